"""What generate() returns in every mode, cached and not: the class, and the shapes of all that can be asked for.

transformers' generation tests ask the same of its own models and are not distributed with it. That modes give the same
text with the memory and without is in test_generate.py; assistants and prompt lookup are in test_rollback.py.
"""

import pytest
import torch
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput, GenerationMixin

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoConfig, BMojoForCausalLM, cache_of
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


PROMPT, NEW, PAD = 11, 6, 0
SETTINGS = {"bmojo": {}, "mixed": MIXED_LAYERS}
MODES = {
    "greedy": dict(do_sample=False),
    "sample": dict(do_sample=True),
    "several samples": dict(do_sample=True, num_return_sequences=3),
    "beams": dict(do_sample=False, num_beams=3, num_return_sequences=2),
    "sampled beams": dict(do_sample=True, num_beams=3, num_return_sequences=2),
}
EVERYTHING = dict(
    return_dict_in_generate=True,
    output_scores=True,
    output_logits=True,
    output_hidden_states=True,
    output_attentions=True,
)


def build(name="bmojo", **fields):
    config = BMojoConfig(**{**SIZES, "pad_token_id": PAD, **SETTINGS[name], **fields})
    return randomize_(BMojoForCausalLM(config)).double().eval()


def tokens(length, batch=2, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model, ids=None, **options):
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": NEW, "suppress_tokens": [PAD], **options})


def assert_near(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_returned(name, mode, use_cache):
    model, ids, options = build(name), tokens(PROMPT), MODES[mode]
    plain = generate(model, ids, use_cache=use_cache, **options)
    result = generate(model, ids, use_cache=use_cache, **options, **EVERYTHING)
    returned, beams = options.get("num_return_sequences", 1), options.get("num_beams", 1)
    rows = 2 * (beams if beams > 1 else returned)
    assert type(result) is (GenerateBeamDecoderOnlyOutput if beams > 1 else GenerateDecoderOnlyOutput)
    assert torch.equal(result.sequences, plain) and plain.shape == (2 * returned, PROMPT + NEW)
    assert torch.equal(plain[:, :PROMPT], ids.repeat_interleave(returned, dim=0))
    for given in (result.scores, result.logits):
        assert [tuple(step.shape) for step in given] == [(rows, VOCAB)] * NEW
    if beams > 1:
        assert result.sequences_scores.shape == (2 * returned,) and result.beam_indices.shape[0] == 2 * returned
    cache = cache_of(result)
    assert cache is None if not use_cache else type(cache) is BMojoCache
    assert not use_cache or (cache.batch_size, cache.get_seq_length()) == (rows, PROMPT + NEW - 1)
    layers = model.config.num_hidden_layers
    attending = sum(kind != "linear_attention" for kind in model.config.layer_types)
    assert len(result.hidden_states) == len(result.attentions) == NEW
    for step, (hidden, weights) in enumerate(zip(result.hidden_states, result.attentions, strict=True)):
        seen = PROMPT + step
        new = 1 if use_cache and step else seen
        assert [tuple(each.shape) for each in hidden] == [(rows, new, 16)] * (layers + 1)
        assert [tuple(layer.shape) for layer in weights] == [(rows, 4, new, seen)] * attending
        for layer in weights:
            assert_near(layer.sum(-1), torch.ones(rows, 4, new, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@pytest.mark.parametrize("name", SETTINGS)
def test_both_attention_implementations_generate_the_same(name, mode):
    model, ids, found = build(name), tokens(PROMPT), []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        options = dict(return_dict_in_generate=True, output_scores=True)
        found.append(generate(model, ids, max_new_tokens=25, **MODES[mode], **options))
    eager, sdpa = found
    assert torch.equal(eager.sequences, sdpa.sequences)
    assert_near(torch.stack(eager.scores).exp(), torch.stack(sdpa.scores).exp())


@pytest.mark.parametrize("padded", [False, True])
def test_positions_that_are_passed_are_those_that_are_counted(padded):
    model, ids = build("mixed"), tokens(PROMPT)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    counted = model(ids, attention_mask=mask).logits
    passed = model(ids, attention_mask=mask, position_ids=positions).logits
    assert_near(passed, counted)
    expected = generate(model, ids, attention_mask=mask, do_sample=False)
    assert torch.equal(generate(model, ids, attention_mask=mask, position_ids=positions, do_sample=False), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_random_embeddings_as_prompt(name):
    """Other embeddings give other scores, the same ones the same; generate() returns the new tokens alone."""
    model = build(name)
    embeds = torch.randn(2, PROMPT, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = dict(do_sample=False, return_dict_in_generate=True, output_scores=True)
    first, again, other = (
        generate(model, inputs_embeds=each, **options) for each in (embeds, embeds.clone(), embeds.roll(1, dims=1))
    )
    assert first.sequences.shape == (2, NEW) and torch.equal(first.sequences, again.sequences)
    assert not torch.allclose(first.scores[0], other.scores[0])
    uncached = generate(model, inputs_embeds=embeds, use_cache=False, **options)
    assert torch.equal(uncached.sequences, first.sequences)
    assert_near(torch.stack(uncached.scores).exp(), torch.stack(first.scores).exp())


@pytest.mark.parametrize("name", SETTINGS)
def test_going_on_from_embeddings(name):
    """A cache that read embeddings is gone on from by tokens, as one that read the tokens."""
    model, ids = build(name), tokens(PROMPT)
    whole = generate(model, ids, max_new_tokens=2 * NEW, do_sample=False)
    embeds = model.get_input_embeddings()(ids)
    options = dict(do_sample=False, return_dict_in_generate=True)
    first = generate(model, inputs_embeds=embeds, **options)
    text = torch.cat([ids, first.sequences], dim=1)
    rest = generate(model, text, **{CACHE_NAME: cache_of(first)}, **options)
    assert torch.equal(rest.sequences, whole)


@pytest.mark.parametrize("name", SETTINGS)
def test_going_on_in_two_calls_gives_the_scores_of_one(name):
    model, ids = build(name), tokens(PROMPT)
    options = dict(do_sample=False, **EVERYTHING)
    whole = generate(model, ids, max_new_tokens=2 * NEW, **options)
    first = generate(model, ids, **options)
    rest = generate(model, first.sequences, **{CACHE_NAME: cache_of(first)}, **options)
    assert torch.equal(rest.sequences, whole.sequences)
    assert_near(torch.stack([*first.scores, *rest.scores]).exp(), torch.stack(whole.scores).exp())
    for step, wanted in zip(rest.attentions, whole.attentions[NEW:], strict=True):
        for layer, expected in zip(step, wanted, strict=True):
            assert_near(layer, expected)


def test_generate_is_transformers_own():
    assert issubclass(BMojoForCausalLM, GenerationMixin) and BMojoForCausalLM.can_generate()
    model = build()
    inputs = model.prepare_inputs_for_generation(tokens(4), unknown_to_it="goes on")
    assert inputs["unknown_to_it"] == "goes on"


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_only_the_last_logits_are_formed(mode):
    """generate() asks for one column of logits; with all of them it chooses the same."""
    model, ids = build("mixed"), tokens(PROMPT)
    expected = generate(model, ids, **MODES[mode])
    widths, head = [], model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    assert torch.equal(generate(model, ids, **MODES[mode]), expected)
    head.remove()
    assert set(widths) == {1}
    assert torch.equal(generate(model, ids, logits_to_keep=0, **MODES[mode]), expected)
