"""scripts/model_speed.py: rows of both sides on the CPU, and what its tables say of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from script_module import load_script
from torch import Tensor

from gdn2gen.nn import Cache, GatedDeltaNet2

speed = load_script("model_speed")
from learning import models  # noqa: E402


class Theirs(GatedDeltaNet2):
    """Called, and keeping its states, as flash-linear-attention's layers do."""

    def __init__(self, **given: Any) -> None:
        super().__init__(given.pop("hidden_size"), **given)

    def forward(self, x: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        if past_key_values is None:
            return super().forward(x), None, None
        assert use_cache and self.layer_idx is not None
        own = Cache(x.shape[0])
        names = "q_tail", "k_tail", "v_tail"
        if len(past_key_values) > self.layer_idx:
            kept = past_key_values[self.layer_idx]
            tails = dict(zip(names, kept["conv_state"], strict=True))
            own.layers[self.layer_idx] = {"state": kept["recurrent_state"], **tails}
            own = own.copy()
        y = super().forward(x, cache=own)
        left = own.layer(self.layer_idx)
        past_key_values.update(
            layer_idx=self.layer_idx,
            recurrent_state=left["state"],
            conv_state=tuple(left[name] for name in names),
            offset=x.shape[1],
        )
        return y, None, past_key_values


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("a_peer")
    module.GatedDeltaNet2 = Theirs
    monkeypatch.setitem(sys.modules, "a_peer", module)
    monkeypatch.setitem(models._THEIRS, "gdn2", ("a_peer", "GatedDeltaNet2"))


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _args(*words: str) -> Any:
    return speed._arguments(["--small", *words])


def test_the_model_is_of_that_size() -> None:
    """1.28 billion: eleven pairs of blocks, a vocabulary, and the last norm."""
    with torch.device("meta"):
        made = models.build("gdn2", replace(speed.FULL, layers=2), 0)
    kinds = [type(block.mixer).__name__ for block in made.blocks]
    assert kinds == ["GatedDeltaNet2", "SlidingWindowAttention"]
    assert speed.FULL.state == 262_144 and speed.FULL.layers == 22
    pair = models.parameters(made.blocks)
    assert models.parameters(made) - pair == 32_000 * 2048 + 2048
    assert 11 * pair + 32_000 * 2048 + 2048 == 1_282_817_584


def test_both_sides_are_timed(peer: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert speed.main(["--small", "--vs", "fla"]) == 0
    said = capsys.readouterr().out
    for line in ("train 2 x 16, fla:gdn2, eager: ", "decode 2 x 5, gdn2, eager: "):
        assert line in said
    assert said.count("│ FLA's") == said.count("│ ours") == 3


def test_both_sides_are_the_same_model(peer: None) -> None:
    """The same loss at first, and the same tokens by the states that each keeps."""
    args, cpu = _args("--steps", "1"), torch.device("cpu")
    ours, theirs = (speed._train(args, cpu, name, 2, 12)[0] for name in ("gdn2", "fla:gdn2"))
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-5)
    prompt = speed._random(args, cpu, 2, 5)
    found = []
    for name in ("gdn2", "fla:gdn2"):
        model, cache = models.build(name, args.sizes, 0).eval(), Cache(2)
        with torch.no_grad():
            last = prompt
            for _ in range(5):
                logits = model._logits(model._hidden(last, cache)[:, -1])
                last = logits.argmax(-1, keepdim=True)
            found.append(logits)
            whole = model(torch.cat((prompt, last), 1))
        assert whole.isfinite().all()
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_bf16_leaves_the_rates_alone(peer: None) -> None:
    made = [speed.narrowed(models.build(x, speed.SMALL, 0)) for x in ("gdn2", "fla:gdn2")]
    for model in made:
        for name, x in model.named_parameters():
            wide = name.endswith(("A_log", "dt_bias"))
            assert x.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_a_peer_that_raises_costs_its_rows_alone(
    peer: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("not with [this] Triton\nand more")

    monkeypatch.setattr(Theirs, "forward", refuse)
    assert speed.main(["--small", "--vs", "fla"]) == 0
    said = capsys.readouterr().out
    assert "fla:gdn2: RuntimeError: not with [this] Triton\n" in said and "decode 2 x 5" in said
    assert "FLA's" not in said.replace("of FLA's", "") and said.count("│ ours") == 3
    monkeypatch.setattr(GatedDeltaNet2, "forward", refuse)
    with pytest.raises(RuntimeError, match="not with"):  # ours is no row that may be left out
        speed.main(["--small"])


def test_a_peer_that_is_missing_costs_its_rows_alone(capsys: pytest.CaptureFixture[str]) -> None:
    if "fla" in sys.modules:
        pytest.skip("it is there")
    assert speed.main(["--small", "--vs", "fla", "--only", "train"]) == 0
    said = capsys.readouterr().out
    assert "fla:gdn2: UnsupportedError: fla.layers.gdn2.GatedDeltaNet2 cannot be imported" in said
    assert "│ ours" in said and "│ FLA's" not in said


def _row(model: str, ms: float, **more: Any) -> dict[str, Any]:
    return {
        "what": "train", "model": model, "parameters": 7, "batch": 4, "tokens": 16, "ms": ms,
        "launched": "eager", "checkpoint": False, "compiled": False, "peak_gib": 3.0,
        "tokens_per_second": 64e3 / ms, **more,
    }  # fmt: skip


def test_rows_are_kept_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the same thing gives way; a factor compares rows that differ in layers alone."""
    text = tmp_path / "page.md"
    text.write_text("before\n<!-- models:begin -->\n<!-- models:end -->\nafter\n")
    monkeypatch.setattr(speed, "PAGE", text)
    monkeypatch.setattr(speed, "RECORDS", tmp_path / "models")
    speed.save([_row("gdn2", 5.0), _row("fla:gdn2", 9.0)])
    speed.save([_row("gdn2", 4.0), _row("gdn2", 2.0, compiled=True)])
    said = text.read_text()
    assert "| train | 4 x 16 | ours | eager | 4.00 | 16,000 | 2.25 | 3.0 |" in said
    assert "| train | 4 x 16 | ours | eager, compiled | 2.00 | 32,000 | - | 3.0 |" in said
    assert "| train | 4 x 16 | FLA's | eager | 9.00 | 7,111 | 1.00 | 3.0 |" in said
    assert "5.00" not in said and said.startswith("before\n") and said.endswith("after\n")
    assert len(speed.recorded(tmp_path / "models")) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--small", "--save"), "--small is another"), (("--mixer", "mamba2", "--vs", "fla"), "kda")],
)
def test_what_does_not_go_together(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.main(words)
    assert said in capsys.readouterr().err
