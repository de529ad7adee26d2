"""The storage equals its definition, full attention where nothing is left out, and itself however text is cut."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_bmojo import (
    BMojoCache,
    BMojoConfig,
    BMojoForCausalLM,
    first_difference,
    memory_bytes,
    storage_ops,
    storage_steps_bmojo,
)
from modeling_bmojo.block_means_bmojo import Pyramid, fetched_inside, inside
from modeling_bmojo.distance_bmojo import TurnTables
from modeling_bmojo.storage_ops import chosen_places, in_steps, largest, places_of_first
from modeling_bmojo.storage_steps_bmojo import Step, blocks_now
from tests.oracles import oracle_eidetic, oracle_key_innovation, randomize_
from tests.oracles_storage import OracleStorage, first_of, shown_blocks
from tests.reading import read, tokens
from tests.tiny import SIZES


EXACT = dict(rtol=1e-10, atol=1e-10)
PLAIN = dict(storage_size=3, innovation="key", fading_size=0)
SKETCHED = dict(PLAIN, storage_candidates=5, storage_sketch_size=3)
MASS = dict(SKETCHED, fading_mass=True, fading_size=2, fading_stride=2)
SETTINGS = {
    "exact": PLAIN,
    "no eidetic memory": dict(PLAIN, eidetic_size=0),
    "sketch": SKETCHED,
    "sketch decides": dict(SKETCHED, storage_candidates=3),
    "mass": MASS,
    "mass, blocks of 3": dict(MASS, fading_size=1, fading_stride=3, eidetic_size=0),
    "limit": dict(MASS, storage_limit=7),
    "decay": dict(MASS, storage_decay=0.7),
    "decay without eidetic memory": dict(SKETCHED, storage_decay=0.7, eidetic_size=0),
    "distance": dict(MASS, max_rope_distance=9),
    "distance from a position on": dict(MASS, max_rope_distance=9, max_rope_distance_start=21),
    "distance of the window": dict(MASS, max_rope_distance=4, fading_size=1),
    "distance alone": dict(PLAIN, storage_size=0, max_rope_distance=6),
    "no positions": dict(MASS, rope_parameters=None),
    "everything": dict(MASS, storage_decay=0.3, storage_limit=20, max_rope_distance=8, qk_norm="head"),
}
SPLITS = [[40], [17, 23], [5, 1, 1, 20, 1, 12], [1] * 40]


def build(dtype=torch.float64, **fields):
    config = BMojoConfig(**{**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **fields})
    torch.manual_seed(0)
    return randomize_(BMojoForCausalLM(config)).to(dtype).eval()


# The definition ------------------------------------------------------------------------------------------------------
def attention_of(model, ids, layer=0):
    """Queries, keys and values of a layer without positions, and what its o_proj reads: `[T, heads, D]` of row 0."""
    attention, found = model.model.layers[layer].self_attn, {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, out, name=name: found.update({name: (inputs[0], out)}))
        for name, module in (("q", attention.q_proj), ("k", attention.k_proj), ("v", attention.v_proj))
    ]
    hooks.append(attention.o_proj.register_forward_hook(lambda _, inputs, out: found.update(o=(inputs[0], out))))
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    q, k, v = (attention._heads(found[name][1][0]) for name in "qkv")
    return attention.q_norm(q).detach(), attention.k_norm(k).detach(), v, attention._heads(found["o"][0][0])


def oracle_of(model, query, keys, values):
    config = model.config
    innovations = oracle_key_innovation(keys)
    sets, _ = oracle_eidetic(innovations.tolist(), config.window_size, config.eidetic_size)
    sketch = model.model.layers[0].self_attn.sketch
    if sketch is not None:
        sketch = sketch.key_projection, sketch.query_projection, sketch.center, sketch.scale
    return OracleStorage(
        query,
        keys,
        values,
        config.window_size,
        [set(each) for each in sets],
        config.storage_size,
        config.storage_candidates,
        sketch,
        config.storage_decay,
        innovations.cumsum(0),
        config.storage_limit,
        config.fading_size if config.fading_mass else 0,
        config.fading_stride,
        config.max_rope_distance,
        config.max_rope_distance_start,
        1e4 if config.rope_parameters is None else config.rope_parameters["rope_theta"],
        config.head_dim**-0.5,
    )


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "no positions"])
def test_a_layer_is_what_the_definition_says(name):
    model = build(**SETTINGS[name])
    for seed in (1, 2):
        query, keys, values, found = attention_of(model, tokens(33, 1, seed))
        expected = oracle_of(model, query, keys, values).run()
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_layer_without_positions_is_what_the_definition_says():
    model = build(**SETTINGS["no positions"])
    query, keys, values, found = attention_of(model, tokens(33, 1))
    oracle = oracle_of(model, query, keys, values)
    oracle.turned = lambda x, position: x
    torch.testing.assert_close(found, oracle.run(), **EXACT)


def test_equal_tokens_are_fetched_oldest_first():
    """One token repeated, no positions: all scores are equal, and the first K that left the window are fetched."""
    model = build(**dict(PLAIN, rope_parameters=None, eidetic_size=0))
    ids = torch.full((1, 20), 7)
    out, weights = attention_of(model, ids), None
    oracle = oracle_of(model, *out[:3])
    oracle.turned = lambda x, position: x
    torch.testing.assert_close(out[3], oracle.run(), **EXACT)
    assert oracle.seen[-1] == {0, 1, 2}
    weights = model(ids, use_cache=False, output_attentions=True).attentions[0]
    assert (weights[0, 0, -1] > 0).nonzero().flatten().tolist() == [0, 1, 2, 15, 16, 17, 18, 19]
    for fields in (dict(PLAIN, eidetic_size=0), MASS):
        model = build(**{**fields, "rope_parameters": None})
        torch.testing.assert_close(read(model, ids, [1] * 20)[0], read(model, ids)[0], **EXACT)


# Full attention ------------------------------------------------------------------------------------------------------
ALL = [
    dict(storage_size=60, fading_size=0),
    dict(storage_size=60, fading_size=0, eidetic_size=0),
    dict(storage_size=60, storage_candidates=70, storage_sketch_size=2, fading_size=0),
    dict(storage_size=60, fading_mass=True, fading_size=2, fading_stride=2),
    dict(storage_size=60, fading_mass=True, fading_size=1, fading_stride=3, eidetic_size=0, max_rope_distance=39),
]


@pytest.mark.parametrize("fields", ALL, ids=str)
@pytest.mark.parametrize("pieces", SPLITS, ids=lambda pieces: f"{len(pieces)} pieces")
def test_a_storage_of_everything_is_full_attention(fields, pieces):
    """transformers' Llama with the same weights."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: SIZES[name] for name in (*names, "num_key_value_heads")}
    llama = randomize_(LlamaForCausalLM(LlamaConfig(**sizes, rms_norm_eps=1e-6))).double().eval()
    model, full = build(**fields), build(layer_types=["full_attention"] * 2)
    for each in (model, full):
        assert not each.load_state_dict(llama.state_dict(), strict=False).unexpected_keys
    for count in (4, 5, 6, 40) if len(pieces) == 1 else (40,):
        ids = tokens(count)
        with torch.no_grad():
            expected, exact = llama(ids).logits, full(ids, use_cache=False).logits
        logits, _ = read(model, ids, pieces if count == 40 else None)
        torch.testing.assert_close(logits, exact, **EXACT)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # Llama's angles are fp32 products


