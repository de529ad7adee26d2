"""What a stranger adds from outside, editing nothing of the package: an innovation test, a fading memory, a part.

Each is registered in the table that names it and must then work everywhere: configuration, prefill = chunks = steps,
pads, the cache's operations and file, adapters, kernels' explanation.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_bmojo import (
    BMojoCache,
    BMojoConfig,
    BMojoForCausalLM,
    bmojo_lora_config,
    explain_kernels,
    first_difference,
)
from modeling_bmojo.attention_ops import KeySet, gathered
from modeling_bmojo.configuration_bmojo import FADING_MEMORIES, INNOVATIONS, PARTS
from modeling_bmojo.fading_bmojo import FadingMemory
from modeling_bmojo.fields_bmojo import memory, require_int
from modeling_bmojo.innovation_bmojo import Innovation
from modeling_bmojo.layout_bmojo import to_columns, to_rows
from modeling_bmojo.linear_bmojo import project
from modeling_bmojo.memory_ops import NEVER
from modeling_bmojo.parts_bmojo import MemoryPart, Observed
from modeling_bmojo.states_bmojo import State, take
from tests.oracles import oracle_eidetic, randomize_
from tests.reading import read, tokens
from tests.tiny import SIZES


EXACT = dict(rtol=1e-10, atol=1e-10)
SPLITS = [[40], [17, 23], [5, 1, 1, 20, 1, 12], [1] * 40]


def build(config_class=BMojoConfig, **fields):
    config = config_class(**{**SIZES, "num_hidden_layers": 2, "window_size": 5, "eidetic_size": 3, **fields})
    torch.manual_seed(0)
    return randomize_(BMojoForCausalLM(config)).double().eval()


def assert_it_works_everywhere(model, tmp_path):
    """What every memory of the package is tested for, of one that is not in it."""
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for pieces in SPLITS:
        logits, cache = read(model, ids, pieces)
        torch.testing.assert_close(logits, expected, **EXACT)
    assert first_difference(model, ids) is None
    # Pads, anywhere: every row equals itself alone.
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13], mask[1, 20:27] = 0, 0
    logits, _ = read(model, ids, [18, 1, 1, 20], mask)
    for row in range(2):
        real = mask[row].bool()
        alone, _ = read(model, ids[row : row + 1, real])
        torch.testing.assert_close(logits[row][real], alone[0], **EXACT)
    # The cache's file and operations.
    cache.save(tmp_path / "cache")
    more = tokens(6)
    kept = copy.deepcopy(cache)
    rest, _ = read(model, more, [1] * 6, cache=cache)
    loaded = BMojoCache.load(tmp_path / "cache", model.config)
    torch.testing.assert_close(read(model, more, [2, 4], cache=loaded)[0], rest, **EXACT)
    kept.batch_repeat_interleave(2)
    kept.reorder_cache(torch.tensor([3, 3, 0, 0]))
    torch.testing.assert_close(read(model, more[[1, 1, 0, 0]], cache=kept)[0], rest[[1, 1, 0, 0]], **EXACT)
    cache.reset()
    torch.testing.assert_close(read(model, ids, cache=cache)[0], expected, **EXACT)
    # Beams, and gradients through what the memory offers.
    out = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
    assert out.shape == (2, 44)
    model.train()
    model(ids, labels=ids).loss.backward()
    missing = [name for name, value in model.named_parameters() if value.grad is None]
    assert missing == []
    model.eval()


# An innovation test ---------------------------------------------------------------------------------------------------
class Loudness(Innovation):
    """The share of the loudest key so far that this one's has: it remembers a number per row."""

    name, signal = "loudness", "key"
    about = "the key's length against the longest before it"

    def __init__(self, config):
        pass

    def states(self, config):
        return {"loudest": State((), "wide")}

    def score(self, signal, lengths, layer, kernels):
        with torch.no_grad():
            return self.score_with_gradient(signal, lengths, layer, kernels)

    def score_with_gradient(self, signal, lengths, layer, kernels):
        loud = signal.flatten(2).norm(dim=-1)
        if lengths is not None:
            loud = loud.masked_fill(torch.arange(loud.shape[1]) >= lengths[:, None], 0.0)
        before = loud.new_zeros(len(loud)) if layer is None else layer.loudest
        most = torch.cat([before[:, None], loud], dim=1).cummax(dim=1).values
        if layer is not None:
            layer.loudest.copy_(most[:, -1])
        return 2 * loud / (loud + most[:, :-1] + 1e-12)


@pytest.fixture
def loudness(monkeypatch):
    monkeypatch.setitem(INNOVATIONS, Loudness.name, Loudness)


