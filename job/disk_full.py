"""A full disk, by whatever exception it comes: libraries in C, C++ and Rust raise their own."""

import errno
import os
import re

_NUMBERS = (errno.ENOSPC, errno.EDQUOT)
_TEXTS = [re.escape(text) for number in _NUMBERS for text in (os.strerror(number), f"os error {number})")]
_SHORT_WRITE = r"^\d+ requested and \d+ written$"  # numpy doesn't say why, but a file system cuts writes for no other
_PATTERN = re.compile("|".join([*_TEXTS, _SHORT_WRITE]))


def is_disk_full(error: BaseException) -> bool:
    """Say whether an exception, or one that it came from, means that a disk or quota is full."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _NUMBERS:
            return True
        if _PATTERN.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
