"""Taking columns back: what is read after `crop` is read as if they had never been."""

import copy
import pickle

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoConfig, BMojoForCausalLM
from tests.oracles import randomize_
from tests.reading import tokens
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED


EXACT = dict(rtol=1e-12, atol=1e-12)
NEAR = dict(rtol=1e-10, atol=1e-10)  # where products of other shapes round otherwise
STORED = dict(storage_size=3, storage_candidates=5, storage_sketch_size=3)
SETTINGS = {
    "output": {},
    "state": dict(innovation="state", eidetic_decay=0.1),
    "key, clock": dict(innovation="key", eidetic_decay=0.1, decay_clock="innovation", fading_size=0),
    "constant": dict(innovation="constant", eidetic_size=2),
    "stride": dict(fading_size=2, fading_stride=5),
    "answers": dict(innovation="key", fading_delay=0),
    "S6": dict(ssm_type="mamba", ssm_num_heads=8, ssm_head_dim=4, ssm_num_groups=1),
    "delta": dict(ssm_type="gated_delta", innovation="state"),
    "kalma": dict(ssm_type="kalmanet", innovation="state", ssm_solver_steps=5),
    "unprojected": UNPROJECTED,
    "mixed": MIXED_LAYERS,
    "full attention": dict(layer_types=["full_attention"] * 2),
    "storage": dict(STORED, fading_mass=True, fading_size=2, fading_stride=2, max_rope_distance=9),
    "storage, answers": dict(STORED, fading_delay=0, innovation="key"),
    "storage, decay": dict(STORED, storage_decay=0.7, fading_size=0, innovation="key"),
    "no positions": dict(rope_parameters=None),
}
LIMIT = 6
QUICK = dict(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # a failure as it is found


def build(dtype=torch.float64, cls=BMojoForCausalLM, **fields):
    torch.manual_seed(0)
    config = BMojoConfig(**{**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **fields}, pad_token_id=0)
    return randomize_(cls(config)).to(dtype).eval()


def unread(model, ids, mask=None):
    """The logits without a cache."""
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def go_on(model, cache, ids, mask=None, **options):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **{CACHE_NAME: cache}, **options)


def same(one, other, **tolerance):
    """Whether two caches hold the same states."""
    assert one.get_seq_length() == other.get_seq_length()
    one.settle()
    for first, second in zip(one.layers, other.layers):
        assert (first.columns, first.even) == (second.columns, second.even)
        held, wanted = (each.memory.arranged(each.states()) for each in (first, second))
        for name, value in wanted.items():
            torch.testing.assert_close(held[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# Exactness -----------------------------------------------------------------------------------------------------------
# Of each turn: columns that are read, and how many of them, and of those before, are taken back.
TURNS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, LIMIT)), min_size=1, max_size=7)


@pytest.mark.own_settings
@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=6, **QUICK)
@given(st.integers(1, 30), TURNS, st.integers(0, 99))
def test_what_was_taken_back_was_never_read(name, first, turns, seed):
    model, ids = build(**SETTINGS[name]), tokens(120)
    draft = torch.Generator().manual_seed(seed)
    cache, settled = BMojoCache(model.config, rollback_limit=LIMIT), max(first - LIMIT, 1)
    close = NEAR if "storage" in name else EXACT
    go_on(model, cache, ids[:, :first])
    text = ids[:, :first]
    for count, back in turns:
        new = torch.randint(0, SIZES["vocab_size"], (2, count), generator=draft)
        logits = go_on(model, cache, new).logits
        text = torch.cat([text, new], dim=1)
        torch.testing.assert_close(logits, unread(model, text)[:, -count:], **close)
        settled = max(settled, text.shape[1] - LIMIT)
        back = min(back, text.shape[1] - settled)
        cache.crop(-back)
        text = text[:, : text.shape[1] - back]
        assert cache.get_seq_length() == text.shape[1]
    fresh = BMojoCache(model.config)
    go_on(model, fresh, text)
    same(cache, fresh, **NEAR)


