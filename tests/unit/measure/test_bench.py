"""The benchmark without a GPU: floors, errors, tables, and the file of results."""

from __future__ import annotations

import inspect
import io
import json
import math
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from taken import of_op

from gdn2gen.base.device import named_device
from gdn2gen.base.errors import DeviceError, StoreError, UnsupportedError
from gdn2gen.family.problem import WHERE_TAKEN, Problem, gate_parameters
from gdn2gen.family.registry import OPS, recurrence_named
from gdn2gen.family.shapes import SHAPES, Shape
from gdn2gen.kernels import floor
from gdn2gen.kernels.stages import STAGES
from gdn2gen.measure import accuracy, peers, results, rows, sides, timing
from gdn2gen.measure.rows import Row, StageRow
from gdn2gen.measure.sides import Errors, Side, Times
from gdn2gen.measure.timing import Timing

BF16 = Problem()


def test_floor_bytes_are_those_of_the_notes():
    assert floor.floor_bytes(BF16, backward=False) == 2048
    assert floor.floor_bytes(BF16, backward=True) == 5888
    gated = Problem(gate="softplus", has_A_log=True, gate_dtype="bf16")
    assert floor.floor_bytes(gated, backward=False) == 1792


def test_floor_ms_at_a_bandwidth():
    assert timing.floor_ms(BF16, SHAPES["train4k"], False, 4300) == pytest.approx(0.1249, abs=1e-3)
    assert timing.floor_ms(BF16, SHAPES["train4k"], True, 4300) == pytest.approx(0.359, abs=1e-3)


def test_every_stage_has_its_bytes_at_every_shape():
    for shape in SHAPES.values():
        problem = Problem(varlen=shape.cu_seqlens is not None)
        sizes = timing.symbol_sizes(problem, shape, 64)
        assert all(stage.nbytes(problem, sizes) > 0 for stage in STAGES.values())


def test_timing_of_samples():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (timing.median, timing.n) == (3.0, 5)
    assert timing.p20 < timing.median < timing.p80
    assert timing.spread == pytest.approx((timing.p80 - timing.p20) / 3)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@pytest.mark.parametrize("measure", [timing.time_ms, timing.peak_mib])
def test_measuring_without_a_gpu_is_refused(measure):
    with pytest.raises(DeviceError, match="needs a GPU"):
        measure(lambda: None)


def test_relative_errors():
    exact = {"a": torch.ones(4), "zero": torch.zeros(4), "nan": torch.ones(2)}
    exact["gone"] = torch.ones(1)
    found = {
        "a": torch.full((4,), 1.01),
        "zero": torch.full((4,), 0.5),
        "nan": torch.tensor([1.0, float("nan")]),
    }
    errors = accuracy.relative_errors(found, exact)
    assert errors["a"] == pytest.approx(0.01, rel=1e-4)
    assert errors["zero"] == pytest.approx(1.0)
    assert math.isinf(errors["nan"]) and math.isinf(errors["gone"])


OF_FLA = [op for op in OPS if recurrence_named(op).public.fla]


@pytest.mark.parametrize("op", OF_FLA)
def test_fla_that_is_not_installed_is_named(monkeypatch, op):
    monkeypatch.setitem(sys.modules, f"fla.ops.{op}", None)
    with pytest.raises(UnsupportedError, match=f"flash-linear-attention with fla.ops.{op}"):
        peers.peer_op("fla", op, "lean")


def test_mamba_ssm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", None)
    with pytest.raises(UnsupportedError, match=r"needs mamba_ssm\.ops\.triton\.ssd_combined"):
        peers.peer_op("mamba_ssm", "mamba2", "lean")
    with pytest.raises(UnsupportedError, match="mamba_ssm has no gdn2"):
        peers.peer_op("mamba_ssm", "gdn2", "lean")
    with pytest.raises(UnsupportedError, match="flash-linear-attention has no mamba2"):
        peers.peer_op("fla", "mamba2", "lean")


