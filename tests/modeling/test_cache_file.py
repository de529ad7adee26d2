"""A cache's file under faults: flipped bits, planted contents, other models, killed and concurrent savers, full disks.

What a good file is, and that it continues exactly, is tested in test_cache.py; old files in test_contract.py.
"""

import dataclasses
import errno
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from modeling_bmojo import BMojoCache, BMojoConfig, cache_file_bmojo
from modeling_bmojo.fields_bmojo import fields_with
from tests.modeling.test_cache import STATES, build, go_on, padded, read, tokens
from tests.tiny import SIZES


pytestmark = pytest.mark.own_settings


# Damage --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["output", "mixed-layers"])
def test_one_flipped_bit_is_refused_wherever_it_is(name, tmp_path):
    """200 places over the whole file, and every bit of its first 16 bytes and of the format's name."""
    model, path = build(name), tmp_path / "cache"
    padded(model).save(path)
    good = bytearray(path.read_bytes())
    generator = random.Random(0)
    places = [(generator.randrange(len(good)), generator.randrange(8)) for _ in range(200)]
    version = good.index(b"bmojo-cache-6")
    header = [*range(16), *range(version, version + 13), good.index(b"sha256") + 20]
    for place, bit in places + [(place, bit) for place in header for bit in range(8)]:
        data = bytearray(good)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"path='.*cache'"):
            BMojoCache.load(path, model.config)
    path.write_bytes(good)
    BMojoCache.load(path, model.config)


def test_the_checksum_is_of_the_whole_file(tmp_path):
    """sha256 with its own digits as zeros: anyone can compute it."""
    padded(build()).save(tmp_path / "cache")
    with safe_open(tmp_path / "cache", framework="pt") as file:
        stated = file.metadata()["sha256"].encode()
    data = (tmp_path / "cache").read_bytes()
    assert data.count(stated) == 1
    assert hashlib.sha256(data.replace(stated, b"0" * 64)).hexdigest().encode() == stated


def test_a_loaded_cache_does_not_follow_its_file(tmp_path):
    """Another program may write into the file in place: what was checked is what is used."""
    model, path = build("mixed-layers"), tmp_path / "cache"
    cache = padded(model)
    cache.save(path)
    loaded = BMojoCache.load(path, model.config)
    with open(path, "rb+") as file:
        file.write(os.urandom(path.stat().st_size))
    ids = tokens(9, seed=1)
    assert torch.equal(go_on(model, loaded, ids), go_on(model, cache, ids))


# Plants: files with a right checksum whose contents no text can leave ------------------------------------------------
def sealed(path, tensors, metadata):
    """Writes a file as `save` would, whatever it holds."""
    if "sha256" in metadata:
        metadata = {**metadata, "sha256": "0" * 64}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    if "sha256" in metadata:
        data = path.read_bytes()
        assert data.count(b"0" * 64) >= 1
        at = data.index(b'"sha256":"') + 10
        digits = hashlib.sha256(data).hexdigest().encode()
        path.write_bytes(data[:at] + digits + data[at + 64 :])


def put(name, index, value):
    def plant(tensors, metadata):
        tensors[name][index] = value

    return plant


def replace(name, function):
    def plant(tensors, metadata):
        tensors[name] = function(tensors[name])

    return plant


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def add(name, value):
    return lambda tensors, metadata: tensors.__setitem__(name, value)


def say(name, value):
    return lambda tensors, metadata: metadata.__setitem__(name, value)


def fact(name, value):
    def plant(tensors, metadata):
        metadata["facts"] = json.dumps({**json.loads(metadata["facts"]), name: value})

    return plant


def everywhere(name, index, value):
    def plant(tensors, metadata):
        for full in tensors:
            if full.endswith(f".{name}"):
                tensors[full][index] = value

    return plant


def both(*plants):
    def plant(tensors, metadata):
        for part in plants:
            part(tensors, metadata)

    return plant


def copied_position(tensors, metadata):
    """The two kept tokens with the smallest positions become one."""
    row = tensors["0.positions"][0, 2:]
    first, second = row.sort().indices[:2]
    row[first] = row[second].clone()


