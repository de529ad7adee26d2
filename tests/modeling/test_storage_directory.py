"""A cache whose storage lies in a directory is the cache in memory, and lives on in other processes."""

import copy
import math
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM
from tests.oracles import randomize_
from tests.reading import tokens
from tests.tiny import SIZES


EXACT = dict(rtol=1e-10, atol=1e-10)
PLAIN = dict(storage_size=3, innovation="key", fading_size=0)
MASS = dict(PLAIN, fading_mass=True, fading_size=2, fading_stride=2, storage_candidates=5, storage_sketch_size=3)
KINDS = {
    "plain": PLAIN,
    "mass": MASS,
    "no eidetic memory": dict(MASS, eidetic_size=0),
    "decay": dict(MASS, storage_decay=0.5),
    "distance": dict(MASS, max_rope_distance=9),
}


def build(**fields):
    torch.manual_seed(0)
    config = BMojoConfig(**{**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **fields})
    return randomize_(BMojoForCausalLM(config)).double().eval()


@torch.no_grad()
def go_on(model, cache, ids, pieces, mask=None):
    """Logits `[B, T, V]` of further columns, read in pieces."""
    found, first, past = [], 0, cache.get_seq_length()
    for size in pieces:
        part = ids[:, first : first + size]
        seen = None if mask is None else mask[:, : past + first + size]
        found.append(model(part, attention_mask=seen, past_key_values=cache).logits)
        first += size
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("pieces", [[40], [7, 1, 1, 20, 1, 10], [1] * 40], ids=lambda pieces: f"{len(pieces)} pieces")
def test_a_directory_changes_nothing(name, pieces, tmp_path):
    model, ids = build(**KINDS[name]), tokens(40, 2)
    found = go_on(model, BMojoCache(model.config, storage=tmp_path / "s"), ids, pieces)
    torch.testing.assert_close(found, go_on(model, BMojoCache(model.config), ids, pieces), **EXACT)


@pytest.mark.parametrize("name", KINDS)
def test_host_memory_changes_nothing(name, tmp_path):
    """Pads, beams, copies, files: as with tensors; and tensors of a file go there, and back."""
    model, ids, more = build(**KINDS[name]), tokens(30, 3), tokens(9, 3, seed=4)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, :9], mask[2, 12:15] = 0, 0
    plain, host = BMojoCache(model.config), BMojoCache(model.config, storage_on_host=True)
    for cache in (plain, host):
        cache.found = go_on(model, cache, ids, [13, 1, 1, 10, 1, 1, 3], mask)
    torch.testing.assert_close(host.found[mask > 0], plain.found[mask > 0], **EXACT)
    assert host.nbytes < plain.nbytes and 0 < plain.storage_nbytes <= host.storage_nbytes
    del host.found
    host.save(tmp_path / "cache")
    loaded = BMojoCache.load(tmp_path / "cache", model.config, storage_on_host=True)
    assert host.layers[0].stored_keys is None and loaded.layers[0].stored_keys is None
    forks = [copy.deepcopy(host), loaded, BMojoCache.load(tmp_path / "cache", model.config)]
    expected = go_on(model, plain, more, [1] * 9)
    for fork in forks:
        torch.testing.assert_close(go_on(model, fork, more, [4, 1, 4]), expected, **EXACT)
    host.reorder_cache(torch.tensor([2, 2, 0]))
    torch.testing.assert_close(go_on(model, host, more[[2, 2, 0]], [9]), expected[[2, 2, 0]], **EXACT)
    host.reset()
    anew = go_on(model, BMojoCache(model.config), more, [9])
    torch.testing.assert_close(go_on(model, host, more, [9]), anew, **EXACT)
    options = dict(max_new_tokens=5, num_beams=2, do_sample=False, eos_token_id=None, pad_token_id=0)
    beams = model.generate(more, past_key_values=BMojoCache(model.config, storage_on_host=True), **options)
    assert torch.equal(beams, model.generate(more, **options))


def test_host_memory_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="storage_on_host=True: nothing to store, because storage_size=0"):
        BMojoCache(build(storage_size=0).config, storage_on_host=True)
    with pytest.raises(ValueError, match=r"storage_on_host=True, storage=.*: stored tokens lie in one place"):
        BMojoCache(build(**MASS).config, storage=tmp_path, storage_on_host=True)
    with pytest.raises(ValueError, match="storage_on_host=True: such caches cannot be joined"):
        list(BMojoCache(build(**MASS).config, storage_on_host=True))


def test_pads_change_nothing(tmp_path):
    model, ids = build(**MASS), tokens(30, 3)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, :9], mask[2, 12:15] = 0, 0
    pieces = [13, 1, 1, 10, 1, 1, 3]
    found = go_on(model, BMojoCache(model.config, storage=tmp_path), ids, pieces, mask)
    expected = go_on(model, BMojoCache(model.config), ids, pieces, mask)
    torch.testing.assert_close(found[mask > 0], expected[mask > 0], **EXACT)