def test_mamba_ssm_is_called_by_its_own_names(monkeypatch):
    """Ours stands for it: both sides then give the same bits, at one group of heads."""
    from gdn2gen import mamba_chunk_scan_combined

    module = SimpleNamespace(mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", module)
    problem = Problem(
        "mamba2", K=16, V=24, dtype="fp32", gate="softplus", final_state=True, initial_state=True,
        **gate_parameters("mamba2", "softplus"),
    )  # fmt: skip
    shape = Shape("tiny", 1, 9, 4, groups=1)
    inputs = accuracy.inputs_of(problem, shape, "layer", 0, "cpu")
    gradients = accuracy.output_gradients(problem, shape, 0, "cpu")
    assert inputs["q"].shape[2] == 1 and {"rate", "dt_bias", "D", "z"} <= {*inputs}
    ours, theirs, plain = (
        accuracy.run_op(x, problem, inputs, gradients)
        for x in (
            sides.our_op("mamba2", "lean"),
            peers.peer_op("mamba_ssm", "mamba2", "lean"),
            accuracy.public_op("mamba2"),
        )
    )
    assert {*ours} == {*theirs} == {*plain} >= {"o", "final_state", "drate", "dz", "dD"}
    assert all(torch.equal(ours[x], theirs[x]) for x in ours)
    assert max(accuracy.relative_errors(ours, plain).values()) < 1e-6


@pytest.mark.parametrize(
    ("op", "dims"), [("gdn2", [2, 16]), ("gated_delta_rule", [2]), ("mamba2", [2])]
)
def test_the_bias_of_a_gate_has_the_dims_of_kernels(op, dims):
    """One number a channel, or, where the decay is a head's, one a head."""
    problem = Problem(op, K=16, V=16, gate="softplus", **gate_parameters(op, "softplus"))
    shape = Shape("tiny", 1, 17, 2)
    inputs = accuracy.inputs_of(problem, shape, "layer", 0, "cpu")
    made = rows._unfolded_bias(problem, shape, inputs)
    assert {x: [*y.shape] for x, y in made.items()} == {"dt_bias": dims}
    assert rows._unfolded_bias(problem, shape, {}) == {}


def test_a_step_is_measured_with_weak_and_with_strong_decay():
    problem = Problem("mamba2", gate="softplus", **gate_parameters("mamba2", "softplus"))
    found = {}
    for pattern in ("layer", "strong", "zero"):
        x = accuracy.inputs_of(problem, Shape("tiny", 1, 99, 8, groups=1), pattern, 0, "cpu")
        step = torch.nn.functional.softplus(x["dt"] + x["dt_bias"])
        found[pattern] = (step * x["rate"]).mean().item()
    assert -1 < found["layer"] < -0.05 and found["strong"] < -10 and found["zero"] == 0


@pytest.mark.parametrize("op", OF_FLA)
def test_both_sides_are_given_the_same_and_only_what_they_take(monkeypatch, op):
    """FLA's ops swallow keywords that they do not know."""
    asked = {}

    def fla(**arguments):
        asked.update(arguments)
        return torch.zeros(1), None

    chunk = recurrence_named(op).public.chunk
    monkeypatch.setitem(sys.modules, f"fla.ops.{op}", SimpleNamespace(**{chunk: fla}))
    problem = of_op(Problem(gate="softplus", has_A_log=True), op)
    inputs = accuracy.inputs_of(problem, Shape("tiny", 1, 5, 2), "layer", 0, "cpu")
    peers.fla_op(op, "lean")(**inputs, **accuracy.op_flags(problem))
    assert {*asked} <= {*inspect.signature(accuracy.public_op(op)).parameters}
    of_beta = {"use_beta_sigmoid_in_kernel", "allow_neg_eigval"}
    assert of_beta & {*asked} == (of_beta if recurrence_named(op).activates_beta else set())


def test_a_beta_before_its_sigmoid_has_either_sign():
    shape = Shape("tiny", 1, 50, 2)
    for wide, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        problem = Problem(op="kda", beta_sigmoid=True, beta_fp32=wide)
        beta = accuracy.inputs_of(problem, shape, "correlated", 0, "cpu")["beta"]
        assert beta.dtype == dtype and beta.min() < -0.5 and beta.max() > 0.5


@pytest.mark.parametrize(("level", "keeps"), [("lean", False), ("fast", True)])
def test_fla_recomputes_as_we_do(monkeypatch, level, keeps):
    asked = {}

    def chunk_gdn2(**arguments):
        asked.update(arguments)
        return torch.zeros(1), None

    monkeypatch.setitem(sys.modules, "fla.ops.gdn2", SimpleNamespace(chunk_gdn2=chunk_gdn2))
    peers.fla_op("gdn2", level)(lower_bound=-2.0)
    assert asked == {"lower_bound": -2.0, "safe_gate": True, "disable_recompute": keeps}


def test_flash_qla_is_called_by_what_it_takes(monkeypatch):
    asked = {}

    def chunk_gated_delta_rule(**arguments):
        asked.update(arguments)
        return torch.zeros(1), None

    module = SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "flash_qla", module)
    op = peers.peer_op("flash_qla", "gated_delta_rule", "lean")
    q = torch.zeros(1, 2, 1, 128, dtype=torch.bfloat16)
    problem = Problem("gated_delta_rule")
    op(q=q, k=q, v=q, g=1, beta=2, output_final_state=False, **accuracy.op_flags(problem))
    assert {*asked} == {
        *("q", "k", "v", "g", "beta", "output_final_state"),
        *("use_qk_l2norm_in_kernel", "state_v_first"),
    }
    with pytest.raises(UnsupportedError, match="use_gate_in_kernel was asked for"):
        op(q=q, k=q, v=q, use_gate_in_kernel=True)
    with pytest.raises(UnsupportedError, match="K=64, V=128"):
        op(q=q[..., :64], k=q, v=q)
    with pytest.raises(UnsupportedError, match=r"torch\.float32"):
        op(q=q.float(), k=q, v=q.float())
    with pytest.raises(UnsupportedError, match="no kda"):
        peers.peer_op("flash_qla", "kda", "lean")
    monkeypatch.setitem(sys.modules, "flash_qla", None)
    with pytest.raises(UnsupportedError, match="pip install flash-qla"):
        peers.peer_op("flash_qla", "gated_delta_rule", "lean")


