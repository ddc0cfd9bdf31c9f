"""Host memory by its address, for what native code reads and writes."""

from __future__ import annotations

import ctypes
import mmap
import os


def address_of(buffer: mmap.mmap | memoryview) -> int:
    """Where a writable buffer lies."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class RawMapping:
    """Memory of a descriptor, shared, at ``address`` until ``close``.

    Mapped without Python: of a read-only mapping it tells no address, and it unmaps late.
    """

    def __init__(self, fd: int, nbytes: int, *, writable: bool = False) -> None:
        """Raises OSError."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        address = self._libc.mmap(None, nbytes, protection, mmap.MAP_SHARED, fd, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"cannot map {nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        self.address: int = address
        self.nbytes = nbytes

    def close(self) -> None:
        """Unmap it. Once."""
        self._libc.munmap(self.address, self.nbytes)