@pytest.mark.parametrize("fields", [{}, dict(eidetic_decay=0.05), dict(fading_size=0), dict(ssm_type="mamba")], ids=str)
def test_an_innovation_test(loudness, tmp_path, fields):
    model = build(innovation="loudness", **fields)
    if fields.get("fading_size") != 0:  # else nobody reads the SSM, as with every test that judges by keys
        assert_it_works_everywhere(model, tmp_path)
    _, cache = read(model, tokens())
    for layer in cache.layers:
        assert layer.loudest.shape == (2,) and layer.loudest.min() > 0
    # What it keeps in the first layer is what its scores say, by the streaming rule.
    attention = model.model.layers[0].self_attn
    found = []
    hook = attention.k_proj.register_forward_hook(lambda _, __, out: found.append(out))
    with torch.no_grad():
        model(tokens(), use_cache=False)
    hook.remove()
    keys = attention._heads(found[0])
    scores = Loudness(None).score(keys, None, None, None)
    for row in range(2):
        sets, _ = oracle_eidetic(scores[row].tolist(), 5, 3, model.config.eidetic_decay)
        assert [token.position for token in cache.remembered(0, row)] == sorted(sets[39])


def test_a_test_that_is_not_registered_is_refused():
    with pytest.raises(ValueError, match=r"innovation='loudness': must be one of \['output', "):
        build(innovation="loudness")


# A fading memory ------------------------------------------------------------------------------------------------------
class Rates(nn.Module):
    """A part that fills its parameters itself."""

    def __init__(self, channels):
        super().__init__()
        self.logit = nn.Parameter(torch.empty(channels))

    def initialise(self, config):
        nn.init.constant_(self.logit, 1.0)


class MovingAverage(FadingMemory):
    """y_t = read_map(a_t), a_t = r a_{t-1} + (1 - r) mix_map(u_t), with one rate r per channel."""

    name = "average"
    operations = ()
    maps = ("mix_map", "read_map")
    about = "a moving average of the layer's input"

    @classmethod
    def fill(cls, config):
        config.ssm_num_groups, config.ssm_norm = 1, False

    @classmethod
    def check(cls, config):
        require_int(config, "ssm_state_size", 1, "it is not read")

    @classmethod
    def states(cls, config):
        return {"average": State((config.hidden_size,), "wide")}

    def __init__(self, config, layer_idx):
        super().__init__()
        self.mix_map = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.read_map = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rates = Rates(config.hidden_size)

    def forward(self, hidden_states, rows=None, layer=None, predicts=False):
        inputs = project(self.mix_map, hidden_states)
        rate, outputs, predictions = torch.sigmoid(self.rates.logit), [], []
        for part, lengths in zip(to_rows(rows.layout, inputs), rows.lengths, strict=True):
            state = part.new_zeros(part.shape[0], part.shape[2]) if layer is None else layer.average.clone()
            steps, before = [], []
            for t in range(part.shape[1]):
                before.append(state)
                new = rate * state + (1 - rate) * part[:, t]
                state = new if lengths is None else torch.where((t < lengths)[:, None], new, state)
                steps.append(state)
            if layer is not None:
                layer.average.copy_(state.detach())
            outputs.append(torch.stack(steps, dim=1))
            predictions.append((part.detach(), torch.stack(before, dim=1).detach()))
        return project(self.read_map, to_columns(rows.layout, outputs)), predictions if predicts else None


@pytest.fixture
def average(monkeypatch):
    monkeypatch.setitem(FADING_MEMORIES, MovingAverage.name, MovingAverage)


@pytest.mark.parametrize("innovation", ["output", "state", "key"])
@pytest.mark.parametrize("layers", [None, ["linear_attention", "bmojo"]], ids=str)
def test_a_fading_memory(average, tmp_path, innovation, layers):
    model = build(ssm_type="average", innovation=innovation, layer_types=layers, fading_stride=1)
    assert isinstance(model.model.layers[0].fading, MovingAverage)
    assert_it_works_everywhere(model, tmp_path)
    _, cache = read(model, tokens())
    assert {"conv", "ssm"}.isdisjoint(cache.layers[0].states()) and "average" in cache.layers[0].states()
    rows = {row.operation: row.used for row in explain_kernels(model)}
    assert not any(
        rows[name] for name in ("conv", "chunk_scan", "scan_step", "s6_scan", "s6_step", "delta_scan", "kalma_scan")
    )
    targets = bmojo_lora_config(model).target_modules
    assert {"mix_map", "read_map"} <= set(targets) and {"in_proj", "out_proj"}.isdisjoint(targets)
    assert {"mix_map", "read_map"} <= set(bmojo_lora_config().target_modules)
    for wish in (dict(recipe="hylora"), dict(ssm_scalars=True)):
        with pytest.raises(ValueError, match="those of ssm_type='average' have no"):
            bmojo_lora_config(model, **wish)


