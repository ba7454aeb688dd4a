"""scripts/gpu_round.py: which steps run, beside which others, and what is said of their ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from script_module import load_script

gpu_round = load_script("gpu_round")
Round, Step = gpu_round.Round, gpu_round.Step
# What a step prints: when it began and ended, on which GPU.
_SAYS = (
    "import os, time; begun = time.time(); time.sleep(0.3); "
    "print(os.environ['CUDA_VISIBLE_DEVICES'], begun, time.time())"
)


def _round(out: Path, *waiting: Any, gpus: str = "0", seconds: float = 60) -> Any:
    made = Round([*waiting], gpus.split(","), 2, time.monotonic() + seconds, out)
    made.run()
    return made


def _says(name: str, alone: bool = False) -> Any:
    return Step(name, f'python -c "{_SAYS}"', alone)


def _times(made: Any) -> dict[str, tuple[str, float, float]]:
    found = {}
    for step in made.ended:
        gpu, begun, ended = step.last.split()
        found[step.name] = gpu, float(begun), float(ended)
    return found


def test_steps_run_side_by_side_and_alone_where_they_must(tmp_path: Path) -> None:
    made = _round(tmp_path, _says("a"), _says("b"), _says("alone", alone=True), _says("c"))
    times = _times(made)
    assert {x.code for x in made.ended} == {0}
    _, begun, ended = times["alone"]
    for name in ("a", "b", "c"):
        assert times[name][2] <= begun or times[name][1] >= ended
    # it was its turn before c's
    assert times["c"][1] >= ended


def test_a_step_has_its_environment(tmp_path: Path) -> None:
    shows = "python -c 'import os; print(os.environ[\"HELLO\"])'"
    made = _round(tmp_path, Step("a", f"HELLO=there {shows}"))
    assert [(x.code, x.last) for x in made.ended] == [(0, "there")]


def test_a_program_that_is_not_there_holds_no_gpu(tmp_path: Path) -> None:
    made = _round(tmp_path, Step("a", "no-such-program", alone=True), _says("b", alone=True))
    assert [x.code for x in made.ended] == [127, 0]


def test_every_gpu_gets_steps(tmp_path: Path) -> None:
    made = _round(tmp_path, *(_says(x, alone=True) for x in "ab"), gpus="3,5")
    assert {x[0] for x in _times(made).values()} == {"3", "5"}


def test_ends_are_told_apart(tmp_path: Path) -> None:
    """Failed, cut off with what it had printed, and never begun."""
    made = _round(
        tmp_path,
        Step("fails", "python -c 'raise SystemExit(7)'", least_s=0),
        Step("long", "python -c 'import time; print(1, flush=True); time.sleep(60)'", least_s=0),
        Step("left", "python -c 'print(2)'", least_s=100),
        seconds=3,
    )
    ends = {x["name"]: x for x in json.loads((tmp_path / "round.json").read_text())}
    assert (ends["fails"]["code"], ends["long"]["code"], ends["left"]["code"]) == (7, None, None)
    assert ends["long"]["last"] == "1" and ends["left"]["last"] == "left: no time"
    assert "===== long: cut off" in (tmp_path / "round.log").read_text()
    assert len(made.ended) == 3


def test_steps_are_chosen_by_name_pattern_and_command() -> None:
    known = [Step("check-a", "x"), Step("check-b", "x"), Step("tune-a", "x")]
    found = gpu_round.chosen(["tune-*", "mine=gdn2gen bench --op kda", "check-b", "check-*"], known)
    assert [x.name for x in found] == ["tune-a", "mine", "check-b", "check-a"]
    assert found[1].command == "gdn2gen bench --op kda" and found[1].alone
    with pytest.raises(SystemExit, match="no step is called 'nothing'"):
        gpu_round.chosen(["nothing"], known)


def test_the_known_steps_name_what_there_is() -> None:
    known = gpu_round.steps()
    assert len({x.name for x in known}) == len(known)
    files = {x.name for x in (gpu_round.ROOT / "tests/gpu").glob("test_*.py")}
    checked = {x.command.split("/")[-1] for x in known if x.name.startswith("check-")}
    assert checked == files
    for step in known:
        words = [x for x in step.command.split() if not x.startswith(("GDN2GEN_", "PYTEST_"))]
        if words[0] == "python" and words[1] != "-m":
            assert (gpu_round.ROOT / words[1]).is_file(), step
