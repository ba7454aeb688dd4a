"""scripts/layer_time.py: rows are printed and kept as they come; what was known of FLA stays."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from script_module import load_script

layer_time = load_script("layer_time")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    text = tmp_path / "page.md"
    text.write_text("<!-- layers:begin -->\n<!-- layers:end -->\n")
    monkeypatch.setattr(layer_time, "PAGE", text)
    monkeypatch.setattr(layer_time, "RECORDS", tmp_path / "layers")
    monkeypatch.setattr(layer_time, "copy_gbps", lambda: 4000.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    return text


def test_a_row_is_kept_at_once(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = layer_time.Rows(4, 4096, True)

    def measured() -> Any:
        yield layer_time._row("gated norm", "forward", 0.05, 0.17, 0.04)
        assert "| gated norm | forward | 0.0500 | 0.0400 | 1.25 | 0.1700 | 3.40 |" in (
            kept.read_text()
        )
        assert "gated norm  forward  0.0500" in capsys.readouterr().out
        yield layer_time._row("layer gdn2", "forward", 2.0)

    rows.add(measured())
    assert "| layer gdn2 | forward | 2.0000 | - | - | - | - |" in kept.read_text()
    # another run, without FLA's, loses nothing; one with it is later
    rows.add([layer_time._row("layer gdn2", "forward", 2.0, 3.0)])
    layer_time.Rows(4, 4096, True).add([layer_time._row("layer gdn2", "forward", 1.5)])
    layer_time.Rows(8, 64, True).add([layer_time._row("layer gdn2", "forward", 0.5)])
    said = kept.read_text()
    assert "| layer gdn2 | forward | 1.5000 | - | - | 3.0000 | 2.00 |" in said
    assert said.index("4 x 4096 tokens") < said.index("8 x 64 tokens")
    assert said.count("| layer gdn2 | forward |") == 2
    rows.show()
    assert "gated norm" in capsys.readouterr().out


def test_ours_come_first(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of ours, then theirs, until the time is over."""
    asked = []
    for name in ("convolution", "norm"):
        monkeypatch.setattr(layer_time, name, lambda *_: None)
    monkeypatch.setattr(layer_time, "tokens", lambda *_: torch.zeros(1))

    def ours(member: str, _: Any) -> Any:
        asked.append(member)
        for name in layer_time.DIRECTIONS:
            yield layer_time._row(f"layer {member}", name, 2.0)

    def theirs(member: str, _: Any) -> Any:
        asked.append(f"fla {member}")
        return None if member == "gla" else (3.0, 7.0)

    monkeypatch.setattr(layer_time, "layer_rows", ours)
    monkeypatch.setattr(layer_time, "their_times", theirs)
    words = ["", "--only", "layers", "--layers", "gdn2", "gla", "kda", "--save"]
    for more, wanted in (([], ["fla gdn2", "fla gla", "fla kda"]), (["--minutes", "0"], [])):
        asked.clear()
        monkeypatch.setattr(sys, "argv", [*words, *more])
        layer_time.main()
        assert asked == ["gdn2", "gla", "kda", *wanted]
    said = kept.read_text()
    assert "| layer kda | forward+backward | 2.0000 | - | - | 7.0000 | 3.50 |" in said
    assert "| layer gla | forward | 2.0000 | - | - | - | - |" in said


def test_both_sides_have_the_same_sizes() -> None:
    """Named for theirs, and of ours by default: GatedDeltaNet's values are twice its keys."""
    for member, theirs in layer_time.OTHERS.items():
        parameters = inspect.signature(layer_time.MIXERS[member]).parameters
        usual = {name: x.default for name, x in parameters.items()}
        ours = usual | layer_time.OURS.get(member, layer_time.SIZES)
        for name in ("num_heads", "head_dim", "expand_v"):
            if name in theirs and not member.startswith("mamba"):
                assert ours[name] == theirs[name], f"{name} of {member}"
