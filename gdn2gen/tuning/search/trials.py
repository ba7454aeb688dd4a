"""StageTrials: the Optuna study of one stage at one chunk size, and what is known from it.

A stage is searched by itself, so trials add over the stages instead of multiplying, and plans that
share a stage share its trials.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import geometric_mean
from typing import Final

import optuna
from optuna.trial import TrialState

from gdn2gen.base.device import Device
from gdn2gen.codegen.render import template_digest
from gdn2gen.family.decays import LAYER, Drawn
from gdn2gen.family.problem import Problem
from gdn2gen.family.shapes import Shape
from gdn2gen.kernels.config import Config
from gdn2gen.kernels.limits import Place
from gdn2gen.tuning import space
from gdn2gen.tuning.records.ledger import Ledger
from gdn2gen.tuning.records.storage import is_gone, open_study, owner
from gdn2gen.tuning.search.climb import next_to_best

# The sampler repeats itself in spaces of some hundred points; then an unseen point is drawn.
_ASKS: Final = 6
_FINISHED: Final = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Proposal:
    """A config to try, and its trial."""

    trial: optuna.Trial
    config: Config


class StageTrials:
    """Ask for configs of one stage, tell what became of them; times are kept per shape."""

    def __init__(
        self,
        problem: Problem,
        stage: str,
        BT: int,
        shapes: Sequence[Shape],
        device: Device,
        ledger: Ledger,
        digest: str,
        storage: optuna.storages.BaseStorage,
        seed: int = 0,
        pattern: Drawn = LAYER,
    ) -> None:
        self.problem, self.stage, self.BT, self.digest = problem, stage, BT, digest
        self.pattern = pattern
        self._place = Place(problem, BT, device.arch)
        self.shapes, self.device, self.ledger = tuple(shapes), device, ledger
        self.times: dict[Config, dict[str, float]] = {}
        self.refused: dict[Config, str] = {}
        self.asked = 0
        self.exhausted = False
        self._pending: set[Config] = set()
        self._elsewhere: set[Config] = set()
        """What other processes are at."""
        self._known: set[int] = set()
        self._unseen: list[Config] | None = None
        self._random = random.Random(seed)
        self._study = open_study(storage, self._name(), seed)
        self._resume()

    def propose(self) -> Proposal | None:
        """Next config to compile, or None once every valid one was tried or refused.

        In turns the sampler's and one next to the best: of few trials, the sampler spends most far
        from it.
        """
        self.refresh()
        near = self._draw_neighbour() if self.asked % 2 else None
        if near is not None:
            self._enqueue(near)
        for _ in range(_ASKS):
            proposal = self._ask()
            if proposal is not None:
                return proposal
        config = self._draw_unseen()
        if config is None:
            self.exhausted = True
            return None
        self._enqueue(config)
        return self._ask() or self.propose()

    def is_hopeless(self, times: Mapping[str, float]) -> bool:
        """Whether a config with these times, at some of the shapes, need not be timed further."""
        known = list(self.times.values())  # another thread may add to them
        best = {name: min(x.get(name, math.inf) for x in known) for name in times}
        return any(space.is_hopeless(self.stage, ms, best[name]) for name, ms in times.items())

    def refresh(self) -> None:
        """Take over what other processes on the same storage have found, and what they are at."""
        states = (*_FINISHED, TrialState.RUNNING)
        self._elsewhere.clear()
        for trial in self._study.get_trials(deepcopy=False, states=states):
            if trial.state == TrialState.RUNNING:
                config = self._config_of(trial)  # None before every knob is drawn
                others = trial.user_attrs.get("owner") != owner() and not is_gone(trial)
                if others and config is not None:
                    self._elsewhere.add(config)
            elif trial.number not in self._known:
                self._known.add(trial.number)
                self._take_over(trial)

    def suggest_first(self, config: Config) -> None:
        """Have `config` tried before anything else, if it is in the space and not known yet."""
        parameters = space.parameters(config, self._place)
        known = config in self.times or config in self.refused
        if parameters is not None and config["BT"] == self.BT and not known:
            self._study.enqueue_trial(parameters, skip_if_exists=True)

    def record(self, config: Config, times: Mapping[str, float]) -> None:
        """File a measurement that was not proposed: the default's."""
        new = config not in self.times
        self.times[config] = dict(times)
        parameters = space.parameters(config, self._place)
        if new and parameters is not None:
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=parameters,
                    distributions=space.distributions(config, self._place),
                    value=geometric_mean(list(times.values())),
                    user_attrs={"times": dict(times)},
                )
            )

    def succeed(self, proposal: Proposal, times: Mapping[str, float]) -> None:
        """File the times (ms) of a proposal, by the name of the shape.

        Where shapes are missing (`is_hopeless`), they count as slower than the best by as much as
        those that were timed.
        """
        best = {shape.name: self.ranked(shape)[0][1] for shape in self.shapes if self.times}
        value = geometric_mean(list(times.values()))
        if len(times) < len(best):
            ratio = value / geometric_mean([best[name] for name in times])
            value = ratio * geometric_mean(list(best.values()))
        self._pending.discard(proposal.config)
        self.times[proposal.config] = dict(times)
        proposal.trial.set_user_attr("times", dict(times))
        self._study.tell(proposal.trial, value)

    def refuse(self, proposal: Proposal, reason: str) -> None:
        """File why a proposal may not be used; the sampler keeps away from its neighbourhood."""
        self._pending.discard(proposal.config)
        self.refused[proposal.config] = reason
        proposal.trial.set_user_attr("reason", reason)
        self._study.tell(proposal.trial, state=TrialState.PRUNED)

    def withdraw(self, config: Config, reason: str) -> None:
        """Drop a config that passed before and failed the full check."""
        self.times.pop(config, None)
        self.refused[config] = reason

    def abandon(self, proposal: Proposal, *, again: bool = True) -> None:
        """Give a proposal up without a verdict; `again` queues it for the next run."""
        self._pending.discard(proposal.config)
        if not again:
            self.refused[proposal.config] = "failed in this run"
        self._give_up(proposal.trial.number, proposal.config if again else None)

    def ranked(self, shape: Shape) -> list[tuple[Config, float]]:
        """Configs with their time (ms) at `shape`, fastest first."""
        found = [(x, times[shape.name]) for x, times in self.times.items() if shape.name in times]
        return sorted(found, key=lambda pair: pair[1])

    def best_ms(self) -> float:
        """Geometric mean over the shapes of the best time at each, in ms; inf without trials."""
        best = [self.ranked(shape)[:1] for shape in self.shapes]
        return geometric_mean([x[0][1] for x in best]) if all(best) else float("inf")

    def best(self) -> tuple[Config, Mapping[str, float]]:
        """The config with the least mean of those timed at every shape, and its times."""
        means = self._means()
        config = min(means, key=lambda x: means[x])
        return config, self.times[config]

    def tried(self) -> tuple[int, int]:
        """Configs that were tried, and all that are worth compiling."""
        worth = {*space.valid_configs(self.stage, self.problem, self.device, self.BT)}
        return len(worth & (self.times.keys() | self.refused.keys())), len(worth)

    def _ask(self) -> Proposal | None:
        trial = self._study.ask()
        # at once: a trial that nobody owns is taken for one of a process that ended
        trial.set_user_attr("owner", owner())
        config = space.suggest(trial, self.stage, self._place)
        if self._is_seen(config):
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        reason = self._why_not(config)
        proposal = Proposal(trial, config)
        if reason is not None:
            self.refuse(proposal, reason)
            return None
        self._pending.add(config)
        self.asked += 1
        return proposal

    def _is_new(self, config: Config) -> bool:
        return not self._is_seen(config) and self._why_not(config) is None

    def _is_seen(self, config: Config) -> bool:
        return any(config in seen for seen in (self.times, self._pending, self._elsewhere))

    def _why_not(self, config: Config) -> str | None:
        return (
            self.refused.get(config)
            or space.why_hopeless(config, self.problem, self.device)
            or self.ledger.why_refused(self.problem, config, template_digest(config))
        )

    def _enqueue(self, config: Config) -> None:
        parameters = space.parameters(config, self._place)
        assert parameters is not None, f"{self.stage} [{config}] is not in its own space"
        self._study.enqueue_trial(parameters)

    def _draw_neighbour(self) -> Config | None:
        """One that was not seen yet, next to the best of those timed at every shape."""
        return next_to_best(self._means(), self._is_new, self.problem, self.device, self._random)

    def _means(self) -> dict[Config, float]:
        """Of those timed at every shape."""
        return {
            config: geometric_mean(list(times.values()))
            for config, times in self.times.items()
            if len(times) >= len(self.shapes)
        }

    def _draw_unseen(self) -> Config | None:
        if self._unseen is None:
            configs = space.valid_configs(self.stage, self.problem, self.device, self.BT)
            self._unseen = list(configs)
            self._random.shuffle(self._unseen)
        while self._unseen:
            config = self._unseen.pop()
            if self._is_new(config):
                return config
        return None

    def _give_up(self, number: int, again: Config | None) -> None:
        try:
            self._study.tell(number, state=TrialState.FAIL)
        except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
            return  # another process was faster
        parameters = None if again is None else space.parameters(again, self._place)
        if parameters is not None:
            self._study.enqueue_trial(parameters)

    def _resume(self) -> None:
        """Take over what earlier runs left; their trials in flight are queued again."""
        self.refresh()
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_gone(trial):
                # a process may end before all knobs are drawn: then there is nothing to queue again
                self._give_up(trial.number, self._config_of(trial))

    def _config_of(self, trial: optuna.trial.FrozenTrial) -> Config | None:
        return space.stored_config(self.stage, {"BT": self.BT, **trial.params})

    def _take_over(self, trial: optuna.trial.FrozenTrial) -> None:
        config = self._config_of(trial)
        if config is None or config in self.times or config in self.refused:
            return
        if trial.state == TrialState.PRUNED:
            self.refused[config] = str(trial.user_attrs.get("reason", "refused before"))
        elif "times" in trial.user_attrs:
            self.times[config] = dict(trial.user_attrs["times"])

    def _name(self) -> str:
        """Names the study by all that its times depend on."""
        content = [
            self.problem.document,
            sorted((asdict(x) for x in self.shapes), key=str),
            self.ledger.toolchain,
            self.digest,
            # Optuna wants one domain per knob and study.
            space.asked(self.stage, self._place),
        ]
        if self.pattern != LAYER:
            drawn = self.pattern
            content.append(drawn if isinstance(drawn, str) else asdict(drawn))
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
        parts = (self.problem.op, self.device.slug, self.stage, f"BT{self.BT}", digest)
        return "/".join(parts)
