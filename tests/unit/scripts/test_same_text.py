"""The script that says whether templates still make the same kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from script_module import load_script

from gdn2gen.base.paths import templates_dir
from gdn2gen.codegen.render import SLOTS_TEMPLATE, TABLES_TEMPLATE, template_name
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.stages import EVERY_STAGE, STAGES

same_text = load_script("same_text")
OLD = ["0" * 16, f'"""Digest {"0" * 16}."""\nx = 1\n']


@pytest.mark.parametrize(
    ("source", "result"),
    [
        (f'"""Digest {"1" * 16}."""\nx = 1\n', "same"),
        ('"""Other words."""\n\nx = 1  # a comment\n', "words"),
        (f'"""Digest {"1" * 16}."""\nx = 2\n', "-x = 1\n+x = 2"),
    ],
)
def test_what_differs(source: str, result: str) -> None:
    assert same_text.compared(OLD, ["1" * 16, source]).endswith(result)


def test_what_could_not_be_made_before_is_new() -> None:
    assert same_text.compared(["", "op must be one of ..."], OLD) == "new"
    assert same_text.compared(OLD, ["", "cannot serve"]).endswith("+ cannot serve")


@pytest.mark.slow
def test_every_template_is_rendered() -> None:
    found = {
        template_name(Config.of(x["stage"], x["knobs"]).form)
        for x in same_text.cases()
        if x["stage"] != same_text.TABLES
    }
    stages = {
        f"{folder}/stages/{path.name}"
        for folder in ("triton", "tilelang")
        for path in (templates_dir() / folder / "stages").iterdir()
    }
    # no entry is of stages that are in no plan, so none can become stale
    others = {template_name(y) for x in {*EVERY_STAGE} - {*STAGES} for y in EVERY_STAGE[x].forms}
    assert found == stages - others - {TABLES_TEMPLATE, SLOTS_TEMPLATE}


def test_what_changed_for_one_op_or_gate_is_renewed_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One digest names a template's files, whatever an op's kernels are made of them."""
    files = [tmp_path / "tuned" / op / "gpu.json" for op in ("gdn2", "kda")]
    for path in files:
        path.parent.mkdir(parents=True)
        entries = [
            {"problem": {"gate": gate}, "templates": {"grad_key": "old"}}
            for gate in ("none", "softplus")
        ]
        path.write_text(json.dumps({"entries": entries}))
    monkeypatch.setattr(same_text, "ROOT", tmp_path)
    same_text._renew({("gdn2", "none", "old"): "new", ("kda", "none", "other"): "newer"})
    found = [
        [entry["templates"]["grad_key"] for entry in json.loads(x.read_text())["entries"]]
        for x in files
    ]
    assert found == [["new", "old"], ["old", "old"]]
