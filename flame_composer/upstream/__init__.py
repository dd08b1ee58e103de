"""Every patch of a third party's private parts: its version, what it mends, when it can go."""
