"""The ways out of a BMojoCache and what is asked of it elsewhere: an unfinished forward that no copy forgets, caches
that are gathered, the mask of what was read, other libraries' readers, and the caches of transformers."""

import copy
import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import scatter_gather
from transformers import DynamicCache, StaticCache

from modeling_bmojo import BMojoCache, BMojoConfig
from modeling_bmojo.cache_pads_bmojo import column_codes
from modeling_bmojo.layer_memory_bmojo import LayerMemory
from tests.modeling.test_cache import (
    LENGTHS,
    STATES,
    assert_near,
    assert_same_states,
    build,
    go_on,
    padded,
    read,
    states,
    tokens,
)
from tests.tiny import MIXED_LAYERS, SIZES


pytestmark = pytest.mark.own_settings


# An unfinished forward -----------------------------------------------------------------------------------------------
def interrupted(model, layer=1):
    """A cache whose forward was interrupted in a layer."""
    cache = padded(model)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model.layers[layer], "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=tokens(4), past_key_values=cache)
    return cache


def torch_saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def after(operation):
    def way(cache):
        operation(cache)
        return cache

    return way


WAYS = {
    "itself": lambda cache: cache,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": torch_saved,
    "to": lambda cache: cache.to("cpu"),
    "offload": after(lambda cache: [cache.offload(i) or cache.prefetch(i) for i in range(len(cache))]),
    "reorder_cache": after(lambda cache: cache.reorder_cache(torch.tensor([2, 1, 0]))),
    "batch_repeat_interleave": after(lambda cache: cache.batch_repeat_interleave(1)),
    "batch_select_indices": after(lambda cache: cache.batch_select_indices(torch.tensor([0, 1, 2]))),
}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_no_way_out_forgets_an_unfinished_forward(way, layer, tmp_path):
    model = build()
    cache = WAYS[way](interrupted(model, layer))
    with pytest.raises(ValueError, match=r"stopped halfway.*layers disagree"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="stopped halfway"):
        model(input_ids=tokens(3), past_key_values=cache)
    with pytest.raises(ValueError, match="stopped halfway"):
        list(cache)
    with pytest.raises(ValueError, match="stopped halfway"):
        BMojoCache(cat(zip(cache, cache, strict=True)))
    cache.reset()
    ids = tokens(12)
    assert torch.equal(go_on(model, cache, ids), go_on(model, BMojoCache(model.config), ids))
    cache.save(tmp_path / "cache")


def test_a_shallow_copy_shares_the_states_and_the_knowledge(tmp_path):
    model = build()
    cache = padded(model)
    shallow = copy.copy(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=tokens(4), past_key_values=cache)
    with pytest.raises(ValueError, match="stopped halfway"):
        shallow.save(tmp_path / "cache")


@pytest.mark.parametrize("way", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices", "reset"])
def test_an_operation_that_breaks_off_between_layers_is_noticed(way, monkeypatch, tmp_path):
    """Half of the layers with other rows than the others make no memory either."""
    model = build()
    cache = padded(model)

    def stop(*args):
        raise KeyboardInterrupt

    argument = {"batch_repeat_interleave": (2,), "reset": ()}.get(way, (torch.tensor([2, 1, 0]),))
    monkeypatch.setattr(cache.layers[1], way, stop)
    with pytest.raises(KeyboardInterrupt):
        getattr(cache, way)(*argument)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"stopped halfway|the cache is empty"):
        cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="stopped halfway"):
        model(input_ids=tokens(3), past_key_values=cache)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", STATES)
def test_copies_continue_alike(name, way):
    model = build(name)
    cache = padded(model)
    other = WAYS[way](cache)
    assert_same_states(states(other), states(cache))
    ids = tokens(9, seed=1)
    assert torch.equal(go_on(model, other, ids), go_on(model, cache, ids))


def test_a_cache_pickled_by_an_older_version_is_refused():
    """Its keys lie otherwise, and nothing in them says so."""
    cache = padded(build())
    del cache._layout
    with pytest.raises(ValueError, match=r"pickled by a version .*save\(\) it there"):
        pickle.loads(pickle.dumps(cache))


def test_a_cache_pickled_before_its_memories_had_slots_goes_on():
    """Its pickle holds what stood in their `__dict__`."""
    model = build()
    cache, ids = padded(model), tokens(9, seed=1)
    expected = go_on(model, copy.deepcopy(cache), ids)
    for layer in cache.layers:
        old = LayerMemory.__new__(LayerMemory)
        old.__setstate__({name: getattr(layer.memory, name) for name in LayerMemory.__slots__})
        layer.memory = old
    assert torch.equal(go_on(model, cache, ids), expected)