def test_the_fastest_peer_that_can_be_imported(monkeypatch):
    monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    monkeypatch.setenv("FLA_FLASH_QLA", "")  # restored afterwards
    monkeypatch.delenv("FLA_FLASH_QLA")
    gone = ("flash_qla", "mamba_ssm", "fla.ops.gla")
    for name in gone:
        monkeypatch.setitem(sys.modules, name, None)
    fla = SimpleNamespace(chunk_gated_delta_rule=lambda **_: None)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", fla)
    assert peers.any_peer("gated_delta_rule", "lean") == ("fla", "")
    assert peers.os.environ["FLA_FLASH_QLA"] == "0"  # which would stand in for it
    monkeypatch.setitem(sys.modules, "flash_qla", fla)
    assert peers.any_peer("gated_delta_rule", "lean") == ("flash_qla", "")
    for op, name in (("gla", "fla.ops.gla"), ("mamba2", "mamba_ssm"), ("mamba3", "mamba_ssm")):
        peer, why = peers.any_peer(op, "lean")
        assert peer is None and why.startswith(f"{op} is measured alone") and name in why


def side(ms: float) -> Side:
    timing = Timing(ms, ms, ms, 10)
    errors = {"o": Errors(4e-3, "layer"), "dg": Errors(7e-3, "sparse")}
    return Side(timing, Timing(3 * ms, 3 * ms, 3 * ms, 10), 1500.0, errors)


def row(name: str, ms: float = 0.7, fla: bool = True) -> Row:
    timing = Timing(0.1, 0.1, 0.1, 10)
    stages = [StageRow("scan", timing, 400_000_000, 20_000_000_000, 5000.0, 800.0)]
    return Row(
        shape=SHAPES[name],
        problem=BF16,
        level="lean",
        recipe="lean (default)",
        ours=side(ms),
        fla=side(1.0) if fla else None,
        floor_forward_ms=0.125,
        floor_forward_backward_ms=0.36,
        stages=stages,
    )


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("gdn2gen.base.device.present_device", lambda: named_device("H200"))