def test_its_initial_values_are_its_own(average):
    config = BMojoConfig(**{**SIZES, "ssm_type": "average"})
    assert all(torch.equal(layer.fading.rates.logit, torch.ones(16)) for layer in BMojoForCausalLM(config).model.layers)


class Silent(MovingAverage):
    """One that says nothing of its inputs."""

    name = "silent"

    def forward(self, hidden_states, rows=None, layer=None, predicts=False):
        return super().forward(hidden_states, rows, layer)


def test_a_memory_that_predicts_nothing_is_refused_by_a_test_that_asks(monkeypatch):
    monkeypatch.setitem(FADING_MEMORIES, Silent.name, Silent)
    read(build(ssm_type="silent", innovation="key"), tokens())
    with pytest.raises(
        ValueError, match=r"innovation='state': judges by what the SSM says .*ssm_type='silent' says nothing"
    ):
        read(build(ssm_type="silent", innovation="state"), tokens())


def test_a_test_that_cannot_learn_is_refused_where_it_should(loudness, monkeypatch):
    with pytest.raises(ValueError, match=r"innovation='loudness' has scores without gradient.*\['output', 'key'\]"):
        build(innovation="loudness", innovation_gradient=1.0)
    monkeypatch.setattr(Loudness, "learns", True)  # which it does not
    model = build(innovation="loudness", innovation_gradient=1.0)
    with torch.no_grad():
        model(tokens())
    with pytest.raises(ValueError, match="innovation='loudness' gives its scores no gradient; compute them with one"):
        model(tokens())
    monkeypatch.setattr(Loudness, "score", Loudness.score_with_gradient)
    model(tokens(), use_cache=False).logits.sum().backward()
    with pytest.raises(ValueError, match=r"its state .loudest. was moved on with a gradient, .*under torch\.no_grad"):
        model(tokens(), use_cache=True)


# Slips of whoever adds something -------------------------------------------------------------------------------------
def test_a_signal_that_there_is_not_is_refused(loudness, monkeypatch):
    monkeypatch.setattr(Loudness, "signal", "value")
    with pytest.raises(
        ValueError, match=r"innovation='loudness': its signal='value' must be one of \['key', 'output', "
    ):
        build(innovation="loudness")
    monkeypatch.setattr(Loudness, "signal", "output")
    monkeypatch.setattr(Loudness, "has_ssm", False)
    with pytest.raises(ValueError, match="judges by the SSM's output, and the layer has no SSM"):
        build(innovation="loudness", fading_size=0)


@pytest.mark.parametrize("name", ["conv", "keys", "seen", "columns", "to", "memory"])
def test_a_state_whose_name_is_taken_is_refused(loudness, monkeypatch, name):
    monkeypatch.setattr(Loudness, "states", lambda self, config: {name: State(())})
    with pytest.raises(ValueError, match=rf"declares the state '{name}': the name is taken"):
        build(innovation="loudness")


def test_scores_of_another_shape_are_refused(loudness, monkeypatch):
    monkeypatch.setattr(Loudness, "score", lambda self, signal, *others: torch.ones(len(signal)))
    with pytest.raises(ValueError, match=r"innovation='loudness': scored \[2\] for tokens \[2, 40\]"):
        read(build(innovation="loudness"), tokens())


def test_a_state_of_an_unknown_kind_is_refused(loudness, monkeypatch):
    monkeypatch.setattr(Loudness, "states", lambda self, config: {"loudest": State((), "float")})
    with pytest.raises(ValueError, match=r"kind='float' of a state: must be one of"):
        read(build(innovation="loudness"), tokens())


# A memory that offers keys --------------------------------------------------------------------------------------------
class ArchiveConfig(BMojoConfig):
    """With what the part needs: room for everything, and how a query discounts what is old."""

    archive_size: int = memory(64)
    archive_discount: float = memory(0.0)


