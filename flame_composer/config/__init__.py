"""What every script is run with: keys, defaults and rules, and how a command line becomes a
checked configuration.
"""