def test_a_sync_writes_states_of_constant_size(tmp_path):
    """What grows is appended to the pages, sketches included; of the means a sync writes one level more at most."""
    model, sizes = build(**MASS), []
    cache = BMojoCache(model.config, storage=tmp_path)
    for count in (200, 56, 2, 254):
        go_on(model, cache, tokens(count, 2), [count])
        cache.sync()
        with safe_open(cache.directory.states, "pt") as file:
            keys = file.keys()
            sizes.append(sum(math.prod(file.get_slice(key).get_shape()) for key in keys))
        names = {key.split(".")[-1] for key in keys}
        assert not names & {"stored_keys", "stored_values", "sketches"} and "mean_keys" in names
    level = 2 * 2 * 2 * 2 * 4 * model.config.head_dim  # layers, keys and values, rows, heads, places
    assert sizes[0] == sizes[1] and sizes[-1] - sizes[0] in (level, 2 * level)
    more = tokens(9, 2, seed=4)
    expected = go_on(model, copy.deepcopy(cache), more, [9])
    cache.close()
    again = BMojoCache(model.config, storage=tmp_path)
    torch.testing.assert_close(go_on(model, again, more, [1] * 9), expected, **EXACT)


@pytest.mark.parametrize("name", KINDS)
def test_what_was_reopened_is_saved_to_a_file(name, tmp_path):
    model, ids, more = build(**KINDS[name]), tokens(31, 2), tokens(9, 2, seed=4)
    first = BMojoCache(model.config, storage=tmp_path / "s")
    go_on(model, first, ids, [31])
    first.sync()
    first.close()
    again = BMojoCache(model.config, storage=tmp_path / "s")
    again.save(tmp_path / "before")
    expected = go_on(model, again, more, [9])
    again.save(tmp_path / "after")
    loaded = [BMojoCache.load(tmp_path / name, model.config) for name in ("before", "after")]
    torch.testing.assert_close(go_on(model, loaded[0], more, [1] * 9), expected, **EXACT)
    assert loaded[1].get_seq_length() == 40
    cells = 2 * 2 * 2 * 2 * model.config.head_dim * 8  # layers, keys and values, rows, heads
    assert again.storage_nbytes == 256 * cells  # a page of each, sketches not among them


def test_beams_share_the_directory(tmp_path):
    model, ids = build(**MASS), tokens(25, 2)
    options = dict(max_new_tokens=8, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **options)
    cache = BMojoCache(model.config, storage=tmp_path)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)


def test_a_copy_goes_its_own_way(tmp_path):
    model, ids = build(**MASS), tokens(60, 1)
    cache = BMojoCache(model.config, storage=tmp_path)
    go_on(model, cache, ids[:, :20], [20])
    fork = copy.deepcopy(cache)
    other = go_on(model, fork, ids[:, 40:], [5, 1, 14])
    own = go_on(model, cache, ids[:, 20:40], [5, 1, 14])
    again = go_on(model, BMojoCache(model.config), torch.cat([ids[:, :20], ids[:, 40:]], 1), [40])[:, 20:]
    torch.testing.assert_close(other, again, **EXACT)
    torch.testing.assert_close(own, go_on(model, BMojoCache(model.config), ids[:, :40], [40])[:, 20:], **EXACT)
    assert fork.directory is None and cache.directory is not None
    with pytest.raises(ValueError, match="no directory to sync"):
        fork.sync()


@pytest.mark.parametrize("rows", [1, 2])
def test_it_goes_on_where_it_was_synced(rows, tmp_path):
    model, ids = build(**KINDS["decay"]), tokens(50, rows)
    cache = BMojoCache(model.config, storage=tmp_path)
    go_on(model, cache, ids[:, :23], [20, 3])
    cache.sync()
    expected = go_on(model, cache, ids[:, 23:], [1, 1, 20, 5])
    cache.close()
    again = BMojoCache(model.config, storage=tmp_path)
    assert again.get_seq_length() == 23
    assert torch.equal(go_on(model, again, ids[:, 23:], [1, 1, 20, 5]), expected)
    again.reset()
    found = go_on(model, again, ids, [50])
    torch.testing.assert_close(found, go_on(model, BMojoCache(model.config), ids, [50]), **EXACT)


def test_a_saved_file_holds_the_directory_too(tmp_path):
    model, ids = build(**MASS), tokens(40, 2)
    cache = BMojoCache(model.config, storage=tmp_path / "s")
    go_on(model, cache, ids[:, :30], [30])
    cache.save(tmp_path / "cache.safetensors")
    loaded = BMojoCache.load(tmp_path / "cache.safetensors", model.config)
    assert loaded.directory is None
    expected = go_on(model, cache, ids[:, 30:], [1, 9])
    torch.testing.assert_close(go_on(model, loaded, ids[:, 30:], [1, 9]), expected, **EXACT)