# However the text is cut ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_chunks_and_steps_agree(name):
    model, ids = build(**SETTINGS[name]), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    for pieces in SPLITS:
        torch.testing.assert_close(read(model, ids, pieces)[0], expected, **EXACT)
    assert first_difference(model, ids) is None


@pytest.mark.parametrize("name", ["sketch", "mass", "everything"])
def test_the_block_size_changes_nothing(name):
    ids, model = tokens(), build(**SETTINGS[name])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for block in (1, 3, 64):
            other = build(**SETTINGS[name], memory_block_size=block)
            torch.testing.assert_close(other(ids, use_cache=False).logits, expected, **EXACT)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(SETTINGS)),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.data(),
)
def test_pads_take_no_part(name, pieces, data):
    model, count = build(**SETTINGS[name]), sum(pieces)
    ids = tokens(count, 3)
    mask = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=3 * count, max_size=3 * count))).view(3, count)
    mask[0] = 1
    logits, _ = read(model, ids, pieces, mask)
    for row in range(3):
        real = mask[row].bool()
        if real.any():
            alone, _ = read(model, ids[row : row + 1, real])
            torch.testing.assert_close(logits[row][real], alone[0], **EXACT)


@pytest.mark.parametrize("name", ["mass", "everything"])
def test_packed_sequences_do_not_see_each_other(name):
    model, ids = build(**SETTINGS[name]), tokens(40, 1)
    positions = torch.cat([torch.arange(27), torch.arange(13)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits
        first, second = (model(part, use_cache=False).logits for part in (ids[:, :27], ids[:, 27:]))
    torch.testing.assert_close(packed, torch.cat([first, second], dim=1), **EXACT)


def test_the_future_changes_nothing():
    model, ids = build(**SETTINGS["everything"]), tokens(40, 1)
    other = ids.clone()
    other[:, 31:] = (other[:, 31:] + 7) % SIZES["vocab_size"]
    with torch.no_grad():
        a, b = (model(each, use_cache=False).logits for each in (ids, other))
    torch.testing.assert_close(a[:, :31], b[:, :31], rtol=0, atol=1e-14)
    assert not torch.allclose(a[:, 31:], b[:, 31:])


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_weights_sum_to_one_and_name_each_token_once(name):
    model, ids = build(**SETTINGS[name]), tokens()
    with torch.no_grad():
        out = model(ids, use_cache=False, output_attentions=True)
        plain = model(ids, use_cache=False).logits
    torch.testing.assert_close(out.logits, plain, **EXACT)
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)), **EXACT)
        assert (weights.triu(1) == 0).all()


