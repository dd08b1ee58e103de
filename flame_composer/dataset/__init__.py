"""The dataset on disk: how documents become packed rows in shards, and how it is read, checked
and described.
"""
