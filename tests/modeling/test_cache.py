"""BMojoCache as an object: every operation over every state, its bytes, its file, and what it refuses.

`STATES` lists the settings that together allocate every kind of state: eidetic slots, visible and delayed fading
tokens, window, predictor history, convolution, SSM, and the growing keys of full attention. That reading is exact for
any split is proven in test_parity.py, for any padding in test_padding.py.
"""

import copy
import gc
import os
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import Cache

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoConfig, BMojoForCausalLM, RememberedToken, cache_file_bmojo
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, SLOTS, VOCAB, WINDOW


pytestmark = pytest.mark.own_settings


BASE = SIZES
STATES = {
    "output": {},
    "state-decay": dict(innovation="state", eidetic_decay=0.05, fading_size=7),
    "stride": dict(window_size=6, fading_size=2, fading_stride=3),
    "key": dict(innovation="key"),
    "answers": dict(innovation="key", fading_delay=0),
    "clock": dict(innovation="key", eidetic_decay=0.3, decay_clock="innovation"),
    "mixed-layers": MIXED_LAYERS,
    "s6": dict(ssm_type="mamba", ssm_state_size=3, num_hidden_layers=1),
    "delta": dict(ssm_type="gated_delta", ssm_state_size=3, num_hidden_layers=1),
    "kalma": dict(ssm_type="kalmanet", ssm_state_size=3, ssm_solver_steps=5, num_hidden_layers=1),
}
LENGTHS = torch.tensor([30, 17, 4])  # real tokens of the three rows of `padded`, left-padded to 30 columns


def build(name="output", dtype=torch.float64, **fields):
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**BASE, **STATES[name], **fields}))).to(dtype).eval()


def tokens(length, batch=3, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model, ids, cache=None, mask=None):
    """The cache after reading ids [B, T] in one forward."""
    cache = BMojoCache(model.config) if cache is None else cache
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    return cache


def padded(model):
    """A cache that has read three rows of different lengths."""
    mask = (torch.arange(30) >= 30 - LENGTHS[:, None]).long()
    return read(model, tokens(30), mask=mask)


@torch.no_grad()
def go_on(model, cache, ids):
    """Logits [B, T, V] of ids read after what the cache holds: three single tokens, then the rest at once."""
    pieces = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
    return torch.cat([*pieces, model(input_ids=ids[:, 3:], past_key_values=cache).logits], dim=1)


def states(cache):
    """Copies of every state: (layer, name) -> tensor."""
    return {(i, name): v.clone() for i, layer in enumerate(cache.layers) for name, v in layer.states().items()}


