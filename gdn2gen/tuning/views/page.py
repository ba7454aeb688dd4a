"""`gdn2gen report`: what a GPU's searches found, tried and refused, as one self-contained page."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from optuna.trial import TrialState

from gdn2gen import __version__
from gdn2gen.base.device import Device
from gdn2gen.base.errors import TuneError
from gdn2gen.base.paths import templates_dir
from gdn2gen.kernels.extras import OFF
from gdn2gen.tuning.records.ledger import PIPELINE
from gdn2gen.tuning.views import charts
from gdn2gen.tuning.views.charts import Bar
from gdn2gen.tuning.views.lines import Line

if TYPE_CHECKING:
    import optuna

    from gdn2gen.tuning.records.ledger import Refusal
    from gdn2gen.tuning.views.parts import PartLine

TEMPLATE = "report/page.html.jinja"
# Importances of fewer trials than this are noise.
_ENOUGH = 8
_CHUNK = re.compile("BT[0-9]{1,3}")


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
        knobs = sorted(self.best.params.items())
        return " ".join(f"{name}={value}" for name, value in knobs if value != OFF)

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
                found = get_param_importances(self._study, evaluator=PedAnovaImportanceEvaluator())
            except (RuntimeError, ValueError):
                return {}  # every trial alike
        return {name: share for name, share in found.items() if share > 0.005}

    def slices(self) -> dict[str, dict[str, list[float]]]:
        """Times by knob and value, of the knobs that took more than one; extras of forms that do
        not take them are off."""
        found = {}
        for name in sorted({x for trial in self.complete for x in trial.params}):
            columns: dict[Any, list[float]] = {}
            for trial in self.complete:
                columns.setdefault(trial.params.get(name, OFF), []).append(_ms(trial))
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
        if len(parts) != 5 or parts[:2] != [op, device.slug] or not _CHUNK.fullmatch(parts[3]):
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


def refused(found: Sequence[StageSearch], ledger: Iterable[Refusal]) -> Counter[tuple[str, str]]:
    """How many configs were refused, by stage and by the first words of the reason.

    The studies know those of the stages that were searched for; the ledger all others, too, such as
    those that were ranked without a GPU.
    """
    searched = {x.stage for x in found}
    counts: Counter[tuple[str, str]] = Counter()
    for search in found:
        for trial in search.trials:
            if trial.state == TrialState.PRUNED:
                counts[search.stage, _kind(str(trial.user_attrs.get("reason", "refused")))] += 1
    for refusal in ledger:
        if refusal.stage == PIPELINE:
            counts["whole pipeline", _kind(refusal.reason)] += 1
        elif refusal.stage not in searched:
            counts[refusal.stage, _kind(refusal.reason)] += 1
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
    parts: Sequence[PartLine] = (),
) -> str:
    """The page as HTML. Raises TuneError if there is nothing to show."""
    if not found and not stages and not parts:
        raise TuneError(
            f"nothing of this op is tuned for {device.name}, and no search is on file: run "
            "`gdn2gen tune` first, or name the op, the GPU and the storage of a search"
        )
    timed = [x for x in found if x.tuned_ms is not None]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        device=device,
        metadata=metadata,
        by_problem=_by_problem(timed),
        predicted=[x for x in found if x.tuned_ms is None],
        parts=parts,
        beside_fla=any(x.fla_ms is not None for x in timed),
        stages=stages,
        refusals=refusals.most_common(),
        version=__version__,
        overview=lambda some: Markup(charts.bars([(_label(x), _bars(x)) for x in some])),
        by_stage=_by_chunk_size(stages),
        progress=lambda x: Markup(charts.progress([t.value for t in x.trials])),
        importances=lambda x: Markup(
            charts.bars([(n, [Bar("tuned", s, f"{s:.0%}")]) for n, s in x.importances.items()])
        ),
        dots=lambda columns: Markup(charts.dots(columns)),
    )
    # a name from a file may hold half of a surrogate pair, which no page can
    return text.encode(errors="backslashreplace").decode()


def _by_chunk_size(stages: list[StageSearch]) -> dict[int, Markup]:
    """One chart for each chunk size, each on a scale of its own."""
    sizes = dict.fromkeys(x.BT for x in stages)
    return {
        BT: Markup(charts.bars([(x.stage, _stage_bars(x)) for x in stages if x.BT == BT]))
        for BT in sizes
    }


def _by_problem(found: list[Line]) -> dict[str, list[Line]]:
    groups: dict[str, list[Line]] = {}
    for line in found:
        groups.setdefault(line.problem, []).append(line)
    return groups


def _label(line: Line) -> str:
    return f"{line.name}, {line.level}"


def _bars(line: Line) -> list[Bar]:
    rows = [
        ("fla", line.fla_ms, line.of_fla),
        ("default", line.default_ms, ""),
        ("tuned", line.tuned_ms, ""),
    ]
    return [Bar(name, ms, f"{ms:.3f}{words}") for name, ms, words in rows if ms is not None]


def _stage_bars(search: StageSearch) -> list[Bar]:
    return [
        Bar("default", search.default_ms, f"{search.default_ms:.3f}"),
        Bar("tuned", search.best_ms, f"{search.best_ms:.3f}"),
    ]