def test_of_each_side_the_faster_of_two_turns_counts(monkeypatch):
    """A host that is slow in a process's first seconds must not count against one of them."""
    order, clock = [], iter(range(100))

    def op(name):
        def call(**_):
            order.append(name)
            return torch.zeros(1), None

        return call

    def time_ms(fn):
        fn()
        turn = next(clock)  # ours, ours, FLA, FLA, and again; then the same for each decay
        ms = [5.0, 9.0, 7.0, 8.0, 6.0, 4.0, 3.0, 8.5][turn % 8] * 10 ** (turn // 8)
        return Timing(ms, ms, ms, 10)

    monkeypatch.setattr(sides, "time_ms", time_ms)
    monkeypatch.setattr(sides, "peak_mib", lambda fn: 100.0)
    drawn = []
    monkeypatch.setattr(sides, "inputs_of", lambda *given: drawn.append(given[2]) or {})
    monkeypatch.setattr(sides, "output_gradients", lambda *_: {})
    monkeypatch.setattr(sides, "run_op", lambda function, *_: function())
    errors = [{"o": Errors(4e-3, "layer")}, {"o": Errors(5e-3, "zero")}]
    functions = [op("ours"), op("FLA")]
    ours, fla = sides.measure_in_turns(functions, errors, BF16, SHAPES["train4k"])
    assert order == ["ours", "ours", "FLA", "FLA"] * 6
    assert drawn == ["layer", "zero", "strong"]
    assert (ours.forward.median, ours.forward_backward.median) == (5.0, 4.0)
    assert (fla.forward.median, fla.forward_backward.median) == (3.0, 8.0)
    assert [ours.errors, fla.errors] == errors
    for number, decay in enumerate(("weak", "strong"), 1):
        of_ours, of_fla = ours.decays[decay], fla.decays[decay]
        times = [x.median for x in (of_ours.forward, of_ours.forward_backward, of_fla.forward)]
        assert times == [5.0 * 10**number, 4.0 * 10**number, 3.0 * 10**number]


def test_a_peer_that_raises_is_left_out_and_ours_is_measured(monkeypatch):
    """As flash-linear-attention does where it knows that a Triton miscompiles its kernels."""
    ours, fla = object(), object()

    def worst_errors(function, _):
        if function is fla:
            raise RuntimeError("Triton 3.6 on Hopper produces incorrect results")
        return {"o": Errors(4e-3, "layer")}

    def measure_in_turns(functions, errors, *_):
        assert functions == [ours] and len(errors) == 1
        return [Side(Timing(1.0, 1.0, 1.0, 9), Timing(3.0, 3.0, 3.0, 9), 100.0, errors[0])]

    monkeypatch.setattr(rows, "our_op", lambda *_: ours)
    monkeypatch.setattr(rows, "peer_op", lambda *_: fla)
    monkeypatch.setattr(rows, "worst_errors", worst_errors)
    monkeypatch.setattr(rows, "measure_in_turns", measure_in_turns)
    monkeypatch.setattr(rows, "copy_gbps", lambda: 4300.0)
    monkeypatch.setattr(rows, "_recipe_name", lambda *_: "")
    with pytest.warns(UserWarning, match="fla is left out: it raised RuntimeError: Triton 3.6 on"):
        (row,) = rows.bench_shapes(
            "simple_gla", [SHAPES["train4k"]], 128, 128, "bf16", vs="fla", gate="none", l2norm=False
        )
    assert row.fla is None and row.ours.forward.median == 1.0


def test_a_peer_that_raises_at_a_shape_is_left_out_there_and_ours_is_measured(monkeypatch):
    """As one does that has no memory for what ours has."""
    ours, fla = object(), object()

    def measure_in_turns(functions, errors, _, shape):
        if fla in functions and shape.name == "train2k":
            raise torch.OutOfMemoryError("CUDA out of memory")
        times = Timing(1.0, 1.0, 1.0, 9), Timing(3.0, 3.0, 3.0, 9), 100.0
        return [Side(*times, x) for _, x in zip(functions, errors, strict=True)]

    monkeypatch.setattr(rows, "our_op", lambda *_: ours)
    monkeypatch.setattr(rows, "peer_op", lambda *_: fla)
    monkeypatch.setattr(rows, "worst_errors", lambda *_: {"o": Errors(4e-3, "layer")})
    monkeypatch.setattr(rows, "measure_in_turns", measure_in_turns)
    monkeypatch.setattr(rows, "copy_gbps", lambda: 4300.0)
    monkeypatch.setattr(rows, "_recipe_name", lambda *_: "")
    shapes = [SHAPES["train2k"], SHAPES["train4k"]]
    with pytest.warns(UserWarning, match="fla is left out at train2k: it raised OutOfMemoryError"):
        found = rows.bench_shapes("gdn2", shapes, 128, 128, "bf16", vs="fla", gate="none")
    assert [x.fla is None for x in found] == [True, False]
    assert all(x.ours.forward.median == 1.0 for x in found)

    def broken(*_):
        raise RuntimeError("ours")

    monkeypatch.setattr(rows, "measure_in_turns", broken)
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="ours"):
        rows.bench_shapes("gdn2", shapes, 128, 128, "bf16", vs="fla", gate="none")