# Caches --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["exact", "mass", "everything"])
def test_a_cache_keeps_all_of_it(name, tmp_path):
    model, ids, more = build(**SETTINGS[name]), tokens(31), tokens(9, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    _, cache = read(model, ids, [14, 17], mask)
    cache.save(tmp_path / "cache")
    copied = copy.deepcopy(cache)
    expected, _ = read(model, more, [1] * 9, cache=cache)
    loaded = BMojoCache.load(tmp_path / "cache", model.config)
    torch.testing.assert_close(read(model, more, [4, 5], cache=loaded)[0], expected, **EXACT)
    copied.batch_repeat_interleave(2)
    copied.reorder_cache(torch.tensor([3, 3, 0, 0]))
    copied.batch_select_indices(torch.tensor([0, 2]))
    torch.testing.assert_close(read(model, more[[1, 0]], cache=copied)[0], expected[[1, 0]], **EXACT)
    cache.reset()
    assert cache.nbytes == 0
    # Cut otherwise, the same states.
    one, two = (read(model, ids, pieces, mask)[1] for pieces in ([31], [9, 1, 21]))
    for a, b in zip(one.layers, two.layers):
        for (key, left), right in zip(a.memory.arranged(a.states()).items(), b.memory.arranged(b.states()).values()):
            torch.testing.assert_close(left, right, **EXACT, msg=key)


@pytest.mark.parametrize("stride", [2, 3, 4, 5])
def test_a_cache_beyond_its_first_room_is_saved(stride, tmp_path):
    model = build(torch.float32, **{**MASS, "fading_stride": stride})
    for count in (257, 300):
        _, cache = read(model, tokens(count))
        cache.save(tmp_path / "cache")
        loaded = BMojoCache.load(tmp_path / "cache", model.config)
        more = tokens(3, seed=3)
        assert torch.equal(read(model, more, cache=loaded)[0], read(model, more, cache=cache)[0])


def test_bytes_of_a_storage_are_counted():
    model = build(torch.float32, **SETTINGS["decay"])
    measured = [read(model, tokens(count, 1))[1] for count in (20, 60)]
    exact = [sum(value.nbytes for layer in cache.layers for value in layer.memory.arranged(layer.states()).values())
             for cache in measured]  # fmt: skip
    assert [memory_bytes(model.config, count)[0] for count in (20, 60)] == exact


def test_generate_with_beams_and_a_second_turn():
    model, ids = build(**SETTINGS["mass"]), tokens(20)
    options = dict(max_new_tokens=6, do_sample=False)
    for beams in (1, 3):
        cached = model.generate(ids, num_beams=beams, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, num_beams=beams, use_cache=False, **options))
    first = model.generate(ids, return_dict_in_generate=True, **options)
    again = torch.cat([first.sequences, tokens(5, seed=9)], dim=1)
    cache = first.get("past_key_values") if first.get("past_key_values") is not None else first["cache"]
    second = model.generate(again, cache=cache, **options)
    assert torch.equal(second, model.generate(again, **options))


