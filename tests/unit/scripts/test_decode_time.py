"""The script that times decoding: its steps, what other libraries' ops are given, its table."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from script_module import load_script
from source_tree import ROOT

B, H, D = 2, 3, 128


@pytest.fixture(name="steps")
def _steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    steps = load_script("decode_steps")
    monkeypatch.setattr(steps, "DEVICE", "cpu")
    monkeypatch.setattr(steps, "MOST_CALLS", 3)
    return steps


@pytest.fixture(name="script")
def _script(steps: Any) -> Any:
    return load_script("decode_time")


def step_of(steps: Any, op: str, state: str = "fp32", v_first: bool = True) -> Any:
    return steps.Step(op, B, H, state, v_first, warm=False)


@pytest.mark.parametrize("op", ["gdn2", "gated_delta_rule", "delta_rule", "mamba2"])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_a_step_runs_and_its_floor_is_of_its_bytes(
    steps: Any, op: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "copy_gbps", lambda: 1.0)
    step = step_of(steps, op, state)
    run = step.ours()
    with torch.no_grad():
        for i in range(4):  # more than there are sets of slots
            run(i)
    least = 2 * B * H * D * step.V * (4 if state == "fp32" else 2) / 1e3
    assert least < step.floor_us() < 1.1 * least


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    found = ModuleType(name)
    vars(found).update(members)
    parts = name.split(".")
    for i in range(1, len(parts)):
        above = ".".join(parts[:i])
        if above not in sys.modules:
            monkeypatch.setitem(sys.modules, above, ModuleType(above))
    monkeypatch.setitem(sys.modules, name, found)


def test_peers_are_given_the_same_step(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's packed row, and FlashInfer's pool; only those of the member, and with V first."""
    seen: dict[str, Any] = {}

    def packed(
        mixed: Any, a: Any, b: Any, A_log: Any, dt_bias: Any, *given: Any, **named: Any
    ) -> None:
        scale, pool, out, indices = given
        seen["vLLM"] = [x.shape for x in (mixed, a, b, A_log, dt_bias, pool, out, indices)]
        assert scale == D**-0.5 and named == {"use_qk_l2norm_in_kernel": True}
        assert indices.dtype == torch.int32 and int(indices.max()) < len(pool)

    def pretransposed(**given: Any) -> None:
        seen["FlashInfer"] = {x: y.shape for x, y in given.items() if isinstance(y, torch.Tensor)}
        assert given["state"] is None and given["use_qk_l2norm"] is True

    module(monkeypatch, steps.VLLM[0], fused_recurrent_gated_delta_rule_packed_decode=packed)
    module(
        monkeypatch, steps.FLASHINFER[0], gated_delta_rule_decode_pretranspose=pretransposed
    )  # fmt: skip
    monkeypatch.setattr(steps, "_fla", lambda _: None)
    found = dict(steps.peers(step_of(steps, "gated_delta_rule", "bf16")))
    assert [*found] == ["vLLM", "FlashInfer"]
    for run in found.values():
        run(1)
    row, head, pool = (B, 3 * H * D), (B, H), (3 * B, H, D, D)
    assert seen["vLLM"] == [row, head, head, (H,), (H,), pool, (B, 1, H, D), (B,)]
    token = {x: (B, 1, H, D) for x in "qkv"} | {"output": (B, 1, H, D)}
    gates = {"A_log": (H,), "dt_bias": (H,), "a": (B, 1, H), "b": (B, 1, H)}
    assert seen["FlashInfer"] == token | gates | {
        "initial_state": pool, "initial_state_indices": (B,)
    }  # fmt: skip
    assert not [*steps.peers(step_of(steps, "kda"))]
    assert not [*steps.peers(step_of(steps, "gated_delta_rule", v_first=False))]


def a_row(script: Any, steps: Any, monkeypatch: pytest.MonkeyPatch, **peers: Any) -> Any:
    monkeypatch.setattr(script, "graph_us", lambda *_: 20.0)
    monkeypatch.setattr(script, "host_us", lambda _: 7.0)
    monkeypatch.setattr(steps, "copy_gbps", lambda: 100.0)
    monkeypatch.setattr(script, "peers", lambda _: peers.items())
    return script.row(step_of(steps, "kda"), [("loads", "ahead")])


def test_rows_and_their_table(script: Any, steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that raises costs its own figures alone; columns are of peers that there are."""

    def failing(_: int) -> None:
        raise RuntimeError("other arguments")

    row = a_row(script, steps, monkeypatch, FLA=lambda _: None, vLLM=failing)
    assert row["peers"] == {"FLA": {"us": 20.0, "host_us": 7.0}} and row["knobs"] == "loads=ahead"
    alone = a_row(script, steps, monkeypatch) | {"batch": 64, "knobs": ""}
    warm = alone | {"warm": True}
    machine = {"device": "a GPU", "date": "2026-01-01"}
    page = script.page([{**x, "gpu": "a GPU", "machine": machine} for x in (row, alone, warm)])
    forced, plain = page.split("\n\n3 heads, V first;")
    assert forced.startswith("3 heads, V first, loads=ahead; device a GPU, date 2026-01-01")
    floor = row["floor_us"]
    assert (
        f"| kda | 2 | fp32 | 20.00 | {floor:.2f} | {20 / floor:.2f} | 7.0 | 20.00 (7) |" in forced
    )
    assert "FLA us (host)" in forced and "FLA" not in plain and plain.count("| kda |") == 1


def test_rows_are_kept_beside_those_of_before(
    script: Any, steps: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """One of the same step gives way, and the page shows all."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- decoding:begin -->\nold\n<!-- decoding:end -->\nafter\n")
    monkeypatch.setattr(script, "RECORDS", tmp_path / "decoding")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(script, "machine", lambda: {"device": "NVIDIA H200"})
    row = a_row(script, steps, monkeypatch)
    script.save([row, row | {"batch": 64}])
    script.save([row | {"us": 10.0}])
    (file,) = (tmp_path / "decoding").iterdir()
    assert file.name == "nvidia-h200.json" and file.read_text().count('"op"') == 2
    text = page.read_text()
    assert "| 10.00 |" in text and text.count("| kda |") == 2 and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
