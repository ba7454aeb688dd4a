"""Tokens a second of the models of text: peers' ops in our layers, turns, rows, the table."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import pytest
import torch
from script_module import load_script
from torch import Tensor

import gdn2gen
from gdn2gen.base import _serve
from gdn2gen.base.errors import UnsupportedError
from gdn2gen.base.outcome import Outcome
from gdn2gen.nn import Cache

text = load_script("text")
from learning import autotuning, models, speed, speed_page, text_plan  # noqa: E402

SIZES = replace(text.SMALL.sizes, vocabulary=61, inner=16)
FEW = replace(text.SMALL, batch=2, length=8, sizes=replace(text.SMALL.sizes, inner=16))
MAMBA2 = "mamba_ssm.ops.triton.ssd_combined"
MAMBA3 = "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Peers' ops in our layers


class TheirOps:
    """mamba_ssm's two ops as its 2.3.2 takes them, checked as they check, by our references."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def mamba_chunk_scan_combined(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> Any:
        self.calls.append("mamba2")
        (b, t, h), (g, N) = x.shape[:3], B.shape[2:]
        assert dt.shape == (b, t, h) and A.shape == (h,) and h % g == 0
        assert B.shape == C.shape == (b, t, g, N) and B.dtype == C.dtype == x.dtype
        assert D is not None and D.shape == (h,) and z is not None and z.shape == x.shape
        return gdn2gen.mamba_chunk_scan_combined(
            x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus
        )

    def mamba3_siso_combined(
        self,
        Q: Tensor,
        K: Tensor,
        V: Tensor,
        ADT: Tensor,
        DT: Tensor,
        Trap: Tensor,
        Q_bias: Tensor,
        K_bias: Tensor,
        Angles: Tensor,
        D: Tensor | None = None,
        Z: Tensor | None = None,
        Input_States: tuple[Tensor, ...] | None = None,
        chunk_size: int = 64,
        return_final_states: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        self.calls.append("mamba3")
        (b, t, h), (g, N) = V.shape[:3], Q.shape[2:]
        assert Q.shape == K.shape == (b, t, g, N) and h % g == 0 and N % 2 == 0
        assert ADT.shape == DT.shape == Trap.shape == (b, h, t)
        assert Q_bias.shape == K_bias.shape == (h, N) and D is not None and D.shape == (h,)
        assert Angles.shape[:3] == (b, t, h) and Angles.shape[3] % 2 == 0
        assert Z is not None and Z.shape == V.shape
        return gdn2gen.mamba3_siso_combined(
            Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D=D, Z=Z
        )


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> TheirOps:
    ops = TheirOps()
    names = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.mamba3"]
    for name in (*names, MAMBA2, MAMBA3):
        module = ModuleType(name)
        module.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    functions: dict[str, Callable[..., Any]] = {
        MAMBA2: ops.mamba_chunk_scan_combined,
        MAMBA3: ops.mamba3_siso_combined,
    }
    for name, function in functions.items():
        setattr(sys.modules[name], function.__name__, function)
    return ops


@pytest.mark.parametrize("mixer", ["mamba2", "mamba3"])
def test_their_op_in_our_layer(theirs: TheirOps, mixer: str) -> None:
    """The same weights, loss and gradients; with a cache, as the observatory calls it, ours."""
    tokens = torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(0))
    found = []
    for name in (mixer, f"mamba_ssm:{mixer}"):
        model = models.build(name, replace(SIZES, layers=2), 3)
        loss = model(tokens, targets=tokens.roll(1, 1))
        gradients = torch.autograd.grad(loss, [*model.parameters()])
        found.append((loss, gradients, dict(model.named_parameters())))
        found[-1][2].update(out=model(tokens, cache=Cache(2)).detach())
    (loss, gradients, weights), (their_loss, their_gradients, their_weights) = found
    assert theirs.calls == [mixer, mixer]
    assert weights.keys() == their_weights.keys()
    torch.testing.assert_close(weights, their_weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(their_loss, loss)
    torch.testing.assert_close(their_gradients, gradients)


def test_their_op_takes_what_ours_takes_in_bf16(theirs: TheirOps) -> None:
    """As in training on a GPU: under autocast, where what a projection makes is bf16."""
    tokens = torch.randint(61, (1, 20), generator=torch.Generator().manual_seed(0))
    for mixer in ("mamba2", "mamba3"):
        losses = []
        for name in (mixer, f"mamba_ssm:{mixer}"):
            model = models.build(name, SIZES, 3)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(tokens, targets=tokens)
            loss.backward()
            assert all(x.grad is not None and x.grad.isfinite().all() for x in model.parameters())
            losses.append(loss.detach())
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=1e-2)


