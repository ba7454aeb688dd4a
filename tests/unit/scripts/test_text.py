"""Text: its corpus, models of as many parameters, and that one learns from bytes on the CPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from script_module import load_script
from source_tree import ROOT

from gdn2gen.base.errors import UnsupportedError
from gdn2gen.base.files import replace_file

text = load_script("text")
from learning import corpus, models  # noqa: E402

FEW = replace(
    text.SMALL, steps=60, rates=(1e-2,), every=30, held_out=8, search=0.05,
    sizes=replace(text.SMALL.sizes, heads=1, expand=1.0),
)  # fmt: skip


def _folder(folder: Path, files: int = 80) -> dict[str, Path]:
    for number in range(files):
        path = folder / f"p{number % 7}/m{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x{number} = {number}\n" * 20)
    (folder / "p1/data.bin").write_bytes(b"no python")
    return {"purelib": folder}


def test_a_corpus_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    one = corpus.collect("cpu", folders=_folder(tmp_path / "here"))
    other = corpus.collect("cpu", folders=_folder(tmp_path / "there"))
    assert one.digest == other.digest and torch.equal(one.train, other.train) and one.files == 80
    said = [bytes(x.tolist()) for x in (one.train, one.held_out)]
    assert all(x.endswith(b"\n\0") for x in said) and b"no python" not in said[0]
    names = [{line.split(b" ")[0] for line in x.replace(b"\0", b"").split(b"\n")} for x in said]
    assert names[0] & names[1] == {b""} and len(names[0] | names[1]) == 81
    assert corpus.collect("cpu", 9000, _folder(tmp_path / "here")).files < 80
    with pytest.raises(ValueError, match="0 Python files are no corpus"):
        corpus.collect("cpu", folders={"purelib": tmp_path / "nothing"})


def test_windows(tmp_path: Path) -> None:
    made = corpus.collect("cpu", folders=_folder(tmp_path))
    tokens, targets = made.windows(5, 16, seed=1)
    assert torch.equal(tokens[:, 1:], targets[:, :-1]) and tokens.dtype == torch.int64
    assert torch.equal(tokens, made.windows(5, 16, seed=1)[0])
    assert not torch.equal(tokens, made.windows(5, 16, seed=2)[0])
    tokens, targets = made.held_out_windows(4, 16)
    assert torch.equal(tokens[0], made.held_out[:16].long())
    assert torch.equal(targets[-1], made.held_out[-17:][1:].long())


@pytest.mark.parametrize("model", models.MIXERS)
def test_models_have_as_many_parameters(model: str) -> None:
    """Within half a step of the width, three vectors a layer, of the full experiment."""
    with torch.device("meta"):
        wanted = models.parameters(models.build("gdn2", text.FULL.sizes, 0))
        sizes = text.sizes_of(text.FULL, model)
        found = models.parameters(models.build(model, sizes, 0))
    assert abs(found - wanted) <= 4 * 3 * sizes.hidden * sizes.layers < 0.01 * wanted
    assert sizes.state == text.FULL.sizes.state == 65536


def test_bytes_are_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Better than their frequencies alone; a row is written, and is not made again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = corpus.collect("cpu", folders={"lib": ROOT / "gdn2gen/family"})
    monkeypatch.setattr(text, "_corpus", lambda *_: made)
    monkeypatch.setattr(text, "SMALL", FEW)
    rows = tmp_path / "rows"
    job = {"model": "gdn2", "small": True, "steps": None, "rows": str(rows), "graphs": False}
    try:
        assert text.work({**job, "until": math.inf}).endswith("tokens/s")
    finally:
        torch.set_num_threads(before)
    assert len([*rows.iterdir()]) == 2
    row = json.loads((rows / "gdn2_steps60_small.json").read_text())
    chances = made.train.long().bincount(minlength=256).double() / len(made.train)
    seen = made.held_out_windows(FEW.held_out, FEW.length)[1]
    unigram = -float(chances.clamp(min=1e-9).log()[seen].mean())
    (middle, _, first), (last, seconds, loss) = row["held_out"]
    assert (middle, last) == (30, 60) and seconds == row["losses"][-1][2]
    assert loss < first and loss < unigram - 0.1 and row["seen"]["alarms"] == []
    assert row["tokens_per_second"] > 0 and row["corpus"]["digest"] == made.digest


def test_peers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models._THEIRS, "gdn2", ("fla_that_is_not_there", "GatedDeltaNet2"))
    with pytest.raises(UnsupportedError, match="leave fla:gdn2 out"):
        models.build("fla:gdn2", FEW.sizes, 0)


def test_peers_begin_with_our_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer with the same parameters, which returns a tuple as theirs does."""

    class Peer(models.GatedDeltaNet2):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
            return super().forward(x), None, None

    monkeypatch.setattr(models, "import_module", lambda _: type("M", (), {"GatedDeltaNet2": Peer}))
    ours, theirs = (models.build(x, FEW.sizes, 3) for x in ("gdn2", "fla:gdn2"))
    tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(tokens), theirs(tokens))


