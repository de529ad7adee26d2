"""generate() and the causal language model's outputs: every decoding mode with the memory equals the one without it.

Without a cache every step reads the whole text anew, so equality far beyond the window tests memory, admission and
expiry at once. Padded prompts are in test_padding.py, the cache's own operations in test_cache.py.
"""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline
from transformers.generation.streamers import BaseStreamer

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, SLOTS, VOCAB, WINDOW


PAD = 0
BASE = {**SIZES, "pad_token_id": PAD}
SETTINGS = {
    "output": {},
    "state-decay": dict(innovation="state", eidetic_decay=0.05, tie_fading_projections=False, fading_size=7),
    "stride": dict(window_size=6, fading_size=2, fading_stride=3),
    "answers": dict(innovation="key", fading_delay=0),
    "mixed-layers": MIXED_LAYERS,
}


def build(name="output", dtype=torch.float64, **fields):
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**BASE, **SETTINGS[name], **fields}))).to(dtype).eval()


def tokens(length, batch=2, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids=None, seed=0, **kwargs):
    """generate() with everything it can report; greedy unless told otherwise."""
    torch.manual_seed(seed)
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return model.generate(ids, **{**options, **kwargs})


def assert_near(actual, expected, tolerance=1e-9):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def assert_same_generation(actual, expected):
    assert torch.equal(actual.sequences, expected.sequences)
    assert_near(torch.stack(actual.logits), torch.stack(expected.logits))


# Modes ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_with_cache_equals_without(name):
    model, ids = build(name), tokens(9)
    result = generate(model, ids, max_new_tokens=45)
    assert_same_generation(result, generate(model, ids, max_new_tokens=45, use_cache=False))
    # The premise: far beyond the window, and what was let go matters.
    assert result.past_key_values.get_seq_length() == 9 + 44 > 5 * (WINDOW + SLOTS)
    last = model(input_ids=result.sequences[:, -1 - WINDOW : -1]).logits[:, -1]
    assert (last - result.logits[-1]).abs().max() > 1e-3


SAMPLING = {
    "plain": {},
    "top-k": dict(top_k=5, temperature=0.7),
    "top-p": dict(top_p=0.8, temperature=1.3),
    "repetition": dict(repetition_penalty=1.3),
}


@pytest.mark.parametrize("mode", SAMPLING)
def test_sampling_is_reproducible_and_equals_sampling_without_cache(mode):
    model, ids = build("state-decay"), tokens(9)
    options = dict(do_sample=True, max_new_tokens=30, **SAMPLING[mode])
    result = generate(model, ids, seed=3, **options)
    assert_same_generation(generate(model, ids, seed=3, **options), result)
    assert_same_generation(generate(model, ids, seed=3, use_cache=False, **options), result)
    assert not torch.equal(generate(model, ids, seed=4, **options).sequences, result.sequences)


