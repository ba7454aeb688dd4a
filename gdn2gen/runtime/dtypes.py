"""torch's dtypes by the names that problems use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

from gdn2gen.base.dtypes import DTYPE

TORCH_DTYPE: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {name: getattr(torch, dtype.full_name) for name, dtype in DTYPE.items()}
)
DTYPE_NAME: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {dtype: name for name, dtype in TORCH_DTYPE.items()}
)