def _row(model: str, loss: float, launched: str = "eager") -> dict[str, Any]:
    return {
        "model": model, "steps": 60, "lr": 1e-2, "tokens_per_step": 1000, "parameters": 99,
        "corpus": {"digest": "d", "files": 2, "bytes": 3}, "diverged": None, "launched": launched,
        "held_out": [[30, 1.0, 4.0], [60, 2.0, loss]], "tokens_per_second": 12345.6,
        "seen": {}, "machine": {"device": "CPU"},
    }  # fmt: skip


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, record = tmp_path / "learning.md", tmp_path / "learning/text.json"
    monkeypatch.setattr(text, "PAGE", page)
    monkeypatch.setattr(text, "RECORD", record)
    monkeypatch.setattr(text, "SPEEDS", record.with_name("speed.json"))
    monkeypatch.setattr(text, "SMALL", FEW)
    page.write_text("".join(f"<!-- {x}:begin -->\n<!-- {x}:end -->\n" for x in ("text", "speed")))
    rows = tmp_path / "rows"
    text.write_row(rows / "a.json", _row("fla:gdn2", 2.0))
    text.write_row(rows / "b.json", _row("gdn2", 1.5, "graph"))
    text.write_row(rows / "c.json", _row("kda", 1.0) | {"search": True})
    text.write_row(rows / "d.json", {"task": "mqar", "lr": 0.1})  # of another script
    text.write_row(rows / "e.json", _row("mamba2", 1.0) | {"seen": {"alarms": ["a", "b"]}})
    assert text.main(["report", "--small", "--rows", str(rows)]) == 0
    said = page.read_text()
    assert "| Gated DeltaNet-2 | 99 | 0.01 | 1.5000 | 2.1640 | 12,346 | graph | - |" in said
    assert said.index("FLA's layer") > said.index("1.5000") and "KDA" not in said
    assert "| Mamba-2 | 99 | 0.01 | 1.0000 | 1.4427 | 12,346 | eager | 2 |" in said
    drawn = (record.parent / "text.svg").read_text()
    ElementTree.fromstring(drawn)
    assert "Gated DeltaNet-2, graphs" in drawn and "seconds of training" in drawn


def test_small_rows_are_not_those_of_the_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are they found in their place, nor put on the page beside them."""
    few = replace(text.FULL, steps=60)
    for name, value in {"FULL": few, "SMALL": FEW, "PAGE": tmp_path / "a.md"}.items():
        monkeypatch.setattr(text, name, value)
    monkeypatch.setattr(text, "RECORD", tmp_path / "text.json")
    monkeypatch.setattr(text, "SPEEDS", tmp_path / "speed.json")
    monkeypatch.setattr(text, "share", lambda _, jobs, *more: [name for name, _ in jobs])
    text.PAGE.write_text(
        "".join(f"<!-- {x}:begin -->\n<!-- {x}:end -->\n" for x in ("text", "speed"))
    )
    rows = tmp_path / "rows"
    text.write_row(text._path(rows, FEW, "gdn2", False), _row("gdn2", 1.5) | {"small": True})
    words = ["--models", "gdn2", "--rows", str(rows)]
    assert text.main(["train", "--small", *words]) == 0
    assert text.main(["train", *words]) == 1
    assert text.main(["report", "--rows", str(rows)]) == 0 and not text.RECORD.exists()


def test_what_still_wants_a_run_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_rate", lambda *_: None)
    job = {"model": "gdn2", "small": True, "steps": 2, "rows": str(tmp_path), "graphs": False}
    assert text.work({**job, "until": 0.0}).startswith("no time left")
    assert text.work({**job, "until": math.inf}) == "diverged at every rate"
    monkeypatch.setattr(text, "share", lambda *_: [])
    assert text.main(["train", "--small", "--models", "gdn2", "--rows", str(tmp_path)]) == 1


def test_the_page_is_what_the_record_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, record = tmp_path / "learning.md", tmp_path / "learning/text.json"
    before = text.PAGE.read_text()
    page.write_text(before)
    for kept in (text.RECORD, text.SPEEDS):
        if kept.exists():
            replace_file(record.with_name(kept.name), kept.read_text())
    monkeypatch.setattr(text, "PAGE", page)
    monkeypatch.setattr(text, "RECORD", record)
    monkeypatch.setattr(text, "SPEEDS", record.with_name("speed.json"))
    assert text.main(["report", "--rows", str(tmp_path / "none")]) == 0
    assert page.read_text() == before, "run: python scripts/text.py report"
