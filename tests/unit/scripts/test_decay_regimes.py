"""The script on decays of trained gates: what it counts and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from script_module import load_script

from gdn2gen.base.errors import DeviceError


@pytest.fixture(scope="module")
def script() -> Any:
    load_script("stage_times")
    return load_script("decay_regimes")


def test_what_one_anchor_does_not_reach_is_counted(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here of one channel of 128, in every other chunk of the one head."""
    g = torch.zeros(1, 128, 1, 128)
    # 7.2 bits a token, 231 a chunk: anchors lie at its tokens 0, 14 and 28
    g[:, 32:64, :, 5] = g[:, 96:, :, 5] = -5.0
    monkeypatch.setattr(script, "make_inputs", lambda *_, **__: {"g": g})
    assert script.shares("layer", 128) == (1 / 256, 1 / 2, 2.0, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "a pattern is a file PATTERN.json or one of layer"),
        (["layer", "nowhere.json"], "nowhere.json"),
        (["broken.json"], "broken.json is no pattern of decay"),
        (["layer", "--head-dim", "7"], "head dim K=7 has no kernels"),
        (["layer", "--vs", "fla"], "--vs is of --time"),
        (["layer", "--time", "many"], "unknown shape 'many'"),
        (["layer", "--time", "varlen8k"], "no packed batch"),
        (["layer", "--time", "train4k"], "no GPU is present"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    words: list[str],
    message: str,
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def none() -> None:
        raise DeviceError("no GPU is present")

    monkeypatch.setattr(script, "present_device", none)
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        script.main(words)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not said.out
