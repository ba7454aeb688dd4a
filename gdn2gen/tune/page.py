"""`gdn2gen report`: what a GPU's searches found, tried and refused, as one self-contained page."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from optuna.trial import TrialState

from gdn2gen import __version__, store
from gdn2gen.bench import floor_bytes
from gdn2gen.device import Device
from gdn2gen.errors import TuneError
from gdn2gen.paths import templates_dir
from gdn2gen.plans import LEVELS
from gdn2gen.shapes import SHAPES
from gdn2gen.store import Entry
from gdn2gen.tune import charts
from gdn2gen.tune.charts import Bar
from gdn2gen.tune.recheck import problem_of, shape_of, words_of

if TYPE_CHECKING:
    import optuna

    from gdn2gen.tune.ledger import Refusal

TEMPLATE = "report/page.html.jinja"
# Importances of fewer trials than this are noise.
_ENOUGH = 8


@dataclass(frozen=True)
class Line:
    """One tuned entry, beside the default, flash-linear-attention and the memory floor, in ms."""

    entry: Entry
    name: str
    default_ms: float | None
    tuned_ms: float
    forward_ms: float | None
    fla_ms: float | None
    floor_ms: float | None
    stale: bool

    @property
    def problem(self) -> str:
        return words_of(self.entry)

    @property
    def speedup(self) -> float | None:
        return None if self.default_ms is None else self.default_ms / self.tuned_ms

    @property
    def to_fla(self) -> float | None:
        return None if self.fla_ms is None else self.fla_ms / self.tuned_ms

    @property
    def to_floor(self) -> float | None:
        return None if self.floor_ms is None else self.tuned_ms / self.floor_ms

    @property
    def worst_error(self) -> tuple[str, float] | None:
        return max(self.entry.gate.items(), key=lambda item: item[1], default=None)


class StageSearch:
    """The trials of one stage at one chunk size, from its latest study."""

    def __init__(self, stage: str, BT: int, study: optuna.Study) -> None:
        self.stage, self.BT = stage, BT
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        self.trials = study.get_trials(deepcopy=False, states=states)
        self._study = study

    @cached_property
    def complete(self) -> list[optuna.trial.FrozenTrial]:
        return [x for x in self.trials if x.state == TrialState.COMPLETE]

    @property
    def best(self) -> optuna.trial.FrozenTrial:
        return min(self.complete, key=lambda trial: _ms(trial))

    @property
    def best_ms(self) -> float:
        return _ms(self.best)

    @property
    def default_ms(self) -> float:
        """The first trial is the default's."""
        return _ms(self.complete[0])

    @property
    def best_knobs(self) -> str:
        return " ".join(f"{name}={value}" for name, value in sorted(self.best.params.items()))

    @cached_property
    def importances(self) -> dict[str, float]:
        """Share of each knob in the differences of time (PED-ANOVA), the largest first."""
        from optuna.exceptions import ExperimentalWarning
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        if len(self.complete) < _ENOUGH:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            try:
                found = get_param_importances(
                    self._study, evaluator=PedAnovaImportanceEvaluator()
                )
            except (RuntimeError, ValueError):
                return {}  # every trial alike
        return {name: share for name, share in found.items() if share > 0.005}

    def slices(self) -> dict[str, dict[str, list[float]]]:
        """Times by knob and value, of the knobs that took more than one."""
        found = {}
        for name in sorted({x for trial in self.complete for x in trial.params}):
            columns: dict[Any, list[float]] = {}
            for trial in self.complete:
                columns.setdefault(trial.params[name], []).append(_ms(trial))
            if len(columns) > 1:
                ordered = sorted(columns.items(), key=lambda item: (str(type(item[0])), item[0]))
                found[name] = {str(value): times for value, times in ordered}
        return found


def _ms(trial: optuna.trial.FrozenTrial) -> float:
    assert trial.value is not None
    return float(trial.value)


