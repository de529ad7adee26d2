"""Scores against loops written from their definitions: NLL by position, agreement, passkeys, costs."""

import math
import statistics

import pytest
import torch

from conversion.common.nll import bucket_means, buckets, curve, mean_and_error, read
from conversion.evaluation import cost as scores_cost
from conversion.evaluation.agreement import continue_greedily, equal_prefix, equal_share
from conversion.evaluation.cost import measure_cost
from conversion.evaluation.passkey import NEEDLE, QUESTION, by_distance, make_prompts, score_prompts
from conversion.grafting.families import bmojo_config_for
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.evaluation_sources import CHARACTERS, READER, character_tokenizer
from tests.conversion.graft_sources import randomised, tiny_tokenizer


TOKENIZER = character_tokenizer()
TOKENS = 50


def ids_of(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(1, len(CHARACTERS), (1, tokens), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module", params=["source", "bmojo"])
def model(request) -> torch.nn.Module:
    if request.param == "source":
        return randomised(READER)
    torch.manual_seed(2)
    return BMojoForCausalLM(bmojo_config_for(READER, {"window_size": 8, "eidetic_size": 3})).eval()


@torch.no_grad()
def naive_chances(model, ids) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("chunk", [1, 7, TOKENS - 1, TOKENS, TOKENS + 1, 512])
def test_reading_in_pieces_gives_the_nll_of_every_token(model, chunk):
    ids = ids_of()
    chances = naive_chances(model, ids)
    found = read(model, ids, chunk)
    expected = torch.stack([-chances[i, ids[0, i + 1]] for i in range(TOKENS - 1)])
    torch.testing.assert_close(found.nll, expected, atol=1e-5, rtol=1e-5)
    assert found.predicted.tolist() == [int(chances[i].argmax()) for i in range(TOKENS - 1)]
    assert found.following == int(chances[-1].argmax())
    assert found.cache.get_seq_length() == TOKENS


def test_a_model_that_breaks_is_named():
    broken = randomised(READER)
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite between tokens 0 and 16"):
        read(broken, ids_of(), 16)


@pytest.mark.parametrize("window", [1, 2, 3, 12, 48, 49, 50, 51])
@pytest.mark.parametrize("tokens", [2, 3, 49, 50, 51])
def test_buckets_by_the_length_of_the_context(window, tokens):
    values = torch.arange(tokens - 1, dtype=torch.float32) ** 2
    found = bucket_means(values, window)
    for name, inside in {
        "inside W": lambda c: c <= window,
        "W to 4W": lambda c: window < c <= 4 * window,
        "4W to 16W": lambda c: 4 * window < c <= 16 * window,
        "beyond 16W": lambda c: c > 16 * window,
        "beyond W": lambda c: c > window,
        "second half": lambda c: c > tokens - 1 - tokens // 2,
    }.items():
        members = [values[i].item() for i in range(tokens - 1) if inside(i + 1)]  # token i + 1 has i + 1 before it
        assert (name in found) == bool(members)
        if members:
            assert found[name] == pytest.approx(sum(members) / len(members))
    halves = list(buckets(window, tokens)["second half"])
    assert len(halves) == tokens // 2 and halves[-1] == tokens - 2


def test_mean_and_standard_error_over_texts():
    values = [2.0, 3.5, 2.5, 4.0]
    assert mean_and_error(values) == pytest.approx((3.0, statistics.stdev(values) / 2))
    assert mean_and_error([1.5]) == (1.5, None)


def test_the_curve_averages_every_token_once():
    values = torch.arange(1, 200, dtype=torch.float32)
    points = curve(values)
    assert points[0] == (pytest.approx(math.sqrt(2)), 1.0) and points[-1][0] < 200
    assert [y for _, y in points] == sorted(y for _, y in points)
    flat = curve(torch.full((199,), 2.5))
    assert all(y == 2.5 for _, y in flat)


def test_agreement_by_hand():
    ours, theirs = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([1, 2, 9, 4, 9, 9])
    assert equal_share(ours, theirs, 2)["inside W"] == 1.0
    assert equal_share(ours, theirs, 2)["beyond W"] == pytest.approx(0.25)
    pairs = (([1, 2], [1, 2]), ([1, 2], [1, 3]), ([0, 2], [1, 2]), ([], []))
    assert [equal_prefix(*pair) for pair in pairs] == [2, 1, 0, 0]


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_writing_on_is_greedy_generation(model, steps):
    ids = ids_of(20)
    reading = read(model, ids, 6)
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert continue_greedily(model, reading, steps) == expected[0, 20:].tolist()


TEXT = torch.tensor(TOKENIZER("the quick brown fox jumps over the lazy dog. " * 20)["input_ids"])
LEAST = len(NEEDLE.format(key="12345")) + len(QUESTION) + 2


@pytest.mark.parametrize("length", [LEAST, LEAST + 1, 200, 300])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_prompts_hide_the_key_where_they_say(length, depth):
    prompts = make_prompts(TOKENIZER, TEXT, [length], [depth], 3, 5, seed=1)
    assert len({tuple(prompt.ids[0].tolist()) for prompt in prompts}) == 3, "each trial has a key and a text of its own"
    for prompt in prompts:
        text = TOKENIZER.decode(prompt.ids[0])
        key = text[-5:]
        assert key.isdigit() and text.endswith(QUESTION + " " + key) and text.count(key) == 3
        needle = NEEDLE.format(key=key)
        room = length - len(needle) - len(QUESTION)
        assert text.index(needle) == round(depth * room)
        assert "".join(CHARACTERS[prompt.ids[0, place]] for place in prompt.digits) == key
        assert len(text) == length + len(" ") + 5
        assert prompt.distance == prompt.digits[0] - (text.index(needle) + len(needle))
    again = make_prompts(TOKENIZER, TEXT, [length], [depth], 3, 5, seed=1)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(prompts, again))
    other = make_prompts(TOKENIZER, TEXT, [length], [depth], 3, 5, seed=2)
    assert not any(torch.equal(a.ids, b.ids) for a, b in zip(prompts, other))


@pytest.mark.parametrize("chunk", [7, 33, 512])
def test_scores_of_passkeys_are_those_of_one_forward(model, chunk):
    prompts = make_prompts(TOKENIZER, TEXT, [180, 200], [0.0, 0.9], 1, 4, seed=0)
    for prompt, result in zip(prompts, score_prompts(model, prompts, chunk)):
        chances = naive_chances(model, prompt.ids)
        nll = [-chances[place - 1, prompt.ids[0, place]].item() for place in prompt.digits]
        assert len(nll) == 4
        assert result["nll"] == pytest.approx(sum(nll) / 4, abs=1e-5)
        assert result["found"] is all(int(chances[p - 1].argmax()) == int(prompt.ids[0, p]) for p in prompt.digits)


def test_a_model_that_knows_the_key_finds_it():
    """Every character has one successor here, so a key of these successors is found and another is not."""

    class Successor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(9.0))

        def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
            after = {" ": "1", "1": "2", "2": "3", "3": "4"}
            follows = [CHARACTERS.index(after.get(c, "a")) for c in CHARACTERS]
            logits = self.scale * torch.nn.functional.one_hot(torch.tensor(follows), len(CHARACTERS))[input_ids]
            return type("Out", (), {"logits": logits, "past_key_values": None})

    prompt = make_prompts(TOKENIZER, TEXT, [200], [0.5], 1, 4, seed=0)[0]
    for key, found in (("1234", True), ("1235", False), ("2234", False)):
        ids = prompt.ids.clone()
        ids[0, prompt.digits] = torch.tensor([CHARACTERS.index(c) for c in key])
        assert score_prompts(Successor(), [prompt._replace(ids=ids)], 64)[0]["found"] is found