# Training ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mass", "everything"])
def test_gradients_flow_through_what_is_fetched(name):
    """Against finite differences, in one direction of all parameters; the choice is the same on both sides."""
    model, ids = build(**SETTINGS[name]).train(), tokens(24, 1)

    def loss():  # in float64, where the model's own is in float32
        return torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])

    loss().backward()
    parameters = list(model.parameters())
    assert all(value.grad is not None for value in parameters)
    generator = torch.Generator().manual_seed(5)
    ways = [torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in parameters]
    slope, size, losses = sum((way * value.grad).sum() for way, value in zip(ways, parameters)), 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for value, way in zip(parameters, ways):
                value.add_(way, alpha=sign * size)
            losses.append(loss())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * size), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mass", "everything"])
def test_gradient_checkpointing_and_a_cache_give_the_same_gradients(name):
    ids, grads = tokens(24, 2), []
    for way in ("plain", "checkpointing", "cache"):
        model = build(**SETTINGS[name]).train()
        if way == "checkpointing":
            model.gradient_checkpointing_enable()
        cache = None
        if way == "cache":
            cache = BMojoCache(model.config)
        model(ids, labels=ids, cache=cache).loss.backward()
        grads.append([value.grad for value in model.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            torch.testing.assert_close(a, b, **EXACT)


def test_training_after_inference_mode():
    model, ids = build(**MASS), tokens(24)
    with torch.inference_mode():
        model(ids, use_cache=False)
    model.train()
    model(ids, labels=ids).loss.backward()


def test_positions_that_do_not_count_are_refused_beyond_the_distance():
    model, ids = build(**SETTINGS["distance"]), tokens()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        given = model(ids, position_ids=torch.arange(40)[None], use_cache=False).logits
        torch.testing.assert_close(given, expected, **EXACT)
        model(ids[:, :9], position_ids=torch.arange(7, 16)[None])  # nothing is beyond it
        with pytest.raises(ValueError, match="position_ids: token 0 of row 0 stands at 7"):
            model(ids, position_ids=torch.arange(7, 47)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_numbers(dtype):
    model, ids = build(dtype, **SETTINGS["mass"]), tokens()
    logits, cache = read(model, ids, [30, *[1] * 10])
    wide, _ = read(build(**SETTINGS["mass"]), ids)
    assert logits.dtype == dtype and logits.isfinite().all()
    assert cache.layers[0].stored_keys.dtype == dtype and cache.layers[0].sketches.dtype == torch.int8
    error = (logits.double() - wide).norm() / wide.norm()
    assert error < (1e-2 if dtype == torch.float32 else 0.3)


def test_a_saved_model_has_its_sketches(tmp_path):
    model, ids = build(**SETTINGS["mass"]), tokens()
    model.save_pretrained(tmp_path)
    loaded = BMojoForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert sum("sketch" in name for name in model.state_dict()) == 4 * 2
    torch.testing.assert_close(read(loaded, ids)[0], read(model, ids)[0], **EXACT)


# Functions -----------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(1, 13), st.data())
def test_ties_go_to_the_older(values, count, data):
    offered = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    wanted = torch.tensor(values, dtype=torch.float32)
    expected = first_of({s: float(wanted[s]) for s in range(len(values)) if offered[s]}, count)
    # One query, and two of which the other wants the opposite.
    for both in (wanted.view(1, 1, 1, -1), torch.stack([wanted, -wanted]).view(1, 1, 2, -1)):
        place, meant = places_of_first(both.clone(), offered.view(1, 1, 1, -1), count)
        place = torch.arange(len(values)).view(1, 1, -1) if place is None else place
        assert set(place[0, 0][meant[0, 0, 0]].tolist()) == expected
    if count < len(values):  # a step's form
        steps = in_steps(wanted.view(1, 1, -1).clone()).masked_fill_(~offered, -torch.inf)
        for where in (None, torch.arange(len(values)).view(1, 1, -1)):
            place, meant = chosen_places(steps.clone(), count, where)
            place = place if meant is None else place[meant][None, None]
            assert set(place[0, 0].tolist()) == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 11))
def test_both_forms_of_the_choice_agree(seed, count):
    """That of other devices and of compiled code, and numpy's, which this machine takes: with equals and -inf."""
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(-2, 3, (2, 3, 4, 12), generator=generator).float()
    wanted[torch.rand(wanted.shape, generator=generator) < 0.4] = -torch.inf
    found = storage_ops._chosen(wanted, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        other = storage_ops._chosen(wanted, count)
    assert torch.equal(found, other)
    assert torch.equal(found.sum(-1), (wanted > -torch.inf).sum(-1).clamp(max=count))


def test_scores_far_below_the_best_keep_their_order():
    """What one query may not see, or what another entry has, does not make two entries equal."""
    for dtype, gap in ((torch.float16, 22.0), (torch.float32, 120.0)):
        scores = torch.tensor([gap, 0.0, 0.5, 1.0, 1.5, 2.0], dtype=dtype).expand(1, 1, 2, 1, -1)
        place, meant = places_of_first(largest(scores), torch.ones(1, 1, 1, 6, dtype=torch.bool), 2)
        assert place[0, 0].tolist() == [0, 5] and bool(meant.all())


@pytest.mark.parametrize("count", [1, SIZES["window_size"]])
def test_decay_inside_the_window(count):
    model, ids = build(**SETTINGS["decay"]), tokens(count)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(read(model, ids)[0], expected, **EXACT)


def test_decay_goes_on_beyond_what_scores_can_be():
    """Whatever the decay, of a long text the newest stored tokens are fetched if it is strong."""
    for decay in (1e2, 1e4):
        model, ids = build(**{**PLAIN, "storage_decay": decay, "eidetic_size": 0}), tokens(40, 1)
        weights = model(ids, use_cache=False, output_attentions=True).attentions[0]
        assert (weights[0, 0, -1] > 0).nonzero().flatten().tolist()[:3] == [32, 33, 34]


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_turns_from_tables_are_those_of_the_positions(dtype, error):
    turn, longest = build(rope_parameters=dict(rope_type="default", rope_theta=1e4)).model.rotary_emb.turn, 70_000
    tables = TurnTables.made(turn, longest, torch.device("cpu"), dtype)
    positions = torch.tensor([[0, 1, 255, 256, 257], [511, 512, 8191, 65_536, longest - 1]])
    for found, exact in zip(tables(positions), turn(positions)):
        assert found.dtype == dtype and (found - exact).abs().max() < error
    assert tables.reach(longest) and not tables.reach(3 * longest)


ROPES = {
    "plain": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    "dynamic": dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=2.0), max_position_embeddings=16),
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ["distance", "distance alone"])
def test_tables_of_turns_are_made_in_any_mode(name, rope):
    """A model built or first run in inference mode, whose frequencies may be replaced, and trained afterwards."""
    fields, ids = {**SETTINGS[name], **ROPES[rope]}, tokens(30)
    expected = build(**fields)(ids, use_cache=False).logits
    with torch.inference_mode():
        torch.testing.assert_close(build(**fields)(ids, use_cache=False).logits, expected.detach(), **EXACT)
    model = build(**fields)
    with torch.inference_mode():
        model(ids, use_cache=False)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **EXACT)
    model.train()(ids, labels=ids).loss.backward()


