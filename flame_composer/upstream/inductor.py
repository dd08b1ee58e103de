"""The compiler of torch 2.7.0, and where it keeps what it has compiled."""

from __future__ import annotations

import os

from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from flame_composer.storage.folders import private_folder


def compile_in_private() -> None:
    """Make torch keep compiled code in this user's private folder.

    A TORCHINDUCTOR_CACHE_DIR that the user has set is left as it is.

    Upstream: torch 2.7.0, `torch._inductor.runtime.cache_dir_utils.default_cache_dir`.
    Mends: torch runs the code it finds in its cache, and the default is a folder of TMPDIR with a
    predictable name, which another user may have created.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(private_folder() / "torchinductor")