NAN, INF = float("nan"), float("inf")
# Row 0 of `padded` has read 30 tokens, row 1 17, row 2 4, in 30 columns. F = 2, M = 3, W = 5.
PLANTS = {
    "a position beyond the tokens read": (put("0.positions", (0, 3), 30), "layer 0: row 0: 'positions'.*beyond"),
    "a position far beyond": (put("1.positions", (1, 4), 2**40), "layer 1: row 1: 'positions'.*beyond"),
    "a position below -1": (put("0.positions", (2, 5), -7), "layer 0: row 2: 'positions'.*below -1"),
    "an emptied slot": (put("0.positions", (0, 4), -1), "layer 0: row 0: 'positions'.*room"),
    "a slot too many": (put("0.positions", (2, 9), 1), "layer 0: row 2: 'positions'"),
    "a position twice": (copied_position, "layer 0: row 0: 'positions'.*twice"),
    "a fading token elsewhere": (put("0.positions", (0, 0), 3), "layer 0: row 0: 'positions' of fading"),
    "a fading token unread": (put("0.positions", (2, 1), 0), "layer 0: row 2: 'positions' of fading"),
    "a sliding window with a gap": (put("1.positions", (0, 0), 3), "layer 1: row 0: 'positions'.*last tokens"),
    "seen negative": (everywhere("seen", 2, -1), "'seen' is .*between 0 and columns=30"),
    "seen beyond columns": (everywhere("seen", 0, 31), "'seen' is .*between 0 and columns=30"),
    "seen differs between layers": (put("1.seen", 0, 29), "layer 1: 'seen'"),
    "seen less than the positions": (everywhere("seen", 0, 20), "row|'pads'"),
    "columns too small": (say("columns", "29"), "'seen'.*columns=29"),
    "columns too large": (say("columns", "31"), "'pads'"),
    "columns beyond full attention": (
        both(say("columns", "3000"), everywhere("pads", slice(None), 5)),
        "layer 2: .*room for.*3000 columns",
    ),
    "columns zero": (say("columns", "0"), "columns='0'"),
    "columns negative": (say("columns", "-3"), "columns='-3'"),
    "columns of many digits": (say("columns", "9" * 5000), "columns='9999"),
    "columns a word": (say("columns", "many"), "columns='many'"),
    "pads missing": (drop("0.pads"), "'pads' is missing"),
    "pads where none were": (put("0.pads", 0, 3), "'pads' is"),
    "no pads where some were": (put("0.pads", 1, 0), "'pads' is"),
    "NaN keys": (put("0.keys", (0, 0, 0, 0), NAN), "layer 0: the state 'keys' holds NaN"),
    "infinite values": (put("2.values", (1, 0, 3, 1), INF), "layer 2: the state 'values' holds NaN"),
    "NaN in the SSM state": (put("3.ssm", (0, 0, 0, 0), NAN), "layer 3: the state 'ssm' holds NaN"),
    "NaN in the convolution": (put("0.conv", (2, 0, 0), NAN), "layer 0: the state 'conv' holds NaN"),
    "NaN in the outputs": (put("0.outputs", (0, 0, 0), NAN), "layer 0: the state 'outputs' holds NaN"),
    "NaN in the delay line": (put("0.delay_keys", (0, 0, 0, 0), NAN), "layer 0: the state 'delay_keys' holds NaN"),
    "NaN as the last output": (put("3.last_hidden", (0, 0), NAN), "layer 3: the state 'last_hidden' holds NaN"),
    "a negative innovation": (put("0.innovations", (0, 4), -0.5), "layer 0: row 0: 'innovations' are negative"),
    "a huge innovation": (put("0.innovations", (0, 4), 1e30), "layer 0: row 0: 'innovations' are larger"),
    "an infinite innovation": (put("0.innovations", (0, 4), INF), "the state 'innovations' holds NaN or infinity"),
    "an innovation of a fading token": (put("0.innovations", (0, 0), 0.5), "'innovations' are not 0 for fading"),
    "keys too short": (replace("0.keys", lambda v: v[:, :, 1:]), "layer 0: the state 'keys' has shape"),
    "full attention too short": (
        both(replace("2.keys", lambda v: v[:, :, :29]), replace("2.values", lambda v: v[:, :, :29])),
        "layer 2: .*room for .29. tokens but 30 columns",
    ),
    "keys and values of two lengths": (replace("2.keys", lambda v: v[:, :, :40]), "layer 2: .*room"),
    "rows missing": (replace("1.keys", lambda v: v[:2]), "layer 1: the state 'keys' has shape"),
    "no rows": (replace("0.seen", lambda v: v[:0]), "layer 0: the state 'seen'"),
    "seen a matrix": (replace("0.seen", lambda v: v[:, None]), "layer 0: the state 'seen'"),
    "keys as fp32": (replace("0.keys", torch.Tensor.float), "layer 0: the state .* is of dtype"),
    "keys as integers": (replace("0.keys", torch.Tensor.long), "layer 0: states of dtype torch.int64"),
    "keys in 8 bits": (replace("0.keys", lambda v: v.to(torch.float8_e4m3fn)), "'0.keys' is of dtype F8_E4M3"),
    "a narrow SSM state": (replace("0.ssm", torch.Tensor.half), "layer 0: the state 'ssm' is of dtype"),
    "positions as fp64": (replace("0.positions", torch.Tensor.double), "layer 0: the state 'positions' is of dtype"),
    "positions as int32": (replace("0.positions", torch.Tensor.int), "'0.positions' is of dtype I32"),
    "an unknown state": (add("0.more", torch.zeros(1)), r"layer 0: states \['more'\] are unknown"),
    "a state of another layer": (add("3.keys", torch.zeros(3, 2, 5, 4).double()), r"layer 3: states \['keys'\] are"),
    "a layer too many": (add("4.seen", torch.zeros(3).long()), "'4.seen' belongs to no layer of 4"),
    "a tensor of no layer": (add("keys", torch.zeros(3)), "'keys' belongs to no layer"),
    "a layer written otherwise": (add("00.seen", torch.zeros(3).long()), "'00.seen' belongs to no layer"),
    "no last output": (drop("3.last_hidden"), r"layer 3: states \['last_hidden'\] are missing"),
    "no seen": (drop("0.seen"), "'seen' is missing"),
    "no facts": (lambda tensors, metadata: metadata.pop("facts"), "description is damaged"),
    "facts a list": (say("facts", "[]"), "description is damaged: facts must be a dict"),
    "facts no JSON": (say("facts", "{"), "description is damaged"),
    "facts too deep": (say("facts", "[" * 100_000), "description is damaged"),
    "a fact of another model": (fact("hidden_act", "gelu"), "hidden_act='gelu' but the model has 'silu'"),
    "a fact of another version": (fact("memory_of_tomorrow", 3), "memory_of_tomorrow=3, which this configuration"),
    "a window of petabytes": (fact("window_size", 10**15), "the cache has window_size=1000000000000000"),
    "no checksum": (lambda tensors, metadata: metadata.pop("sha256"), "does not hold one sha256"),
    "the old format": (say("format", "bmojo-cache-4"), "has no sha256, but the file has one"),
    "an unknown format": (say("format", "bmojo-cache-7"), "format 'bmojo-cache-7' is none of"),
    "a format before": (say("format", "bmojo-cache-3"), "format 'bmojo-cache-3' is none of"),
    "no format": (lambda tensors, metadata: metadata.pop("format"), "format None is none of"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model of all layer types and the parts of a good file."""
    model, path = build("mixed-layers"), tmp_path_factory.mktemp("good") / "cache"
    padded(model).save(path)
    with safe_open(path, framework="pt") as file:
        return model.config, load_file(path), file.metadata()


@pytest.mark.parametrize("name", PLANTS)
def test_planted_contents_are_refused_by_name(name, good, tmp_path):
    config, tensors, metadata = good
    tensors, metadata = {key: value.clone() for key, value in tensors.items()}, dict(metadata)
    sealed(tmp_path / "same", tensors, metadata)
    BMojoCache.load(tmp_path / "same", config)
    plant, message = PLANTS[name]
    plant(tensors, metadata)
    sealed(tmp_path / "planted", tensors, metadata)
    with pytest.raises(ValueError, match=rf"(?s)path='.*planted': .*{message}"):
        BMojoCache.load(tmp_path / "planted", config)


@pytest.mark.parametrize("header", [b'{"__metadata__":5}', b'{"__metadata__":{"format":5}}', b"[]", b"5", b"null"])
def test_metadata_of_another_kind_is_refused(header, tmp_path):
    (tmp_path / "cache").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"path='.*cache'"):
        BMojoCache.load(tmp_path / "cache", build().config)


@pytest.mark.parametrize("claim", ["tensor", "header"])
def test_a_small_file_that_claims_gigabytes_is_refused_before_anything_is_allocated(claim, good, tmp_path):
    config, tensors, metadata = good
    if claim == "header":
        data = (2**60).to_bytes(8, "little") + b"{}"
    else:
        header = {"__metadata__": metadata}
        header["0.seen"] = {"dtype": "I64", "shape": [2**40], "data_offsets": [0, 2**43]}
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(64)
    (tmp_path / "cache").write_bytes(data)
    with pytest.raises(ValueError, match=r"path='.*cache'"):
        BMojoCache.load(tmp_path / "cache", config)


def test_values_are_not_loaded_before_the_header_fits(good, tmp_path, monkeypatch):
    config, tensors, metadata = good
    sealed(tmp_path / "cache", {**tensors, "0.more": torch.zeros(1)}, metadata)
    monkeypatch.setattr(cache_file_bmojo, "check_values", lambda *args, **kwargs: pytest.fail("values were loaded"))
    with pytest.raises(ValueError, match="unknown"):
        BMojoCache.load(tmp_path / "cache", config)


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("pieces", [[30], [1] * 30, [4, 1, 9, 1, 15], [12, 18]], ids=str)
def test_what_any_reading_leaves_is_accepted(name, pieces, tmp_path):
    """The rules hold for every state that the model can reach: pads anywhere, pieces of any size, one token at a time.
    What `save` refuses, it would say."""
    model = build(name)
    generator = torch.Generator().manual_seed(len(pieces))
    mask, cache, start = torch.rand(4, 30, generator=generator) < torch.tensor([[1.0], [0.8], [0.4], [0.05]]), None, 0
    mask = mask.long()
    for size in pieces:
        cache = read(model, tokens(30, 4)[:, start : start + size], cache, mask[:, : start + size])
        start += size
        cache.save(tmp_path / "cache")
        BMojoCache.load(tmp_path / "cache", model.config)
    assert cache.seen.tolist() == mask.sum(1).tolist()
    for _ in range(3):
        cache.reorder_cache(torch.tensor([3, 3, 1, 0]))
        read(model, tokens(2, 4), cache)
        cache.save(tmp_path / "cache")
        BMojoCache.load(tmp_path / "cache", model.config)


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    cache = padded(build())
    cache.layers[1].ssm[0] = NAN
    with pytest.raises(ValueError, match="not saved: layer 1: the state 'ssm' holds NaN"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


# Format 4 ------------------------------------------------------------------------------------------------------------
OLD_FACTS = [
    "rope_parameters",
    "no_rope_layers",
    "qk_norm",
    "norm_position",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
    "rms_norm_eps",
    "eidetic_decay",
    "innovation",
    "tie_fading_projections",
    "ssm_type",
    "ssm_time_step_rank",
    "ssm_num_groups",
    "ssm_conv_act",
    "ssm_projected",
    "ssm_gated",
    "ssm_norm",
    "ssm_time_step_limit",
]


def old_specs(config):
    """The sizes of every layer as formats 4 and 5 wrote them."""
    sizes = {
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden": config.hidden_size,
        "ssm_heads": config.ssm_num_heads,
        "ssm_head_dim": config.ssm_head_dim,
        "ssm_state": config.ssm_state_size,
        "conv_kernel": config.ssm_conv_kernel,
    }
    specs = [config.layer_spec(index) for index in range(config.num_hidden_layers)]
    taps = [config.innovation_taps * (config.innovation == "output" and spec.slots > 0) for spec in specs]
    return [spec._asdict() | sizes | {"taps": tap} for spec, tap in zip(specs, taps, strict=True)]


def as_before(path, plant=None):
    """Makes the file at `path` one of format 4, as version 0.1 wrote it: see tests/project/contract for real ones."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), load_file(path)
    facts = json.loads(metadata["facts"])
    del metadata["sha256"]
    metadata |= {"format": "bmojo-cache-4", "facts": json.dumps({name: facts[name] for name in OLD_FACTS})}
    metadata["specs"] = json.dumps(old_specs(BMojoConfig(**facts)))
    tensors.pop("0.pads", None)
    for name in tensors:
        if name.endswith((".keys", ".values")):
            tensors[name] = tensors[name].transpose(1, 2)
    if plant is not None:
        plant(tensors, metadata)
    sealed(path, tensors, metadata)


@pytest.mark.parametrize("name", STATES)
def test_a_file_of_format_4_continues(name, tmp_path):
    model, path = build(name), tmp_path / "cache"
    cache = padded(model)
    cache.save(path)
    as_before(path)
    loaded = BMojoCache.load(path, model.config)
    ids = tokens(9, seed=1)
    assert torch.equal(go_on(model, loaded, ids), go_on(model, cache, ids))
    # Which columns were pads is not in it: the number of tokens is, also behind what is read later.
    mask = torch.nn.functional.pad(
        (torch.arange(30) >= 30 - torch.tensor([30, 17, 4])[:, None]).long(), (0, 9), value=1
    )
    loaded.check_mask(mask)
    loaded.check_mask(mask.roll(1, 1))
    wrong = mask.clone()
    wrong[1, 0] = 1
    with pytest.raises(ValueError, match=r"attention_mask\[1\] calls 27 of the 39"):
        loaded.check_mask(wrong)
    joined = BMojoCache(list(loaded))
    joined.check_mask(mask.roll(1, 1))


def test_a_file_of_format_4_without_pads_knows_that(tmp_path):
    model, path = build(), tmp_path / "cache"
    read(model, tokens(30)).save(path)
    as_before(path)
    loaded = BMojoCache.load(path, model.config)
    loaded.check_mask(torch.ones(3, 30))
    read(model, tokens(2), loaded, torch.tensor([[1, 1], [0, 1], [1, 1]]))
    mask = torch.ones(3, 32)
    mask[1, 30] = 0
    loaded.check_mask(mask)
    with pytest.raises(ValueError, match="in other columns"):
        loaded.check_mask(mask.roll(1, 1))


@pytest.mark.parametrize(
    "name",
    ["a position beyond the tokens read", "seen negative", "NaN keys", "a negative innovation", "keys as fp32"],
)
def test_plants_in_format_4_are_refused_too(name, tmp_path):
    model, path = build("mixed-layers"), tmp_path / "planted"
    padded(model).save(path)
    plant, message = PLANTS[name]
    as_before(path, plant)
    with pytest.raises(ValueError, match=rf"(?s)path='.*planted': .*{message}"):
        BMojoCache.load(path, model.config)


def test_format_4_compares_the_facts_that_it_holds(tmp_path):
    path = tmp_path / "cache"
    read(build(), tokens(9)).save(path)
    as_before(path)
    for field in (dict(qk_norm="head"), dict(eidetic_decay=0.5), dict(window_size=6)):
        with pytest.raises(ValueError, match=r"the cache has (qk_norm|eidetic_decay|window)="):
            BMojoCache.load(path, build(**field).config)
    BMojoCache.load(path, build(hidden_act="gelu").config)  # never recorded then


# Other models --------------------------------------------------------------------------------------------------------
BACKBONE = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, ssm_num_heads=4, ssm_head_dim=4)
# Every field that changes results, at another value; further fields that it needs to be valid.
OTHER_VALUES = {
    "vocab_size": 62,
    "hidden_size": 20,
    "intermediate_size": 25,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_act": "gelu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "qk_norm": "head",
    "norm_position": "post",
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
    "no_rope_layers": [1, 0],
    "layer_types": ["bmojo", "full_attention"],
    "window_size": 6,
    "eidetic_size": 4,
    "eidetic_decay": 0.1,
    "decay_clock": "innovation",
    "innovation": "state",
    "innovation_taps": 3,
    "fading_size": 3,
    "fading_stride": 5,
    "fading_delay": 5,
    "fading_mass": True,
    "storage_size": 7,
    "storage_candidates": 90,
    "storage_sketch_size": 2,
    "storage_decay": 0.5,
    "storage_limit": 300,
    "max_rope_distance": 100,
    "max_rope_distance_start": 7,
    "tie_fading_projections": False,
    "tie_fading_queries": False,
    "ssm_type": "mamba",
    "ssm_num_heads": 8,
    "ssm_head_dim": 8,
    "ssm_solver_steps": 7,
    "ssm_ridge": 0.1,
    "ssm_state_size": 7,
    "ssm_num_groups": 4,
    "ssm_head_pattern": "multi_query",
    "ssm_qk_norm": True,
    "ssm_conv_kernel": 3,
    "ssm_conv_bias": False,
    "ssm_conv_act": "gelu",
    "ssm_projected": False,
    "ssm_proj_bias": True,
    "ssm_gated": False,
    "ssm_norm": False,
    "ssm_norm_eps": 1e-3,
    "ssm_time_step_limit": [0.0, 0.5],
}


# What a field cannot be set without.
NEEDED_BY = {
    "fading_mass": dict(storage_size=3, fading_stride=5),
    "tie_fading_queries": dict(tie_fading_projections=False),
    "storage_candidates": dict(storage_size=3, storage_sketch_size=2),
    "max_rope_distance_start": dict(max_rope_distance=90),
}


def fields_of_config():
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(BMojoConfig)} - inherited
    return own | set(BMojoConfig.__annotations__)