@pytest.mark.own_settings
@pytest.mark.parametrize("name", ["output", "stride", "mixed", "storage"])
@settings(max_examples=4, **QUICK)
@given(st.data())
def test_pads_are_taken_back_too(name, data):
    model, ids, total = build(**SETTINGS[name]), tokens(26, rows=3), 26
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=26, max_size=26), min_size=3, max_size=3)))
    mask[:, 0] = True
    cache, here = BMojoCache(model.config, rollback_limit=LIMIT), 0
    close = NEAR if name == "storage" else EXACT
    while here < total:
        count = min(data.draw(st.integers(1, 7)), total - here)
        draft = torch.cat([ids[:, :here], tokens(count, rows=3, seed=here)], dim=1)
        other = mask.clone()
        other[:, here : here + count] = data.draw(st.booleans())
        go_on(model, cache, draft[:, here:], other[:, : here + count])
        cache.crop(-min(count, LIMIT))
        left = count - min(count, LIMIT)
        if left:
            cache, left = BMojoCache(model.config, rollback_limit=LIMIT), 0
            if here:
                go_on(model, cache, ids[:, :here], mask[:, :here])
        logits = go_on(model, cache, ids[:, here : here + count], mask[:, : here + count]).logits
        expected = unread(model, ids[:, : here + count], mask[:, : here + count])[:, here:]
        torch.testing.assert_close(logits, expected, **close)
        here += count


def test_a_mask_that_names_other_pads_than_those_that_wait_is_refused():
    model, ids = build(), tokens(20)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, 10] = 0
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :8], mask[:, :8])
    go_on(model, cache, ids[:, 8:14], mask[:, :14])
    cache.crop(-2)
    with pytest.raises(ValueError, match=r"attention_mask\[0\] calls 12 of the 12 columns"):
        go_on(model, cache, ids[:, 12:14], torch.ones(2, 14, dtype=torch.int64))
    logits = go_on(model, cache, ids[:, 12:], mask).logits
    torch.testing.assert_close(logits, unread(model, ids, mask)[:, 12:], **EXACT)


def test_positions_that_are_given_go_with_what_waits():
    model, ids = build(), tokens(24)
    positions = torch.arange(24)[None]
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :10], position_ids=positions[:, :10])
    go_on(model, cache, ids[:, 10:15], position_ids=positions[:, 10:15])
    cache.crop(-3)
    logits = go_on(model, cache, ids[:, 12:18], position_ids=positions[:, 12:18]).logits
    torch.testing.assert_close(logits, unread(model, ids)[:, 12:18], **EXACT)
    cache.crop(-2)
    # Given no more: what waits is read by itself, and can no longer be taken back.
    torch.testing.assert_close(go_on(model, cache, ids[:, 16:20]).logits, unread(model, ids[:, :20])[:, 16:], **EXACT)
    with pytest.raises(ValueError, match="at most 4 can be taken back"):
        cache.crop(-5)


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
def test_outputs_of_layers_are_those_of_the_new_columns(wanted):
    model, ids = build(), tokens(20)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :16])
    cache.crop(-4)
    found = go_on(model, cache, ids[:, 12:], **{wanted: True})
    with torch.no_grad():
        expected = model(ids, use_cache=False, **{wanted: True})
    name = wanted.removeprefix("output_")
    assert len(found[name]) == len(expected[name])
    for new, whole in zip(found[name], expected[name]):
        part = whole[:, 12:] if name == "hidden_states" else whole[:, :, 12:]
        torch.testing.assert_close(new, part, **EXACT)


def test_tuples_are_returned_on_demand():
    model, ids = build(), tokens(20)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :16])
    cache.crop(-4)
    found = go_on(model, cache, ids[:, 12:], return_dict=False)
    torch.testing.assert_close(found[0], unread(model, ids)[:, 12:], **EXACT)


def test_the_last_columns_of_a_long_prompt_are_taken_back_without_reading_it_anew():
    model, ids = build(), tokens(90)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    torch.testing.assert_close(go_on(model, cache, ids).logits, unread(model, ids), **EXACT)
    assert [kept[0].columns for kept in cache.rollback.copies] == [90 - LIMIT]
    assert sum(part.count for part in cache.rollback.read) == LIMIT


def test_it_costs_a_few_copies_however_it_is_read():
    model, ids = build(), tokens(200)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    generator = torch.Generator().manual_seed(0)
    here = 0
    while here < 200:
        count = int(torch.randint(1, 5, (), generator=generator))
        go_on(model, cache, ids[:, here : here + count])
        here += count
        assert len(cache.rollback.copies) <= 4
        assert sum(part.count for part in cache.rollback.read) <= 2 * LIMIT + 4