def test_what_does_not_decay_is_measured_once(monkeypatch):
    drawn = []
    monkeypatch.setattr(sides, "time_ms", lambda fn: (fn() and None) or Timing(1.0, 1.0, 1.0, 9))
    monkeypatch.setattr(sides, "peak_mib", lambda fn: 100.0)
    monkeypatch.setattr(sides, "inputs_of", lambda *given: drawn.append(given[2]) or {})
    monkeypatch.setattr(sides, "output_gradients", lambda *_: {})
    monkeypatch.setattr(sides, "run_op", lambda *_: None)
    problem = Problem(op="delta_rule")
    function = lambda **_: (torch.zeros(1), None)  # noqa: E731
    (found,) = sides.measure_in_turns([function], [{}], problem, SHAPES["train4k"])
    assert drawn == ["layer"] and found.decays == {}


def _least_and_most_decay(problem, shape, decay):
    """Of a token, in nats, out of what a member's kernels make of the inputs."""
    inputs = sides.decaying_inputs(problem, shape, decay, "cpu")
    member = recurrence_named(problem.op)
    g = inputs[member.decay.input].double()
    channels = member.decays_by == "channel"
    bias = inputs.get("dt_bias", torch.zeros(())).double()
    bias = bias.view(shape.H, problem.K) if channels and bias.dim() else bias
    rate = inputs["A_log"].double().exp() if "A_log" in inputs else torch.ones(shape.H)
    rate = rate[:, None] if channels else rate
    if problem.gate == "softplus":
        g = torch.nn.functional.softplus(g + bias) * (1 if member.stepped else -rate)
    elif problem.gate == "sigmoid":
        g = -5.0 * torch.sigmoid(rate * (g + bias))
    if member.stepped:
        g = g * inputs.get("rate", torch.tensor(-1.0)).double()
    return g.max().item(), g.min().item()


@pytest.mark.parametrize(
    ("op", "gate"),
    [(op, gate) for op in OPS for gate in recurrence_named(op).activations
     if recurrence_named(op).decay],
)  # fmt: skip
def test_weak_decay_forgets_nothing_and_strong_decay_all_but_a_few_tokens(op, gate):
    shape = Shape("small", 1, 64, 4)
    problem = rows.bench_problem(op, 32, 32, "bf16", gate, WHERE_TAKEN, shape)
    # of a whole sequence of 32768 tokens more than a tenth stays
    most, least = _least_and_most_decay(problem, shape, "weak")
    assert most <= 0 and least > -2.3 / 32768
    most, _ = _least_and_most_decay(problem, shape, "strong")
    assert most < (-2.0 if gate == "softplus" else -4.5)


def test_ratios_and_rates():
    measured = row("train4k", 0.5)
    assert measured.ratio_to_fla == pytest.approx((2.0, 2.0))
    assert measured.ratio_to_floor[0] == pytest.approx(4.0)
    assert measured.stages[0].gbps == pytest.approx(4000)
    assert measured.stages[0].tflops == pytest.approx(200)
    assert row("train4k", fla=False).ratio_to_fla is None


def test_the_table_shows_times_ratios_errors_and_stages():
    from rich.console import Console

    text = io.StringIO()
    given = [row("train4k"), row("wide8k", fla=False)]
    decays = {x: Times(Timing(y, y, y, 9), Timing(2 * y, y, y, 9))
              for x, y in (("weak", 0.123), ("strong", 0.456))}  # fmt: skip
    given[0] = replace(given[0], ours=replace(given[0].ours, decays=decays))
    Console(file=text, width=200).print(results.rows_table(given))
    words = ("train4k", "wide8k", "0.700", "7.00e-03 (sparse)", "lean (default)")
    words = (*words, "ours, weak", "FLA, strong", "0.123 / 0.246", "0.456 / 0.912")
    for word in (*words, "4000", "80%", "20.0", "200", "25%"):
        assert word in text.getvalue()


