"""Keeps compiled programs on disk, so that later processes need not compile them."""

import jax
from jax.experimental.compilation_cache import compilation_cache

from dimat_jax.data._cache import user_cache

__all__ = ["keep_compiled"]

# The seconds of compilation from which on a program is kept.
_SECONDS = 0.1


def keep_compiled() -> None:
    """Keeps the programs that this process compiles from now on, for later processes.

    The folder is in `user_cache`. If JAX has been told of a folder already, that one is
    used, and nothing changes.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
    # A process that has compiled something before would go on without the folder.
    compilation_cache.reset_cache()
