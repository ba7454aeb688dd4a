"""A search for calls that expect strong decay: what it begins with, times, and files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from fake_tuning import DEVICE, PROBLEM, SMALL, FakeBackend

from gdn2gen.base.errors import InputError, TuneError
from gdn2gen.cli import program
from gdn2gen.family.decays import DecayPattern
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import SHAPES, Shape
from gdn2gen.kernels import plans
from gdn2gen.kernels.config import default_config
from gdn2gen.kernels.plans import PLANS
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.store import tuned_files
from gdn2gen.tuning import space
from gdn2gen.tuning.gpu.backend import WorkerBackend
from gdn2gen.tuning.records.stored import Stored, steady, steady_recipes, stored_recipes
from gdn2gen.tuning.run import tune
from gdn2gen.tuning.search.loop import Search
from gdn2gen.tuning.search.trials import StageTrials
from gdn2gen.tuning.views.progress import Progress
from gdn2gen.workflows.wanted import tuned_under

PREPARE = {
    **{"BK": 128, "chunks": 4, "decay": "centred", "maxnreg": 80},
    **{"num_stages": 1, "num_warps": 4, "solve": "halves"},
}
GRAD_KEY = {
    **{"BK": 64, "BV": 128, "chunks": 16, "decay": "centred", "maxnreg": 128},
    **{"num_stages": 1, "num_warps": 4},
}
FEW = Shape("few", 1, 64, 2)
PATTERN = DecayPattern("seen", "gdn2", 64, 64, ((((-9.0,) * 9,),),))


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No folders of the user's, studies in memory, three plans."""
    monkeypatch.setenv("GDN2GEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("GDN2GEN_TUNED_DIR", raising=False)
    monkeypatch.setattr(
        "gdn2gen.tuning.records.stored.packaged_tuned_dir", lambda: tmp_path / "packaged"
    )
    kept = optuna.storages.InMemoryStorage()
    monkeypatch.setattr("gdn2gen.tuning.run.open_storage", lambda *_, **__: kept)
    few = {
        level: tuple(x for x in names if not (PLANS[x].every or PLANS[x].instead))
        for level, names in plans.PLANS_OF.items()
    }
    monkeypatch.setattr(plans, "PLANS_OF", few)
    return tmp_path


def _tune(house: Path, backend: FakeBackend, **options: Any) -> Any:
    return tune(
        options.pop("problem", PROBLEM),
        [SMALL],
        DEVICE,
        budget_minutes=0.8,
        out_dir=house / "tuned",
        levels=("lean",),
        backend=backend,
        clock=backend.clock,
        progress=Progress(),
        **options,
    )


def _speed(config: Any, shape: Any) -> float:
    """As under strong decay: forms that take frames are slow."""
    return 0.5 if config.form.steady else 4.0


# What it begins with


def _in_tilelang(problem: Problem, plan: str) -> Recipe:
    """As entries for weak decay are."""
    recipe = Recipe.default(problem, plan, 32, arch=DEVICE.arch)
    anchored = [
        config
        for stage in recipe.by_stage
        for config in space.starts(stage, problem, DEVICE, 32)
        if (config.form.language, config.form.name) == ("tilelang", "anchored")
    ]
    return recipe.with_config(*anchored)


@pytest.mark.parametrize("op", ["gdn2", "kda"])
def test_it_begins_with_the_form_whose_time_does_not_depend_on_decay(op: str) -> None:
    """In what is on file of the plans that have it; in Triton with what Triton has."""
    problem, shape, regime = Problem(op), SHAPES["train4k"], SHAPES["train4k"].regime.key
    plans = ("lean", "blocks2", "states")
    stored = [Stored(tuple(regime.items()), _in_tilelang(problem, x)) for x in plans]
    alone = Recipe.default(problem, "lean", 32, arch=DEVICE.arch)
    stored.append(Stored(tuple(regime.items()), alone))
    found = list(steady_recipes(problem, plans, [shape], DEVICE, stored))
    assert [x.recipe.plan.name for x in found] == ["lean", "lean", "states"]
    for x in (found[0], found[2]):
        for stage, knobs in (("prepare", PREPARE), ("grad_key", GRAD_KEY)):
            assert {name: x.recipe[stage][name] for name in knobs} == knobs
    assert found[1].recipe.needs_triton_alone
    assert [found[1].recipe[x]["decay"] for x in ("prepare", "grad_key")] == ["tree", "log"]
    assert all(x.own and all(y.form.steady for y in x.recipe.configs) for x in found)
    assert all(x.is_for(shape, x.recipe.plan.name) for x in found)
    assert steady(_in_tilelang(problem, "blocks2"), problem, DEVICE) is None


def test_where_nothing_is_stored_it_begins_with_defaults() -> None:
    (found,) = steady_recipes(PROBLEM, ["lean"], [SMALL], DEVICE, [])
    assert found.recipe["prepare"]["decay"] == "tree"


def test_forms_that_take_frames_are_known() -> None:
    frames = {
        (name, form.language, form.name)
        for name, stage in STAGES.items()
        for form in stage.forms
        if not form.steady
    }
    anchored = ("prepare", "grad_key", "grad_blocks1", "grad_blocks2")
    wanted = {(x, y, "anchored") for x in anchored for y in ("triton", "tilelang")}
    wanted |= {
        (x, "tilelang", "cluster") for x in ("forward", "forward_blocks1", "forward_blocks2")
    }
    wanted |= {("grad_blocks4", "triton", "anchored")}
    assert frames == wanted


# What it files


def test_entries_lie_beside_those_for_weak_decay(house: Path) -> None:
    weak = _tune(house, FakeBackend())
    before = tuned_files.load_tuned(weak.path)
    assert before is not None and {x.decay for x in before.entries} == {"weak"}
    backend = FakeBackend(speed=_speed)
    report = _tune(house, backend, decay="strong")
    file = tuned_files.load_tuned(report.path)
    assert file is not None
    assert [x for x in file.entries if x.decay == "weak"] == [*before.entries]
    best = min(
        (x for x in file.entries if x.decay == "strong"),
        key=lambda x: x.measured["forward_backward_ms"],
    )
    assert best.measured["pattern"] == "strong"
    assert all(x.form.steady for x in best.configs.values())
    assert "under strong decay" in str(report.table().renderables[0].title)  # type: ignore[attr-defined]
    # the other way round: what is for strong decay is no seed of a search for weak
    stored = stored_recipes(PROBLEM, ["lean"], [SMALL], report.path, DEVICE)
    strong = {best.recipe_for(PROBLEM)}
    assert not strong & {x.recipe for x in stored}
    first = next(stored_recipes(PROBLEM, ["lean"], [SMALL], report.path, DEVICE, "strong"))
    assert first.own and all(x.form.steady for x in first.recipe.configs)


def test_studies_are_apart(house: Path) -> None:
    """Times under one decay are none under another."""
    names = set()
    drawn: tuple[Any, ...] = ("layer", "strong", PATTERN)
    for pattern in drawn:
        trials: Any = StageTrials.__new__(StageTrials)
        trials.problem, trials.shapes, trials.stage, trials.BT = PROBLEM, [SMALL], "prepare", 32
        trials.device, trials.digest, trials.pattern = DEVICE, "d", pattern
        trials.ledger = type("Ledger", (), {"toolchain": {}})
        trials._place = space.Place(PROBLEM, 32, DEVICE.arch)
        names.add(trials._name())
    assert len(names) == 3


def test_stages_of_plans_left_behind_get_no_trials() -> None:
    """Though they take most of the time: under strong decay alone, and as long as they are slow."""
    plans = ("lean", "blocks2", "fast", "states")

    def tried(decay: str, grad_blocks2: float) -> set[str]:
        slow = {"grad_blocks2": grad_blocks2, "grad_key": 0.5}
        search: Any = Search.__new__(Search)
        search.context, search.plans = SimpleNamespace(decay=decay), plans
        search.trials = {
            32: {
                stage: SimpleNamespace(best_ms=partial(slow.get, stage, 0.1))
                for plan in plans
                for stage in PLANS[plan].stages
            }
        }
        found: set[str] = search._promising(32)
        return found

    of_blocks = {"grad_blocks2", "reverse_scan_blocks2", "rescan_blocks2", "reprepare_factors"}
    assert of_blocks <= tried("weak", 3.0)
    strong = tried("strong", 3.0)
    assert not of_blocks & strong and {"prepare", "grad_key", "scan_states"} <= strong
    assert of_blocks <= tried("strong", 0.6)


# What it draws


@pytest.mark.parametrize("pattern", ["layer", "strong", PATTERN], ids=str)
def test_the_worker_is_told_what_to_draw(pattern: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    backend = WorkerBackend(DEVICE, 1, pattern)
    monkeypatch.setattr(backend._worker, "call", lambda *x, **_: called.append(x))
    recipe = Recipe.default(PROBLEM)
    backend.time_stages(recipe, ("scan",), SMALL)
    backend.time_recipe(recipe, SMALL, with_peak=False)
    backend.close()
    assert [x[-1] for x in called] == [pattern, pattern]


@pytest.mark.parametrize("gate", ["none", "softplus"])
def test_strong_is_strong_with_a_gate_in_the_kernels_too(gate: str) -> None:
    """Where a pattern of decays is none of what gates take."""
    from gdn2gen.family.activations import activate_gate
    from gdn2gen.family.problem import gate_parameters
    from gdn2gen.family.strength import strong_share
    from gdn2gen.measure import sides

    problem = Problem("kda", 32, 32, gate=gate, **gate_parameters("kda", gate))  # type: ignore[arg-type]
    inputs = sides.decaying_inputs(problem, FEW, "strong", "cpu")
    g = inputs["g"].float()
    if gate != "none":
        g = activate_gate(g, inputs["A_log"], inputs["dt_bias"].view(-1, 32), None)
    assert float(strong_share(g)) == 1.0


# What is refused


def test_what_makes_no_sense_is_refused(house: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(TuneError, match="as long under any decay"):
        _tune(house, FakeBackend(), problem=Problem("gated_delta_rule"), decay="strong")
    gated = Problem(gate="softplus", has_A_log=True)
    with pytest.raises(TuneError, match="leave the gate or the pattern out"):
        _tune(house, FakeBackend(), problem=gated, decay="strong", pattern=PATTERN)
    with pytest.raises(InputError, match="decay must be one of"):
        _tune(house, FakeBackend(), decay="fierce")
    weak = DecayPattern("idle", "gdn2", 64, 64, ((((-0.01,) * 9,),),))
    with pytest.raises(TuneError, match="its decay is weak"):
        _tune(house, FakeBackend(), decay="strong", pattern=weak)
    assert tuned_under("strong") == ("strong", None)
    PATTERN.save(tmp_path / "seen.json")
    assert tuned_under(tmp_path / "seen.json") == ("strong", PATTERN)
    with pytest.raises(InputError, match=r"decay must be one of .*nowhere"):
        tuned_under("nowhere")
    for words, said in (
        (["--op", "gdn2"], "nothing is timed without a GPU"),
        (["--op", "all"], "--op all is tuned for weak decay"),
        (["--op", "mamba3"], "--op mamba3 takes as long under any decay"),
    ):
        command = ["tune", *words, "--decay", "strong", "--target", "sm_90", "--budget", "0.1"]
        assert program.main(command) != 0
        assert said in " ".join(capsys.readouterr().err.split())


def test_explain_and_the_environment(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["explain", "--op", "gdn2", "--device", "H200", "--json"]
    assert program.main(words) == 0 and '"decay": "weak"' in capsys.readouterr().out
    assert program.main([*words, "--decay", "strong"]) == 0
    assert '"decay": "strong"' in capsys.readouterr().out
    monkeypatch.setenv("GDN2GEN_EXPECTED_DECAY", "strong")
    assert program.main(words) == 0 and '"decay": "strong"' in capsys.readouterr().out
    default = default_config("prepare", Problem(), BT=32, arch="sm_90")
    assert not default.form.steady, "what calls run that nothing is tuned for, as before"
