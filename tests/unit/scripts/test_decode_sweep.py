"""The sweep of decoding configs: what it takes, and what a GPU would time and in which order."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from script_module import load_script
from source_tree import ROOT

from gdn2gen.base import paths
from gdn2gen.base.device import named_device
from gdn2gen.family.decoding import DecodingProblem
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.recurrent import RECURRENT
from gdn2gen.runtime import decoding

PROBLEM = DecodingProblem(
    op="kda", state_v_first=True, state_bf16=True, pool=True, indexed=True, one_token=True
)
DIMS: Any = SimpleNamespace(N=256, HV=16)


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(decoding, "device_of", lambda _: named_device("H200"))
    monkeypatch.setenv("GDN2GEN_TUNED_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "packaged_tuned_dir", lambda: tmp_path / "packaged")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # what it imports lies there
    script = load_script("decode_sweep")
    monkeypatch.setattr(script, "present_device", lambda: named_device("H200"))
    return script


def chosen() -> Config:
    return decoding.config_for(PROBLEM, DIMS, torch.device("cuda", 0))


def test_words_are_knobs_and_what_they_may_be(script: Any) -> None:
    assert script.domain("BV=32,8") == ("BV", (8, 32))
    assert script.knob("loads=ahead") == ("loads", "ahead")
    for words, said in (
        ("BT=1", "of BV, num_warps, tiles, loads"),
        ("BV", "KNOB=VALUE"),
        ("BV=8,12", "BV may be of 8, 16, 32, 64, 128, but got 8,12"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            script.domain(words)
    with pytest.raises(argparse.ArgumentTypeError, match="one value of BV"):
        script.knob("BV=8,16")


def test_configs_are_all_that_fit(script: Any) -> None:
    every = [*script.configs(PROBLEM, {})]
    assert {(x["BV"], x["num_warps"]) for x in every} >= {(8, 1), (16, 1), (16, 2), (64, 4)}
    assert {x["loads"] for x in every} == {*RECURRENT.domains["loads"]}
    assert len({*every}) == len(every)
    wanted = {"BV": (16,), "loads": ("ahead",), "maxnreg": (0,), "evict": ("usual",)}
    few = [*script.configs(PROBLEM, wanted)]
    found = {(x["num_warps"], x["tiles"]) for x in few}
    assert {*few} < {*every} and found == {
        (1, 1),
        (2, 1),
        (1, 2),
        (2, 2),
        (4, 2),
        (2, 4),
        (4, 4),
        (8, 4),
    }


@pytest.mark.usefixtures("script")
def test_knobs_replace_those_of_the_rule_where_a_kernel_takes_them() -> None:
    device = torch.device("cuda", 0)
    usual = decoding.config_at(PROBLEM, 256, 16, named_device("H200"))
    forced = decoding.force
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "device_of", lambda _: named_device("H200"))
            forced(loads="ahead", BV=8)
            assert chosen() == usual.replace(loads="ahead", BV=8)
            everyone = DecodingProblem(op="kda", pool=True, one_token=True)
            assert decoding.config_for(everyone, DIMS, device)["loads"] == "behind"
            forced(usual.replace(BV=32))
            assert chosen() == usual.replace(BV=32)
            forced()
            assert chosen() == usual
    finally:
        forced()


def test_every_config_is_compiled_and_then_timed(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fastest is first, and the rule's own stands below."""
    compiled: list[Config] = []
    ran: list[Config] = []

    def compile_all(given: Any) -> set[Config]:
        """No compiler takes the last but one; the last is the rule's."""
        compiled.extend(x for _, x in given)
        return {compiled[-2]}

    monkeypatch.setattr(script, "compile_all", compile_all)

    def us(run: Any) -> float:
        assert compiled, "nothing is timed that is not compiled"
        run(0)
        return 100.0 - ran[-1].size("BV")

    wanted = {"BV": (8, 16, 32), "evict": ("usual",), "maxnreg": (0,)}
    step = script.Timed("a step", lambda: lambda _: ran.append(chosen()), us, lambda: 60.0, 256, 16)
    script.sweep([step], wanted)
    rule = decoding.by_rule(PROBLEM, 256, 16, named_device("H200"))
    every = [*dict.fromkeys((*script.configs(PROBLEM, wanted), rule))]
    assert [*dict.fromkeys(compiled)] == every
    # the first call says what is compiled; the one that did not compile is not timed
    assert ran[0] == rule and {*ran[1:]} == {*every} - {compiled[-2]}
    assert len(ran) == len({*ran[1:]}) + 1
    rows = [x.split("│")[1:-1] for x in capsys.readouterr().out.splitlines() if ".00" in x]
    assert rows[0][-1].strip() == "68.00" and rows[-1][-1].strip() == "84.00"
    assert rows[-1][0].strip() == "rule"


def test_the_fastest_that_is_right_is_filed_and_calls_run_it(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At up to twice as many programs, or half; not where it was measured of other states."""
    gpu = named_device("H200")
    rule = decoding.by_rule(PROBLEM, 64, 16, gpu)
    fastest, second = rule.replace(BV=8, tiles=4, loads="ahead"), rule.replace(loads="ahead")
    monkeypatch.setattr(script, "toolchain", dict)
    monkeypatch.setattr(script, "command_line", lambda *_, **__: "decode_time.py")
    verdicts = {fastest: ({"o": 0.1}, "o 1.0e-01 above 1.0e-02"), second: ({"o": 0.003}, "")}
    monkeypatch.setattr(script, "checked", lambda _, config: verdicts[config])
    step = script.Timed("a step", lambda: None, lambda _: 0.0, lambda: 16.3, 64, 16)
    times = {fastest: 17.0, second: 18.0, rule: 25.0}
    said = script.file(step, PROBLEM, [*times], times, rule, tmp_path)
    path = tmp_path / "kda/decoding/nvidia-h200.json"
    assert said.splitlines() == [f"wrong, [{fastest}]: o 1.0e-01 above 1.0e-02", f"filed: {path}"]
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["measured"] == {"us": 18.0, "rule_us": 25.0, "copy_us": 16.3}
    for sequences, runs in ((64, second), (32, second), (128, second), (31, None), (129, None)):
        found = decoding.config_at(PROBLEM, sequences, 16, gpu)
        assert found == (runs or decoding.by_rule(PROBLEM, sequences, 16, gpu)), sequences
    others = DecodingProblem(op="kda", state_v_first=True, pool=True, indexed=True, one_token=True)
    assert decoding.config_at(others, 64, 16, gpu) == decoding.by_rule(others, 64, 16, gpu)
    assert "not of one token" in script.file(
        step, DecodingProblem(op="kda"), [*times], times, rule, tmp_path
    )