def test_a_peer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    for name in ("mamba_ssm:mamba2", "mamba_ssm:mamba3"):
        with pytest.raises(UnsupportedError, match="the comparison needs mamba_ssm"):
            models.build(name, SIZES, 0)


@pytest.mark.parametrize("peer", models.PEERS)
def test_a_peer_is_as_large_as_ours(peer: str) -> None:
    mixer = models.member_of(peer)
    assert mixer in models.MIXERS and mixer in peer
    assert text.sizes_of(text.FULL, peer) == text.sizes_of(text.FULL, mixer)


# Turns


class Here:
    """A worker without a process: one at a time, for all draw weights from the same seed."""

    lock = Lock()
    fails: dict[tuple[str, str], str]
    calls: list[tuple[str, str]]

    def __init__(self, env: dict[str, str]) -> None:
        assert env["TRITON_CACHE_AUTOTUNING"] == "1"

    def call(self, target: str, job: dict[str, Any], *, timeout: float) -> Outcome[Any]:
        what = target.rpartition(":")[2]
        Here.calls.append((what, job["model"]))
        assert timeout > 0
        if (what, job["model"]) in Here.fails:
            return Outcome("crashed", detail=Here.fails[what, job["model"]])
        with Here.lock:
            return Outcome(*_serve.answer(target, (job,)))

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, theirs: TheirOps) -> None:
    Here.fails, Here.calls = {}, []
    monkeypatch.setattr(speed, "Worker", Here)
    monkeypatch.setattr(speed, "SMALL", FEW)


def _measure(folder: Path, *names: str, steps: int = 12) -> tuple[int, dict[str, Any]]:
    words = ["speed", "--small", "--rows", str(folder), "--steps", str(steps)]
    code = text.main([*words, "--models", *names])
    rows = [json.loads(x.read_text()) for x in folder.glob("*.json")]
    return code, {row["model"]: row for row in rows}