def test_without_it_nothing_is_kept():
    model, ids = build(), tokens(20)
    plain, able = BMojoCache(model.config), BMojoCache(model.config, rollback_limit=LIMIT)
    for cache in (plain, able):
        go_on(model, cache, ids)
    assert plain.rollback is None
    assert able.nbytes == plain.nbytes + able.rollback.nbytes > plain.nbytes
    assert (plain.is_croppable, able.is_croppable) == (False, True)


# Operations of a cache -----------------------------------------------------------------------------------------------
OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "to": (lambda cache: cache.to("cpu"), [0, 1]),
    "offload": (lambda cache: [cache.offload(0), cache.prefetch(0)], [0, 1]),
}


@pytest.mark.own_settings
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", ["output", "storage"])
def test_rows_are_chosen_of_what_may_be_taken_back(name, operation, waits):
    model, ids = build(**SETTINGS[name]), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :20])
    apply, rows = OPERATIONS[operation]
    if waits:
        cache.crop(-2)
        apply(cache)
        cache.crop(-2)
    else:
        apply(cache)
        cache.crop(-4)
    torch.testing.assert_close(go_on(model, cache, ids[rows, 16:]).logits, unread(model, ids)[rows, 16:], **NEAR)


def test_a_copy_goes_its_own_way():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :20])
    cache.crop(-3)
    fork = copy.deepcopy(cache)
    go_on(model, fork, tokens(5, seed=9))
    fork.crop(-5)
    for one in (cache, fork):
        torch.testing.assert_close(go_on(model, one, ids[:, 17:]).logits, unread(model, ids)[:, 17:], **EXACT)


def test_a_pickled_cache_takes_back():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :20])
    cache.crop(-1)
    found = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="the model that read them is gone"):
        found.settle()
    found.crop(-2)
    torch.testing.assert_close(go_on(model, found, ids[:, 17:]).logits, unread(model, ids)[:, 17:], **EXACT)


def test_what_looks_at_the_states_finds_those_of_the_last_column(tmp_path):
    model, ids = build(), tokens(30)
    cache, fresh = BMojoCache(model.config, rollback_limit=LIMIT), BMojoCache(model.config)
    go_on(model, cache, ids[:, :20])
    go_on(model, fresh, ids[:, :16])
    cache.crop(-4)
    torch.testing.assert_close(copy.deepcopy(cache).last_hidden, fresh.last_hidden, **EXACT)
    assert copy.deepcopy(cache).seen.tolist() == [16, 16]
    assert [t.position for t in copy.deepcopy(cache).remembered(0)] == [t.position for t in fresh.remembered(0)]
    cache.save(tmp_path / "cache.safetensors")
    same(BMojoCache.load(tmp_path / "cache.safetensors", model.config), fresh, **EXACT)


@pytest.mark.parametrize("place", ["directory", "host"])
def test_stored_tokens_in_pages_are_taken_back(place, tmp_path):
    model, ids = build(**SETTINGS["storage"]), tokens(60, rows=1)
    where = dict(storage=str(tmp_path / "store")) if place == "directory" else dict(storage_on_host=True)
    cache = BMojoCache(model.config, rollback_limit=LIMIT, **where)
    go_on(model, cache, ids[:, :30])
    for here in range(30, 50, 4):
        go_on(model, cache, tokens(5, rows=1, seed=here))
        cache.crop(-5)
        found = go_on(model, cache, ids[:, here : here + 4]).logits
        torch.testing.assert_close(found, unread(model, ids)[:, here : here + 4], **NEAR)
    cache.close()


def test_a_directory_holds_what_was_synced_whatever_was_taken_back(tmp_path):
    model, ids, folder = build(**SETTINGS["storage"]), tokens(60, rows=1), str(tmp_path / "store")
    cache = BMojoCache(model.config, storage=folder, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :40])
    cache.sync()
    cache.crop(-5)  # and what stood there is written anew
    go_on(model, cache, tokens(12, rows=1, seed=9))
    cache.close()
    again = BMojoCache(model.config, storage=folder)
    assert again.get_seq_length() == 40
    torch.testing.assert_close(go_on(model, again, ids[:, 40:]).logits, unread(model, ids)[:, 40:], **NEAR)
    again.close()


# generate() ----------------------------------------------------------------------------------------------------------
def llama():
    torch.manual_seed(3)
    sizes = dict(vocab_size=SIZES["vocab_size"], hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)).double().eval()


