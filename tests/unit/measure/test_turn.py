"""Measurements that share a GPU."""

from pathlib import Path
from typing import Any

import pytest

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import ConfigError
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import parse_shapes
from gdn2gen.kernels.config import Config
from gdn2gen.measure import rows
from gdn2gen.measure.sides import Side
from gdn2gen.measure.timing import Timing
from gdn2gen.measure.turn import in_turn, wait_for_turn


def test_turns_are_waited_for(tmp_path: Path) -> None:
    turn = tmp_path / "turn"
    with pytest.raises(ConfigError, match="when all others are ready"):
        wait_for_turn(turn, seconds=0.2, every=0.05)
    turn.touch()
    wait_for_turn(turn, seconds=0.2)
    assert len(Path(f"{turn}.ready").read_text().split()) == 2


def test_without_a_turn_nothing_waits() -> None:
    with in_turn(None):
        pass


def test_a_bench_times_after_all_is_checked_and_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What compiles is done by then: both implementations at all shapes."""
    turn = tmp_path / "turn"
    turn.touch()
    seen: list[str] = []

    def noting(what: str, result: Any) -> Any:
        def note(*_: Any) -> Any:
            ready = Path(f"{turn}.ready").exists()
            seen.append(f"{what}{' in turn' if ready else ''}")
            return result

        return note

    side = Side(Timing(1.0, 1.0, 1.0, 9), Timing(2.0, 2.0, 2.0, 9), 1.0, {})
    monkeypatch.setattr(rows, "_present_device", lambda: named_device("NVIDIA H200"))
    compiled: set[tuple[Problem, Config]] = set()
    monkeypatch.setattr(rows, "compile_side_by_side", lambda asked, *_: compiled.update(asked))
    monkeypatch.setattr(rows, "peer_op", lambda *_: lambda **_: None)
    monkeypatch.setattr(rows, "worst_errors", noting("errors", {"o": None}))
    monkeypatch.setattr(rows, "called", noting("called", None))
    monkeypatch.setattr(rows, "copy_gbps", noting("copy", 4000.0))
    monkeypatch.setattr(rows, "measure_in_turns", noting("timed", [side, side]))
    monkeypatch.setattr(rows, "_recipe_name", lambda *_: "lean")
    shapes = parse_shapes("train4k,train2k")
    made = rows.bench_shapes("gdn2", shapes, 128, 128, "bf16", vs="fla", gate="none", turn=turn)
    assert len(made) == 2
    # of calls, and of the checks, whose kernels give the final state
    assert {problem.final_state for problem, _ in compiled} == {False, True}
    assert "forward" in {config.stage for _, config in compiled}
    assert seen == ["errors"] * 2 + ["called"] * 4 + ["copy in turn"] + ["timed in turn"] * 2
    seen.clear()
    Path(f"{turn}.ready").unlink()
    rows.bench_shapes("gdn2", shapes, 128, 128, "bf16", vs="fla", gate="none")
    assert "called" not in seen