def test_ours_and_theirs_in_turns(here: None, tmp_path: Path) -> None:
    code, rows = _measure(tmp_path, "mamba2", "mamba_ssm:mamba2")
    assert code == 0 and rows.keys() == {"mamba2", "mamba_ssm:mamba2"}
    turns = [model for what, model in Here.calls if what == "turn"]
    ours, theirs = "mamba2", "mamba_ssm:mamba2"
    # each begins every second time, so that none is always the one after the other
    assert turns == [ours, theirs, theirs, ours] * (speed.TURNS // 2) + [ours, theirs]
    a, b = rows[ours], rows[theirs]
    assert len(a["seconds"]) == len(b["seconds"]) == speed.TURNS and a["turn"] == 2
    assert a["at"] == b["at"] and a["failed"] is b["failed"] is None
    assert a["parameters"] == b["parameters"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["tokens_per_step"] == 16 and a["peak_mib"] is None and a["launched"] == "eager"
    # what is there is not measured again
    Here.calls.clear()
    assert _measure(tmp_path, ours, theirs)[0] == 0 and not Here.calls


@pytest.mark.parametrize("what", ["prepare", "turn"])
def test_a_peer_that_dies_is_a_row_that_says_so(here: None, tmp_path: Path, what: str) -> None:
    Here.fails[what, "mamba_ssm:mamba3"] = "signal 11"
    code, rows = _measure(tmp_path, "mamba3", "mamba_ssm:mamba3")
    assert code == 0 and rows["mamba_ssm:mamba3"]["failed"] == "crashed: signal 11"
    assert len(rows["mamba3"]["seconds"]) == speed.TURNS
    Here.fails.clear()
    Here.calls.clear()
    assert _measure(tmp_path, "mamba3", "mamba_ssm:mamba3")[1]["mamba_ssm:mamba3"]["loss"] > 0
    assert ("turn", "mamba3") in Here.calls  # both again, in turns


def test_ours_that_dies_is_a_failure(here: None, tmp_path: Path) -> None:
    Here.fails["turn", "kda"] = "exit code 1"
    assert _measure(tmp_path, "kda")[0] == 1


def test_a_loss_that_is_not_finite(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(FEW, rates=(math.nan,))
    monkeypatch.setattr(speed, "SMALL", broken)
    code, rows = _measure(tmp_path, "gated_delta_rule")
    assert code == 1 and "the loss is not finite" in rows["gated_delta_rule"]["failed"]


def test_no_time(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = speed.measure(
        ["kda"], {"small": True, "graphs": False}, tmp_path, minutes=-1.0, steps=6
    )
    assert failed == {"kda": "no time left"} and not Here.calls
    assert json.loads(next(tmp_path.glob("speed_kda*.json")).read_text())["failed"] == failed["kda"]


@pytest.mark.slow
def test_processes(tmp_path: Path) -> None:
    """The command as it is; a peer that is not there is told."""
    code, rows = _measure(tmp_path, "gdn2", "fla:gdn2", steps=6)
    assert code == 0 and len(rows["gdn2"]["seconds"]) == speed.TURNS
    assert "pip install flash-linear-attention" in rows["fla:gdn2"]["failed"]


def test_small_rows_are_not_those_of_the_full_size(here: None, tmp_path: Path) -> None:
    """The command after --small, with the same steps, measures."""
    _measure(tmp_path, "kda")
    job = {"small": False, "graphs": False, "turn": 2}
    assert speed._lacks(tmp_path, job, "kda") and not speed._lacks(
        tmp_path, {**job, "small": True}, "kda"
    )
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {x}:begin -->\n<!-- {x}:end -->\n" for x in ("text", "speed")))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PAGE", "RECORD", "SPEEDS"):
            patch.setattr(text, name, page if name == "PAGE" else tmp_path / f"none/{name}")
        assert text.main(["report", "--rows", str(tmp_path)]) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("raw", ['{"machine":{}}', '{"machine":{},"speed":false}', '"machine"'])
def test_a_row_that_says_nothing_is_made_again(here: None, tmp_path: Path, raw: str) -> None:
    path = speed._path(tmp_path, {"small": True, "graphs": False, "turn": 2}, "kda")
    path.write_text(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, rows = _measure(tmp_path, "kda")
    assert code == 0 and rows["kda"]["loss"] > 0


# The table


def _row(model: str, seconds: list[float], at: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "speed": True, "model": model, "failed": None, "at": at, "turn": 10, "seconds": seconds,
        "peak_mib": 2048.0, "tokens_per_step": 1000, "launched": "eager", "graphs": False,
        "machine": {"device": "H", "date": "today"}, **more,
    }  # fmt: skip


def test_the_table() -> None:
    rows = [
        _row("fla:kda", [4.0, 2.0, 2.0], peak_mib=4096.0),
        _row("kda", [1.0, 1.25, 1.0]),
        _row("mamba2", [0.5]),
        _row("mamba_ssm:mamba2", [], failed="crashed: signal 11"),
        _row("gdn2", [1.0]),
        _row("fla:gdn2", [1.0], at=2.0),
    ]
    lines = speed_page.page(speed_page.merged([], rows)).splitlines()
    assert [x.split("|")[1].strip() for x in lines[2:5]] == ["Gated DeltaNet-2", "KDA", "Mamba-2"]
    assert lines[3] == (
        "| KDA | 10,000 (8,000 to 10,000) | FLA's layer | 5,000 (2,500 to 5,000) | "
        "2.00 (1.60 to 4.00) | 2.00 | 4.00 | eager |"
    )
    assert "| our layer on mamba_ssm's op | - | - | 2.00 | - |" in lines[4]
    assert "| - |" in lines[2], "a ratio of what was not timed together"
    assert "- mamba_ssm:mamba2: crashed: signal 11" in lines


def test_fresh_rows_replace_those_that_were_timed_together() -> None:
    both = [_row("kda", [1.0]), _row("fla:kda", [2.0])]
    assert speed_page.merged(both, [_row("kda", [3.0], at=2.0)]) == both
    failed = [_row("kda", [3.0], at=2.0), _row("fla:kda", [], at=2.0, failed="x")]
    assert speed_page.merged(both, failed) == both
    assert speed_page.merged([], failed) == failed
    assert speed_page.merged(failed, both) == both
    again = [_row("kda", [3.0], at=3.0), _row("fla:kda", [5.0], at=3.0)]
    assert speed_page.merged(both, again) == again
    graphs = [
        _row("kda", [0.5], launched="graph", graphs=True),
        _row("fla:kda", [1.0], launched="eager: it waits", graphs=True),
    ]
    assert speed_page.merged(both, graphs) == [*both, *graphs]
    assert "| 2.00 (2.00 to 2.00) | 2.00 | 2.00 | graph / eager: it waits |" in (
        speed_page.page(graphs)
    )


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "learning.md"
    for name, value in {"PAGE": page, "RECORD": tmp_path / "a", "SPEEDS": tmp_path / "b"}.items():
        monkeypatch.setattr(text, name, value)
    page.write_text("".join(f"<!-- {x}:begin -->\n<!-- {x}:end -->\n" for x in ("text", "speed")))
    rows = tmp_path / "rows"
    for row in (_row("kda", [1.0]), _row("fla:kda", [2.0])):
        text.write_row(rows / f"{row['model'][:3]}.json", row)
    assert text.main(["report", "--rows", str(rows)]) == 0
    assert "| KDA | 10,000 (10,000 to 10,000) | FLA's layer |" in page.read_text()
    assert len(json.loads((tmp_path / "b").read_text())["rows"]) == 2
    assert not (tmp_path / "a").exists()


# Peers' autotuners


class Kernel:
    """What an autotuner calls; larger tiles are faster, and 64 cannot be compiled."""

    def __init__(self) -> None:
        self.arg_names = ["x", "n"]
        self.calls: list[tuple[str, int]] = []
        self.fn = lambda: None

    def run(self, x: int, n: int, *, BT: int, grid: Any, warmup: bool, **_: Any) -> None:
        self.calls.append(("compile" if warmup else "launch", BT))
        if BT == 64:
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(1, 0, "shared memory")


def test_configs_are_compiled_before_the_first_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.runtime.autotuner import Autotuner

    kernel = Kernel()
    configs = [triton.Config({"BT": x}, num_warps=4) for x in (16, 32, 64)]
    kept = object()
    tuner = Autotuner(kernel, kernel.arg_names, configs, ["n"], None, None, do_bench=None)
    tuner.do_bench = kept

    def time_of(call: Callable[[], None], quantiles: Any) -> list[float]:
        call()
        return [1.0 / kernel.calls[-1][1]] * 3

    monkeypatch.setattr(autotuning, "shortly", lambda: time_of)
    before = Autotuner._bench
    with autotuning.searching(2, tmp_path / "lock") as found:
        tuner.run(1, 2, grid=(1,), warmup=False)
        tuner.run(1, 2, grid=(1,), warmup=False)
    wanted = [("compile", 16), ("compile", 32), ("compile", 64)]
    wanted += [("launch", 16), ("launch", 32), ("launch", 64), ("launch", 32), ("launch", 32)]
    assert kernel.calls == wanted and tuner.best_config.kwargs == {"BT": 32}
    assert found.configs == 3 and tuner.do_bench is kept and Autotuner._bench is before


def test_the_plan_of_all_runs() -> None:
    schedule = speed._schedule(text_plan.FULL, 10)
    taken = speed.WARM + 1 + (speed.TURNS + 1) * 10
    # the observatory looks at the last step, and once in `look`
    assert schedule.steps > taken and schedule.look > taken
    bytes_, targets = speed._random_bytes(FEW, 3, 0, torch.device("cpu"))
    assert bytes_.shape == (3, 2, 8) and torch.equal(bytes_[..., 1:], targets[..., :-1])
