"""What is a text and what only stands where one should be."""

from __future__ import annotations

import re
from pathlib import Path

# What spreadsheets and data frames write where there is nothing, and what de-identification leaves of a whole field.
_NOTHING = frozenset("nan none null na n/a #n/a n.a nil <na> nat undefined empty".split())
# Words of a label of two classes, in lower case; UNKNOWN ones are left out of any label.
YES = frozenset({"1", "1.0", "true", "yes", "positive", "present"})
NO = frozenset({"0", "0.0", "false", "no", "negative", "absent"})
UNKNOWN = frozenset({"", "-1", "-1.0", "nan", "none", "null", "na", "n/a", "unknown", "uncertain"})
_LFS = "version https://git-lfs.github.com/spec/"


def no_report(text: str) -> str | None:
    """Why `text` is no report, in the words of `images.REASONS`: empty_text, git_lfs_pointer, no_report (`nan`, `None`,
    `___`, `.` and other marks without a letter or figure); None for a report, however short."""
    bare = text.strip()
    if not bare:
        return "empty_text"
    if bare.startswith(_LFS):
        return "git_lfs_pointer"
    if bare.lower().strip(" .") in _NOTHING or not re.search(r"[^\W_]", bare):
        return "no_report"
    return None


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file's first bytes are Git LFS's stand-in for the file; `git lfs pull` fetches the file itself."""
    return data.startswith(_LFS.encode())


def is_lfs_file(path: Path) -> bool:
    """Whether a file is one. Raises OSError."""
    with open(path, "rb") as file:
        return is_lfs_pointer(file.read(len(_LFS)))
