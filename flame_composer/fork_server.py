"""A module that runs code when it is imported: it ties a fork server to its owner.

The fork servers of multiprocessing preload it, which is the only way to run code of ours in them.
They then end with the process that started them.
"""

from flame_composer.processes import end_with_fork_server_owner

end_with_fork_server_owner()
