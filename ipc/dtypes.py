"""The element types of the safetensors format: width on disk, and the torch type that views them, if there is one.

Source: the ``Dtype`` enumeration of safetensors 0.8 (F4 and the two F6 are packed, so a tensor's bits, not its
elements, must come to whole bytes).
"""

from __future__ import annotations

from typing import NamedTuple


class DType(NamedTuple):
    """One element type: ``bits`` an element takes on disk; ``torch`` the attribute of the torch module, or None."""

    bits: int
    torch: str | None


DTYPES: dict[str, DType] = {
    "BOOL": DType(8, "bool"),
    "U8": DType(8, "uint8"),
    "I8": DType(8, "int8"),
    "U16": DType(16, "uint16"),
    "I16": DType(16, "int16"),
    "U32": DType(32, "uint32"),
    "I32": DType(32, "int32"),
    "U64": DType(64, "uint64"),
    "I64": DType(64, "int64"),
    "F16": DType(16, "float16"),
    "BF16": DType(16, "bfloat16"),
    "F32": DType(32, "float32"),
    "F64": DType(64, "float64"),
    "C64": DType(64, "complex64"),
    "F8_E5M2": DType(8, "float8_e5m2"),
    "F8_E4M3": DType(8, "float8_e4m3fn"),
    "F8_E8M0": DType(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": DType(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": DType(8, "float8_e5m2fnuz"),
    # torch packs two F4 values into one element, so its view has half as many in the last dimension.
    "F4": DType(4, "float4_e2m1fn_x2"),
    "F6_E2M3": DType(6, None),
    "F6_E3M2": DType(6, None),
}
"""Every element type that a safetensors header may name."""
