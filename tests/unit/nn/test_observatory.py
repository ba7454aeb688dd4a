"""What the observatory sees, what it raises an alarm at, and that its pattern can be drawn from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from layer_cases import ALL, HIDDEN, MAMBA, small

from gdn2gen.base.errors import InputError
from gdn2gen.cli import program
from gdn2gen.family.decays import LEVELS, DecayPattern
from gdn2gen.family.inputs import make_inputs
from gdn2gen.family.strength import strength_of, strong_share
from gdn2gen.measure.suite import select_cases
from gdn2gen.nn import Cache, LanguageModel, Observatory
from gdn2gen.nn.model import MIXERS

WORDS = 13


def _model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16}
    return LanguageModel(WORDS, **{**sizes, **options})


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mixer", ALL)
def test_the_decay_of_a_layer_is_what_becomes_of_its_state(mixer: str) -> None:
    """Tokens that write nothing and erase nothing."""
    layer = small(mixer)
    x, cache = torch.randn(1, 9, HIDDEN), Cache(1)
    decay = layer.decay_of(x)
    with torch.no_grad():
        layer(x[:, :4], cache=cache)
        kept = cache.layer(3)
        name = "ssm" if mixer == "mamba3" else "state"
        first = kept[name].clone()
        for other in kept.keys() - {name, "angle"}:
            kept[other].zero_()
        if mixer in MAMBA:
            inner = layer.num_heads * layer.head_dim
            layer.in_proj.weight[inner : 2 * inner] = 0  # of x, which follows z
            if mixer == "mamba2":
                layer.conv1d.bias.zero_()
        else:
            layer.v_proj.weight.zero_()
            layer.k_proj.weight.zero_()
        layer(x[:, 4:], cache=cache)
    heads = first.shape[1]
    assert decay.shape[:3] == (1, 9, heads) and decay.dtype == torch.float32
    factor = decay[0, 4:].sum(0).exp()[..., None]  # [heads, K or 1, 1]
    torch.testing.assert_close(kept[name][0], first[0] * factor)


def test_it_sees_and_changes_nothing() -> None:
    model, tokens = _model(window=4, num_layers=3), _tokens(3, 40)
    loss = model(tokens, targets=tokens)
    loss.backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    watch, drawn = Observatory(model, every=5, tokens=80), torch.get_rng_state()
    assert watch.look(4, tokens) is None and not watch.sightings
    sighting = watch.look(5, tokens)
    assert sighting is not None and watch.sightings == [sighting]
    assert torch.equal(torch.get_rng_state(), drawn)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(not layer._forward_pre_hooks for layer in watch.layers)
    assert sighting.alarms == () and len(sighting.states) == 3 and len(sighting.decays) == 2
    norm = torch.stack([x.norm() for x in before]).norm()
    assert sighting.gradient == pytest.approx(float(norm))
    # of the first layer, over the tokens that were looked at
    layer = watch.layers[0]
    decay = layer.decay_of(model.blocks[0].mixer_norm(model.embeddings(tokens[:2]))[1])
    for head, quantiles in enumerate(sighting.decays[0]):
        seen = decay[:, :, head].flatten()
        assert quantiles[0] == seen.min() and quantiles[-1] == seen.max()
        wanted = torch.quantile(seen, torch.tensor(LEVELS), interpolation="nearest")
        assert [*quantiles] == wanted.tolist()
        assert sorted(quantiles) == [*quantiles]


def test_alarms() -> None:
    model, tokens = _model(), _tokens(2, 8)
    model(tokens, targets=tokens).backward()
    watch = Observatory(model)
    grad = model.blocks[1].mixer.k_proj.weight.grad
    assert grad is not None
    grad[3, 4] = torch.inf
    (alarm,) = watch.look_now(1, tokens).alarms
    assert alarm == "not finite: the gradient of blocks.1.mixer.k_proj.weight"
    model.zero_grad()
    with torch.no_grad():
        model.blocks[0].mixer.v_proj.weight.mul_(1e9)
    (alarm,) = watch.look_now(2, tokens).alarms
    assert alarm.startswith("the state of layer 0 reaches") and "above 65504" in alarm
    with torch.no_grad():
        model.blocks[0].mixer.A_log.fill_(torch.nan)
    said = watch.look_now(3, tokens).alarms
    assert "not finite: the parameter blocks.0.mixer.A_log" in said
    assert "not finite: the decay of layer 0" in said
    assert any(x.startswith("the state of layer 0 reaches nan") for x in said)


def test_what_cannot_be_looked_at() -> None:
    with pytest.raises(InputError, match=r"Linear has no layer of gdn2gen\.nn"):
        Observatory(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="every must be at least 1, but got 0"):
        Observatory(_model(), every=0)
    with pytest.raises(InputError, match="nothing was seen yet"):
        Observatory(_model()).pattern()


def _pattern(mixer: str, path: Path) -> DecayPattern:
    model = _model(mixer=mixer)
    watch = Observatory(model)
    watch.look_now(0, _tokens(4, 50))
    watch.pattern("mine").save(path)
    return watch.pattern("mine")


@pytest.mark.parametrize("mixer", ["gdn2", "gated_delta_rule"])
def test_a_pattern_is_drawn_from(mixer: str, tmp_path: Path) -> None:
    """As many heads as are asked for; each is one of those on file, with its slow and fast
    channels."""
    path = tmp_path / "gates.json"
    pattern = _pattern(mixer, path)
    assert DecayPattern.load(path) == pattern and (pattern.op, pattern.K) == (mixer, 16)
    K = 16 if mixer == "gdn2" else 1
    g = make_inputs(2, 500, 3, 16, 16, op=mixer, pattern=pattern)["g"].reshape(1000, 3, K)
    for head in range(3):
        means = g[:, head].sort(0).values[500]
        near = [
            max(abs(means[c].item() / groups[c * len(groups) // K][4] - 1) for c in range(K))
            for groups in pattern.heads
        ]
        # the median of 1000 draws
        assert min(near) < 0.15, near
        inside = [groups[0][0] <= float(g[:, head].min()) for groups in pattern.heads]
        assert any(inside) and float(g[:, head].max()) <= 0
    other = make_inputs(2, 500, 3, 16, 16, op=mixer, pattern=pattern)["g"].reshape(1000, 3, K)
    assert torch.equal(g, other)


def test_verify_draws_from_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gates.json"
    pattern = _pattern("kda", path)
    assert program.main(["verify", "--pattern", str(path), "--list", "--interpreter"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed[:2] == ["kda-small-mine-bf16", "kda-small-mine-bf16-repeat"]
    for interpreter in (True, False):
        cases = select_cases([], interpreter=interpreter, decays=pattern)
        assert {(x.problem.op, x.problem.K, x.problem.V) for x in cases} == {("kda", 16, 16)}
        assert {x.pattern for x in cases} == {pattern} and len(cases) == 6
    (case,) = select_cases(["*fp16"], interpreter=False, decays=pattern, op="gla")
    assert case.problem.op == "gla"
    assert program.main(["verify", "--pattern", str(path), "--head-dim", "64"]) != 0
    assert "--pattern brings its own head dims" in capsys.readouterr().err
    assert program.main(["verify", "--pattern", str(path), "--op", "mamba3", "--list"]) != 0
    assert "are not drawn for mamba3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema": 0}, "its schema is not 1"),
        ({"op": "rwkv"}, "op must be one of"),
        ({"K": "16"}, "K and V must be whole numbers"),
        ({"layers": []}, "it has no head"),
        ({"layers": [[[[0.0] * 8]]]}, "quantiles must be 9 rising numbers"),
        ({"layers": [[[[-1.0] * 8 + [0.1]]]]}, "quantiles must be 9 rising numbers"),
        ({"layers": [[[[-1.0] * 8 + [float("nan")]]]]}, "quantiles must be 9 rising numbers"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_files_that_are_no_pattern(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "gates.json"
    _pattern("gdn2", path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=said):
        DecayPattern.load(path)


def test_a_layer_of_ones_own_in_a_model() -> None:
    """What makes it is called as the layers are."""
    made = []

    class Mine(MIXERS["kda"]):  # type: ignore[misc]
        def __init__(self, hidden_size: int, **options: Any) -> None:
            super().__init__(hidden_size, **options)
            made.append(options["layer_idx"])

    model = _model(mixer=Mine)
    assert made == [0, 1] and all(isinstance(block.mixer, Mine) for block in model.blocks)
    assert torch.equal(model(_tokens(1, 5)), _model(mixer="kda")(_tokens(1, 5)))


class _Around(torch.nn.Module):
    """A model that drops, averages, and calls its layer by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = torch.nn.Embedding(WORDS, HIDDEN, sparse=True)
        self.norm, self.drop = torch.nn.BatchNorm1d(HIDDEN), torch.nn.Dropout(0.5)
        self.layer, self.unused = small("gla"), torch.nn.Identity()

    def forward(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        x = self.drop(self.norm(self.embeddings(tokens).mT).mT)
        y: torch.Tensor = self.layer(x=x, cache=cache)
        return y


def test_a_look_neither_draws_nor_averages() -> None:
    model, tokens = _Around(), _tokens(2, 9)
    model.drop.eval()
    model(tokens).sum().backward()
    drawn, mean = torch.get_rng_state(), model.norm.running_mean.clone()
    model.drop.train(), model.layer.eval()
    sighting = Observatory(model).look_now(0, tokens)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(model.norm.running_mean, mean)
    assert model.training and model.drop.training and not model.layer.training
    dense = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
    assert sighting.gradient == pytest.approx(float(torch.stack([x.norm() for x in dense]).norm()))


def test_looks_that_are_refused() -> None:
    model = _Around()
    watch = Observatory(model)
    for shape in ((0, 3), (2, 0), (5,)):
        with pytest.raises(InputError, match="one token at least"):
            watch.look_now(0, _tokens(*shape))
    model.unused = small("gla")
    with pytest.raises(InputError, match=r"did not call its layers unused with"):
        Observatory(model).look_now(0, _tokens(1, 3))
    model.layer.gk_proj[1].bias.data.fill_(torch.nan)
    sighting = watch.look_now(0, _tokens(1, 3))
    assert "not finite: the decay of layer 3" in sighting.alarms  # its layer_idx
    with pytest.raises(InputError, match="not finite"):
        watch.pattern()


@pytest.mark.parametrize(
    "raw",
    (
        b"\xff\xfe\x00",
        b"[" * 100_000,
        {"K": 0},
        {"V": -1},
        {"layers": [[[[-1, math.nan, *[0] * 7]]]]},
    ),
    ids=("not text", "deep", "no K", "negative", "NaN"),
)
def test_files_that_hold_no_pattern(raw: bytes | dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "gates.json"
    DecayPattern("x", "gla", 16, 16, (((tuple([-1.0] * 9),),),)).save(file)
    kept = json.loads(file.read_text())
    file.write_bytes(raw if isinstance(raw, bytes) else json.dumps({**kept, **raw}).encode())
    with pytest.raises(InputError, match=r"gates\.json is no pattern of decay"):
        DecayPattern.load(file)


def _strong(model: LanguageModel, place: int, bias: float = 30.0) -> None:
    """Have a layer's gates forget all at once."""
    with torch.no_grad():
        model.blocks[place].mixer.dt_bias.fill_(bias)


def test_it_says_whether_a_decay_is_weak_or_strong() -> None:
    model = _model()
    seen = Observatory(model)
    with pytest.raises(InputError, match="nothing was seen yet"):
        seen.decay()
    assert seen.look_now(0, _tokens(2, 40)).strong == (0.0, 0.0)
    assert (seen.decay(), seen.decay(0), seen.decay(1)) == ("weak", "weak", "weak")
    seen.expect()
    _strong(model, 1)
    assert seen.look_now(1, _tokens(2, 40)).strong == (0.0, 1.0)
    assert (seen.decay(), seen.decay(0), seen.decay(1)) == ("strong", "weak", "strong")
    assert [x.expected_decay for x in seen.layers] == ["weak", "weak"]
    seen.expect()
    assert [x.expected_decay for x in seen.layers] == ["weak", "strong"]


@pytest.mark.parametrize("mixer", ["gated_delta_rule", "mamba2"])
def test_a_decay_of_heads_is_weak(mixer: str) -> None:
    """No kernel's time depends on it, however strong it is."""
    sizes = {"state_size": 16, "num_heads": 4} if mixer == "mamba2" else {}
    model = _model(mixer=mixer, **sizes)
    _strong(model, 0)
    seen = Observatory(model)
    assert seen.look_now(0, _tokens(1, 40)).strong == (0.0, 0.0)
    assert seen.decay() == "weak"
    seen.expect()


def test_chunks_are_counted_where_a_channel_loses_enough() -> None:
    """Chunks of 32 tokens of a head; what is left of a sequence is one of what it has."""
    limit = 96 * math.log(2.0)
    g = torch.zeros(2, 40, 3, 8)
    g[0, 31, 1, 5] = -limit * 1.01
    g[1, 32:, 2, 0] = -limit * 1.01 / 8
    g[1, 28:36, 0, 0] = -limit * 1.9 / 8  # half of it in either chunk
    assert float(strong_share(g)) == pytest.approx(2 / 12)
    assert strength_of(0.0999) == "weak" and strength_of(0.1) == strength_of(math.nan) == "strong"
    pattern = make_inputs(1, 64, 2, 32, 32, pattern="strong")["g"]
    assert float(strong_share(pattern)) == 1.0
    assert float(strong_share(make_inputs(1, 64, 4, 32, 32)["g"])) == 0.0


@pytest.mark.parametrize("mixer", ["gdn2", "kda", "gla"])
def test_layers_tell_their_op(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(mixer=mixer, num_layers=1, expected_decay="strong", checkpoint_activations=True)
    layer, told = model.blocks[0].mixer, []
    chunk = type(layer)._chunk

    def listen(*given: Any, **named: Any) -> Any:
        told.append(named["expected_decay"])
        return chunk(*given, **named)

    monkeypatch.setattr(type(layer), "_chunk", staticmethod(listen))
    model(_tokens(1, 5), targets=_tokens(1, 5)).backward()
    assert told == ["strong", "strong"], "and once more where activations are made again"
    layer.expected_decay = None
    model(_tokens(1, 5))
    assert told[2:] == [None]
    with pytest.raises(InputError, match="expected_decay must be one of"):
        _model(mixer=mixer, expected_decay="fierce")
