"""What a forward is given is read or refused: nothing that carries a meaning is passed over (arguments_bmojo)."""

import copy
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeling_bmojo import (
    BMojoCache,
    BMojoConfig,
    BMojoForCausalLM,
    BMojoForQuestionAnswering,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
    BMojoModel,
)
from modeling_bmojo.arguments_bmojo import HARMLESS
from modeling_bmojo.fields_bmojo import fields_with
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


pytestmark = pytest.mark.own_settings


PAD = 0
MODELS = {
    "plain": {},
    "key": dict(innovation="key", fading_stride=5, fading_size=1),
    "mixed layers": MIXED_LAYERS,
    "full attention": dict(layer_types=["full_attention"] * 2),
    "S6": dict(ssm_type="mamba", ssm_state_size=4),
    "no positions": dict(rope_parameters=None),
}
HEADS = (
    BMojoModel,
    BMojoForCausalLM,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
    BMojoForQuestionAnswering,
)


def build(name="plain", cls=BMojoForCausalLM, **settings):
    config = BMojoConfig(**{**SIZES, "pad_token_id": PAD, **MODELS[name], **settings})
    return randomize_(cls(config)).double().eval()


def tokens(length, batch=1, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def output(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)[0]


def assert_near(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# Names ---------------------------------------------------------------------------------------------------------------
UNKNOWN = {
    "a cache of other models": dict(cache_params=object()),
    "a cache under an old name": dict(past_key_value=object()),
    "a cache under a future name": dict(memory=object()),
    "another library's lengths": dict(cu_seqlens=torch.tensor([0, 3, 9])),
    "another library's mask": dict(attn_mask=torch.ones(1, 9)),
    "a mask of pads": dict(padding_mask=torch.ones(1, 9)),
    "bidirectional attention": dict(is_causal=False),
    "segments": dict(token_type_ids=torch.tensor([[0] * 4 + [1] * 5])),
    "experts": dict(output_router_logits=True),
    "lengths of keys alone": dict(cu_seq_lens_k=torch.tensor([0, 3, 9])),
    "other lengths of keys": dict(cu_seq_lens_q=torch.tensor([0, 3, 9]), cu_seq_lens_k=torch.tensor([0, 9])),
    "a typo": dict(attention_maks=torch.ones(1, 9)),
    "even an empty one": dict(head_mask=[]),
}


@pytest.mark.parametrize("head", HEADS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("case", UNKNOWN)
def test_what_has_an_unknown_meaning_is_refused(case, head):
    arguments = UNKNOWN[case]
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        build(cls=head)(tokens(9), **arguments)


@pytest.mark.parametrize("head", HEADS, ids=lambda cls: cls.__name__)
def test_what_means_nothing_passes(head):
    model, ids = build(cls=head), tokens(9)
    nothing = dict(cache_params=None, whatever=None, is_causal=True, output_router_logits=False)
    nothing |= dict(token_type_ids=torch.zeros_like(ids), num_items_in_batch=torch.tensor(3), return_dict=True)
    assert_near(output(model, ids, **nothing), output(model, ids), 0.0)


def test_every_harmless_name_passes_with_some_value():
    values = dict(tokenizer=object(), assistant_tokenizer=object())
    values |= dict(is_causal=True, output_router_logits=False, return_dict=True, max_length_q=9, max_length_k=9)
    values |= dict(output_attentions=False, output_hidden_states=False, num_items_in_batch=2, ignore_index=-100)
    values |= dict(token_type_ids=torch.zeros(1, 9), shift_labels=tokens(9), cu_seq_lens_k=torch.tensor([0, 9]))
    values |= dict(kwargs={"tokenizer": object()})
    assert set(values) == set(HARMLESS)
    build()(tokens(9), labels=tokens(9), cu_seq_lens_q=torch.tensor([0, 9]), **values)


def test_a_loss_needs_labels():
    with pytest.raises(ValueError, match="shift_labels without labels"):
        build()(tokens(9), shift_labels=tokens(9))
    with pytest.raises(ValueError, match=r"labels=.*BMojoForCausalLM"):
        build(cls=BMojoModel)(tokens(9), labels=tokens(9))


def test_two_caches_are_refused():
    model = build()
    with pytest.raises(ValueError, match="two names of one argument"):
        model(tokens(9), past_key_values=BMojoCache(model.config), cache=BMojoCache(model.config))


# Masks ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [2, -1, 0.5, -torch.inf])
def test_masks_hold_zeros_and_ones(wrong):
    mask = torch.ones(1, 9, dtype=torch.float64)
    mask[0, 4:] = wrong
    with pytest.raises(ValueError, match=r"attention_mask holds .*must be 1 = real token or 0 = pad.*seq_idx"):
        build()(tokens(9), attention_mask=mask)


@pytest.mark.parametrize("name", MODELS)
def test_the_past_of_a_mask_is_what_was_read(name):
    model, first, second = build(name), tokens(20, 2), tokens(4, 2, seed=1)
    with torch.no_grad():
        read = model(first, use_cache=True, attention_mask=pads(2, 20, left=3))[1]
    for other in (pads(2, 24), pads(2, 24, left=4), pads(2, 24, hole=(8, 11)), pads(2, 24, left=3, hole=(8, 9))):
        with pytest.raises(ValueError, match=r"attention_mask.*read"):
            model(second, past_key_values=copy.deepcopy(read), attention_mask=other)
    whole = torch.cat([first, second], dim=1)
    expected = output(model, whole, attention_mask=pads(2, 24, left=3))[:, 20:]
    assert_near(
        output(model, second, past_key_values=copy.deepcopy(read), attention_mask=pads(2, 24, left=3)), expected
    )
    assert_near(output(model, second, past_key_values=read), expected)


def test_generate_compares_the_past_too():
    """transformers drops masks of nothing but ones before the model sees them."""
    model, prompt, more = build(), tokens(9, 2), tokens(4, 2, seed=1)
    mask = pads(2, 9, left=3)
    options = dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    turn = model.generate(prompt, attention_mask=mask, **options)
    whole = torch.cat([turn.sequences, more], dim=1)
    for wrong in (pads(2, 16), pads(2, 16, left=2)):
        with pytest.raises(ValueError, match=r"attention_mask\[0\] calls .* but the cache"):
            model.generate(whole, attention_mask=wrong, cache=copy.deepcopy(turn[-1]), **options)
    same = pads(2, 16, left=3)
    found = model.generate(whole, attention_mask=same, cache=turn[-1], **options)
    expected = model.generate(whole, attention_mask=same, use_cache=False, **options)
    assert torch.equal(found.sequences, expected.sequences)


def pads(batch, columns, left=0, hole=(0, 0)):
    """A mask with pads at the left of its first row and in a hole of it."""
    mask = torch.ones(batch, columns, dtype=torch.int64)
    mask[0, :left] = 0
    mask[0, hole[0] : hole[1]] = 0
    return mask


@pytest.mark.parametrize("given_mask", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_that_has_ended_reads_no_pads(name, given_mask):
    """One row of a batch ends early; in the second turn the pads behind its end are masked: each row is as alone."""
    model, prompt, more = build(name), tokens(9, 3), tokens(6, 3, seed=1)
    free = model.generate(prompt, max_new_tokens=12, do_sample=False)
    end = int(free[1, 12])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=end, return_dict_in_generate=True)
    if given_mask:
        options["attention_mask"] = torch.ones_like(prompt)
    turn = model.generate(prompt, **options)
    memory, written = turn[-1], turn.sequences
    mask = torch.ones_like(written)
    for row in range(3):
        ends = (written[row, 9:] == end).nonzero()
        if len(ends):
            mask[row, 9 + int(ends[0]) + 1 :] = 0
    assert 0 < int(mask[1].sum()) < mask.shape[1], "the row must end early for this to test anything"
    assert bool((written[mask == 0] == PAD).all())
    ids = torch.cat([written, more], dim=1)
    whole = torch.cat([mask, torch.ones_like(more)], dim=1)
    rest = output(model, ids[:, memory.get_seq_length() :], past_key_values=memory, attention_mask=whole)
    for row in range(3):
        alone = output(model, ids[row][whole[row] == 1][None])
        assert_near(rest[row, -6:], alone[0, -6:], 1e-11)


def test_a_row_of_pads_reads_nothing_and_stops_no_training():
    model, ids = build().train(), tokens(9, 2)
    mask = torch.ones_like(ids)
    mask[1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    alone = model(ids[:1], labels=ids[:1])
    assert_near(out.loss, alone.loss)
    assert not out.logits[1].any()
    gradients = []
    for loss in (out.loss, alone.loss):
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for found, wanted in zip(*gradients, strict=True):
        assert_near(found, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_nothing_but_pads(name):
    model, ids = build(name), tokens(9, 2)
    assert not output(model, ids, attention_mask=torch.zeros_like(ids)).any()


# Positions -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize("name", MODELS)
def test_positions_that_go_back_start_another_sequence(name, first):
    model, parts = build(name), [tokens(length, seed=length) for length in (12, 15, 1, 3)]
    positions = torch.cat([torch.arange(first, first + part.shape[1]) for part in parts])[None]
    packed = output(model, torch.cat(parts, dim=1), position_ids=positions, use_cache=False)
    alone = torch.cat([output(model, part) for part in parts], dim=1)
    # RoPE turns by differences: what is left is the rounding of the angles.
    assert_near(packed, alone, 1e-12 if name == "no positions" else 1e-6)


@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5), starts=st.data(), left=st.integers(0, 3))
def test_any_packing_by_positions(lengths, starts, left):
    model = build("no positions")
    parts = [tokens(length, seed=index) for index, length in enumerate(lengths)]
    positions, last = [], None
    for length in lengths:
        first = starts.draw(st.integers(0, 9 if last is None else last))  # at most where the one before it ended
        positions.append(torch.arange(first, first + length))
        last = first + length - 1
    ids = torch.cat([torch.full((1, left), PAD), *parts], dim=1)
    positions = torch.cat([torch.ones(left, dtype=torch.int64), *positions])[None]
    mask = torch.ones_like(ids)
    mask[:, :left] = 0
    packed = output(model, ids, position_ids=positions, attention_mask=mask, use_cache=False)
    alone = torch.cat([output(model, part) for part in parts], dim=1)
    assert_near(packed[:, left:], alone)


def test_positions_may_skip_ahead():
    model, ids = build("no positions"), tokens(12)
    positions = torch.tensor([[0, 1, 2, 5, 6, 9, 20, 21, 22, 23, 30, 31]])
    assert_near(output(model, ids, position_ids=positions, use_cache=False), output(model, ids))


@pytest.mark.parametrize("columns", [1, 4])
def test_a_cache_is_not_continued_further_back(columns):
    model = build()
    memory = model(tokens(20), use_cache=True)[1]
    with pytest.raises(ValueError, match=r"position_ids\[0\] starts at 19 .* read 20 tokens"):
        model(tokens(columns), past_key_values=memory, position_ids=torch.arange(19, 19 + columns)[None])
    model(tokens(columns), past_key_values=memory, position_ids=torch.arange(20, 20 + columns)[None])


# Embeddings beside ids -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [None, "ones", "left pads"])
def test_embeddings_win_over_ids_in_generate(mask):
    model, ids = build(), tokens(6, 2)
    embeddings = model.get_input_embeddings()(tokens(15, 2, seed=1)).detach()
    options = dict(max_new_tokens=5, do_sample=False)
    if mask:
        options["attention_mask"] = pads(2, 15, left=4 * (mask == "left pads"))
    both = model.generate(ids, inputs_embeds=embeddings, **options)
    assert torch.equal(both[:, 6:], model.generate(inputs_embeds=embeddings, **options))
    assert torch.equal(both[:, :6], ids)


# A configuration that changes ----------------------------------------------------------------------------------------
CHANGES = dict(
    window_size=9,
    eidetic_size=4,
    eidetic_decay=0.5,
    innovation="key",
    innovation_taps=2,
    fading_size=1,
    fading_stride=5,
    rms_norm_eps=1e-3,
    attention_multiplier=0.3,
    residual_multiplier=0.5,
    hidden_act="gelu",
    layer_types=["bmojo", "full_attention"],
    no_rope_layers=[1, 0],
    rope_parameters={"rope_type": "default", "rope_theta": 5.0},
    ssm_time_step_limit=[0.0, 0.1],
    attention_dropout=0.5,
    memory_block_size=3,
)


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("field", CHANGES)
def test_a_configuration_that_changed_after_building_is_refused(field, call):
    model = build()
    setattr(model.config, field, CHANGES[field])
    run = model if call == "forward" else lambda ids: model.generate(ids, max_new_tokens=9)
    with pytest.raises(ValueError, match=rf"{field}=.*built with"):
        run(tokens(4))


def test_a_change_in_place_is_noticed_too():
    model = build()
    model.config.layer_types[1] = "full_attention"
    with pytest.raises(ValueError, match="layer_types"):
        model(tokens(4))


def test_changes_that_are_followed_pass():
    model, ids = build(), tokens(9)
    before = output(model, ids)
    model.config.logits_scaling = 2.0
    model.config.max_position_embeddings = 8
    model.config.use_cache = False
    assert_near(output(model, ids), before / 2)
    model.resize_token_embeddings(VOCAB + 3)
    assert output(model, ids).shape[-1] == VOCAB + 3


def test_every_field_is_live_or_built_in():
    names = {field.name for field in fields(BMojoConfig)}
    live = set(fields_with(BMojoConfig, live=True))
    assert names >= live
    assert set(build().model._built) == set(BMojoConfig.__annotations__) - live


# Compiled ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("use_cache", [None, False])
def test_masks_compile_in_one_graph(use_cache):
    """What a mask says is no part of the graph: the same one serves both."""
    torch._dynamo.reset()
    model, ids = build(), tokens(12, 2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for left in (0, 5):
        mask = pads(2, 12, left=left)
        real = mask.bool()
        with torch._dynamo.config.patch(error_on_recompile=left > 0):
            found = output(compiled, ids, attention_mask=mask, use_cache=use_cache)
        assert_near(found[real], output(model, ids, attention_mask=mask)[real], 1e-10)