class Archive(MemoryPart):
    """All tokens that the eidetic memory let go, in an order of its own for every head, discounted by age per head:
    the bias of query t for token s in head h is -(h + 1) * discount * (t - s)."""

    takes_left = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.size, self.discount = config.archive_size, config.archive_discount
        self.shape = config.num_key_value_heads, config.head_dim

    @classmethod
    def belongs(cls, config, spec):
        return spec.kind == "bmojo" and getattr(config, "archive_size", 0) > 0

    def states(self):
        entry = State((self.size, *self.shape), on_host=True)
        return {
            "archive_keys": entry,
            "archive_values": entry,
            "archive_positions": State((self.size,), "count", fill=-1),
            "archive_scratch": State((3,), saved=False),
        }

    def observe(self, tokens, layer, left, kernels):
        (left,) = left
        keys, values, positions, out_at = left.keys, left.values, left.positions, left.out_at
        gone = (positions >= 0) & (out_at > -NEVER)
        if layer is not None:
            keys = torch.cat([layer.archive_keys, keys], dim=1)
            values = torch.cat([layer.archive_values, values], dim=1)
            positions = torch.cat([layer.archive_positions, positions], dim=1)
            before = torch.zeros_like(layer.archive_positions)
            out_at = torch.cat([before, out_at], dim=1)
            gone = torch.cat([layer.archive_positions >= 0, gone], dim=1)
        end = torch.where(gone, NEVER, -NEVER)
        keyset = KeySet(keys, values, out_at, end, positions)
        offer = self.by_head(keyset, tokens, layer)
        if layer is not None:
            self.keep(layer, keyset, gone & (out_at <= (tokens.real() - 1).clamp(min=-1)[:, None]))
        return Observed([offer])

    def by_head(self, keyset, tokens, layer):
        rows, entries = keyset.position.shape
        block = min(tokens.block, tokens.queries)
        blocks = -(-tokens.queries // block)
        heads, groups = tokens.query.shape[2], keyset.keys.shape[2]
        orders = torch.stack([torch.arange(entries).roll(head) for head in range(groups)])
        index = orders.expand(rows, blocks, groups, entries)
        seen = torch.zeros(rows, dtype=torch.int64) if layer is None else layer.seen
        now = (seen[:, None] + torch.arange(blocks * block)).view(rows, blocks, 1, block, 1)
        slope = (1 + torch.arange(heads)).view(1, 1, heads, 1, 1) * self.discount
        own = keyset.position[torch.arange(rows)[:, None, None, None], index]
        age = now - own.repeat_interleave(heads // groups, dim=2)[:, :, :, None]
        return gathered(keyset, index, (-slope * age).to(tokens.query.dtype))

    def keep(self, layer, keyset, taken):
        """Each token in the place of its position: the archive has room for all of them."""
        place = torch.where(taken, keyset.position, self.size)
        order = torch.full((len(place), self.size + 1), -1).scatter(
            1, place, torch.arange(place.shape[1]).expand_as(place)
        )
        order = order[:, :-1]
        found, index = order >= 0, order.clamp(min=0)
        layer.archive_keys.copy_(take(keyset.keys, index).masked_fill(~found[..., None, None], 0.0))
        layer.archive_values.copy_(take(keyset.values, index).masked_fill(~found[..., None, None], 0.0))
        layer.archive_positions.copy_(torch.where(found, torch.arange(self.size), -1))


@pytest.fixture
def archive():
    PARTS.append(Archive)
    yield
    PARTS.remove(Archive)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(archive_discount=0.1),
        dict(eidetic_size=0),
        dict(fading_size=0, innovation="key"),
        dict(memory_block_size=7),
    ],
    ids=str,
)
def test_a_part_that_offers_keys_per_head_with_a_bias(archive, tmp_path, fields):
    model = build(ArchiveConfig, num_key_value_heads=2, num_attention_heads=4, head_dim=4, **fields)
    if fields.get("fading_size") == 0:
        model.eval()
        for pieces in SPLITS:
            torch.testing.assert_close(read(model, tokens(), pieces)[0], read(model, tokens())[0], **EXACT)
        return
    assert_it_works_everywhere(model, tmp_path)
    _, cache = read(model, tokens())
    layer = cache.layers[0]
    held = (
        {token.position for token in cache.remembered(0)} | set(range(35, 40))
        if model.config.eidetic_size
        else set(range(35, 40))
    )
    kept = set(layer.archive_positions[0].tolist()) - {-1}
    assert kept == set(range(40)) - held, "every token is offered once"


