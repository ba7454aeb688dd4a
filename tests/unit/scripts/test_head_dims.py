"""What a head costs by its head dim: the tables and the chart; measuring needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from script_module import load_script

head_dims = load_script("head_dims")
TIMES = [
    {"K": 96, "V": 96, "source": "exact", "ours": [0.28, 1.23], "fla": [1.12, 4.92]},
    {"K": 128, "V": 64, "source": "default", "ours": [0.30, 1.42], "fla": None},
]
TRANSFER = [
    {"K": 96, "V": 96, "level": "lean", "tuned": 1.23, "transferred": None, "default": 2.1}
    | {"from": "K=128 V=128"}
]


def test_tables_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"times": TIMES, "transfer": TRANSFER}))
    head_dims.plot(path)
    shown = capsys.readouterr().out
    # nanoseconds for each of 4 * 4096 * 16 tokens and heads
    assert "| 96, 96 | exact | 1.068 | 4.272 | 4.00 | 4.692 | 18.768 | 4.00 |" in shown
    assert "| 128, 64 | default | 1.144 |  |  | 5.417 |  |  |" in shown
    assert "| 96, 96 | lean | 1.230 | none | K=128 V=128 | 2.100 |" in shown
    svg = ElementTree.fromstring(path.with_suffix(".svg").read_text())
    assert len([x for x in svg.iter() if x.get("class") in ("ours", "fla")]) == 3


def test_sizes_are_read_as_the_commands_read_them() -> None:
    assert (head_dims.problem_of("96").K, head_dims.problem_of("96").V) == (96, 96)
    assert (head_dims.problem_of("256,512").K, head_dims.problem_of("256,512").V) == (256, 512)


def test_what_breaks_one_side_breaks_a_process_of_its_own() -> None:
    assert head_dims.in_a_process("problem_of", "96").get() == head_dims.problem_of("96")
    failed = head_dims.in_a_process("times_of", "ours", head_dims.problem_of("96"))
    assert not failed.ok and "GPU" in failed.reason.upper().replace("CUDA", "GPU")