def test_every_field_is_a_fact_or_neutral():
    facts, neutral = (set(fields_with(BMojoConfig, results=results)) for results in (True, False))
    assert facts | neutral == fields_of_config() and not facts & neutral
    assert facts == {*OTHER_VALUES, "ssm_time_step_rank", "ssm_expand_rank"}  # these exist for one SSM each: below


def assert_refused(fields, other, name, tmp_path):
    model, foreign = build(**fields), BMojoConfig(**{**SIZES, **fields, **other})
    cache = read(model, tokens(9))
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"the cache has {name}="):
        BMojoCache.load(tmp_path / "cache", foreign)
    with pytest.raises(ValueError, match=rf"the cache has {name}="):
        cache.check(foreign)
    # The same object, changed after the cache was built and used.
    setattr(model.config, name, other[name])
    with pytest.raises(ValueError, match=rf"the cache has {name}="):
        cache.check(model.config)


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_a_cache_of_a_model_with_other_results_is_refused(name, tmp_path):
    extra = {} if name != "ssm_type" else dict(ssm_num_groups=None, ssm_norm=None)
    assert_refused({**BACKBONE, **NEEDED_BY.get(name, {})}, {name: OTHER_VALUES[name], **extra}, name, tmp_path)


@pytest.mark.parametrize("form, name", [("mamba", "ssm_time_step_rank"), ("kalmanet", "ssm_expand_rank")])
def test_a_cache_of_another_rank_is_refused(form, name, tmp_path):
    assert_refused(dict(ssm_type=form), {name: 2}, name, tmp_path)


