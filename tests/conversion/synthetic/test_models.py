"""The models that are compared: equal bytes by the cache itself, equal parameters, and what each has to be."""

import pytest
import torch

from conversion.synthetic.models import (
    BYTES_TOLERANCE,
    MODELS,
    PARAMETERS_TOLERANCE,
    Model,
    Sizes,
    bytes_read,
    constant_bytes,
    models_of,
    parameters,
)
from modeling_bmojo import BMojoForCausalLM


T = 96
SIZES = Sizes(width=64, heads=2, layers=2, vocabulary=64, parameters=100_000, state_bytes=32_768)
RANKED = [name for name, kind in MODELS.items() if kind.ranked]


def built(name: str, sizes: Sizes = SIZES, **overrides) -> BMojoForCausalLM:
    (model,) = models_of([{"model": name, **overrides}])
    return BMojoForCausalLM(model.config(sizes, T)).eval()


def test_a_memory_that_grows_is_not_ranked():
    (grows,) = models_of([{"model": "bmojo_key", "name": "x", "storage_size": 16}])
    assert not grows.ranked and models_of(["bmojo_key"])[0].ranked


@pytest.mark.parametrize("state_bytes", [24_576, 49_152])
@pytest.mark.parametrize("name", RANKED)
def test_equal_bytes_and_parameters(name, state_bytes):
    sizes = Sizes(64, 2, 2, 64, 100_000, state_bytes)
    model = built(name, sizes)
    cache = bytes_read(model, T)
    assert cache == bytes_read(model, 2 * T), "the memory does not grow"
    # The cache itself also holds the last token's output, for every model alike.
    assert cache == constant_bytes(model.config) + 64 * 4
    assert (1 - BYTES_TOLERANCE) * state_bytes <= constant_bytes(model.config) <= state_bytes
    own = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name)
    assert own == parameters(model.config)
    assert abs(own - 100_000) <= PARAMETERS_TOLERANCE * 100_000


@pytest.mark.parametrize("name", [name for name in MODELS if name not in RANKED])
def test_ceilings_grow_with_the_text(name):
    model = built(name)
    assert bytes_read(model, 8 * T) > bytes_read(model, T)
    assert abs(parameters(model.config) - 100_000) <= PARAMETERS_TOLERANCE * 100_000


@torch.no_grad()
@pytest.mark.parametrize("name", RANKED)
def test_what_a_model_cannot_reach_has_no_effect_and_what_it_can_has(name):
    """The window of two layers reaches 2 (W - 1) back; whatever has an SSM or slots reaches the first token."""
    model = built(name)
    ids = torch.randint(64, (1, T), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 64
    changed = (model(ids).logits[0, -1] - model(other).logits[0, -1]).abs().max() > 0
    assert bool(changed) == (name != "window")


def test_layers_and_tests_are_what_the_names_say():
    kinds = {name: built(name).config.layer_types for name in MODELS}
    assert kinds["full_attention"] == ["full_attention"] * 2 and kinds["window"] == ["sliding_attention"] * 2
    for name in ("mamba", "mamba2", "gated_delta", "kalmanet"):
        assert kinds[name] == ["linear_attention"] * 2 and built(name).config.ssm_type == name
    assert kinds["jamba"] == ["linear_attention", "full_attention"]
    assert kinds["samba"] == ["linear_attention", "sliding_attention"]
    assert kinds["bmojo_hybrid"] == ["linear_attention", "bmojo"]
    for name in ("output", "state", "key", "constant"):
        config = built(f"bmojo_{name}").config
        assert config.innovation == name and config.eidetic_size > 0 and config.storage_size == 0
    assert built("bmojo_f").config.eidetic_size == 0
    assert built("bmojo_storage").config.storage_size > 0
    for name in ("bmojo_direct", "bmojo_f_direct", "bmojo_slots", "bmojo_learnt"):
        config = built(name).config
        assert config.fading_delay == 0 and config.fading_size == 1 and bool(config.eidetic_size) == ("_f" not in name)
    assert built("bmojo_slots").config.eidetic_size > 2 * built("bmojo_direct").config.eidetic_size
    slots, learnt = (built(name).config for name in ("bmojo_slots", "bmojo_learnt"))
    assert {key for key, value in slots.to_dict().items() if value != learnt.to_dict()[key]} == {"innovation_gradient"}
    assert built("bmojo_key").config.fading_delay is None


def test_an_override_is_part_of_what_is_solved():
    plain, wide = built("bmojo_key").config, built("bmojo_key", ssm_state_size=32).config
    assert wide.ssm_state_size == 32 and wide.window_size < plain.window_size
    assert constant_bytes(wide) <= SIZES.state_bytes < constant_bytes(wide) / (1 - BYTES_TOLERANCE)


def test_a_size_that_its_own_fields_fix_is_taken_or_refused():
    own = {"window_size": 5, "eidetic_size": 18}
    fitting = built("bmojo_slots", **own).config
    assert (fitting.window_size, fitting.eidetic_size) == (5, 18)
    assert (1 - BYTES_TOLERANCE) * SIZES.state_bytes <= constant_bytes(fitting) <= SIZES.state_bytes
    with pytest.raises(ValueError, match=r"takes [\d,]+ bytes by its own fields, and must .*; leave one of them out"):
        built("bmojo_slots", window_size=5, eidetic_size=8)
    with pytest.raises(ValueError, match="bytes at least"):
        built("bmojo_slots", window_size=5, eidetic_size=30)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["lstm"], "models: 'lstm' is no model; known are full_attention, window, "),
        ("window", "models='window': must be a list"),
        (["window", "window"], "must be distinct"),
        ([{"model": "bmojo_key", "eidetic_decy": 1}], "did you mean 'models: bmojo_key.eidetic_decay'"),
        ([{"model": "bmojo_key", "hidden_size": 1}], "models: bmojo_key.hidden_size: no such setting"),
    ],
)
def test_refused_names(entries, said):
    with pytest.raises(ValueError) as error:
        models_of(entries)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("model", "sizes", "said"),
    [
        ("bmojo_key", {"state_bytes": 5_000}, "state_bytes=5,000: bmojo_key needs"),
        ("window", {"state_bytes": 3_000}, "must come within 7%; give more bytes"),
        ("mamba", {"parameters": 30_000}, "parameters=30,000: mamba has"),
    ],
)
def test_refused_sizes(model, sizes, said):
    with pytest.raises(ValueError) as error:
        Model(model, model).config(Sizes(**{**SIZES.__dict__, **sizes}), T)
    assert said in str(error.value)