DRAFTERS = {
    "prompt lookup": lambda model: dict(prompt_lookup_num_tokens=4),
    "itself": lambda model: dict(assistant_model=model),
    "smaller": lambda model: dict(assistant_model=build(num_hidden_layers=1)),
    "llama": lambda model: dict(assistant_model=llama()),
}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", ["output", "mixed", "storage"])
def test_drafted_text_is_that_of_plain_decoding(name, drafter):
    model, prompt = build(**SETTINGS[name]), tokens(9, rows=1).repeat(1, 3)
    plain = model.generate(prompt, max_new_tokens=30, do_sample=False, output_logits=True, return_dict_in_generate=True)
    found = model.generate(
        prompt, max_new_tokens=30, do_sample=False, output_logits=True, return_dict_in_generate=True,
        **DRAFTERS[drafter](model),
    )  # fmt: skip
    assert torch.equal(found.sequences, plain.sequences)
    count = len(found.logits)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(plain.logits[:count]).float(), rtol=0, atol=1e-5)


def test_a_draft_model_decodes_for_another_model():
    model, prompt = llama(), tokens(9, rows=1).repeat(1, 3)
    plain = model.generate(prompt, max_new_tokens=30, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=30, do_sample=False, assistant_model=build()), plain)


def test_a_chat_goes_on_with_a_drafted_answer():
    model, first, second = build(), tokens(12, rows=1), tokens(7, rows=1, seed=5)
    cache = BMojoCache(model.config)
    answer = model.generate(first, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == answer.shape[1] - 1
    text = torch.cat([answer, second], dim=1)
    plain = model.generate(text, max_new_tokens=8, do_sample=False)
    found = model.generate(text, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3, **{CACHE_NAME: cache})
    assert torch.equal(found, plain)


def test_an_edited_turn_is_answered_as_if_the_first_form_had_not_been():
    model, prompt = build(), tokens(30, rows=1)
    cache = BMojoCache(model.config, rollback_limit=20)
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False, **{CACHE_NAME: cache})
    cache.crop(-(cache.get_seq_length() - 20))
    edited = torch.cat([answer[:, :20], tokens(6, rows=1, seed=8)], dim=1)
    plain = model.generate(edited, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(edited, max_new_tokens=8, do_sample=False, **{CACHE_NAME: cache}), plain)


def test_a_drafted_pad_is_text():
    model, prompt = build(), tokens(9, rows=1).repeat(1, 3)
    plain = model.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=60)
    common = plain[0, 27:].mode().values.item()
    plain = model.generate(prompt, max_new_tokens=30, do_sample=False, pad_token_id=common)
    for drafter in ("itself", "prompt lookup"):
        found = model.generate(
            prompt, max_new_tokens=30, do_sample=False, pad_token_id=common, **DRAFTERS[drafter](model)
        )
        assert torch.equal(found, plain)


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_long_drafts_are_taken_back(schedule):
    model, assistant, prompt = build(), build(num_hidden_layers=1), tokens(9, rows=1)
    assistant.generation_config.update(num_assistant_tokens=90, num_assistant_tokens_schedule=schedule)
    plain = model.generate(prompt, max_new_tokens=120, do_sample=False)
    for each in (assistant, model):
        each.generation_config.update(num_assistant_tokens=90, num_assistant_tokens_schedule=schedule)
        found = model.generate(prompt, max_new_tokens=120, do_sample=False, assistant_model=each)
        assert torch.equal(found, plain)


def test_a_limit_that_is_raised_keeps_what_is_held():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :20])
    cache.crop(-1)
    cache.allow_rollback(2 * LIMIT)
    assert cache.get_seq_length() == 19
    torch.testing.assert_close(go_on(model, cache, ids[:, 19:]).logits, unread(model, ids)[:, 19:], **EXACT)
    with pytest.raises(ValueError, match="rollback_limit=0"):
        cache.allow_rollback(0)


def test_gradients_go_through_all_that_is_read_at_once():
    model, ids = build(), tokens(40, rows=1)
    found = []
    for cache in (BMojoCache(model.config), BMojoCache(model.config, rollback_limit=LIMIT)):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embeds, **{CACHE_NAME: cache}).logits[0, -1].square().sum().backward()
        found.append(embeds.grad)
    assert found[0][0, 0].abs().max() > 0
    torch.testing.assert_close(found[1], found[0], **EXACT)