def assert_same_states(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name


def assert_near(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_settings_allocate_every_state():
    """The premise of this file, for every row: nothing below may pass because a state does not exist or is empty."""
    found = set()
    for name in STATES:
        cache = padded(build(name))
        found |= {state for _, state in states(cache)}
        assert [len(cache.remembered(0, row)) for row in range(3)] == [SLOTS, SLOTS, 0]
        assert cache.seen.tolist() == LENGTHS.tolist()
    declared = {state for name in STATES for layer in BMojoCache(build(name).config).layers for state in layer.names}
    assert found == declared


# Operations over every state -----------------------------------------------------------------------------------------
def test_saving_into_no_folder_is_refused(tmp_path):
    cache = read(build(), tokens(4))
    with pytest.raises(ValueError, match="there is no folder"):
        cache.save(tmp_path / "missing" / "cache.safetensors")


@pytest.mark.parametrize("name", STATES)
def test_reset_is_a_fresh_cache(name):
    model = build(name)
    cache = padded(model)
    assert states(cache) and cache.remembered(0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.seen is None and cache.nbytes == 0
    assert states(cache) == {} and cache.remembered(0) == []
    ids = tokens(24, seed=1)
    assert_near(go_on(model, cache, ids), go_on(model, BMojoCache(model.config), ids), 1e-12)


OPERATIONS = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "one row of many": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_rows_move_with_all_their_states(name, operation):
    """Every state is permuted alike, and decoding continues as each row would alone."""
    model = build(name)
    cache = padded(model)
    before = states(cache)
    apply, rows = OPERATIONS[operation]
    apply(cache)
    assert cache.batch_size == len(rows) and cache.get_seq_length() == 30
    assert_same_states(states(cache), {key: value[rows] for key, value in before.items()})
    ids, more = tokens(30), tokens(12, batch=len(rows), seed=1)
    logits = go_on(model, cache, more)
    for index, row in enumerate(rows):
        own = read(model, ids[row : row + 1, 30 - LENGTHS[row] :])
        assert_near(logits[index], go_on(model, own, more[index : index + 1])[0])


@pytest.mark.parametrize("operation", ["reset", "reorder", "repeat", "select", "crop", "to", "offload"])
def test_operations_on_an_empty_cache_do_nothing(operation):
    model = build("mixed-layers")
    cache = BMojoCache(model.config)
    {
        "reset": lambda: cache.reset(),
        "reorder": lambda: cache.reorder_cache(torch.tensor([1, 0])),
        "repeat": lambda: cache.batch_repeat_interleave(2),
        "select": lambda: cache.batch_select_indices(torch.tensor([0])),
        "crop": lambda: cache.crop(0),
        "to": lambda: cache.to("cpu"),
        "offload": lambda: cache.offload(0),
    }[operation]()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0 and cache.seen is None and cache.remembered(0) == []
    ids = tokens(12)
    assert torch.equal(go_on(model, cache, ids), go_on(model, BMojoCache(model.config), ids))


@pytest.mark.parametrize("name", STATES)
def test_crop_refuses_what_it_cannot_restore(name):
    cache = padded(build(name))
    before = states(cache)
    assert not cache.is_croppable
    cache.crop(0)
    for tokens_to_remove in (1, 5, -1):
        with pytest.raises(ValueError, match=f"tokens_to_remove={tokens_to_remove}: .*deepcopy"):
            cache.crop(tokens_to_remove)
    assert_same_states(states(cache), before)


@pytest.mark.parametrize("name", STATES)
def test_offload_and_prefetch_keep_every_state(name):
    model = build(name)
    cache, untouched = padded(model), padded(model)
    for layer in range(len(cache)):
        cache.offload(layer, only_non_sliding=False)
        assert {value.device.type for value in cache.layers[layer].states().values()} == {"cpu"}
        cache.prefetch(layer, only_non_sliding=False)
    assert_same_states(states(cache), states(untouched))
    ids = tokens(9, seed=1)
    assert torch.equal(go_on(model, cache, ids), go_on(model, untouched, ids))


def test_to_moves_every_state():
    """On a machine with one device: the meta device, which has shapes and types but no values."""
    cache = padded(build("mixed-layers"))
    shapes = {key: (value.shape, value.dtype) for key, value in states(cache).items()}
    assert cache.to("cpu") is cache
    assert cache.to(torch.device("meta")) is cache
    moved = states(cache)
    assert {value.device.type for value in moved.values()} == {"meta"}
    assert {key: (value.shape, value.dtype) for key, value in moved.items()} == shapes
    assert all(layer.device.type == "meta" for layer in cache.layers)


@pytest.mark.parametrize("name", STATES)
def test_copies_are_independent(name):
    model = build(name)
    cache, untouched = padded(model), padded(model)
    kept = copy.deepcopy(cache)
    go_on(model, cache, tokens(25, seed=2))
    assert_same_states(states(kept), states(untouched))
    assert kept.get_seq_length() == 30 and cache.get_seq_length() == 55
    ids = tokens(9, seed=1)
    assert torch.equal(go_on(model, kept, ids), go_on(model, untouched, ids))


def test_states_hold_no_graph():
    """Reading with gradients switched on leaves values in the cache, not a growing graph."""
    model = build("mixed-layers").train()
    cache = BMojoCache(model.config)
    for piece in tokens(30).split([11, 1, 1, 17], dim=1):
        assert model(input_ids=piece, past_key_values=cache).logits.requires_grad
        assert not any(value.requires_grad for value in states(cache).values())


def test_read_under_inference_mode_and_continued_outside():
    model, ids = build("mixed-layers"), tokens(9, seed=1)
    cache = BMojoCache(model.config)
    with torch.inference_mode():
        model(input_ids=tokens(30), past_key_values=cache)
    assert torch.equal(go_on(model, cache, ids), go_on(model, read(model, tokens(30)), ids))


def test_what_generate_asks_of_a_cache():
    cache = padded(build("mixed-layers"))
    assert isinstance(cache, Cache) and len(cache) == 4
    assert [cache.get_seq_length(layer) for layer in range(4)] == [30] * 4
    assert [cache.get_mask_sizes(7, layer) for layer in range(4)] == [(37, 0)] * 4
    assert cache.get_max_length() == -1
    assert cache.batch_size == 3 and BMojoCache(build().config).batch_size == -1
    assert "layers=4, columns=30, nbytes=" in repr(cache)


# Bytes ---------------------------------------------------------------------------------------------------------------
def layer_bytes(config, kind, size):
    """Bytes of one row of a layer by the table in cache_bmojo.py; size: bytes per number of the model's dtype."""
    wide, integer = max(size, 4), 8
    W, M, F = config.window_size, config.eidetic_size, config.fading_size
    entry = 2 * config.num_key_value_heads * config.head_dim * size  # a key and a value
    channels = config.ssm_num_heads * config.ssm_head_dim
    if config.ssm_type != "mamba":
        channels += 2 * config.ssm_num_groups * config.ssm_state_size
    values = config.ssm_head_dim
    if config.ssm_type == "kalmanet":  # values and keys of groups, queries of heads; keys on keys beside values on keys
        channels = config.ssm_num_groups * (values + config.ssm_state_size)
        channels += config.ssm_num_heads * config.ssm_state_size
        values += config.ssm_state_size
    ssm = (config.ssm_conv_kernel - 1) * channels * size
    ssm += config.ssm_num_heads * values * config.ssm_state_size * wide
    if kind == "linear_attention":
        return integer + ssm
    if kind == "sliding_attention":
        return integer + W * (entry + integer + wide)
    history = config.innovation_taps * config.hidden_size * size if config.innovation == "output" and M else 0
    if config.innovation == "key" and M:
        history = config.num_key_value_heads * config.head_dim * 8
    delay = W if config.fading_delay is None else config.fading_delay
    delayed = delay // config.fading_stride * entry if F else 0
    return integer + (M + F + W) * (entry + integer + wide) + delayed + history + ssm


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(innovation="state", fading_size=9),
        dict(innovation="key"),
        dict(innovation="key", eidetic_size=0),
        dict(window_size=6, fading_stride=3, fading_size=4),
        dict(fading_delay=0),
        dict(window_size=6, fading_stride=2, fading_delay=4),
        dict(fading_size=0, ssm_conv_kernel=1),
        dict(eidetic_size=0, window_size=8),
        dict(num_hidden_layers=3, layer_types=["linear_attention", "sliding_attention", "bmojo"], innovation_taps=2),
        dict(ssm_type="mamba", ssm_num_heads=3, ssm_head_dim=5),
        dict(ssm_type="gated_delta", ssm_num_heads=6, ssm_num_groups=3, ssm_head_dim=5),
        dict(ssm_type="kalmanet", ssm_num_heads=6, ssm_num_groups=3, ssm_head_dim=5, ssm_solver_steps=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_are_constant_and_what_the_table_says(fields, dtype):
    model = build(dtype=dtype, **fields)
    config, batch, size = model.config, 2, dtype.itemsize
    expected = batch * sum(layer_bytes(config, kind, size) for kind in config.layer_types)
    expected += batch * config.hidden_size * size  # the last output
    cache, found = None, {}
    for times, new in ((2, 2), (10, 8), (100, 90)):
        cache = read(model, tokens(new * config.window_size, batch), cache)
        assert cache.get_seq_length() == times * config.window_size
        found[times] = cache.nbytes
    assert found == {2: expected, 10: expected, 100: expected}
    assert sum(value.nbytes for value in states(cache).values()) == expected


def test_full_attention_keeps_every_token():
    """The exception: its layers grow, by no more than a half beyond what they hold and one step of growth."""
    model = build("mixed-layers")
    cache = read(model, tokens(900))
    layer = cache.layers[2]
    token = 2 * 3 * 2 * 4 * 8  # keys and values, rows, heads, head dim, bytes
    assert 900 * token < layer.nbytes <= (1.5 * 900 + 256) * token + 3 * 8


def resident():
    gc.collect()
    return psutil.Process().memory_info().rss


def test_twenty_thousand_tokens_leave_memory_flat():
    """Streamed in pieces of 256 with single steps between: as many bytes after 20,000 tokens as after 2,000."""
    sizes = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=32, window_size=64)
    model = build(dtype=torch.float32, **sizes, eidetic_size=16, memory_block_size=64, ssm_chunk_size=64)
    limit = 20 * 2**20
    # What must not happen, keeping every key and value, would be plainly visible.
    assert 18_000 * 2 * sum(2 * 4 * 32 * 4 for _ in model.config.layer_types) > 3 * limit
    cache, generator = BMojoCache(model.config), torch.Generator().manual_seed(0)
    start, constant = None, None
    with torch.no_grad():
        while cache.get_seq_length() < 20_000:
            for size in (256, 1, 1, 254):
                ids = torch.randint(0, VOCAB, (2, size), generator=generator)
                model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            if start is None and cache.get_seq_length() >= 2_000:
                start, constant = resident(), cache.nbytes
    assert cache.nbytes == constant
    assert resident() - start < limit
    assert cache.seen.tolist() == [cache.get_seq_length()] * 2 and cache.get_seq_length() >= 20_000


# What is remembered --------------------------------------------------------------------------------------------------
def test_remembered_is_a_view_of_positions_and_innovations():
    model = build()
    cache = padded(model)
    before = states(cache)
    for layer in range(2):
        for row, length in enumerate(LENGTHS.tolist()):
            found = cache.remembered(layer, row)
            assert len(found) == min(SLOTS, max(0, length - WINDOW))
            assert all(type(token) is RememberedToken for token in found)
            positions = [token.position for token in found]
            assert positions == sorted(set(positions))
            assert all(type(p) is int and 0 <= p < length - WINDOW for p in positions)
            assert all(type(token.innovation) is float and 0 < token.innovation <= 2 for token in found)
            # No decay: with the window, nothing unexpected was let go for something more expected.
            own = read(model, tokens(30)[row : row + 1, 30 - length :])
            assert [(t.position, pytest.approx(t.innovation, rel=1e-9)) for t in own.remembered(layer)] == found
    assert cache.remembered(0) == cache.remembered(0, 0) == cache.remembered(0, -3)
    assert_same_states(states(cache), before)


def test_remembered_names_what_it_cannot_show():
    cache = padded(build("mixed-layers"))
    for layer, kind in ((1, "sliding_attention"), (2, "full_attention"), (3, "linear_attention")):
        with pytest.raises(ValueError, match=rf"layer_idx={layer}: .*{kind}.*eidetic_size > 0"):
            cache.remembered(layer)
    for row in (3, -4):
        with pytest.raises(ValueError, match=rf"row={row}: the cache has 3 rows"):
            cache.remembered(0, row)
    with pytest.raises(ValueError, match=r"layer_idx=4: .*4 layers"):
        cache.remembered(4)


# Its file ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_save_load_and_go_on(name, dtype, tmp_path):
    model = build(name, dtype)
    cache = padded(model)
    path = tmp_path / "document.safetensors"
    cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    loaded = BMojoCache.load(str(path), model.config)
    assert_same_states(states(loaded), states(cache))
    assert loaded.get_seq_length() == 30 and loaded.nbytes == cache.nbytes and loaded.batch_size == 3
    assert [loaded.remembered(0, row) for row in range(3)] == [cache.remembered(0, row) for row in range(3)]
    ids = tokens(12, seed=1)
    assert torch.equal(go_on(model, loaded, ids), go_on(model, cache, ids))
    again = BMojoCache.load(path, model.config, device=torch.device("cpu"))  # the file is what it was
    assert again.get_seq_length() == 30


def test_generation_goes_on_from_a_file(tmp_path):
    model, ids = build("mixed-layers"), tokens(40, batch=2)
    read(model, ids[:, :36]).save(tmp_path / "cache")
    loaded = BMojoCache.load(tmp_path / "cache", model.config)
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    expected = model.generate(ids, **options)
    actual = model.generate(ids, past_key_values=loaded, **options)
    assert actual.past_key_values is loaded
    assert torch.equal(actual.sequences, expected.sequences)
    assert_near(torch.stack(actual.logits), torch.stack(expected.logits))


def test_saving_replaces_an_older_file(tmp_path):
    model, path = build(), tmp_path / "cache"
    read(model, tokens(9)).save(path)
    read(model, tokens(30)).save(path)
    assert BMojoCache.load(path, model.config).get_seq_length() == 30
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_cache_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="the cache is empty"):
        BMojoCache(build().config).save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_a_saved_cache_has_the_mode_that_the_user_wants(tmp_path):
    model, old = build(), os.umask(0o027)
    try:
        read(model, tokens(9)).save(tmp_path / "memory.safetensors")
    finally:
        os.umask(old)
    assert (tmp_path / "memory.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failing", ["save_file", "replace"])
def test_a_failed_save_leaves_nothing_new(failing, tmp_path, monkeypatch):
    model, path = build(), tmp_path / "cache"
    read(model, tokens(9)).save(path)
    good = path.read_bytes()

    def half_a_file(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    def no_replace(source, target):
        raise OSError(13, "Permission denied")

    if failing == "save_file":
        monkeypatch.setattr(cache_file_bmojo, "save_file", half_a_file)
    else:
        monkeypatch.setattr(os, "replace", no_replace)
    for target in (path, tmp_path / "new"):
        with pytest.raises(OSError, match=r"No space left|Permission denied"):
            read(model, tokens(30)).save(target)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"] and path.read_bytes() == good


def test_saving_into_no_folder_names_the_path(tmp_path):
    with pytest.raises((OSError, ValueError, SafetensorError), match="missing"):
        read(build(), tokens(9)).save(tmp_path / "missing" / "cache")
    assert list(tmp_path.iterdir()) == []


def damage(path, kind):
    """Makes the saved cache at `path` unusable in one way."""
    data = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "truncated by a byte":
        path.write_bytes(data[:-1])
    elif kind == "header only":
        path.write_bytes(data[:6])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("This is not a cache.\n" * 20)
    elif kind == "a model's weights":
        save_file(build().state_dict(), path)
    elif kind == "another format":
        save_file(tensors, path, metadata={**metadata, "format": "bmojo-cache-99"})
    elif kind == "a state is missing":
        save_file({name: value for name, value in tensors.items() if name != "1.ssm"}, path, metadata=metadata)
    elif kind == "a state has another shape":
        save_file({**tensors, "0.keys": tensors["0.keys"][:, 1:].clone()}, path, metadata=metadata)
    elif kind == "gone":
        path.unlink()
    elif kind == "a folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "truncated by a byte",
        "header only",
        "empty",
        "text",
        "a model's weights",
        "another format",
        "a state is missing",
        "a state has another shape",
        "gone",
        "a folder",
    ],
)
def test_unusable_files_are_refused_by_path(kind, tmp_path):
    model, path = build(), tmp_path / "document.safetensors"
    read(model, tokens(9)).save(path)
    damage(path, kind)
    with pytest.raises(ValueError, match=r"path='.*document\.safetensors'"):
        BMojoCache.load(path, model.config)


OTHER_MODELS = {
    "window_size": (dict(window_size=6), r"the cache has window_size=5 but the model has 6"),
    "eidetic_size": (dict(eidetic_size=4), r"the cache has eidetic_size=3 but the model has 4"),
    "layers": (dict(num_hidden_layers=3), r"the cache has num_hidden_layers=2 but the model has 3"),
    "kind": (dict(layer_types=["bmojo", "full_attention"]), r"the cache has layer_types=\['bmojo', 'bmojo'\] but"),
    "innovation": (dict(innovation="state"), r"the cache has innovation='output' but the model has 'state'"),
    "heads": (dict(num_key_value_heads=4), r"the cache has num_key_value_heads=2 but the model has 4"),
    "state": (dict(ssm_state_size=7), r"the cache has ssm_state_size=6 but the model has 7"),
    "ssm": (dict(ssm_type="mamba"), r"the cache has ssm_type='mamba2' but the model has 'mamba'"),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_a_cache_of_another_model_is_refused(other, tmp_path):
    fields, message = OTHER_MODELS[other]
    cache = read(build(), tokens(9))
    cache.save(tmp_path / "cache")
    model = build(**fields)
    with pytest.raises(ValueError, match=message):
        BMojoCache.load(tmp_path / "cache", model.config)
    with pytest.raises(ValueError, match=message):
        model(input_ids=tokens(3), past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(12), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 9


# Refusals ------------------------------------------------------------------------------------------------------------
def test_update_is_refused():
    cache = padded(build())
    before = states(cache)
    keys = torch.zeros(3, 2, 1, 4, dtype=torch.float64)
    for call in (lambda: cache.update(keys, keys, 0), lambda: cache.layers[1].update(keys, keys)):
        with pytest.raises(ValueError, match=r"update\(key_states, value_states\): .*pass the cache to a B'MOJO model"):
            call()
    assert_same_states(states(cache), before)


@pytest.mark.parametrize(
    "cache",
    [DynamicCache(), ((torch.zeros(1), torch.zeros(1)),), "a cache"],
    ids=["DynamicCache", "tuple", "str"],
)
def test_other_caches_are_refused(cache):
    model = build()
    wanted = f"{CACHE_NAME} is a {type(cache).__name__}: must be a BMojoCache"
    with pytest.raises(ValueError, match=wanted):
        model(input_ids=tokens(3), past_key_values=cache)
    with pytest.raises(ValueError, match=wanted):
        model.model(input_ids=tokens(3), past_key_values=cache)


def test_a_dynamic_cache_is_refused_by_generate():
    with pytest.raises(ValueError, match=f"{CACHE_NAME} is a DynamicCache: must be a BMojoCache"):
        build().generate(tokens(3), past_key_values=DynamicCache(), max_new_tokens=2)


def test_a_cache_needs_a_bmojo_config():
    for config in (LlamaConfig(), None, {}):
        with pytest.raises(ValueError, match=f"config={type(config).__name__}: must be a BMojoConfig"):
            BMojoCache(config)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_another_batch_size_is_refused(rows):
    model = build()
    cache = padded(model)
    before = states(cache)
    with pytest.raises(ValueError, match=f"batch size 3 but the input has {rows} rows; .*batch_repeat_interleave"):
        model(input_ids=tokens(3, batch=rows), past_key_values=cache)
    assert_same_states(states(cache), before)


BAD_CALLS = {
    "ids beyond the vocabulary": dict(input_ids=torch.tensor([[1, VOCAB], [1, 2], [3, 4]])),
    "negative ids": dict(input_ids=torch.tensor([[1, 2], [1, -1], [3, 4]])),
    "no tokens": dict(input_ids=torch.zeros(3, 0, dtype=torch.long)),
    "mask too long": dict(input_ids=tokens(2), attention_mask=torch.ones(3, 33)),
    "mask too short": dict(input_ids=tokens(2), attention_mask=torch.ones(3, 1)),
    "mask of other rows": dict(input_ids=tokens(2), attention_mask=torch.ones(1, 32)),
    "4-D mask": dict(input_ids=tokens(2), attention_mask=torch.ones(3, 1, 2, 32)),
    "other rows": dict(input_ids=tokens(2, batch=2)),
    "two inputs": dict(input_ids=tokens(2), inputs_embeds=torch.zeros(3, 2, 16, dtype=torch.float64)),
    "no input": {},
    "embeddings of another size": dict(inputs_embeds=torch.zeros(3, 2, 15, dtype=torch.float64)),
    "packed": dict(input_ids=tokens(4), position_ids=torch.tensor([[30, 31, 0, 1]])),
    "positions of another length": dict(input_ids=tokens(4), position_ids=torch.tensor([[30, 31, 32]])),
}


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_a_refused_call_leaves_the_cache_as_it_was(bad):
    model = build("mixed-layers")
    cache, untouched = padded(model), padded(model)
    with pytest.raises(ValueError):
        model(past_key_values=cache, **BAD_CALLS[bad])
    assert_same_states(states(cache), states(untouched))
    ids = tokens(9, seed=1)
    assert torch.equal(go_on(model, cache, ids), go_on(model, untouched, ids))


def test_a_call_that_breaks_off_between_layers_is_noticed(monkeypatch):
    """Out of memory, or an interrupt: layers that have read and layers that have not make no memory."""
    model = build()
    cache = padded(model)

    def out_of_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(input_ids=tokens(4), past_key_values=cache)
    with pytest.raises(ValueError, match="layer"):
        model(input_ids=tokens(4), past_key_values=cache)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_recurrent_state_stays_fp32_through_every_operation(autocast, tmp_path):
    model = build("mixed-layers", torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        cache = padded(model)
        go_on(model, cache, tokens(9))
        cache.reorder_cache(torch.tensor([1, 0, 2]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        cache.save(tmp_path / "cache")
        cache = BMojoCache.load(tmp_path / "cache", model.config)
        go_on(model, cache, tokens(9))
    found = {
        name: {layer.states()[name].dtype for layer in cache.layers if name in layer.states()}
        for name in ("ssm", "innovations")
    }
    assert found == {"ssm": {torch.float32}, "innovations": {torch.float32}}
    assert cache.layers[0].keys.dtype == (torch.float32 if autocast else torch.bfloat16)


@torch.no_grad()
def test_keys_stay_head_by_head_in_memory(tmp_path):
    """As attention reads them: after beams, selections, copies and a file too."""
    model = build()
    cache = read(model, tokens(30))

    def strides(cache):
        return [layer.keys.is_contiguous() for layer in cache.layers]

    assert all(strides(cache))
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert all(strides(cache))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert all(strides(cache))
    cache.save(tmp_path / "cache.safetensors")
    assert all(strides(BMojoCache.load(tmp_path / "cache.safetensors", model.config)))


def test_a_step_in_a_cuda_graph_counts_in_tensors(monkeypatch):
    """A captured graph would keep the numbers of the step that it saw."""
    cache = read(build(), tokens(30))
    layer = cache.layers[0]
    assert layer.counts(None) and not layer.counts(torch.ones(3))

    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer.seen = OnGPU()
    assert not layer.counts(None)
