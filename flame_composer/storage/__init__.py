"""Files and object stores by the same functions, folders that appear whole or not at all, locks."""
