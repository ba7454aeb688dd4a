"""The forward in one kernel (`scripts/one_forward`): arithmetic, barriers, what it takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch
from cluster_standin import run_all
from script_module import load_script
from source_tree import ROOT

from gdn2gen.family import reference
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.registry import recurrence_named
from gdn2gen.measure.accuracy import relative_errors

SEGMENT: Final = 2
SCALE: Final = 128**-0.5


@pytest.fixture(scope="module")
def program(monkeypatch_module: pytest.MonkeyPatch) -> object:
    monkeypatch_module.syspath_prepend(str(ROOT / "scripts"))
    from one_forward import program as found

    return found


@pytest.fixture(scope="module")
def monkeypatch_module() -> object:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def carried_out(program: object, op: str, T: int, pattern: str) -> dict[str, float]:
    """Errors of o and the state, of those that are kept, and of rows of zeros past the end."""
    x = make_inputs(
        1, T, 1, 128, 128, op=op, dtype=torch.bfloat16, pattern=pattern, initial_state=True
    )
    gates = {"b": x["beta"], "w": x["v"]} if op == "kda" else {}
    chunks = -(-T // 32)
    half = {"dtype": torch.bfloat16}
    written = {
        "o": torch.full((1, T, 1, 128), torch.nan, **half),
        "final_state": torch.full((1, 1, 128, 128), torch.nan),
        "q_rstd": torch.full((chunks, 1, 32), torch.nan),
        "k_rstd": torch.full((chunks, 1, 32), torch.nan),
        "A": torch.full((chunks, 1, 32, 32), torch.nan, **half),
        "Aqk": torch.full((chunks, 1, 32, 32), torch.nan, **half),
        "S_seg": torch.full((1, 1, -(-chunks // SEGMENT), 128, 128), torch.nan),
    }
    sizes = {"B": 1, "T": T, "H": 1, "NT": chunks, "NS": -(-chunks // SEGMENT)}
    found = run_all(program, x | gates | written, sizes, SCALE, SEGMENT, op=op, starts=True)
    exact = {name: value.double() for name, value in x.items()}

    def until(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = {n: v if n == "initial_state" else v[:, :tokens] for n, v in exact.items()}
        return reference.recurrent(
            recurrence_named(op),
            given,
            use_qk_l2norm_in_kernel=True,
            compute_dtype=torch.float64,
        )

    o, state = until(T)
    starts = [until(i)[1] for i in range(0, T, 32 * SEGMENT)]
    expected = {
        "o": o,
        "final_state": state,
        "S_seg": torch.stack(starts, 2).transpose(-1, -2),
        "k_rstd": _rstd(exact["k"]),
        "q_rstd": _rstd(exact["q"]),
    }
    assert all(found[name].isfinite().all() for name in written)
    return relative_errors(found, expected)


def _rstd(x: torch.Tensor) -> torch.Tensor:
    """Of one head, by chunk; a token past the end is zero."""
    T = x.shape[1]
    padded = torch.nn.functional.pad(x[0, :, 0], (0, 0, 0, -T % 32))
    return torch.rsqrt(padded.square().sum(-1) + 1e-6).reshape(-1, 1, 32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # factors out of the first frame
@pytest.mark.parametrize(
    ("op", "T", "pattern"),
    [("gdn2", 7, "layer"), ("gdn2", 140, "mixed"), ("kda", 40, "strong")],
)
def test_results_and_barriers(program: object, op: str, T: int, pattern: str) -> None:
    """Five chunks take each slot once, and one twice; every wait ends, and none too early."""
    errors = carried_out(program, op, T, pattern)
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.slow
def test_what_it_takes(tmp_path: Path) -> None:
    """Hardly a register is spilled, and a program fits into 227 KB with 1 KB for its barriers."""
    pytest.importorskip("tilelang")
    command = [sys.executable, "scripts/one_forward_time.py", "--compile", ""]
    fresh = os.environ | {"TILELANG_CACHE_DIR": str(tmp_path)}  # what is kept passes no compiler
    said = subprocess.run(
        command, cwd=ROOT, env=fresh, capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"\((\d+), (\d+)\), (\d+) B", said)
    assert found is not None, said
    registers, stack, shared = map(int, found.groups())
    assert registers <= 168 and stack <= 32 and shared <= 226 * 1024, said


def test_options_are_read_as_they_were_written() -> None:
    script = load_script("one_forward_time")
    for options in (*script.VARIANTS.values(), script.STARTS):
        assert script.read(script.written(options)) == dict(options)
