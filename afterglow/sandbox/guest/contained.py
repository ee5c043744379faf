"""The first program of a container: the agent, with the packages imported ahead and the system calls filtered.

The container is the wall here (see `sandbox/docker.py`): it has its namespaces, mounts and limits before this starts.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import NoReturn

from . import agent, wall, warm

FONTS = "/opt/matplotlib"  # in the image: the list of fonts that matplotlib made when it was built
WRITABLE_FONTS = f"{wall.HOME}/.matplotlib"  # where MPLCONFIGDIR points; in a folder that is read-only it is made anew
# With a PATH all variables of the first program, here and in a pod; those of `native` are in `launch.py`.
VARIABLES = {
    "LANG": "C.UTF-8",
    "HOME": wall.HOME,
    "PYTHONDONTWRITEBYTECODE": "1",
    "MPLBACKEND": "agg",
    "MPLCONFIGDIR": WRITABLE_FONTS,
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}


def main(folder: str = wall.WORK) -> NoReturn:
    """Serve one session over stdin and stdout."""
    try:
        server = os.dup(0), os.dup(1)
        wall.keep_only(*server)  # what a package prints must not reach the server
        with suppress(OSError):
            shutil.copytree(FONTS, WRITABLE_FONTS)
        warm.preload()
        wall.restrict_calls()
        agent.run(*server, folder, before_worker=lambda: wall.restrict_calls(worker=True))
    finally:
        os._exit(0)
