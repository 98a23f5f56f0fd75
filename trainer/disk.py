"""What a full disk looks like through the libraries that write: a plain OSError only of those in Python."""

from __future__ import annotations

import errno
import os
import re

from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)


def full_disk(error: BaseException | None) -> OSError | None:
    """The OSError of a disk or quota that is full, if that is what an exception is about, or what it was raised over; else None.

    torch's writer says "unexpected pos" over the OSError of the file it was given, safetensors has the number in its words alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
        if found and int(found[1]) in FULL:
            return OSError(int(found[1]), os.strerror(int(found[1])))
        error = error.__cause__ or error.__context__
    return None
