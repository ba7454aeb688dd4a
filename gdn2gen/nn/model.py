"""A small language model of the family's layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gdn2gen.base.errors import InputError
from gdn2gen.nn._loss import cross_entropy
from gdn2gen.nn._stream import Norm, ResidualNorm, swiglu
from gdn2gen.nn.attention import SlidingWindowAttention
from gdn2gen.nn.cache import Cache, LayerCache
from gdn2gen.nn.deltanet import DeltaNet
from gdn2gen.nn.gated_deltanet import GatedDeltaNet
from gdn2gen.nn.gdn2 import GatedDeltaNet2
from gdn2gen.nn.gla import GatedLinearAttention
from gdn2gen.nn.kda import KimiDeltaAttention
from gdn2gen.nn.layer import Layer
from gdn2gen.nn.mamba2 import Mamba2
from gdn2gen.nn.mamba3 import Mamba3
from gdn2gen.nn.projections import Projected

MIXERS: Final[Mapping[str, Callable[..., Layer]]] = {
    "gdn2": GatedDeltaNet2,
    "kda": KimiDeltaAttention,
    "gated_delta_rule": GatedDeltaNet,
    "delta_rule": DeltaNet,
    "gla": GatedLinearAttention,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
}


class SwiGLU(nn.Module):
    """y = (silu(x W_gate) * (x W_up)) W_down, with so many channels in between."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = Projected(x, [self.gate_proj, self.up_proj])
        gate, up = tokens.by(self.gate_proj), tokens.by(self.up_proj)
        y: Tensor = self.down_proj(swiglu(gate, up))
        return y


class Block(nn.Module):
    """x + mixer(norm(x)), then the same with a SwiGLU."""

    def __init__(self, mixer: nn.Module, hidden_size: int, inner: int, norm_eps: float) -> None:
        super().__init__()
        self.mixer_norm = ResidualNorm(hidden_size, eps=norm_eps)
        self.mixer = mixer
        self.mlp_norm = ResidualNorm(hidden_size, eps=norm_eps)
        self.mlp = SwiGLU(hidden_size, inner)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        """x [B, T, hidden]; `given` goes to the mixer."""
        x, normed = self.mixer_norm(x)
        x, normed = self.mlp_norm(x, self.mixer(normed, **given))
        y: Tensor = x + self.mlp(normed)
        return y