def test_what_was_read_is_its_own():
    model, ids = build(), tokens(30)
    embeds = model.get_input_embeddings()(ids[:, :20]).detach()
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 12] = False
    expected = unread(model, ids, torch.cat([mask, torch.ones(2, 10, dtype=torch.bool)], dim=1))
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    with torch.no_grad():
        model(inputs_embeds=embeds, attention_mask=mask, **{CACHE_NAME: cache})
    embeds.zero_()
    mask.fill_(True)
    cache.crop(-3)
    torch.testing.assert_close(go_on(model, cache, ids[:, 17:]).logits, expected[:, 17:], **EXACT)
    assert len(pickle.dumps(cache.rollback)) < 1.5 * cache.rollback.nbytes + 20000


def test_a_read_that_stops_between_its_parts_is_noticed(monkeypatch):
    model, ids = build(), tokens(60)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    before, calls = cache.rollback.before, []

    def second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        before(*args)

    monkeypatch.setattr(cache.rollback, "before", second)
    with pytest.raises(MemoryError):
        go_on(model, cache, ids)
    with pytest.raises(ValueError, match="stopped halfway"):
        go_on(model, cache, ids)


# Bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [0, -1, True, 2.5, "6"])
def test_limits_that_are_none_are_refused(limit):
    with pytest.raises(ValueError, match=r"rollback_limit=.*must be an integer >= 1"):
        BMojoCache(build().config, rollback_limit=limit)


def test_more_than_is_held_is_refused_and_nothing_is_lost():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :4])
    with pytest.raises(ValueError, match=r"crop of 5 columns: 4 were read since it is allowed"):
        cache.crop(-5)
    go_on(model, cache, ids[:, 4:20])
    with pytest.raises(ValueError, match=r"crop of 7 columns: rollback_limit=6, so that at most 6"):
        cache.crop(-7)
    cache.crop(-4)
    with pytest.raises(ValueError, match="at most 2 can be taken back"):
        cache.crop(-3)
    torch.testing.assert_close(go_on(model, cache, ids[:, 16:]).logits, unread(model, ids)[:, 16:], **EXACT)


def test_all_of_a_short_text_is_taken_back():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, tokens(5, seed=9))
    cache.crop(-5)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(go_on(model, cache, ids).logits, unread(model, ids), **EXACT)


def test_another_batch_after_all_was_taken_back_is_refused():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :5])
    cache.crop(-5)
    with pytest.raises(ValueError, match="batch size 2 but the input has 1 rows"):
        go_on(model, cache, ids[:1])


@pytest.mark.parametrize("value", [2.0, True, None, "3"])
def test_what_is_taken_back_is_a_number(value):
    with pytest.raises(ValueError, match="must be an integer"):
        BMojoCache(build().config, rollback_limit=LIMIT).crop(value)


@pytest.mark.parametrize("shape", [(3, 13), (13,), (2, 5)])
def test_positions_of_another_shape_are_refused(shape):
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :20])
    cache.crop(-3)
    with pytest.raises(ValueError, match="position_ids of shape"):
        go_on(model, cache, ids[:, 17:], position_ids=torch.zeros(shape, dtype=torch.int64))
    torch.testing.assert_close(go_on(model, cache, ids[:, 17:]).logits, unread(model, ids)[:, 17:], **EXACT)


def test_a_forward_that_is_refused_leaves_what_waits():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :20])
    cache.crop(-3)
    with pytest.raises(ValueError, match="packed sequences and a cache"):
        go_on(model, cache, ids[:, 17:], seq_idx=torch.tensor([[0] * 5 + [1] * 8] * 2))
    with pytest.raises(ValueError, match="batch size 2 but the input has 1 rows"):
        go_on(model, cache, ids[:1, 17:])
    torch.testing.assert_close(go_on(model, cache, ids[:, 17:]).logits, unread(model, ids)[:, 17:], **EXACT)


def test_after_reset_nothing_can_be_taken_back():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids)
    cache.crop(-3)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(go_on(model, cache, ids[:1]).logits, unread(model, ids[:1]), **EXACT)


def test_a_cache_that_a_forward_left_halfway_takes_nothing_back():
    model, ids = build(), tokens(30)
    cache = BMojoCache(model.config, rollback_limit=LIMIT)
    go_on(model, cache, ids[:, :20])
    stop = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go_on(model, cache, ids[:, 20:])
    stop.remove()
    with pytest.raises(ValueError, match="stopped halfway"):
        cache.crop(-1)


def test_a_draft_model_with_another_vocabulary_is_refused():
    model, prompt = build(), tokens(9, rows=1)
    with pytest.raises(ValueError, match=r"vocab|tokenizer"):
        model.generate(prompt, max_new_tokens=5, assistant_model=build(vocab_size=50))