def test_results_merge_by_shape_and_problem(tmp_path, gpu):
    path = tmp_path / "results" / "nvidia-h200.json"
    results.save_results(path, [row("train4k", 0.9), row("wide8k")], command="first")
    results.save_results(path, [row("train4k", 0.5)], command="second")
    document = results.read_results(path)
    assert document["gpu"] == "NVIDIA H200"
    by_name = {x["shape"]["name"]: x for x in document["rows"]}
    assert by_name["train4k"]["ours"]["forward"]["median"] == 0.5
    assert by_name["train4k"]["command"] == "second"
    assert by_name["wide8k"]["command"] == "first"
    assert by_name["wide8k"]["versions"]["torch"]
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_results_of_calls_that_expect_strong_decay_are_rows_of_their_own(tmp_path, gpu):
    path = tmp_path / "results.json"
    results.save_results(path, [row("train4k", 0.9)])
    results.save_results(path, [replace(row("train4k", 0.5), decay="strong")])
    rows = {x.get("decay"): x for x in results.read_results(path)["rows"]}
    assert {x: y["ours"]["forward"]["median"] for x, y in rows.items()} == {
        None: 0.9,
        "strong": 0.5,
    }


@pytest.mark.parametrize(("op", "told"), [("gdn2", True), ("gated_delta_rule", False)])
def test_our_op_is_told_what_to_expect_where_it_can_be(op, told):
    keywords = sides.our_op(op, "fast", "strong").keywords
    assert keywords == {"disable_recompute": True} | ({"expected_decay": "strong"} if told else {})


def test_results_of_another_gpu_or_kind_are_not_overwritten(tmp_path, gpu):
    path = tmp_path / "results.json"
    for text, words in (
        ("{", "cannot be read"),
        ("[]", "schema"),
        (json.dumps({"schema": 1, "gpu": "NVIDIA L4", "rows": []}), "NVIDIA L4"),
    ):
        path.write_text(text)
        with pytest.raises(StoreError, match=words):
            results.save_results(path, [row("train4k")])
        with pytest.raises(StoreError, match=words):
            results.check_saveable(path, "NVIDIA H200")
        assert path.read_text() == text


def _save(folder, name):
    for _ in range(5):
        results.save_results(folder / "results.json", [row(name)], command="test")


def test_rows_that_two_processes_save_all_stay(tmp_path, gpu):
    processes = [
        multiprocessing.get_context("fork").Process(target=_save, args=(tmp_path, name))
        for name in ("train4k", "wide8k", "long16k", "long32k")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    rows = results.read_results(tmp_path / "results.json")["rows"]
    assert len(rows) == 4
    assert [x.name for x in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "module", ["gdn2gen.measure.rows", "gdn2gen.tuning", "gdn2gen.base._serve"]
)
def test_imports_stay_light(module):
    code = f"import {module}, sys; sys.exit('optuna' in sys.modules or 'fla' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_operations_of_a_stage_are_those_of_its_products():
    """Of a scan five products a tile: three of 32 x 128 x 128 and two of 32 x 32 x 128."""
    sizes = timing.symbol_sizes(BF16, SHAPES["train4k"], 32)
    tiles = 4 * 16 * 4096 // 32
    expected = 2 * tiles * (3 * 32 * 128 * 128 + 2 * 32 * 32 * 128)
    assert STAGES["scan"].flops(BF16, sizes) == expected
    assert STAGES["scan_states"].flops(BF16, sizes) == expected
    # of what only writes, two and one: o from the state and the values, and the state
    only_writes = 2 * tiles * (2 * 32 * 128 * 128 + 32 * 32 * 128)
    assert STAGES["scan"].flops(Problem("gla"), sizes) == only_writes
    assert STAGES["sum_decay"].flops(BF16, sizes) == 0
    for stage in STAGES.values():
        for one in stage.products_of(BF16):
            assert len(one.split()) == 3 and {*one.split()} <= {*sizes}