BEAMS = {
    "two beams": dict(num_beams=2),
    "four beams, four sequences": dict(num_beams=4, num_return_sequences=4),
    "five beams, three sequences, a length penalty": dict(
        num_beams=5, num_return_sequences=3, length_penalty=0.3, early_stopping=True, eos_token_id=[7, 19]
    ),
    "sampled beams": dict(num_beams=3, num_return_sequences=2, do_sample=True),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mode", BEAMS)
def test_beam_search_with_cache_equals_without(name, mode):
    model, ids = build(name), tokens(9)
    options = dict(max_new_tokens=20, output_logits=False, output_scores=True, **BEAMS[mode])
    result = generate(model, ids, **options)
    expected = generate(model, ids, use_cache=False, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.beam_indices, expected.beam_indices)
    assert_near(result.sequences_scores, expected.sequences_scores)
    assert_near(torch.stack(result.scores).exp(), torch.stack(expected.scores).exp())
    # The premise: beams change places, so that the cache must be reordered.
    used = result.beam_indices[result.beam_indices >= 0]
    assert len(used.unique()) > 2


def test_beam_search_of_left_padded_prompts_equals_each_alone():
    model = build("mixed-layers")
    prompts = [tokens(length, 1, seed=length) for length in (17, 9, 2)]
    ids, mask = torch.full((3, 17), PAD), torch.zeros(3, 17, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 17 - prompt.shape[1] :], mask[row, 17 - prompt.shape[1] :] = prompt[0], 1
    options = dict(num_beams=3, num_return_sequences=2, output_logits=False, output_scores=True)
    result = generate(model, ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        own, part = generate(model, prompt, **options), slice(2 * row, 2 * row + 2)
        assert torch.equal(result.sequences[part, 17:], own.sequences[:, prompt.shape[1] :])
        assert_near(result.sequences_scores[part], own.sequences_scores)


def test_several_sequences_of_one_prompt():
    model, ids = build(), tokens(9, batch=1)
    options = dict(do_sample=True, num_return_sequences=3, max_new_tokens=20)
    result = generate(model, ids, **options)
    assert result.sequences.shape == (3, 29) and result.past_key_values.batch_size == 3
    assert len({tuple(row.tolist()) for row in result.sequences}) == 3
    assert_same_generation(generate(model, ids, use_cache=False, **options), result)


def test_guidance_keeps_a_second_memory():
    """Classifier-free guidance runs the model on another text with a cache of its own."""
    model, ids = build("mixed-layers"), tokens(14)
    options = dict(guidance_scale=1.7, negative_prompt_ids=tokens(6, seed=1), output_logits=False, output_scores=True)
    result, expected = generate(model, ids, **options), generate(model, ids, use_cache=False, **options)
    assert torch.equal(result.sequences, expected.sequences)
    assert_near(torch.stack(result.scores), torch.stack(expected.scores))
    assert not torch.equal(result.sequences, generate(model, ids).sequences)


class Collector(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("do_sample", [False, True])
def test_streaming_yields_the_ids_one_by_one(do_sample):
    model, ids, streamer = build(), tokens(9, batch=1), Collector()
    expected = generate(model, ids, do_sample=do_sample).sequences[0].tolist()
    generate(model, ids, do_sample=do_sample, streamer=streamer)
    assert streamer.ended and streamer.pieces[0] == ids[0].tolist()
    assert [len(piece) for piece in streamer.pieces[1:]] == [1] * 12
    assert [token for piece in streamer.pieces for token in piece] == expected


def test_rows_that_end_early_do_not_disturb_the_others():
    model, ids = build(), tokens(9, batch=3)
    free = generate(model, ids, max_new_tokens=20).sequences
    stop = free[0, 9 + 4].item()  # the fifth new token of row 0 ends a row
    result = generate(model, ids, max_new_tokens=20, eos_token_id=stop).sequences
    lengths = []
    for row in range(3):
        own = generate(model, ids[row : row + 1], max_new_tokens=20, eos_token_id=stop).sequences[0]
        lengths.append(len(own))
        assert result[row, : len(own)].tolist() == own.tolist()
        assert (result[row, len(own) :] == PAD).all()
    assert min(lengths) < max(lengths) == result.shape[1]


# The cache across calls ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SETTINGS)
def test_a_chat_on_one_cache_equals_the_whole_conversation(name):
    model = build(name)
    cache, conversation = BMojoCache(model.config), tokens(0)
    for turn, (asked, answered) in enumerate([(9, 6), (1, 3), (23, 10), (4, 2)]):
        conversation = torch.cat([conversation, tokens(asked, seed=turn)], dim=1)
        # A mask, because an answer may hold the pad's id, which generate() would otherwise take for padding.
        options = dict(max_new_tokens=answered, attention_mask=torch.ones_like(conversation))
        result = generate(model, conversation, past_key_values=cache, **options)
        assert result.past_key_values is cache
        assert_same_generation(result, generate(model, conversation, **options))
        conversation = result.sequences
        assert cache.get_seq_length() == conversation.shape[1] - 1  # the last new token is not read yet


def test_only_the_new_tokens_may_be_passed_with_the_whole_mask():
    model, ids = build("mixed-layers"), tokens(30)
    expected = generate(model, ids)
    cache = model(input_ids=ids[:, :22]).past_key_values
    result = generate(model, ids[:, 22:], attention_mask=torch.ones_like(ids), past_key_values=cache)
    assert torch.equal(result.sequences[:, 8:], expected.sequences[:, 30:])
    assert_near(torch.stack(result.logits), torch.stack(expected.logits))


def test_a_prompt_that_was_read_to_its_end_is_refused():
    """There is no token left whose logits could be continued, and reading the prompt twice would be silently wrong."""
    model, ids = build(), tokens(20)
    cache = model(input_ids=ids).past_key_values
    with pytest.raises(ValueError, match=r"20.*cache|cache.*20"):
        generate(model, ids, past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_beams_on_a_document_that_was_read_once():
    model, ids = build("mixed-layers"), tokens(30)
    options = dict(num_beams=3, output_logits=False)
    cache = model(input_ids=ids[:, :25]).past_key_values
    with pytest.raises(ValueError, match=r"batch size 2 but the input has 6 rows; .*batch_repeat_interleave"):
        generate(model, ids, past_key_values=cache, **options)
    cache.batch_repeat_interleave(3)
    result = generate(model, ids, past_key_values=cache, **options)
    assert torch.equal(result.sequences, generate(model, ids, **options).sequences)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [1, 4, 13, 100])
def test_prefill_in_chunks(name, size):
    model, ids = build(name), tokens(27)
    result, expected = generate(model, ids, prefill_chunk_size=size), generate(model, ids)
    assert_same_generation(result, expected)
    for layer, other in zip(result.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert layer.columns == other.columns == 27 + 11
        if "ssm" in layer.states():
            assert_near(layer.ssm, other.ssm)


def test_embeddings_as_prompt():
    model, ids = build("mixed-layers"), tokens(20)
    expected = generate(model, ids)
    embeds = model.get_input_embeddings()(ids)
    result = generate(model, inputs_embeds=embeds)
    assert torch.equal(result.sequences, expected.sequences[:, 20:])
    assert_near(torch.stack(result.logits), torch.stack(expected.logits))
    assert_same_generation(generate(model, ids, inputs_embeds=embeds), expected)
    beams = generate(model, inputs_embeds=embeds, num_beams=3, output_logits=False).sequences
    assert torch.equal(beams, generate(model, ids, num_beams=3, output_logits=False).sequences[:, 20:])


def test_the_returned_cache():
    model, ids = build(), tokens(9)
    result = generate(model, ids)
    assert type(result.past_key_values) is BMojoCache
    assert result.past_key_values.get_seq_length() == 9 + 11
    goes_on = model(input_ids=result.sequences[:, -1:], past_key_values=result.past_key_values).logits[:, -1]
    assert_near(goes_on, model(input_ids=result.sequences).logits[:, -1])
    assert generate(model, ids, use_cache=False).past_key_values is None
    assert generate(model, ids, num_beams=3).past_key_values.batch_size == 6


# Outputs -------------------------------------------------------------------------------------------------------------
def test_attentions_and_hidden_states_of_generate():
    model, ids = build("mixed-layers"), tokens(9)
    model.set_attn_implementation("eager")
    result = generate(model, ids, max_new_tokens=6, output_attentions=True, output_hidden_states=True)
    assert len(result.attentions) == len(result.hidden_states) == 6
    for step, (weights, hidden) in enumerate(zip(result.attentions, result.hidden_states, strict=True)):
        new, seen = (9, 9) if step == 0 else (1, 9 + step)
        assert [tuple(layer.shape) for layer in hidden] == [(2, new, 16)] * 5
        shapes = [None if layer is None else tuple(layer.shape) for layer in weights]
        assert [shape for shape in shapes if shape] == [(2, 4, new, seen)] * 3  # the SSM layer has none
        for layer in weights:
            if layer is not None:
                assert_near(layer.sum(-1), torch.ones(2, 4, new, dtype=torch.float64))


@pytest.mark.parametrize("use_cache", [True, False])
def test_attentions_and_hidden_states_of_a_forward(use_cache):
    model, ids = build(), tokens(30)
    model.set_attn_implementation("eager")
    out = model(input_ids=ids, output_attentions=True, output_hidden_states=True, use_cache=use_cache)
    plain = model(input_ids=ids, use_cache=use_cache)
    assert plain.attentions is None and plain.hidden_states is None
    assert torch.equal(plain.logits, out.logits)
    assert [tuple(layer.shape) for layer in out.attentions] == [(2, 4, 30, 30)] * 2
    assert [tuple(layer.shape) for layer in out.hidden_states] == [(2, 30, 16)] * 3
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert_near(model.lm_head(out.hidden_states[-1]), out.logits)  # the last one is after the final norm
    for weights in out.attentions:
        assert (weights.triu(1) == 0).all() and (weights >= 0).all()


def test_attention_weights_do_not_depend_on_the_implementation():
    model, ids = build("mixed-layers"), tokens(30)
    found = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        found[implementation] = model(input_ids=ids, output_attentions=True)
    assert_near(found["sdpa"].logits, found["eager"].logits, 1e-12)
    for actual, expected in zip(found["sdpa"].attentions, found["eager"].attentions, strict=True):
        assert (actual is None) is (expected is None)
        if expected is not None:
            assert_near(actual, expected, 1e-12)


@pytest.mark.parametrize("length", [4, WINDOW])
def test_gradients_of_attention_weights_inside_the_window(length):
    """The output comes from the weights that are returned: d loss / d weight = d loss / d mixed values . value."""
    model, ids = build().train(), tokens(length)
    values, mixed = [], []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out))
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: mixed.append(args[0]))
    out = model(input_ids=ids, output_attentions=True)
    values = [value for value in values if value.shape[1] == length][:: len(values) // 2]  # without fading tokens
    for each in (*out.attentions, *mixed):
        each.retain_grad()
    out.logits.square().sum().backward()
    for weights, value, taken in zip(out.attentions, values, mixed, strict=True):
        value = value.unflatten(-1, (2, 4)).repeat_interleave(2, dim=2)  # [B, T, H, D]
        expected = torch.einsum("bthd,bshd->bhts", taken.grad.unflatten(-1, (4, 4)), value)
        assert expected.tril().abs().max() > 0
        assert_near(weights.grad.tril(), expected.tril())


def test_return_dict():
    model, ids = build(), tokens(9)
    as_dict, as_tuple = model(input_ids=ids), model(input_ids=ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], as_dict.logits)
    assert type(as_tuple[1]) is BMojoCache and as_dict.loss is None


def test_logits_to_keep():
    model, ids = build(), tokens(30)
    full = model(input_ids=ids).logits
    assert full.shape == (2, 30, VOCAB)
    for keep in (1, 7, 30):
        kept = model(input_ids=ids, logits_to_keep=keep).logits
        assert kept.shape == (2, keep, VOCAB)
        assert_near(kept, full[:, -keep:], 1e-12)
    assert torch.equal(model(input_ids=ids, logits_to_keep=0).logits, full)
    chosen = torch.tensor([3, 29, 0])
    assert_near(model(input_ids=ids, logits_to_keep=chosen).logits, full[:, chosen], 1e-12)
    by_row = torch.tensor([[3, 29, 0], [8, 8, 1]])
    expected = torch.stack([full[row, columns] for row, columns in enumerate(by_row)])
    assert_near(model(input_ids=ids, logits_to_keep=by_row).logits, expected, 1e-12)
    mask = torch.rand(2, 30) < 0.3
    assert_near(model(input_ids=ids, logits_to_keep=mask).logits, full[mask], 1e-12)


# The loss ------------------------------------------------------------------------------------------------------------
def cross_entropy(logits, labels):
    """Mean over labels that are not -100 of -log softmax(logits)[label], label t being predicted at t - 1."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[row, t] != -100:
                scores = logits[row, t - 1].double()
                total += (torch.log(torch.exp(scores).sum()) - scores[labels[row, t]]).item()
                count += 1
    return total / count


def test_the_loss_is_next_token_cross_entropy():
    model, ids = build(), tokens(30)
    out = model(input_ids=ids, labels=ids)
    assert out.loss.item() == pytest.approx(cross_entropy(out.logits, ids), rel=1e-6)
    assert out.loss.item() != pytest.approx(cross_entropy(out.logits, ids.roll(1, dims=1)), rel=1e-3)
    ignored = ids.clone()
    ignored[0, :13] = ignored[1, 20:] = -100
    part = model(input_ids=ids, labels=ignored)
    assert torch.equal(part.logits, out.logits)
    assert part.loss.item() == pytest.approx(cross_entropy(out.logits, ignored), rel=1e-6)
    assert part.loss.item() != pytest.approx(out.loss.item(), rel=1e-4)
    # A trainer that accumulates steps divides by the number of tokens of all of them.
    shared = model(input_ids=ids, labels=ids, num_items_in_batch=116)
    assert shared.loss.item() == pytest.approx(out.loss.item() * 58 / 116, rel=1e-6)


def test_gradient_checkpointing_of_a_padded_batch():
    model, ids = build("mixed-layers").train(), tokens(30, batch=3)
    mask = (torch.arange(30) >= torch.tensor([0, 11, 26])[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)

    def gradients():
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    actual = gradients()
    assert expected.keys() == actual.keys() and all(value.abs().max() > 0 for value in expected.values())
    for name, value in expected.items():
        assert_near(actual[name], value, 1e-12)


# Refusals ------------------------------------------------------------------------------------------------------------
REFUSED_MODES = {
    "contrastive search": (dict(penalty_alpha=0.6, top_k=4), r"penalty_alpha=0\.6: "),
    "static": (dict(cache_implementation="static"), r"cache_implementation='static': "),
    "offloaded": (dict(cache_implementation="offloaded"), r"cache_implementation='offloaded': "),
    "offloaded_static": (dict(cache_implementation="offloaded_static"), r"cache_implementation='offloaded_static': "),
    "quantized": (dict(cache_implementation="quantized"), r"cache_implementation='quantized': "),
    "early exit": (dict(assistant_early_exit=1), r"assistant_early_exit=1: "),
}


@pytest.mark.parametrize("asked_by", ["argument", "config argument", "the model's own config"])
@pytest.mark.parametrize("mode", REFUSED_MODES)
def test_modes_the_memory_forbids_are_refused(mode, asked_by):
    fields, message = REFUSED_MODES[mode]
    model, ids = build(), tokens(9, batch=1)
    with pytest.raises(ValueError, match=message):
        if asked_by == "argument":
            model.generate(ids, max_new_tokens=2, **fields)
        elif asked_by == "config argument":
            model.generate(ids, generation_config=GenerationConfig(max_new_tokens=2, **fields))
        else:
            model.generation_config.update(**fields)
            model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize(
    "fields", [dict(cache_implementation="dynamic"), dict(penalty_alpha=0.0), dict(top_k=4)], ids=str
)
def test_harmless_settings_pass(fields):
    model, ids = build(), tokens(9)
    assert_same_generation(generate(model, ids, **fields), generate(model, ids))


BAD_PROMPTS = {
    "empty": (dict(inputs=torch.zeros(1, 0, dtype=torch.long)), r"input_ids of shape \[1, 0\]: .*bos"),
    "no rows": (dict(inputs=torch.zeros(0, 4, dtype=torch.long)), r"\[0, 4\]"),
    "nothing": ({}, "bos_token_id"),
    "id beyond the vocabulary": (dict(inputs=torch.tensor([[1, VOCAB]])), r"input_ids holds 61: .*vocab_size=61"),
    "negative id": (dict(inputs=torch.tensor([[1, -1]])), r"input_ids holds -1: .*vocab_size=61"),
    "a row of pads": (
        dict(inputs=tokens(4), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])),
        r"attention_mask\[1\] is all zeros",
    ),
    "mask too short": (
        dict(inputs=tokens(4), attention_mask=torch.tensor([[0, 1, 1]] * 2)),
        r"attention_mask.*\[2, 3\]",
    ),
    "mask too long": (
        dict(inputs=tokens(4), attention_mask=torch.tensor([[0, 1, 1, 1, 1]] * 2)),
        r"attention_mask.*\[2, 5\]",
    ),
    "mask too short, no pads": (dict(inputs=tokens(4), attention_mask=torch.ones(2, 3)), r"attention_mask.*\[2, 3\]"),
    "mask too long, no pads": (dict(inputs=tokens(4), attention_mask=torch.ones(2, 5)), r"attention_mask.*\[2, 5\]"),
    "mask of other rows": (
        dict(inputs=tokens(4), attention_mask=torch.tensor([[0, 1, 1, 1]])),
        r"attention_mask.*\[1, 4\]",
    ),
    "mask of other rows, no pads": (
        dict(inputs=tokens(4), attention_mask=torch.ones(1, 4)),
        r"attention_mask.*\[1, 4\]",
    ),
    "4-D mask": (dict(inputs=tokens(4), attention_mask=torch.ones(2, 1, 4, 4)), "attention_mask.*2-D"),
    "unknown argument": (dict(inputs=tokens(4), windw=3), "windw"),
}


@pytest.mark.parametrize("bad", BAD_PROMPTS)
def test_bad_prompts_are_refused(bad):
    arguments, message = BAD_PROMPTS[bad]
    with pytest.raises(ValueError, match=message):
        build().generate(**{"max_new_tokens": 2, **arguments})


BAD_INPUTS = {
    "empty": (dict(input_ids=torch.zeros(2, 0, dtype=torch.long)), r"input_ids of shape \[2, 0\]: "),
    "one dimension": (dict(input_ids=tokens(4)[0]), r"input_ids of shape \[4\]: must be \[batch, tokens\]"),
    "neither": ({}, "input_ids, inputs_embeds: exactly one"),
    "both": (dict(input_ids=tokens(4), inputs_embeds=torch.zeros(2, 4, 16)), "input_ids, inputs_embeds: exactly one"),
    "flat embeddings": (dict(inputs_embeds=torch.zeros(4, 16)), r"inputs_embeds of shape \[4, 16\]: "),
    "embeddings of another size": (
        dict(inputs_embeds=torch.zeros(2, 4, 15).double()),
        r"inputs_embeds.*\[2, 4, 15\].*16",
    ),
    "id beyond the vocabulary": (dict(input_ids=torch.tensor([[VOCAB + 3]])), r"input_ids holds 64: .*vocab_size=61"),
    "negative id": (dict(input_ids=torch.tensor([[3, -100]])), r"input_ids holds -100: "),
    "4-D mask": (
        dict(input_ids=tokens(4), attention_mask=torch.ones(2, 1, 4, 4)),
        r"attention_mask is a Tensor of shape \[2, 1, 4, 4\]",
    ),
    "dict of masks": (dict(input_ids=tokens(4), attention_mask={"full_attention": None}), "attention_mask is a dict"),
    "mask too long": (
        dict(input_ids=tokens(4), attention_mask=torch.ones(2, 5)),
        r"attention_mask of shape \[2, 5\]: must be \[2, 4\]",
    ),
    "mask of other rows": (
        dict(input_ids=tokens(4), attention_mask=torch.ones(1, 4)),
        r"attention_mask of shape \[1, 4\]",
    ),
    "positions of another length": (
        dict(input_ids=tokens(4), position_ids=torch.arange(3)[None]),
        r"position_ids.*\[1, 3\]",
    ),
    "seq_idx of another length": (dict(input_ids=tokens(4), seq_idx=torch.zeros(2, 3)), r"seq_idx.*\[2, 3\]"),
}


@pytest.mark.parametrize("bad", BAD_INPUTS)
def test_bad_inputs_are_refused(bad):
    arguments, message = BAD_INPUTS[bad]
    with pytest.raises(ValueError, match=message):
        build()(**arguments)


# Through a pipeline --------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, **{f"w{i}": i for i in range(1, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="left")


def test_the_text_generation_pipeline(tokenizer):
    model = build("mixed-layers")
    prompts = [tokenizer.decode(tokens(length, 1, seed=length)[0]) for length in (17, 3, 30)]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=3)
    options = dict(max_new_tokens=9, suppress_tokens=[PAD])  # the pipeline leaves special tokens out of its text
    results = generator(prompts, do_sample=False, return_full_text=False, **options)
    for prompt, result in zip(prompts, results, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = tokenizer.decode(generate(model, ids, **options).sequences[0, ids.shape[1] :])
        assert result[0]["generated_text"].split() == expected.split()
        assert len(expected.split()) == 9


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2)], ids=str)
def test_a_cache_of_every_beam_takes_the_mask_of_the_prompt(options):
    """transformers repeats prompt and mask for each beam; a cache that its owner has repeated fits both."""
    model, ids = build("output"), tokens(40)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    cache = BMojoCache(model.config)
    model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, past_key_values=cache, **options
    )
    assert torch.equal(found, plain)
    with pytest.raises(ValueError, match="attention_mask"):
        cache = BMojoCache(model.config)
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        model.generate(ids, attention_mask=mask.flip(0), max_new_tokens=6, past_key_values=cache, **options)
