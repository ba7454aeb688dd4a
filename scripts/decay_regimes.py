"""What decays a model's gates have, and what a pass takes under them.

    python scripts/decay_regimes.py                       # patterns on file, shares alone: no GPU
    python scripts/decay_regimes.py --time train4k        # and times of GDN-2's and KDA's passes
    python scripts/decay_regimes.py PATTERN.json layer strong [--time 4x4096x16] [--vs fla]

Kernels score the pairs of a chunk at one anchor where every channel of a slice keeps at least 2^-96
over the chunk, and take frame by frame what lost more. Of each pattern: how many channels of a
chunk of 32 tokens lose more, how many chunks of a head have such a channel, and how many frames
they take, of the channel with most. GDN2GEN_EXPECTED_DECAY=strong has the passes run what is tuned
for strong decay.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # also from a source tree that is not installed

import torch  # noqa: E402
from stage_times import one_shape  # noqa: E402
from torch import Tensor  # noqa: E402

from gdn2gen.base.device import present_device  # noqa: E402
from gdn2gen.base.environment import verifying  # noqa: E402
from gdn2gen.base.errors import Gdn2genError, InputError  # noqa: E402
from gdn2gen.family.decays import DecayPattern  # noqa: E402
from gdn2gen.family.inputs import PATTERNS, make_inputs  # noqa: E402
from gdn2gen.family.problem import Problem, check_head_dim  # noqa: E402
from gdn2gen.family.shapes import Shape  # noqa: E402
from gdn2gen.kernels.anchors import anchor_range  # noqa: E402
from gdn2gen.measure.accuracy import inputs_of, op_flags, output_gradients, public_op  # noqa: E402
from gdn2gen.measure.peers import fla_op  # noqa: E402
from gdn2gen.measure.timing import time_ms  # noqa: E402

GATES: Final = ROOT / "docs/learning/gates"
OPS: Final = ("gdn2", "kda")
CHUNK: Final = 32
RANGE: Final = float(anchor_range(Problem(), "grad_key"))


def shares(pattern: str | DecayPattern, K: int) -> tuple[float, float, float, int]:
    """Channels of a chunk that lose more than RANGE, chunks with one, mean and most frames."""
    g = make_inputs(4, 1024, 16, K, 16, pattern=pattern)["g"]
    chunks = (g.double() / math.log(2.0)).reshape(g.shape[0], -1, CHUNK, *g.shape[2:])
    G = chunks.cumsum(2)
    strong = G[:, :, -1] < -RANGE
    counted = frames(G).double()
    return (
        float(strong.double().mean()),
        float(strong.any(-1).double().mean()),
        float(counted.mean()),
        int(counted.amax()),
    )


def frames(G: Tensor) -> Tensor:
    """How often kernels move the anchors of a chunk: `next_frame` of the generated ones.

    G [B, chunks, tokens, heads, K] in log2; counts are [B, chunks, heads].
    """
    anchor, least = torch.full_like(G[:, :, 0], 2 * RANGE), G[:, :, -1]
    counted = torch.zeros(anchor.shape[:-1], dtype=torch.int64)
    while (left := (anchor - least).amax(-1) > RANGE).any():
        below = torch.where((anchor - RANGE)[:, :, None] > G, G, -math.inf)
        anchor = torch.where(left[..., None], below.amax(2), anchor)
        counted += left
    return counted


def passes(op: str, shape: Shape, pattern: str | DecayPattern, K: int, theirs: bool) -> list[str]:
    """Times of a forward, and of forward and backward, lean and fast; FLA's beside them."""
    problem = Problem(op=op, K=K, V=K)
    inputs = inputs_of(problem, shape, pattern, 0, "cuda")
    do = output_gradients(problem, shape, 0, "cuda")["o"]
    leaves = {x: y.detach().requires_grad_() for x, y in inputs.items()}
    flags = op_flags(problem)
    ours = [partial(public_op(op), **flags, disable_recompute=x) for x in (False, True)]
    found = []
    for function in [*ours, *([_fla(op)] if theirs else [])]:

        def both(run: Any = function) -> object:
            return torch.autograd.grad(run(**leaves)[0], [*leaves.values()], do)

        with torch.no_grad():
            forward = time_ms(partial(function, **inputs)).median
        found.append(f"{forward:.3f} / {time_ms(both).median:.3f}")
    return found


def _fla(op: str) -> Any:
    return partial(fla_op(op, "lean"), use_qk_l2norm_in_kernel=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", help="files, or names of patterns (those on file)")
    parser.add_argument("--time", metavar="SHAPE", help="also time passes, on the GPU")
    parser.add_argument("--op", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--vs", choices=("fla",), help="beside this peer")
    args = parser.parse_args(words)
    try:
        run(args)
    except (Gdn2genError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    return 0


def run(args: argparse.Namespace) -> None:
    """Print what was asked for; raises before that for what cannot be drawn or timed."""
    check_head_dim("K", args.head_dim)
    given = args.patterns or [
        *("layer", "strong"),
        *(str(x) for op in OPS for x in sorted(GATES.glob(f"*-{op}.json"))),
    ]
    patterns = {x: DecayPattern.load(x) if x.endswith(".json") else x for x in given}
    unknown = [x for x in patterns.values() if isinstance(x, str) and x not in PATTERNS]
    if unknown:
        raise InputError(
            f"a pattern is a file PATTERN.json or one of {', '.join(PATTERNS)}, not {unknown[0]!r}"
        )
    shape = None if args.time is None else one_shape(args.time)
    if shape is not None:
        present_device()
    elif args.vs:
        raise InputError("--vs is of --time SHAPE, which was not given")
    if args.vs:
        for op in args.op:
            _fla(op)
    for word, pattern in patterns.items():
        channels, chunks, mean, most = shares(pattern, args.head_dim)
        print(
            f"{Path(word).stem}: {channels:.1%} of channels lose more than 2^-{RANGE:g} over "
            f"{CHUNK} tokens, {chunks:.1%} of chunks have one; {mean:.1f} frames, at most {most}",
            flush=True,
        )
        if shape is not None:
            with verifying():
                for op in args.op:
                    times = passes(op, shape, pattern, args.head_dim, args.vs == "fla")
                    print(f"  {op}: lean, fast{', FLA' * bool(args.vs)}: {', '.join(times)}")


if __name__ == "__main__":
    sys.exit(main())
