"""The C library's allocator while a model is loaded."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # what glibc's own threshold grows to once tensors of that size were freed


@contextmanager
def returned_when_freed(threshold: int = 2**20) -> Iterator[None]:
    """Have glibc give tensors of `threshold` bytes and more back to the system as soon as they are freed.

    By itself it keeps freed blocks of up to 32 MB for later, and loading a model frees every weight of it at least once:
    in a measured case that was as much as the model again. Afterwards it keeps them, as training wants. Other C libraries
    are left alone.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, threshold)
    try:
        yield
    finally:
        library.malloc_trim(ctypes.c_size_t(0))
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD)