def test_what_a_layer_is_was_pickled_without_a_delay():
    spec = build().config.layer_spec(0)
    assert type(spec)(*spec[:-1]) == spec and spec.delayed > 0


@pytest.mark.parametrize(("call", "missing"), [("begin", 1), ("finish", 2)])
def test_code_of_another_version_stops_before_it_writes(call, missing):
    """A model of older code calls begin() without the mask."""
    cache = padded(build())
    with pytest.raises(TypeError, match=f"missing {missing} required"):
        getattr(cache, call)()


# Gathered ------------------------------------------------------------------------------------------------------------
class OnCPU:
    """In the place of what joins tensors of several GPUs."""

    @staticmethod
    def apply(device, dim, *found):
        return torch.cat(found, dim)


def gather(found):
    """What nn.DataParallel makes of the outputs of its replicas."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter_gather, "Gather", OnCPU)
        return scatter_gather.gather(found, "cpu")


def cat(items):
    return map(gather, items)


def mask_of(lengths, columns=30):
    return (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize(
    "lengths",
    [(30, 17, 4, 30), (30, 30, 12, 3), (12, 3, 30, 30), (30, 30, 30, 30)],
    ids=["pads in both", "in the second", "in the first", "none"],
)
def test_gathered_caches_are_the_cache_of_the_whole_batch(name, lengths, tmp_path):
    model, ids, mask = build(name), tokens(30, batch=4), mask_of(lengths)
    whole = read(model, ids, mask=mask)
    parts = [read(model, ids[half], mask=mask[half]) for half in (slice(0, 2), slice(2, 4))]
    joined = gather(parts)
    assert type(joined) is BMojoCache and joined.batch_size == 4 and joined.get_seq_length() == 30
    joined.check(model.config, 4)
    joined.check_mask(mask)
    with pytest.raises(ValueError, match="attention_mask"):
        joined.check_mask(mask.roll(1, dims=1) if min(lengths) < 30 else mask * 0)
    joined.save(tmp_path / "cache")
    assert_same_states(
        states(BMojoCache.load(tmp_path / "cache", model.config)),
        states(joined),
    )
    more = tokens(12, batch=4, seed=1)
    expected = go_on(model, whole, more)
    assert_near(go_on(model, joined, more), expected, 1e-12)
    assert_near(go_on(model, BMojoCache.load(tmp_path / "cache", model.config), more), expected, 1e-12)


@torch.no_grad()
def test_whole_outputs_are_gathered():
    model, ids = build("mixed-layers"), tokens(30, batch=4)
    outputs = gather([model(ids[:2]), model(ids[2:])])
    assert_near(outputs.logits, model(ids).logits, 1e-12)
    cache = next(value for value in outputs.values() if isinstance(value, BMojoCache))
    more = tokens(12, batch=4, seed=1)
    assert_near(go_on(model, cache, more), go_on(model, read(model, ids), more), 1e-12)


def test_gathering_empty_caches_and_single_ones():
    model = build("mixed-layers")
    empty = gather([BMojoCache(model.config), BMojoCache(model.config)])
    assert empty.get_seq_length() == 0 and empty.nbytes == 0
    ids = tokens(12)
    assert torch.equal(go_on(model, empty, ids), go_on(model, BMojoCache(model.config), ids))
    cache = padded(model)
    alone = BMojoCache(list(cache))
    ids = tokens(12, seed=1)
    assert torch.equal(go_on(model, alone, ids), go_on(model, cache, ids))  # they share no state


def test_caches_that_disagree_are_not_joined():
    model, other = build(), build(window_size=6)
    for name in ("output", "mixed-layers"):
        model = build(name)
        with pytest.raises(ValueError, match=r"be joined.*same number of columns"):
            gather([read(model, tokens(9)), read(model, tokens(12))])
    model = build()
    with pytest.raises(ValueError, match="be joined"):
        gather([read(model, tokens(9)), read(other, tokens(9))])


@pytest.mark.parametrize("items", [[], [()], [(None, None)], [(torch.zeros(1), torch.zeros(1), None)], iter([5])])
def test_other_items_make_no_cache(items):
    with pytest.raises(ValueError, match="no items of caches that can be joined"):
        BMojoCache(items)


# The mask of what was read -------------------------------------------------------------------------------------------
def random_mask(rows=4, columns=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < torch.linspace(1.0, 0.3, rows)[:, None]
    mask[0] = True
    return mask.long()


def pieces_of(model, mask, sizes):
    cache, start, ids = BMojoCache(model.config), 0, tokens(mask.shape[1], mask.shape[0])
    for size in sizes:
        read(model, ids[:, start : start + size], cache, mask[:, start : start + size])
        start += size
    return cache


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [5, 1, 1, 20, 3]], ids=str)
@pytest.mark.parametrize("kind", ["any", "right", "left", "none"])
def test_the_mask_that_was_read_is_known(kind, sizes):
    mask = {
        "any": random_mask(),
        "left": mask_of([30, 4, 17, 29]),
        "right": mask_of([30, 4, 17, 29]).flip(1),
        "none": torch.ones(4, 30, dtype=torch.long),
    }[kind]
    cache = pieces_of(build(), mask, sizes)
    for dtype in (torch.long, torch.bool, torch.float32):
        cache.check_mask(mask.to(dtype))
    for row in range(4):
        for column in (0, 7, 29):
            wrong = mask.clone()
            wrong[row, column] = 1 - wrong[row, column]
            with pytest.raises(ValueError, match=rf"attention_mask\[{row}\] calls {int(wrong[row].sum())} of the 30"):
                cache.check_mask(wrong)


def test_as_many_tokens_in_other_columns_are_noticed():
    mask = mask_of([30, 17, 4])
    cache = read(build(), tokens(30), mask=mask)
    for wrong in (mask.flip(1), mask.roll(1, 1), mask[[0, 2, 1]]):
        with pytest.raises(ValueError, match=r"attention_mask\[\d\] calls .* the cache has read .* what was read"):
            cache.check_mask(wrong)
    with pytest.raises(ValueError, match=r"attention_mask\[1\] calls 17 .* has read 17 in other columns"):
        cache.check_mask(mask.flip(1))


def test_a_mask_of_another_shape_is_refused():
    cache = padded(build())
    for shape in ((3, 29), (2, 30), (30,), (3, 1, 1, 30)):
        with pytest.raises(ValueError, match="attention_mask"):
            cache.check_mask(torch.ones(shape))
    BMojoCache(build().config).check_mask(torch.ones(3, 0))


@pytest.mark.parametrize("name", ["output", "mixed-layers"])
def test_what_is_known_of_the_mask_goes_with_the_rows(name, tmp_path):
    model, mask = build(name), random_mask()
    cache = pieces_of(model, mask, [11, 19])

    def follow(rows):
        cache.check_mask(mask[rows])
        if (mask[rows] != mask[rows].roll(1, 1)).any():
            with pytest.raises(ValueError, match="attention_mask"):
                cache.check_mask(mask[rows].roll(1, 1))

    follow([0, 1, 2, 3])
    cache.reorder_cache(torch.tensor([3, 1, 1, 0]))
    follow([3, 1, 1, 0])
    cache.batch_repeat_interleave(2)
    follow([3, 3, 1, 1, 1, 1, 0, 0])
    cache.batch_select_indices(torch.tensor([0, 2, 7]))
    follow([3, 1, 0])
    cache.save(tmp_path / "cache")
    for way in (copy.deepcopy, WAYS["pickle"], lambda cache: BMojoCache.load(tmp_path / "cache", model.config)):
        cache = way(cache)
        follow([3, 1, 0])
    # Text without pads behind pads: the new columns are real in every row.
    read(model, tokens(2), cache)
    cache.check_mask(torch.nn.functional.pad(mask[[3, 1, 0]], (0, 2), value=1))
    cache.batch_select_indices(torch.tensor([2]))
    cache.check_mask(torch.ones(1, 32))
    cache.reset()
    read(model, tokens(5), cache, mask_of([5, 2, 1], 5))
    cache.check_mask(mask_of([5, 2, 1], 5))


def test_text_without_pads_costs_no_state():
    cache = read(build(), tokens(30))
    read(build(), tokens(1), cache, torch.ones(3, 31))
    assert cache.layers[0].pads is None and "pads" not in cache.layers[0].states()
    assert [layer.pads for layer in padded(build()).layers[1:]] == [None]


def test_codes_of_columns_are_splitmix64():
    """By its definition in integers; constant for ever, since files hold sums of them."""

    def reference(column):
        z = ((column + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    columns = [0, 1, 2, 1000, 2**31, 2**40 + 7]
    found = column_codes(torch.tensor(columns)).tolist()
    assert [value % 2**64 for value in found] == [reference(column) for column in columns]
    codes = column_codes(torch.arange(1_000_000))
    assert len(codes.unique()) == 1_000_000 and not (codes == 0).any()


def test_a_row_that_read_a_pad_knows_it_at_any_length():
    """A fingerprint is a sum: it must not grow, and not vanish."""
    model, mask = build(num_hidden_layers=1), torch.ones(1, 2000, dtype=torch.long)
    mask[0, ::3] = 0
    cache = pieces_of(model, mask, [1000, 1, 999])
    cache.check_mask(mask)
    assert cache.layers[0].pads.shape == (1,)


# Other readers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["output", "mixed-layers", "stride"])
def test_keys_and_values_stand_as_in_transformers_caches(name):
    """`[B, G, S, D]`, and for full attention the very keys and values of DynamicCache."""
    model = build(name)
    cache, config = padded(model), model.config
    heads, size = config.num_key_value_heads, config.head_dim
    for layer in cache.layers:
        if not layer.spec.has_attention:
            assert layer.keys is None and layer.values is None
            continue
        length = layer.spec.window is not None and layer.spec.window + layer.spec.slots + layer.spec.fading
        for state in (layer.keys, layer.values):
            assert state.shape[:2] == (3, heads) and state.shape[3] == size
            assert state.shape[2] == length if length else state.shape[2] >= 30
            assert state.is_contiguous()
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    for keys, values, *_ in cache:
        assert keys is None or (keys.shape == values.shape and keys.shape[:2] == (3, heads))


def test_full_attention_holds_the_projected_keys():
    model, ids = build(layer_types=["full_attention", "bmojo"]), tokens(7)
    found = []
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda _, __, out: found.append(out))
    cache = read(model, ids)
    hook.remove()
    expected = found[0].unflatten(-1, (-1, model.config.head_dim)).transpose(1, 2)
    assert torch.equal(cache.layers[0].values[:, :, :7], expected)


# Caches of transformers ----------------------------------------------------------------------------------------------
LAYERS = {"bmojo": {}, "mixed": MIXED_LAYERS, "bmojo last": dict(layer_types=["full_attention", "bmojo"])}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=9)])
def test_transformers_caches_say_what_to_build(kind, layers):
    config = BMojoConfig(**{**SIZES, **LAYERS[layers]})
    build_one = (lambda: kind(config=config)) if kind is DynamicCache else lambda: kind(config)
    with pytest.raises(ValueError, match=r"build BMojoCache\(model.config\)"):
        build_one()


def test_continuous_batching_is_refused_by_name():
    model = build(dtype=torch.float32)
    calls = (
        lambda: model.generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=2),
        lambda: model.init_continuous_batching(),
        lambda: model.continuous_batching_context_manager().__enter__(),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"continuous batching: .*use generate"):
            call()


def test_the_lengths_of_the_rows_are_those_of_this_file():
    assert padded(build()).seen.tolist() == LENGTHS.tolist()


# Code that travelled with a checkpoint -------------------------------------------------------------------------------
REMOTE = """
import sys, torch
from pathlib import Path
from transformers.dynamic_module_utils import get_class_from_dynamic_module
folder = sys.argv[1]
sys.path[:0] = sys.argv[2:]
from tests.modeling.test_cache import build, go_on, read, tokens
import modeling_bmojo
Model = get_class_from_dynamic_module("modeling_bmojo.BMojoForCausalLM", folder)
Config = get_class_from_dynamic_module("configuration_bmojo.BMojoConfig", folder)
Cache = get_class_from_dynamic_module("cache_bmojo.BMojoCache", folder)
assert Cache is not modeling_bmojo.BMojoCache and Cache.__name__ == "BMojoCache"
ours = build("mixed-layers")
theirs = Model(Config(**ours.config.to_diff_dict())).double().eval()
theirs.load_state_dict(ours.state_dict())
ids, more = tokens(30), tokens(12, seed=1)
mask = (torch.arange(30) >= 30 - torch.tensor([30, 17, 4])[:, None]).long()
expected = go_on(ours, read(ours, ids, mask=mask), more)
for Kind, reader, writer in ((Cache, ours, theirs), (modeling_bmojo.BMojoCache, theirs, ours)):
    cache = read(reader, ids, Kind(writer.config), mask)
    cache.check_mask(mask)
    path = Path(folder) / f"{reader is ours}.cache"
    cache.save(path)
    joined = Kind(list(cache))
    loaded = [Cache.load(path, ours.config), modeling_bmojo.BMojoCache.load(path, theirs.config)]
    for continued in (cache, joined, *loaded):
        assert torch.equal(go_on(writer, continued, more), expected)
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    for Loading in (Cache, modeling_bmojo.BMojoCache):
        try:
            Loading.load(path, ours.config)
        except ValueError as error:
            assert "sha256" in str(error)
        else:
            raise AssertionError("loaded")
print("as one")
"""


def test_package_and_remote_code_share_caches(tmp_path):
    """Two sets of classes in one process: each reads, saves, loads and joins what the other wrote."""
    folder, root = tmp_path / "folder", Path(__file__).resolve().parents[2]
    folder.mkdir()
    for file in (root / "modeling_bmojo").glob("*.py"):
        if file.name != "__init__.py":
            shutil.copy(file, folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REMOTE, str(folder), str(root)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n")[-2] == "as one"