def test_bytes_are_reported_apart(tmp_path):
    model, ids = build(**PLAIN), tokens(40, 1)
    inside, outside = BMojoCache(model.config), BMojoCache(model.config, storage=tmp_path)
    for cache in (inside, outside):
        go_on(model, cache, ids, [40])
    stored = sum(layer.stored_keys.nbytes + layer.stored_values.nbytes for layer in inside.layers)
    assert inside.storage_nbytes == stored > 0
    assert outside.nbytes == inside.nbytes - stored
    assert outside.storage_nbytes > 0


READER = """
import sys, torch
from modeling_bmojo import BMojoCache
from tests.modeling.test_storage_directory import MASS, build, go_on
from tests.reading import tokens
model, ids = build(**MASS), tokens(400, 1)
cache = BMojoCache(model.config, storage=sys.argv[1])
while cache.get_seq_length() < 400:
    first = cache.get_seq_length()
    go_on(model, cache, ids[:, first : first + 7], [3, 1, 3][: 400 - first])
    cache.sync()
    print(cache.get_seq_length(), flush=True)
"""


@torch.no_grad()
def test_killed_while_reading_it_resumes_at_the_last_sync(tmp_path):
    """kill -9 at random moments, each process going on where the one before was killed."""
    model, ids, chance, told = build(**MASS), tokens(400, 1), random.Random(0), 0
    expected = model(ids, use_cache=False).logits
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", READER, str(tmp_path)],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(chance.randint(1, 9)):
            told = int(process.stdout.readline())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        cache = BMojoCache(model.config, storage=tmp_path)
        read = cache.get_seq_length()
        assert read >= told > 0
        found = model(ids[:, read : read + 5], past_key_values=cache).logits
        torch.testing.assert_close(found, expected[:, read : read + 5], **EXACT)
        cache.close()


# Refusals ------------------------------------------------------------------------------------------------------------
def written(model, folder):
    cache = BMojoCache(model.config, storage=folder)
    go_on(model, cache, tokens(20, 1), [20])
    cache.sync()
    cache.close()


def test_nothing_to_store_is_refused(tmp_path):
    model = build(**{**PLAIN, "storage_size": 0})
    with pytest.raises(ValueError, match="storage_size=0; set storage_size > 0"):
        BMojoCache(model.config, storage=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_other_weights_are_refused_unless_told(tmp_path):
    model = build(**PLAIN)
    written(model, tmp_path)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 1
    cache = BMojoCache(model.config, storage=tmp_path)
    with pytest.raises(ValueError, match="other weights"):
        go_on(model, cache, tokens(3, 1), [3])
    cache.close()
    told = BMojoCache(model.config, storage=tmp_path, check_weights=False)
    go_on(model, told, tokens(3, 1), [3])
    told.sync()
    told.close()
    go_on(model, BMojoCache(model.config, storage=tmp_path), tokens(3, 1), [3])


def test_an_adapter_is_other_weights(tmp_path):
    model = build(**PLAIN)
    written(model, tmp_path)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.raises(ValueError, match="other weights"):
        go_on(adapted, BMojoCache(model.config, storage=tmp_path), tokens(3, 1), [3])


def test_another_models_directory_is_refused_and_left_as_it_was(tmp_path):
    model = build(**PLAIN)
    written(model, tmp_path)
    for fields in (dict(window_size=6), dict(storage_size=4), dict(num_hidden_layers=1), dict(eidetic_size=0)):
        with pytest.raises(ValueError, match="storage="):
            BMojoCache(build(**{**PLAIN, **fields}).config, storage=tmp_path)
    assert BMojoCache(model.config, storage=tmp_path).get_seq_length() == 20


def test_a_directory_has_one_writer(tmp_path):
    model = build(**PLAIN)
    cache = BMojoCache(model.config, storage=tmp_path)
    with pytest.raises(ValueError, match="in use"):
        BMojoCache(model.config, storage=tmp_path)
    cache.close()
    BMojoCache(model.config, storage=tmp_path).close()


def test_a_damaged_directory_is_refused(tmp_path):
    model = build(**PLAIN)
    written(model, tmp_path)
    path = next(tmp_path.glob("states-*"))
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    with pytest.raises(ValueError, match="damaged"):
        BMojoCache(model.config, storage=tmp_path)


def test_what_cannot_be_synced_or_joined_says_so(tmp_path):
    model = build(**PLAIN)
    cache = BMojoCache(model.config, storage=tmp_path)
    with pytest.raises(ValueError, match="empty"):
        cache.sync()
    go_on(model, cache, tokens(9, 1), [9])
    with pytest.raises(ValueError, match="cannot be joined"):
        list(cache)