class LanguageModel(nn.Module):
    """Token embeddings, blocks of a mixer and a SwiGLU, RMSNorm, and the embeddings' transpose.

    Args:
        vocab_size: tokens that there are.
        hidden_size: channels between blocks.
        num_layers: blocks.
        mixer: "gdn2", "kda", "gated_delta_rule", "delta_rule", "gla", "mamba2" or "mamba3"; or what
            makes a layer of one's own, called as those are, whose forward takes x and `cache`.
        window: if given, every other block (the second, the fourth ..) has attention over so many
            tokens instead of the mixer, as the hybrid of arXiv 2605.22791.
        attention_heads: of those blocks; if None the mixer's `num_heads`, or 16 where it has none.
        inner: channels within a SwiGLU; if None 8/3 of hidden_size, up to a multiple of 64.
        norm_eps: of all norms.
        init_std: embeddings and projections are drawn from a normal distribution of this width;
            those that write into the sum of blocks, of 1 / sqrt(2 num_layers) of it.
        checkpoint_activations: keep the inputs of blocks alone, and compute the rest again in the
            backward.
        mixer_options: what else the mixer takes: num_heads, head_dim, state_size ...

    Raises:
        InputError: sizes that do not go together, an unknown mixer.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        hidden_size: int = 2048,
        num_layers: int = 24,
        mixer: str | Callable[..., nn.Module] = "gdn2",
        window: int | None = None,
        attention_heads: int | None = None,
        inner: int | None = None,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        checkpoint_activations: bool = False,
        **mixer_options: Any,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_layers": num_layers}
        for name, size in (*sizes.items(), ("inner", inner)):
            if size is not None and size < 1:
                raise InputError(f"{name} must be at least 1, but got {size}")
        if not callable(mixer) and mixer not in MIXERS:
            known = ", ".join(map(repr, MIXERS))
            raise InputError(f"mixer must be one of {known}, but got {mixer!r}")
        make: Callable[..., nn.Module] = mixer if callable(mixer) else MIXERS[mixer]
        self.vocab_size = vocab_size
        self.init_std = init_std
        self.checkpoint_activations = checkpoint_activations
        inner = -(-8 * hidden_size // (3 * 64)) * 64 if inner is None else inner
        self.embeddings = nn.Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList()
        for index in range(num_layers):
            part: nn.Module
            if window is not None and index % 2 == 1:
                heads = mixer_options.get("num_heads", 16)
                heads = heads if attention_heads is None else attention_heads
                part = SlidingWindowAttention(
                    hidden_size, num_heads=heads, window=window, layer_idx=index
                )
            else:
                part = make(hidden_size, layer_idx=index, norm_eps=norm_eps, **mixer_options)
            self.blocks.append(Block(part, hidden_size, inner, norm_eps))
        self.norm = Norm(hidden_size, eps=norm_eps)
        self._draw_projections()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as after `to_empty` of a model made on the device "meta"."""
        for module in self.modules():
            draw = getattr(module, "reset_parameters", None)
            if module is not self and draw is not None:
                draw()
        self._draw_projections()

    def _draw_projections(self) -> None:
        """Norms, convolutions and rates stay as their layers draw them."""
        nn.init.normal_(self.embeddings.weight, std=self.init_std)
        narrow = (2 * len(self.blocks)) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_sum = name.endswith(("o_proj", "out_proj", "down_proj"))
                nn.init.normal_(module.weight, std=self.init_std * (narrow if into_sum else 1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, *, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Logits of what follows each token, or the mean loss.

        Args:
            tokens: [B, T] int64.
            targets: [B, T] int64, the token that follows each; -100 where it does not count.
            cache: what earlier tokens of the same sequences left.

        Returns:
            Logits [B, T, vocab_size], or with `targets` their mean cross-entropy, in fp32.

        Raises:
            InputError: wrong shapes, or a cache of another batch size.
        """
        if tokens.dim() != 2 or (targets is not None and targets.shape != tokens.shape):
            shape = None if targets is None else tuple(targets.shape)
            raise InputError(
                f"tokens and targets must be [B, T], but got {tuple(tokens.shape)} and {shape}"
            )
        x = self._hidden(tokens, cache)
        if targets is None:
            return self._logits(x)
        return cross_entropy(self.norm(x), self.embeddings.weight, targets)

    def _hidden(self, tokens: Tensor, cache: Cache | None) -> Tensor:
        x: Tensor = self.embeddings(tokens)
        again = self.checkpoint_activations and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            if again:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache=None if cache is None else _part(cache, block))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return functional.linear(self.norm(x), self.embeddings.weight)

    def _after(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Logits [B, vocabulary] after these tokens, in fp32: no others are wanted of a prompt."""
        return self._logits(self._hidden(tokens, cache)[:, -1]).float()

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        graph: bool = False,
    ) -> Tensor:
        """Follow each of the sequences with `count` tokens, one after another.

        Args:
            tokens: [B, T] int64 with T >= 1, of one length.
            count: how many to add.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it, and a
                token is drawn.
            generator: what to draw with.
            graph: on a GPU, replay what computes a token as a CUDA graph from the third one on: the
                same tokens, without a host's time for each kernel (of 1.3 billion parameters, one
                sequence, 2.7 ms a token for 40 on an H200). Mixers of one's own must be such as may
                be captured, and keep what they keep where it lies.

        Returns:
            [B, T + count].

        Raises:
            InputError: no token to begin with, or negative numbers.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise InputError(f"tokens must be [B, T] with T >= 1, but got {tuple(tokens.shape)}")
        if count < 0 or not temperature >= 0:
            raise InputError(
                f"count and temperature must not be negative, but got {count} and {temperature}"
            )
        cache, found = Cache(tokens.shape[0]), [tokens]
        step: Callable[[Tensor], Tensor] = partial(self._after, cache=cache)
        for number in range(count):
            # by then kernels are chosen, and all that a cache keeps has its place
            if graph and tokens.is_cuda and number == 2:
                step = _replayed(step, found[-1])
            last = step(found[-1])
            if temperature == 0:
                found.append(last.argmax(-1, keepdim=True))
            else:
                # However low it is, the likeliest stays at 0.
                last = last - last.amax(-1, keepdim=True)
                chances = (last / temperature).softmax(-1)
                found.append(torch.multinomial(chances, 1, generator=generator))
        return torch.cat(found, 1)


def _replayed(step: Callable[[Tensor], Tensor], token: Tensor) -> Callable[[Tensor], Tensor]:
    """A step as a CUDA graph, in which it reads and writes where it does now."""
    given, graph = token.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step(given)

    def replay(token: Tensor) -> Tensor:
        given.copy_(token)
        graph.replay()
        return made

    return replay


def _part(cache: Cache, block: nn.Module) -> Cache | LayerCache:
    """What a block takes: its own part, so that blocks which are compiled one by one share a graph.
    Where all of a model is one graph, and for a layer of one's own, the whole."""
    mixer = getattr(block, "mixer", None)
    if torch.compiler.is_compiling() or not isinstance(mixer, Layer | SlidingWindowAttention):
        return cache
    return cache if mixer.layer_idx is None else cache.part(mixer.layer_idx)
