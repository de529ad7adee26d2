"""Caches of fixed shapes: every token is read by the same step, the first one too, exactly as without them."""

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, DecodingStep, cache_of
from modeling_bmojo.compat_bmojo import CACHE_NAME
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


LENGTH, ROOM = 40, 64  # W + M + F and all rings are passed several times
SETTINGS = {
    "bmojo": {},
    "mixed": MIXED_LAYERS,
    "stride": dict(window_size=6, fading_stride=3),
    "answers": dict(innovation="key", fading_delay=0),
    "s6": dict(ssm_type="mamba", innovation="key"),
    "state": dict(innovation="state", eidetic_decay=0.1),
    "clock": dict(eidetic_decay=0.1, decay_clock="innovation"),
    "sinks": dict(innovation="constant", fading_size=0),
    "window": dict(eidetic_size=0, fading_size=0),
    "near": dict(max_rope_distance=9),
    "near, later": dict(max_rope_distance=9, max_rope_distance_start=20),
}


def build(name="bmojo", **others):
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name], **others}))).double().eval()


def tokens(length=LENGTH, batch=2, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def new(model, name="bmojo", batch=2):
    return BMojoCache(model.config).fix(model, batch, room=ROOM if name == "mixed" else None)


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def read(model, ids, cache, size=1, mask=None):
    """The logits of chunks; masks are of the new columns alone."""
    parts = [slice(at, at + size) for at in range(0, ids.shape[1], size)]
    masks = [None if mask is None else mask[:, part] for part in parts]
    return torch.cat([model(ids[:, p], attention_mask=m, cache=cache).logits for p, m in zip(parts, masks)], dim=1)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_token_is_read_by_the_same_step(name):
    """As the whole text at once gives it; and no state ever has another shape."""
    model, ids = build(name), tokens()
    cache = new(model, name)
    shapes = [leaf.shape for leaf in pytree.tree_leaves(cache)]
    with torch.no_grad():
        assert_near(read(model, ids, cache), model(ids).logits)
    assert [leaf.shape for leaf in pytree.tree_leaves(cache)] == shapes
    assert cache.get_seq_length() == LENGTH and all(layer.columns is None for layer in cache.layers)


@pytest.mark.parametrize("name", ["mixed", "stride", "near"])
def test_a_prompt_before_and_chunks_behind(name):
    """Read as it is, fixed, read on by chunks and by steps, and made one that generate() goes on from."""
    model, ids = build(name), tokens()
    with torch.no_grad():
        cache = cache_of(model(ids[:, :7]))
        cache.fix(model, room=ROOM if name == "mixed" else None)
        found = torch.cat([read(model, ids[:, 7:23], cache, size=8), read(model, ids[:, 23:], cache)], dim=1)
        assert_near(found, model(ids).logits[:, 7:])
        cache.unfix()
        assert not cache.fixed and cache.get_seq_length() == LENGTH
        more = torch.cat([ids, tokens(1, seed=2)], dim=1)
        settings = dict(max_new_tokens=6, do_sample=False)
        continued = model.generate(more, **{CACHE_NAME: cache}, **settings)
        assert torch.equal(continued, model.generate(more, **settings))


@pytest.mark.parametrize("name", ["bmojo", "mixed", "near"])
def test_pads(name):
    """Any pads, in any column; afterwards the cache knows which they were."""
    model, ids = build(name), tokens()
    mask = (torch.arange(LENGTH) % 5 > torch.tensor([[1], [-1]])).long()
    cache = new(model, name)
    found = read(model, ids, cache, mask=mask)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    assert_near(found, expected)
    cache.check_mask(mask)
    cache.unfix().check_mask(mask)
    with pytest.raises(ValueError, match="attention_mask"):
        cache.check_mask(mask.flip(0))


@pytest.mark.parametrize("name, masked, layers", [("mixed", False, 4), ("near", True, 1)])
def test_one_exported_program(name, masked, layers, tmp_path):
    """From a file, without a symbol, from the first token on; "near" passes its distance on the way."""
    model, ids = build(name, num_hidden_layers=layers), tokens()
    mask = (torch.arange(LENGTH) % 5 > torch.tensor([[1], [-1]])).long() if masked else None
    step = DecodingStep(model, new(model, name), masked)
    with torch.no_grad():
        exported = torch.export.export(step, step.example(), strict=False)
        assert not exported.range_constraints
        torch.export.save(exported, tmp_path / "step.pt2")
        program, states = torch.export.load(tmp_path / "step.pt2").module(), step.example()[1 + masked :]
        shapes, found = [state.shape for state in states], []
        for at in range(LENGTH):
            masks = () if mask is None else (mask[:, at : at + 1],)
            logits, *states = program(ids[:, at : at + 1], *masks, *states)
            found.append(logits)
        assert [state.shape for state in states] == shapes
        assert_near(torch.cat(found, dim=1), model(ids, attention_mask=mask).logits)
    assert step.cache(states).unfix().get_seq_length() == LENGTH


def test_the_step_as_a_module():
    model, ids = build(), tokens()
    cache = new(model)
    step, before = DecodingStep(model, cache), copy.deepcopy(cache)
    ids_of_it, *states = step.example()
    assert len(step.inputs) == 1 + len(states) and step.inputs[:2] == ["input_ids", "columns"]
    assert step.outputs == ["logits", *(f"next.{name}" for name in step.inputs[1:])]
    assert dict(zip(step.inputs[1:], states))["1.keys"].shape == cache.layers[1].keys.shape
    with torch.no_grad():
        logits, *after = step(ids[:, :1], *states)
        assert_near(logits, model(ids[:, :1]).logits)
    assert all(torch.equal(*pair) for pair in zip(states, pytree.tree_leaves(before)))  # what goes in stays
    assert after[0].tolist() == [1]
    with pytest.raises(ValueError, match="not fixed"):
        model.decoding_step(BMojoCache(model.config))
    with pytest.raises(ValueError, match="in training"):
        DecodingStep(copy.deepcopy(model).train(), cache)


def test_what_a_fixed_cache_refuses():
    model, ids = build(), tokens(4)
    cache = new(model)
    read(model, ids, cache)
    with pytest.raises(ValueError, match=r"attention_mask of shape \[2, 5\].*\[2, 1\]"):
        model(ids[:, :1], attention_mask=torch.ones(2, 5), cache=cache)
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids[:, :1], cache=cache, output_attentions=True)
    with pytest.raises(ValueError, match="joined"):
        list(cache)
    with pytest.raises(ValueError, match="rollback_limit: a fixed cache"):
        cache.allow_rollback(2)
    with pytest.raises(ValueError, match=r"batch_size=3: .* has 2 rows"):
        cache.fix(model, 3)
    assert cache.fix(model) is cache and cache.get_seq_length() == 4
    cache.reset()
    assert not cache.fixed
    read(model, ids, cache)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize(
    "settings, how, message",
    [
        (dict(storage_size=4), {}, r"storage_size=4: what a storage offers"),
        ({}, dict(rollback_limit=2), r"rollback_limit=2: a cache that can take back"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), {}, r"rope_type='dynamic'"),
    ],
)
def test_caches_that_cannot_be_fixed(settings, how, message):
    model = BMojoForCausalLM(BMojoConfig(**SIZES, **settings)).eval()
    with pytest.raises(ValueError, match=message):
        BMojoCache(model.config, **how).fix(model)
    other = build("mixed")
    with pytest.raises(ValueError, match="a cache belongs to one model"):
        BMojoCache(model.config, **how).fix(other)


def test_room():
    model, ids = build("mixed"), tokens(9)
    for room in (None, 0, 2.5):
        with pytest.raises(ValueError, match=rf"room={room}: layers \[2\] have full attention"):
            BMojoCache(model.config).fix(model, room=room)
    with torch.no_grad():
        cache = cache_of(model(ids))
    with pytest.raises(ValueError, match="at least the 9 read"):
        cache.fix(model, room=8)
    cache.fix(model, room=9)
    with pytest.raises(ValueError, match="another room"):
        cache.fix(model, room=10)
    with pytest.raises(IndexError):
        read(model, ids[:, :1], cache)
    small = build()
    with pytest.raises(ValueError, match="no layer has full attention"):
        BMojoCache(small.config).fix(small, room=9)
    with pytest.raises(ValueError, match="batch_size=0"):
        BMojoCache(small.config).fix(small, 0)
