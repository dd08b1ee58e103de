"""A module that fork servers preload to end with the process that started them.

multiprocessing's fork servers run no other code of ours.
"""

from flame_composer.processes import end_with_fork_server_owner

end_with_fork_server_owner()