def test_distances_need_no_values():
    """On the meta device, where estimates of memory and FLOPs run a model."""
    model = build(torch.float32, **SETTINGS["distance alone"]).to("meta")
    out = model(inputs_embeds=torch.empty(2, 20, SIZES["hidden_size"], device="meta"), use_cache=False)
    assert out.logits.shape == (2, 20, SIZES["vocab_size"])


def test_sketches_are_scanned_piece_by_piece(monkeypatch):
    model, ids = build(**SETTINGS["mass"]), tokens()
    expected, _ = read(model, ids, [30, *[1] * 10])
    monkeypatch.setattr(storage_steps_bmojo, "SCAN", 7)
    torch.testing.assert_close(read(model, ids, [30, *[1] * 10])[0], expected, **EXACT)


def test_distances_are_cut_far_from_the_start():
    """Beyond one entry of the coarse table, in prefill and in steps, with what a text before has left in the tables."""
    model = build(**SETTINGS["distance"])
    model(tokens(30, 1), use_cache=False)
    ids = tokens(540, 1)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(read(model, ids, [500, *[1] * 40])[0], expected, **EXACT)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 90), st.integers(1, 40), st.integers(1, 9), st.integers(2, 5), st.integers(1, 4),
    st.none() | st.integers(0, 60), st.integers(0, 120),
)  # fmt: skip
def test_blocks_are_those_of_the_definition(low, more, window, size, shown, reach, start):
    pyramid = Pyramid(window, size, shown, reach, start)
    offsets = tuple(1000 * level for level in range(20))
    blocks = pyramid.between(low, low + more, offsets, torch.device("cpu"))
    for t in range(low, low + more):
        here = (blocks.begin <= t) & (t < blocks.end)
        found = sorted(zip(blocks.first[here].tolist(), blocks.size[here].tolist()))
        assert found == sorted(shown_blocks(t, window, size, shown, reach, start))
        now = blocks_now(Step(torch.zeros(1), None, None, 1.0, t, window), pyramid)
        rows = zip(now.first.tolist(), now.size.int().tolist(), now.end.tolist())
        assert sorted((first, count) for first, count, end in rows if end) == found
        if reach is not None:
            continue
        # Every token that has left the window and whose block is complete is in exactly one of them.
        covered = [s for first, count in found for s in range(first, first + count)]
        assert covered == list(range(max(0, (t - window + 1) // size * size)))
    assert len(set(blocks.node.tolist())) == len(blocks.node)


def test_what_is_fetched_is_counted_by_block():
    blocks = Pyramid(4, 2, 2).between(10, 30, (0, 100, 200, 300), torch.device("cpu"))
    place = torch.tensor([[[1, 4, 5, 9, 17, 0, 2], [0, 1, 2, 3, 4, 5, 26]]])  # two that nobody means
    meant = torch.rand(1, 2, 3, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    meant[:, 0, :, 5:] = False
    found = fetched_inside(place, meant, blocks)
    for number, (first, size) in enumerate(zip(blocks.first.tolist(), blocks.size.tolist())):
        within = (place >= first) & (place < first + size)
        assert torch.equal(found[..., number], (meant & within[:, :, None]).sum(-1).to(found.dtype))


def test_inside_counts_by_block():
    blocks = Pyramid(4, 2, 2).between(0, 30, (0, 100, 200, 300), torch.device("cpu"))
    kept = torch.rand(2, 3, 30, generator=torch.Generator().manual_seed(0)) > 0.5
    found = inside(kept, blocks, 2)
    for place, (first, size) in enumerate(zip(blocks.first.tolist(), blocks.size.tolist())):
        assert torch.equal(found[..., place], kept[..., first : first + size].sum(-1).to(found.dtype))


# Bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(storage_size=-1), r"storage_size=-1: must be an integer >= 0"),
        (dict(storage_size=4, storage_candidates=3, storage_sketch_size=2), "storage_candidates=3: .* storage_size=4"),
        (dict(storage_size=4, storage_candidates=8), r"storage_candidates=8: needs a sketch"),
        (dict(storage_sketch_size=5), r"storage_sketch_size=5: must lie in \[1, head_dim=4\]"),
        (dict(storage_size=1, storage_limit=0), r"storage_limit=0: must be an integer >= 1"),
        (dict(storage_decay=-0.1), r"storage_decay=-0.1"),
        (dict(fading_mass=True), r"fading_mass=True: needs storage_size > 0"),
        (dict(fading_mass=True, storage_size=1), r"fading_stride=1: must lie in \[2, 1,048,576\] with fading_mass"),
        (dict(max_rope_distance=3), r"max_rope_distance=3: must be an integer >= 4"),
        (dict(max_rope_distance_start=-1, max_rope_distance=9), r"max_rope_distance_start=-1: must be an integer >= 0"),
        (dict(max_rope_distance_start=5), r"max_rope_distance_start=5.*give a distance"),
    ],
    ids=str,
)
def test_values_that_contradict_each_other(fields, message):
    with pytest.raises(ValueError, match=message):
        build(**fields)
