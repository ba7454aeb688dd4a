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
    for name in ("convolution", "norm", "gate"):
        monkeypatch.setattr(layer_time, name, lambda *_: None)
    monkeypatch.setattr(layer_time, "tokens", lambda *_: torch.zeros(1))

    def ours(member: str, _: Any) -> Any:
        asked.append(member)
        for name in layer_time.DIRECTIONS:
            yield layer_time._row(f"layer {member}", name, 2.0)

    def theirs(member: str, _: Any) -> Any:
        asked.append(f"fla {member}")
        return (3.0, None) if member == "gla" else (3.0, 7.0)

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
    assert "| layer gla | forward | 2.0000 | - | - | 3.0000 | 1.50 |" in said
    assert "| layer gla | forward+backward | 2.0000 | - | - | - | - |" in said


def test_in_a_turn_all_is_called_before_anything_is_timed(
    kept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    turn = tmp_path / "turn"
    turn.touch()
    asked = []
    for name in ("convolution", "norm", "gate"):
        monkeypatch.setattr(layer_time, name, lambda *_: None)
    monkeypatch.setattr(layer_time, "tokens", lambda *_: torch.zeros(1))

    def called(member: str, _: Any, peer: bool, lock: Path) -> None:
        assert lock.name == "turn.search" and not Path(f"{turn}.ready").exists()
        asked.append((member, peer))

    def timed(member: str, _: Any) -> Any:
        assert Path(f"{turn}.ready").exists()
        asked.append(member)
        return iter(())

    monkeypatch.setattr(layer_time, "called", called)
    monkeypatch.setattr(layer_time, "layer_rows", timed)
    words = ["", "--only", "layers", "--alone", "--turn", str(turn), "--layers", "gdn2", "gla"]
    monkeypatch.setattr(sys, "argv", words)
    layer_time.main()
    assert asked == [("gdn2", False), ("gla", False), "gdn2", "gla"]


def test_a_table_says_from_when_to_when() -> None:
    """Rows of a later run take the places of their own alone."""
    rows = [
        {**layer_time._row(name, "forward", 1.0), "gpu": "H200", "batch": 4, "tokens": 64}
        | {"machine": {"device": "H200", "date": date, "torch": "2.11.0"}}
        for name, date in (("gated norm", "2026-12-01"), ("layer gdn2", "2026-11-29"))
    ]
    about = "4 x 64 tokens; device H200, date {}, torch 2.11.0"
    assert about.format("2026-11-29 to 2026-12-01") in layer_time.page(rows)
    assert about.format("2026-12-01") in layer_time.page(rows[:1])


def test_both_sides_have_the_same_sizes() -> None:
    """Named for theirs, and of ours by default: GatedDeltaNet's values are twice its keys."""
    for member, theirs in layer_time.OTHERS.items():
        parameters = inspect.signature(layer_time.MIXERS[member]).parameters
        usual = {name: x.default for name, x in parameters.items()}
        ours = usual | layer_time.OURS.get(member, layer_time.SIZES)
        for name in ("num_heads", "head_dim", "expand_v"):
            if name in theirs and not member.startswith("mamba"):
                assert ours[name] == theirs[name], f"{name} of {member}"


class Peer(torch.nn.Module):
    """A layer of theirs, whose backward or forward may not run here."""

    fails = ""

    def __init__(self, hidden_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size))
        self.dt_bias = torch.nn.Parameter(torch.ones(4))
        self.states: list[bool] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.states.append(self.training)
        if self.fails == "forward" or (self.fails and torch.is_grad_enabled()):
            raise NotImplementedError("not on this GPU\nand more")
        return x * self.weight * self.dt_bias.sum(), None


@pytest.mark.parametrize("fails", ["", "backward", "forward"])
def test_what_of_theirs_does_not_run(
    fails: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A forward is kept where the backward is refused."""
    monkeypatch.setattr(Peer, "fails", fails)
    monkeypatch.setattr(layer_time, "their_module", lambda *_: Peer)
    times = iter((1.0, 2.0))

    def ms(run: Any) -> float:
        run()
        return next(times)

    monkeypatch.setattr(layer_time, "ms", ms)
    found = layer_time.their_times("gla", torch.ones(1, layer_time.HIDDEN, requires_grad=True))
    wanted = {"": (1.0, 2.0), "backward": (1.0, None), "forward": (None, None)}
    assert found == wanted[fails]
    assert ("gla: not on this GPU" in capsys.readouterr().err) == bool(fails)


def test_what_of_theirs_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer_time.THEIRS, "gla", ("fla_that_is_not_there", "Layer"))
    assert layer_time.their_times("gla", torch.ones(1)) == (None, None)


@pytest.mark.parametrize("there", [True, False])
def test_their_mamba2_without_causal_conv1d(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which its layer calls in training alone."""
    monkeypatch.setattr(layer_time, "find_spec", lambda _: object() if there else None)
    x = torch.ones(1, layer_time.HIDDEN)
    for member in ("mamba2", "mamba3", "gla"):
        layer = layer_time.their_layer(member, Peer, x)
        assert layer.training == (there or member != "mamba2")
        kept = torch.float32 if member.startswith("mamba") else torch.bfloat16
        assert layer.dt_bias.dtype == kept and layer.weight.dtype == torch.bfloat16
