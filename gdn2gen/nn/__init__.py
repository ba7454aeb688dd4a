"""Layers on the public ops, in place of flash-linear-attention's: the same parameters.

cache           Cache: states and tails of sequences, for decoding
convolution     ShortConvolution, with SiLU
norm            GatedRMSNorm
projections     Projected: of the same tokens, their gradients added up in the products
layer           what all layers share
mixer           what those with q, k and v share
gdn2            GatedDeltaNet2
kda             KimiDeltaAttention
gated_deltanet  GatedDeltaNet
deltanet        DeltaNet
gla             GatedLinearAttention
mamba2          Mamba2
mamba3          Mamba3
attention       SlidingWindowAttention, by torch's own
model           LanguageModel: blocks of these
observatory     Observatory: what becomes of gradients, states and decays in training
"""

from gdn2gen.nn.attention import SlidingWindowAttention
from gdn2gen.nn.cache import Cache
from gdn2gen.nn.convolution import ShortConvolution
from gdn2gen.nn.deltanet import DeltaNet
from gdn2gen.nn.gated_deltanet import GatedDeltaNet
from gdn2gen.nn.gdn2 import GatedDeltaNet2
from gdn2gen.nn.gla import GatedLinearAttention
from gdn2gen.nn.kda import KimiDeltaAttention
from gdn2gen.nn.mamba2 import Mamba2
from gdn2gen.nn.mamba3 import Mamba3
from gdn2gen.nn.model import LanguageModel
from gdn2gen.nn.norm import GatedRMSNorm
from gdn2gen.nn.observatory import Observatory, Sighting

__all__ = [
    "Cache",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedLinearAttention",
    "GatedRMSNorm",
    "KimiDeltaAttention",
    "LanguageModel",
    "Mamba2",
    "Mamba3",
    "Observatory",
    "ShortConvolution",
    "Sighting",
    "SlidingWindowAttention",
]
