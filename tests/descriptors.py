"""The files that this process holds open."""

import contextlib
import gc
from pathlib import Path


def descriptors() -> set[tuple[int, str]]:
    """Number and target of each; those of objects that nobody holds any more are closed first.

    Compare with `<=`: something else of the process, such as a server of an earlier test, may still be closing its own.
    """
    gc.collect()
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since it was listed, as the listing itself
            found.add((int(entry.name), str(entry.readlink())))
    return found