@pytest.mark.parametrize(
    "field",
    [
        dict(memory_block_size=3),
        dict(ssm_chunk_size=5),
        dict(kernel_backend="torch"),
        dict(attention_dropout=0.5),
        dict(innovation_gradient=3.0),
        dict(use_cache=False),
        dict(eos_token_id=3),
        dict(initializer_range=0.5),
    ],
    ids=str,
)
def test_a_neutral_field_may_differ(field, tmp_path):
    model = build()
    cache = padded(model)
    cache.save(tmp_path / "cache")
    other = build(**field)
    other.load_state_dict(model.state_dict())
    loaded = BMojoCache.load(tmp_path / "cache", other.config)
    ids = tokens(12, seed=1)
    torch.testing.assert_close(go_on(other, loaded, ids), go_on(model, cache, ids), rtol=1e-12, atol=1e-12)


def test_a_list_and_a_tuple_are_one_value(tmp_path):
    model = build(num_hidden_layers=2, no_rope_layers=(1, 0), layer_types=("bmojo", "bmojo"))
    cache = read(model, tokens(9))
    cache.save(tmp_path / "cache")
    BMojoCache.load(tmp_path / "cache", model.config)
    read(model, tokens(3), cache)


def test_a_changed_list_inside_the_same_config_is_noticed():
    model = build()
    cache = read(model, tokens(9))
    model.config.layer_types[1] = "full_attention"
    with pytest.raises(ValueError, match="the cache has layer_types="):
        cache.check(model.config)


