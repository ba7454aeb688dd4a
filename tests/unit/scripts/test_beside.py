"""The script that runs passes on several streams: what it refuses, and what its graphs read."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from script_module import load_script

from gdn2gen.base.errors import DeviceError
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape


@pytest.fixture(scope="module")
def script() -> Any:
    load_script("stage_times")
    return load_script("beside")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing", "64x256x2"], "op must be one of"),
        (["gdn2:x", "64x256x2"], "K or K,V such as"),
        (["gdn2:7", "64x256x2"], "head dim K=7 has no kernels"),
        (["gdn2", "many"], "unknown shape 'many'"),
        (["gdn2", "train4k,train2k"], "one shape"),
        (["gdn2", "varlen8k"], "no packed batch"),
        (["gdn2", "64x256x2", "--streams", "0"], "--streams must be 1 at least"),
        (["gdn2", "64x256x2", "--seconds", "nan"], "--seconds above 0"),
        (["gdn2", "64x256x2"], "no GPU is present"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(
    words: list[str],
    message: str,
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def none() -> None:
        raise DeviceError("no GPU is present")

    monkeypatch.setattr(script, "present_device", none)
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out


def test_what_a_graph_reads_is_kept(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read at every replay, and nobody else has it."""
    made: list[weakref.ref[torch.Tensor]] = []

    def drawn(*_: object) -> dict[str, torch.Tensor]:
        x = torch.zeros(2)
        made.append(weakref.ref(x))
        return {"o": x}

    monkeypatch.setattr(script, "inputs_of", drawn)
    monkeypatch.setattr(script, "output_gradients", drawn)
    monkeypatch.setattr(script, "run_op", lambda *_: {"o": torch.zeros(2)})
    cuda = {"Stream": SimpleNamespace, "CUDAGraph": SimpleNamespace, "synchronize": lambda: None}
    for name in ("stream", "graph"):
        cuda[name] = lambda *_, **__: nullcontext()
    for name, x in cuda.items():
        monkeypatch.setattr(torch.cuda, name, x)
    lane = script.Lane(Problem(), Shape("1x64x1", 1, 64, 1), "lean", 0)
    gc.collect()
    assert [x() is None for x in made] == [False, False], lane
