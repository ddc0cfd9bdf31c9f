"""Casts: numbers from one dtype to another on their way into a segment, rounded as torch rounds.

To nearest, ties to even, overflow to infinity; through float32 where neither type is it, as torch goes (``c10``'s
``convert`` of its 16-bit and 8-bit types). A NaN stays a NaN; which of them is not said, as torch's own kernels differ.
Blocks that are cast pass through memory of their own, a bounce buffer's worth at most.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from weightd.ipc.dtypes import DTYPES

if TYPE_CHECKING:
    from typing import Any

    import numpy
    from numpy.typing import NDArray

SOURCES = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
TARGETS = frozenset({"F32", "F16", "BF16"})


class Cast(NamedTuple):
    """From one dtype of ``SOURCES`` to one of ``TARGETS``, as safetensors names them."""

    source: str
    target: str

    def scaled(self, nbytes: int) -> int:
        """Bytes that so many bytes of whole elements become."""
        return nbytes * DTYPES[self.target].bits // DTYPES[self.source].bits

    def convert(self, data: NDArray[numpy.uint8]) -> NDArray[numpy.uint8]:
        """Elements as bytes, contiguous in the last dimension, as the bytes of what they become. Drops the GIL."""
        import numpy

        # numpy would keep the order of a block whose rows are a broadcast, or lie within one another.
        data = numpy.ascontiguousarray(data)
        if self.target == "BF16":
            return _to_bfloat16(_to_float32(data, self.source)).view(numpy.uint8)
        kind: Any = numpy.float16 if self.target == "F16" else numpy.float32
        with numpy.errstate(over="ignore", invalid="ignore"):
            return _to_float32(data, self.source).astype(kind, copy=False).view(numpy.uint8)


def _to_float32(data: NDArray[numpy.uint8], dtype: str) -> NDArray[numpy.float32]:
    import numpy

    if dtype == "F32":
        return data.view(numpy.float32)
    if dtype in ("F64", "F16"):
        with numpy.errstate(over="ignore", invalid="ignore"):
            return data.view(numpy.float64 if dtype == "F64" else numpy.float16).astype(numpy.float32)
    if dtype == "BF16":
        return (data.view(numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
    return _eight_bits(dtype)[data]


def _to_bfloat16(values: NDArray[numpy.float32]) -> NDArray[numpy.uint16]:
    import numpy

    bits = values.view(numpy.uint32)
    # Half of what is cut off, less one where what stays is even: the carry rounds.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
    rounded[numpy.isnan(values)] = 0x7FC0
    return rounded


def _eight_bits(dtype: str) -> NDArray[numpy.float32]:
    """What each of the 256 bytes stands for (OCP 8-bit Floating Point, revision 1.0)."""
    import numpy

    exponent_bits, bias = (4, 7) if dtype == "F8_E4M3" else (5, 15)
    mantissa_bits = 7 - exponent_bits
    byte = numpy.arange(256)
    exponent = (byte >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (byte & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    values = numpy.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    if dtype == "F8_E4M3":
        values[(byte & 0x7F) == 0x7F] = numpy.nan
    else:
        values[exponent == 31] = numpy.where(mantissa[exponent == 31] == 0, numpy.inf, numpy.nan)
    return numpy.where(byte & 0x80, -values, values).astype(numpy.float32)
