"""Preloaded by multiprocessing's fork servers, which run no other code of ours: ends one with
the process that started it.
"""

from flame_composer.processes import end_with_fork_server_owner

end_with_fork_server_owner()