@pytest.mark.parametrize("pieces", SPLITS, ids=str)
@pytest.mark.parametrize("slots", [0, 3])
def test_with_it_a_window_is_full_attention(archive, pieces, slots):
    """Nothing is lost and nothing is offered twice: the logits are those of transformers' Llama."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, rms_norm_eps=1e-6)
    llama = randomize_(LlamaForCausalLM(LlamaConfig(**sizes, **heads))).double().eval()
    fields = dict(fading_size=0, innovation="key", eidetic_size=slots)
    ours = build(ArchiveConfig, **sizes, **heads, **fields)
    report = ours.load_state_dict(llama.state_dict(), strict=False)
    assert all(".fading." in name for name in report.missing_keys) and not report.unexpected_keys
    full = build(**sizes, **heads, layer_types=["full_attention"] * 2)
    full.load_state_dict(llama.state_dict())
    with torch.no_grad():
        expected, exact = llama(tokens()).logits, full(tokens(), use_cache=False).logits
        uncached = ours(tokens(), use_cache=False).logits
    logits, _ = read(ours, tokens(), pieces)
    for found in (logits, uncached):
        torch.testing.assert_close(found, exact, **EXACT)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # Llama's angles are fp32 products


def test_its_bias_reaches_every_query_and_head(archive):
    """One layer without eidetic memory against dense attention, written down from the definition."""
    model = build(ArchiveConfig, num_hidden_layers=1, eidetic_size=0, fading_size=0, rope_parameters=None,
                  num_attention_heads=4, num_key_value_heads=2, head_dim=4, archive_discount=0.3)  # fmt: skip
    attention = model.model.layers[0].self_attn
    seen = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(attention, name).register_forward_hook(
            lambda _, given, out, name=name: seen.update({name: given[0] if name == "o_proj" else out})
        )
    with torch.no_grad():
        model(tokens(), use_cache=False)
    q, k, v = (seen[name].unflatten(-1, (-1, 4)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    age = torch.arange(40)[:, None] - torch.arange(40)
    slope = 0.3 * (1 + torch.arange(4)).view(4, 1, 1)
    bias = torch.where(age >= 5, -slope * age, 0.0).masked_fill(age < 0, -torch.inf)
    expected = ((q @ k.transpose(-1, -2)) * 0.5 + bias).softmax(dim=-1) @ v
    torch.testing.assert_close(seen["o_proj"], expected.transpose(1, 2).flatten(2), **EXACT)


def test_weights_say_what_is_read_from_the_part(archive):
    model = build(
        ArchiveConfig, num_key_value_heads=2, num_attention_heads=4, head_dim=4, fading_size=0, innovation="key"
    )
    with torch.no_grad():
        out = model(tokens(), output_attentions=True)
        stepped = BMojoCache(model.config)
        model(tokens()[:, :39], cache=stepped)
        last = model(tokens()[:, 39:], cache=stepped, output_attentions=True)
    for whole, step in zip(out.attentions, last.attentions, strict=True):
        torch.testing.assert_close(whole.sum(-1), torch.ones_like(whole.sum(-1)), **EXACT)
        assert bool((whole[:, :, -1, :] > 0).all()), "every token, each in its own column"
        torch.testing.assert_close(step[:, :, 0], whole[:, :, -1], **EXACT)


def test_states_that_are_not_saved_or_stay_on_the_host(archive, tmp_path):
    model = build(ArchiveConfig)
    _, cache = read(model, tokens())
    cache.layers[0].archive_scratch += 1
    cache.save(tmp_path / "cache")
    loaded = BMojoCache.load(tmp_path / "cache", model.config)
    assert loaded.layers[0].archive_scratch.tolist() == [[0.0] * 3] * 2
    away = copy.deepcopy(cache).to("meta")
    layer = away.layers[0]
    assert layer.keys.device.type == layer.archive_positions.device.type == "meta"
    assert layer.archive_keys.device.type == layer.archive_values.device.type == "cpu"


def test_caches_of_a_subclass_are_joined(archive):
    """As nn.DataParallel gathers them: the items tell of which configuration they are."""
    model, ids = build(ArchiveConfig), tokens()
    _, cache = read(model, ids)
    expected, _ = read(model, tokens(6), cache=copy.deepcopy(cache))
    torch.testing.assert_close(read(model, tokens(6), cache=BMojoCache(list(cache)))[0], expected, **EXACT)


def test_a_cache_without_the_part_is_refused(archive, tmp_path):
    model = build(ArchiveConfig)
    _, cache = read(model, tokens())
    cache.save(tmp_path / "cache")
    other = build(ArchiveConfig, archive_size=50)
    with pytest.raises(ValueError, match="the cache has archive_size=64 but the model has 50"):
        other(tokens(), cache=cache)
    with pytest.raises(ValueError, match="the cache has archive_size=64 but the model has 50"):
        BMojoCache.load(tmp_path / "cache", other.config)