# Savers --------------------------------------------------------------------------------------------------------------
def partials(folder):
    return sorted(file.name for file in folder.iterdir() if ".partial-" in file.name)


def test_two_threads_save_one_path(tmp_path):
    """Both end, none meets the other's partial file, and what remains is one of the two, whole."""
    model, path = build(), tmp_path / "cache"
    caches, failures = [read(model, tokens(length)) for length in (9, 30)], []

    def save(cache):
        try:
            for _ in range(40):
                cache.save(path)
                assert BMojoCache.load(path, model.config).get_seq_length() in (9, 30)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(cache,)) for cache in caches for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import torch
from tests.modeling.test_cache import build, read, tokens
from modeling_bmojo import cache_file_bmojo
written = cache_file_bmojo.save_file
def killed(tensors, filename, metadata=None):
    written(tensors, filename, metadata=metadata)
    print(os.getpid(), filename, flush=True)
    if sys.argv[2] == "live":
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
cache_file_bmojo.save_file = killed
read(build(), tokens(9)).save(sys.argv[1])
"""


def saver(path, *, live):
    folders = [str(Path(__file__).resolve().parents[2])]
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path), "live" if live else "dead", *folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_leftovers_of_killed_savers_are_removed_and_no_others(tmp_path):
    model, path = build(), tmp_path / "cache"
    read(model, tokens(30)).save(path)
    live = saver(path, live=True)
    assert live.stdout.readline()  # it stands in the middle of its save
    dead = saver(path, live=False)
    assert dead.wait(timeout=300) == -9
    of_dead, of_live = ([name for name in partials(tmp_path) if f"-{process.pid}-" in name] for process in (dead, live))
    assert len(of_dead) == len(of_live) == 1
    assert BMojoCache.load(path, model.config).get_seq_length() == 30  # neither touched it
    other = of_dead[0].replace("cache.", "cache2.")
    strangers = [other, of_dead[0] + ".txt", "cache.partial-1-2", "cache.partial-ffffffff-999999-00000000"]
    for name in strangers:
        (tmp_path / name).write_text("not ours")
    read(model, tokens(9)).save(path)
    assert partials(tmp_path) == sorted([*of_live, *strangers])
    live.kill()
    live.wait()
    read(model, tokens(9)).save(path)
    assert partials(tmp_path) == sorted(strangers)


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), sync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("replace"), replace(*names))[1])
    read(build(), tokens(9)).save(tmp_path / "cache")
    assert events[:2] == ["fsync", "replace"]


FAILURES = {
    "safetensors": lambda patch: patch.setattr(cache_file_bmojo, "save_file", no_space_by_safetensors),
    "checksum": lambda patch: patch.setattr(cache_file_bmojo, "_digest", no_space),
    "fsync": lambda patch: patch.setattr(os, "fsync", no_space),
    "chmod": lambda patch: patch.setattr(os, "chmod", no_space),
    "rename": lambda patch: patch.setattr(os, "replace", no_space),
}


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_by_safetensors(tensors, filename, metadata=None):
    Path(filename).write_bytes(b"half of it")
    raise cache_file_bmojo.SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failing", FAILURES)
def test_a_full_disk_is_one_clear_error(failing, tmp_path, monkeypatch):
    model, path = build(), tmp_path / "cache"
    read(model, tokens(9)).save(path)
    before = path.read_bytes()
    FAILURES[failing](monkeypatch)
    for target in (path, tmp_path / "new"):
        with pytest.raises(OSError, match=rf"path='.*{target.name}': .*No space left.*unchanged\. Make room") as caught:
            read(model, tokens(30)).save(target)
        assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["cache"] and path.read_bytes() == before


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(build(), tokens(9)).save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_reads_on_while_it_is_saved_is_not_saved(tmp_path, monkeypatch):
    model, path = build(), tmp_path / "cache"
    cache, write = read(model, tokens(9)), cache_file_bmojo.save_file

    def meanwhile(tensors, filename, metadata=None):
        write(tensors, filename, metadata=metadata)
        read(model, tokens(2), cache)

    monkeypatch.setattr(cache_file_bmojo, "save_file", meanwhile)
    with pytest.raises(ValueError, match="written to while it was saved"):
        cache.save(path)
    assert list(tmp_path.iterdir()) == []
