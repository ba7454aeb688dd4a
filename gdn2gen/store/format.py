"""What a tuned file says, as text and as dataclasses. Reads and writes strings only, no files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn, get_args

from gdn2gen.base.decay import WEAK, check_decay
from gdn2gen.base.errors import Gdn2genError, StoreError
from gdn2gen.family.problem import Problem, Regime, gate_parameters
from gdn2gen.family.registry import CHANNEL_OPS
from gdn2gen.kernels.config import SHARED_KNOBS, Config
from gdn2gen.kernels.plans import LEVELS, PLANS, Level, plan_named
from gdn2gen.kernels.recipe import Recipe
from gdn2gen.kernels.stages import STAGES
from gdn2gen.kernels.validity import why_invalid
from gdn2gen.store._claims import check_claims

TUNED_SCHEMA: Final = 1

Provenance = Literal["measured", "transferred", "predicted"]
PROVENANCES: Final[tuple[str, ...]] = get_args(Provenance)

# Of what a size may be: ratios of more are no floats.
_LARGEST: Final = 2**63
# Longest line of a tuned file, so that a problem and a config stay on one.
_LINE: Final = 140
_METADATA_KEYS: Final = ("schema", "gpu", "arch", "sms", "toolchain", "command", "date")
_ENTRY_KEYS: Final = (
    "problem",
    "regime",
    "level",
    "plan",
    "configs",
    "templates",
    "measured",
    "gate",
    "provenance",
)
# Of entries that were tuned under strong decay: one without it is for weak decay, as all were that
# were filed before there was the word.
_DECAY: Final = "decay"
_PROBLEM_TYPES: Final[Mapping[str, type]] = {
    name: type(value) for name, value in Problem().key.items()
}
# In the keys of problems whose gate has a bound that is known.
_BOUND_TYPE: Final[Mapping[str, type]] = {"bound": int}
_TRITON_ALONE: Final = "triton"
_EVERY_OPTION: Final = "every option"
# Of a problem's: they move the speed only a little; an entry that differs in these alone serves.
MINOR_KEYS: Final = ("l2norm", "gate", "gate_dtype", "bound")
_REGIME_TYPES: Final = dict.fromkeys(Regime(1, 1, 1).key, int)
_MEASURED_KEYS: Final = (
    "forward_ms",
    "forward_backward_ms",
    "default_forward_ms",
    "default_forward_backward_ms",
    "default_ms",
    "spread",
    "peak_mib",
    "n",
)


@dataclass(frozen=True)
class Entry:
    """The plan and configs found for one problem and regime on the GPU of the file."""

    problem_key: Mapping[str, str | int | bool]
    """`Problem.key`."""
    regime_key: Mapping[str, int]
    """`Regime.key`."""
    level: Level
    """What the caller lets the forward keep: `lean` or `fast`."""
    plan: str
    configs: Mapping[str, Config]
    """One config for each stage of the plan."""
    templates: Mapping[str, str]
    """Digest of the template of each stage that the entry was checked under."""
    measured: Mapping[str, Any]
    """Milliseconds (`forward_ms`, `forward_backward_ms`, `default_ms`), spread, peak_mib, n."""
    gate: Mapping[str, Any]
    """Errors that the check found, by output."""
    provenance: Provenance
    decay: str = WEAK
    """How strong the decay was that it was tuned under (`base.decay`)."""

    @property
    def regime(self) -> Regime:
        return Regime(**self.regime_key)

    @property
    def size(self) -> tuple[str, ...]:
        """What its entries compete for: problem, regime, level and decay."""
        return self._known[:-1]

    @property
    def key(self) -> tuple[str, ...]:
        """What a file holds one entry for: problem, regime, level, decay, whether Triton is enough,
        and whether calls with every option are served. The last two follow from the configs."""
        return (*self._known, _EVERY_OPTION if self.serves_every_option else "")

    @property
    def _known(self) -> tuple[str, ...]:
        return _key(self.problem_key, self.regime_key, self.level, self.decay, self.configs)

    def recipe_for(self, problem: Problem) -> Recipe:
        """The plan and configs, for a problem that they serve."""
        return Recipe.of(problem, self.plan, self.configs)

    @property
    def needs_triton_alone(self) -> bool:
        """Whether no stage is in another language, which not every machine can compile."""
        return _language(self.configs) == _TRITON_ALONE

    @property
    def serves_every_option(self) -> bool:
        """Whether it serves all calls that may find it, whatever their options
        (`Recipe.serves_every_option`)."""
        key = dict(self.problem_key)
        flags = gate_parameters(str(key["op"]), str(key["gate"]))
        problem = Problem(**{**key, **flags})  # type: ignore[arg-type]
        return self.recipe_for(problem).serves_every_option

    @property
    def label(self) -> str:
        """Problem, regime, level and decay in one line, for messages."""
        words = [f"{name}={value}" for name, value in self.problem_key.items() if name != "op"]
        words += [f"{name}={value}" for name, value in self.regime_key.items()]
        words += ["language=triton"] if self.needs_triton_alone else []
        words += [] if self.serves_every_option else ["options=some"]
        words += [f"level={self.level}"]
        words += [] if self.decay == WEAK else [f"decay={self.decay}"]
        return " ".join((str(self.problem_key["op"]), *words))


@dataclass(frozen=True)
class Unread:
    """An entry that this gdn2gen cannot use; kept as it is, so that a merge does not lose it."""

    raw: Any
    position: int
    reason: str


@dataclass(frozen=True)
class TunedFile:
    """Everything in one tuned file. `metadata` says of which GPU, toolchain, command and date."""

    metadata: Mapping[str, Any]
    entries: tuple[Entry, ...]
    unread: tuple[Unread, ...] = ()


def parse_file(text: str) -> TunedFile:
    """Read the text of a tuned file; entries that cannot be used are set aside in `unread`.

    Raises StoreError with the reason if the whole file cannot be read.
    """
    try:
        raw = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"it is truncated or not JSON ({error})") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("_metadata"), dict):
        raise StoreError("it is JSON, but not a tuned file: it has no _metadata")
    metadata = raw["_metadata"]
    schema = metadata.get("schema")
    if type(schema) is not int or schema != TUNED_SCHEMA:
        raise StoreError(f"its schema is {schema!r}, but this gdn2gen reads {TUNED_SCHEMA}")
    _check_types("_metadata", metadata, {"gpu": str, "arch": str, "sms": int}, others=True)
    if not 0 <= metadata["sms"] < _LARGEST:
        raise StoreError(f"_metadata.sms must be a number of processors, but is {metadata['sms']}")
    if set(raw) != {"_metadata", "entries"} or not isinstance(raw["entries"], list):
        raise StoreError(f"it should hold _metadata and a list of entries, but holds {sorted(raw)}")
    entries: list[Entry] = []
    unread: list[Unread] = []
    for position, item in enumerate(raw["entries"]):
        try:
            entries.append(entry_from(item, metadata["gpu"]))
        except Gdn2genError as error:
            unread.append(Unread(item, position, str(error)))
    return TunedFile(metadata, tuple(entries), tuple(unread))


def entry_from(raw: Any, gpu: str) -> Entry:
    """Check one entry of the file of a GPU, and freeze it.

    Raises a Gdn2genError that names what is wrong.
    """
    given = {_DECAY: str} if isinstance(raw, dict) and _DECAY in raw else {}
    _check_types("entry", raw, {**dict.fromkeys(_ENTRY_KEYS), **given})
    for name in ("problem", "regime", "configs", "templates", "measured", "gate"):
        _check_types(name, raw[name], {}, others=True)
    configs = configs_from(raw["configs"])
    entry = Entry(
        problem_key=raw["problem"],
        regime_key=raw["regime"],
        level=raw["level"],
        plan=raw["plan"],
        configs=configs,
        templates=raw["templates"],
        measured=raw["measured"],
        gate=raw["gate"],
        provenance=raw["provenance"],
        decay=raw.get(_DECAY, WEAK),
    )
    check_entry(entry, gpu)
    return entry


def check_entry(entry: Entry, gpu: str) -> None:
    """Raise a Gdn2genError unless the entry is one that `find_recipe` could use.

    It fits together, and what it claims of the GPU of that name can be true.
    """
    key = dict(entry.problem_key)
    given = _BOUND_TYPE if "bound" in key else {}
    _check_types("problem", key, {**_PROBLEM_TYPES, **given})
    _check_types("regime", dict(entry.regime_key), _REGIME_TYPES)
    for name, known in (("level", LEVELS), ("plan", tuple(PLANS)), ("provenance", PROVENANCES)):
        given = getattr(entry, name)
        if given not in known:
            raise StoreError(f"{name} must be one of {known}, but is {given!r}")
    flags = gate_parameters(str(key["op"]), str(key["gate"]))
    problem = Problem(**key, **flags)  # type: ignore[arg-type]
    if problem.key != key:
        raise StoreError(f"problem.bound must be left out where it is not known, but is in {key}")
    for name, size in entry.regime_key.items():
        if not 0 <= size < _LARGEST:
            raise StoreError(f"regime.{name} must be 0 or more and below 2^63, but is {size}")
    check_decay(entry.decay, _DECAY)
    if entry.decay != WEAK and problem.op not in CHANNEL_OPS:
        raise StoreError(
            f"decay is {entry.decay!r}, but kernels of {problem.op} take as long under any decay: "
            "leave it out"
        )
    check_configs(entry.plan, entry.configs, problem)
    unknown = sorted(set(entry.templates) - set(STAGES))
    if unknown:
        raise StoreError(f"templates name the unknown stages {unknown}; known: {list(STAGES)}")
    check_claims(entry.provenance, problem, entry.regime, entry.measured, entry.gate, gpu)


def check_configs(plan: str, configs: Mapping[str, Config], problem: Problem) -> None:
    """Raise a Gdn2genError unless `configs` are one valid config for each stage of `plan`."""
    stages = plan_named(plan).stages
    if set(configs) != set(stages):
        raise StoreError(
            f"plan {plan!r} has the stages {sorted(stages)}, but configs are given for "
            f"{sorted(configs)}"
        )
    for stage, config in configs.items():
        reason = why_invalid(config, problem)
        if config.stage != stage:
            reason = f"it is a config of {config.stage}"
        if reason is not None:
            raise StoreError(f"{stage} [{config}] cannot serve this problem: {reason}")
    for knob in SHARED_KNOBS:
        values = {stage: config[knob] for stage, config in configs.items()}
        if len(set(values.values())) > 1:
            raise StoreError(f"the stages of a plan share {knob}, but it is {values}")


def format_file(file: TunedFile) -> str:
    """The text of a tuned file: the same content gives the same bytes.

    Entries come sorted, keys in the order of the dataclass, and what fits stays on one line.
    Raises StoreError for a value that JSON cannot hold.
    """
    toolchain = file.metadata.get("toolchain")
    metadata = {"schema": TUNED_SCHEMA, **file.metadata}
    if isinstance(toolchain, Mapping):
        metadata["toolchain"] = dict(sorted(toolchain.items()))
    raw: list[tuple[tuple[str, ...], Any]] = [(x.key, entry_to(x)) for x in file.entries]
    raw += [(("~", _one_line(x.raw)), x.raw) for x in file.unread]
    raw.sort(key=lambda pair: pair[0])
    lines = ["{", f'  "_metadata": {_spread(_ordered(metadata, _METADATA_KEYS), 2)},']
    if raw:
        items = ",\n".join(f"    {_spread(item, 4)}" for _, item in raw)
        lines += ['  "entries": [', items, "  ]"]
    else:
        lines += ['  "entries": []']
    return "\n".join((*lines, "}")) + "\n"


def raw_key(raw: Any) -> tuple[str, ...] | None:
    """`Entry.key` but for its last part, of an entry that was not read, as far as it has one."""
    try:
        decay = raw.get(_DECAY, WEAK)
        key = _key(raw["problem"], raw["regime"], raw["level"], decay, raw["configs"])
    except (TypeError, KeyError, AttributeError):
        return None
    return key if isinstance(raw["level"], str) and isinstance(decay, str) else None


def _key(
    problem: Mapping[str, Any],
    regime: Mapping[str, Any],
    level: str,
    decay: str,
    configs: Mapping[str, Mapping[str, Any]],
) -> tuple[str, ...]:
    """Texts that sort as their numbers do; what Triton is enough for comes after what it is not."""
    values = [problem[name] for name in _PROBLEM_TYPES] + [problem.get("bound", 0)]
    values += [regime[name] for name in _REGIME_TYPES]
    texts = (f"{x:012d}" if type(x) is int else str(x) for x in values)
    return (*texts, level, "" if decay == WEAK else decay, _language(configs))


def _language(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Whether Triton is enough for them."""
    languages = {knobs.get("language", "triton") for knobs in configs.values()}
    return _TRITON_ALONE if languages == {"triton"} else ""