def searches(
    storage: optuna.storages.BaseStorage, op: str, device: Device, first: Iterable[int] = ()
) -> list[StageSearch]:
    """The latest study of each stage and chunk size that has times; chunk sizes `first` first."""
    import optuna

    latest: dict[tuple[str, int], tuple[Any, StageSearch]] = {}
    for name in optuna.study.get_all_study_names(storage):
        parts = name.split("/")
        if len(parts) != 5 or parts[:2] != [op, device.slug]:
            continue
        stage, BT = parts[2], int(parts[3].removeprefix("BT"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = StageSearch(stage, BT, optuna.load_study(study_name=name, storage=storage))
        if found.complete:
            last = max(str(trial.datetime_complete) for trial in found.complete)
            if (stage, BT) not in latest or last > latest[stage, BT][0]:
                latest[stage, BT] = (last, found)
    preferred = {*first}
    keys = sorted(latest, key=lambda key: (key[1] not in preferred, key[1], key[0]))
    return [latest[key][1] for key in keys]


def lines(entries: Iterable[Entry], device: Device, results: dict[str, Any] | None) -> list[Line]:
    """What is on file, in the order of the shapes; entries without times are left out."""
    found = []
    for entry in entries:
        ms = entry.measured.get("forward_backward_ms")
        shape = shape_of(entry)
        if ms is None or shape is None:
            continue
        problem = problem_of(entry, shape)
        floor = None
        if device.memory_gbps:
            tokens = shape.B * shape.T * shape.H
            floor = floor_bytes(problem, True) * tokens / device.memory_gbps / 1e6
        found.append(
            Line(
                entry,
                shape.name,
                entry.measured.get("default_forward_backward_ms"),
                ms,
                entry.measured.get("forward_ms"),
                _fla_ms(results, problem.key, shape.name, entry.level),
                floor,
                store.is_stale(entry),
            )
        )
    order = list(SHAPES)

    def place(line: Line) -> tuple[str, int, str, int]:
        known = order.index(line.name) if line.name in order else len(order)
        return str(line.entry.problem_key), known, line.name, LEVELS.index(line.entry.level)

    return sorted(found, key=place)


def _fla_ms(
    results: dict[str, Any] | None, key: dict[str, Any], shape: str, level: str
) -> float | None:
    """FLA's time at this shape, where possible when told to recompute as `level` does."""
    found = {}
    for row in (results or {}).get("rows", []):
        problem = {name: row["problem"].get(name) for name in key}
        if row["shape"]["name"] == shape and problem == key and row.get("fla"):
            found[row["level"]] = float(row["fla"]["forward_backward"]["median"])
    return found.get(level, next(iter(found.values()), None))


def refused(found: Iterable[StageSearch], ledger: Iterable[Refusal]) -> Counter[tuple[str, str]]:
    """How many configs were refused, by stage and by the first words of the reason."""
    counts: Counter[tuple[str, str]] = Counter()
    for search in found:
        for trial in search.trials:
            if trial.state == TrialState.PRUNED:
                counts[search.stage, _kind(str(trial.user_attrs.get("reason", "refused")))] += 1
    for refusal in ledger:
        if refusal.stage == "pipeline":
            counts["whole pipeline", _kind(refusal.reason)] += 1
    return counts


def _kind(reason: str) -> str:
    """`resources: spills 900 bytes a thread` -> `resources`; what was never compiled says why."""
    head, separator, _ = reason.partition(":")
    return head if separator and len(head) < 30 else "not valid for this problem or GPU"


def page(
    device: Device,
    metadata: dict[str, Any],
    found: list[Line],
    stages: list[StageSearch],
    refusals: Counter[tuple[str, str]],
) -> str:
    """The page as HTML. Raises TuneError if there is nothing to show."""
    if not found and not stages:
        raise TuneError(
            f"nothing is tuned for {device.name}, and no search is on file: run `gdn2gen tune` "
            "first, or name the GPU and the storage of a search"
        )
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        device=device,
        metadata=metadata,
        by_problem=_by_problem(found),
        beside_fla=any(x.fla_ms is not None for x in found),
        stages=stages,
        refusals=refusals.most_common(),
        version=__version__,
        overview=lambda some: Markup(charts.bars([(_label(x), _bars(x)) for x in some], 960)),
        by_stage=_by_chunk_size(stages),
        progress=lambda x: Markup(charts.progress([t.value for t in x.trials])),
        importances=lambda x: Markup(
            charts.bars([(n, [Bar("tuned", s, f"{s:.0%}")]) for n, s in x.importances.items()], 330)
        ),
        dots=lambda columns: Markup(charts.dots(columns)),
    )


def _by_chunk_size(stages: list[StageSearch]) -> dict[int, Markup]:
    """One chart for each chunk size, each on a scale of its own."""
    sizes = dict.fromkeys(x.BT for x in stages)
    return {
        BT: Markup(charts.bars([(x.stage, _stage_bars(x)) for x in stages if x.BT == BT], 300))
        for BT in sizes
    }


def _by_problem(found: list[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in found:
        groups.setdefault(line.problem, []).append(line)
    return groups


def _label(line: Line) -> str:
    return f"{line.name}, {line.entry.level}"


def _bars(line: Line) -> list[Bar]:
    rows = [("fla", line.fla_ms), ("default", line.default_ms), ("tuned", line.tuned_ms)]
    return [Bar(name, ms, f"{ms:.3f}") for name, ms in rows if ms is not None]


def _stage_bars(search: StageSearch) -> list[Bar]:
    return [
        Bar("default", search.default_ms, f"{search.default_ms:.3f}"),
        Bar("tuned", search.best_ms, f"{search.best_ms:.3f}"),
    ]
