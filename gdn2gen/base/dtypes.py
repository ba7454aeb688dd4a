"""The dtypes of tensors, by the names that problems use, and what others call them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple


class Dtype(NamedTuple):
    """Its bytes an element, and its names elsewhere."""

    nbytes: int
    full_name: str
    """In torch and TileLang, and after `tl.` in Triton."""
    triton_name: str
    """In the signature of a Triton kernel, where a `*` before it makes a pointer."""


DTYPE: Final[Mapping[str, Dtype]] = MappingProxyType(
    {
        "bf16": Dtype(2, "bfloat16", "bf16"),
        "fp16": Dtype(2, "float16", "fp16"),
        "fp32": Dtype(4, "float32", "fp32"),
        "int32": Dtype(4, "int32", "i32"),
        "int64": Dtype(8, "int64", "i64"),
        "uint8": Dtype(1, "uint8", "u8"),
    }
)