def test_classes_of_distance_have_no_needle_in_sight():
    results = [{"distance": d, "found": d < 40, "nll": float(d)} for d in (0, 9, 10, 39, 40, 500)]
    classes = by_distance(results, 10)
    assert classes["inside W"] == {"accuracy": 1.0, "nll": 4.5, "prompts": 2}
    assert classes["W to 4W"] == {"accuracy": 1.0, "nll": 24.5, "prompts": 2}
    assert classes["beyond 4W"] == {"accuracy": 0.0, "nll": 270.0, "prompts": 2}
    assert set(by_distance(results[:1], 10)) == {"inside W"}


def test_passkeys_that_cannot_be_hidden_are_refused():
    with pytest.raises(ValueError, match=rf"{LEAST - 1} tokens have no room .* at least {LEAST}"):
        make_prompts(TOKENIZER, TEXT, [LEAST - 1], [0.5], 1, 5, seed=0)
    with pytest.raises(ValueError, match=r"2000 tokens need more text than the 900 tokens"):
        make_prompts(TOKENIZER, TEXT, [2000], [0.5], 1, 5, seed=0)
    with pytest.raises(ValueError, match=r"does not spell '\d+'"):
        make_prompts(tiny_tokenizer(), torch.arange(3, 16).repeat(99), [200], [0.5], 1, 5, seed=0)


def test_costs_count_tokens_and_bytes(model):
    found = measure_cost(model, ids_of(), chunk=20, steps=3, rounds=2)
    assert found["tokens"] == TOKENS and found["prefill"] > 0 and found["decode"] > 0
    cache = read(model, ids_of(TOKENS + 3), 20).cache
    ours = type(cache).__name__ == "BMojoCache"
    assert found["cache_bytes"] == (cache.nbytes if ours else 3 * 2 * 2 * 8 * 4 * (TOKENS + 3))


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_first_pass_is_not_timed(rounds, monkeypatch):
    """A clock that a call of the model moves: by 100 s in the first pass, of 3 pieces and 3 tokens, then by 1 s."""
    reader, calls = randomised(READER), []
    reader.register_forward_hook(lambda *_: calls.append(100.0 if len(calls) < 6 else 1.0))
    monkeypatch.setattr(scores_cost, "_now", lambda device: sum(calls))
    found = measure_cost(reader, ids_of(), chunk=20, steps=3, rounds=rounds)
    assert found["prefill"] == pytest.approx(TOKENS / 3) and found["decode"] == 1.0
    assert len(calls) == 6 * (1 + rounds)