def entry_to(entry: Entry) -> dict[str, Any]:
    """The entry as a file holds it; `entry_from` reads it."""
    stages = plan_named(entry.plan).stages
    configs = {name: dict(entry.configs[name]) for name in stages}
    raw = {
        "problem": _ordered(entry.problem_key, tuple(_PROBLEM_TYPES)),
        "regime": _ordered(entry.regime_key, tuple(_REGIME_TYPES)),
        "level": entry.level,
        "plan": entry.plan,
        "configs": configs,
        "templates": _ordered(entry.templates, stages),
        "measured": _ordered(entry.measured, _MEASURED_KEYS),
        "gate": _ordered(entry.gate, ()),
        "provenance": entry.provenance,
    }
    if entry.decay != WEAK:
        raw[_DECAY] = entry.decay
    return _ordered(raw, _ENTRY_KEYS)


def configs_from(raw: Mapping[str, Any]) -> dict[str, Config]:
    """Configs by stage, from their knobs as files hold them."""
    return {stage: _config_from(stage, knobs) for stage, knobs in raw.items()}


def _config_from(stage: str, knobs: Any) -> Config:
    _check_types(f"configs.{stage}", knobs, {}, others=True)
    for name, value in knobs.items():
        if type(value) not in (int, str):
            raise StoreError(f"{stage}.{name} must be an integer or a text, but is {value!r}")
    later = STAGES[stage].later if stage in STAGES else {}
    return Config.of(stage, {**later, **knobs})


def _check_types(
    name: str, raw: Any, types: Mapping[str, type | None], *, others: bool = False
) -> None:
    """Raise unless `raw` is a dict with these keys, of these types, and (maybe) others."""
    if not isinstance(raw, dict):
        raise StoreError(f"{name} must be a dict, but is {raw!r}")
    missing, unknown = sorted(set(types) - set(raw)), sorted(set(raw) - set(types))
    if missing or (unknown and not others):
        raise StoreError(f"{name} lacks the keys {missing} and has the unknown ones {unknown}")
    for key, expected in types.items():
        if expected is not None and type(raw[key]) is not expected:
            raise StoreError(f"{name}.{key} must be of {expected.__name__}, but is {raw[key]!r}")


def _ordered(raw: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """`raw` with `keys` first, in their order, then the others sorted."""
    first = {key: raw[key] for key in keys if key in raw}
    return first | {key: raw[key] for key in sorted(raw) if key not in first}


def _spread(value: Any, indent: int) -> str:
    """A dict with one line for each key; what is inside stays on its line if it fits."""
    if not isinstance(value, Mapping) or not value:
        return _one_line(value)
    pad = " " * (indent + 2)
    lines = []
    for key, item in value.items():
        line = f"{pad}{_one_line(key)}: {_one_line(item)}"
        if len(line) >= _LINE or _is_deep(item):
            line = f"{pad}{_one_line(key)}: {_spread(item, indent + 2)}"
        lines.append(line)
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def _is_deep(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(x, Mapping) for x in value.values())


def _one_line(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        # half of a surrogate pair can stand in JSON as an escape, but in no text file
        lone = any("\ud800" <= x <= "\udfff" for x in text)
        return json.dumps(value, allow_nan=False) if lone else text
    except (TypeError, ValueError) as error:
        raise StoreError(f"a tuned file cannot hold {value!r}: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
