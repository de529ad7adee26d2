"""attribute and show_passages: votes against their definition, a passage that is known by construction, bad input."""

import copy
import html
import math
import re

import pytest
import torch

from modeling_bmojo import Attribution, BMojoConfig, BMojoForCausalLM, attribute, cache_of, show_passages
from modeling_bmojo.inspect import attribution as module
from tests.modeling.inspect.test_show import TOKENIZER, encode
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB, WINDOW


STORAGE = dict(storage_size=4, eidetic_size=0, fading_mass=True, fading_stride=4)
IDS = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
START = 33


def build(**fields) -> BMojoForCausalLM:
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **fields})).double()).eval()


def read(model, ids, mask=None):
    with torch.no_grad():
        return cache_of(model(ids, attention_mask=mask, use_cache=True))


def same(ours: Attribution, theirs: Attribution) -> None:
    assert (ours.ids, ours.answer, ours.layers) == (theirs.ids, theirs.answer, theirs.layers)
    torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ours.beyond, theirs.beyond, rtol=1e-6, atol=1e-8)
    assert torch.equal(ours.positions, theirs.positions)


# Votes ---------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def votes_by_definition(model, ids, start):
    """Loops over queries and heads, from two readings of the whole text without a cache."""
    drawn = torch.randint(start, (module.NEUTRAL,), generator=torch.Generator().manual_seed(0))
    other = torch.cat([ids[: start - 1], ids[drawn]])
    real, neutral = (model(x[None], output_attentions=True, use_cache=False).attentions for x in (ids, other))
    found = []
    for query in range(start - 1, len(ids) - 1):
        for weights, others in zip(real, neutral):
            for head in range(weights.shape[1]):
                best = (0.0, 0)
                for place in range(module.SINKS, min(start, query - model.config.window_size + 1)):
                    mean = float(others[0, head, start - 1 :, place].sum()) / module.NEUTRAL
                    best = max(best, (float(weights[0, head, query, place]) - mean, -place))
                found.append((best[0], -best[1]))
    return found


@pytest.mark.parametrize("fields", [{}, STORAGE, MIXED_LAYERS], ids=["eidetic", "storage", "mixed"])
def test_votes_are_those_of_the_definition(fields, monkeypatch):
    monkeypatch.setattr(module, "WEIGHT_BYTES", 20_000)  # several pieces
    model = build(**fields)
    found = attribute(model, IDS[:1], START)
    assert (found.row, found.answer, found.window) == (0, range(START, 40), WINDOW)
    assert found.layers == [i for i, kind in enumerate(model.config.layer_types) if kind != "linear_attention"]
    expected = votes_by_definition(model, IDS[0], START)
    assert len(expected) == found.weights.numel()
    for (weight, place), ours, at in zip(
        expected, found.weights.flatten().tolist(), found.positions.flatten().tolist()
    ):
        assert math.isclose(weight, ours, abs_tol=1e-6)
        assert weight < 1e-6 or place == at
    assert float(found.weights.max()) > 0.01


@pytest.mark.parametrize("fields", [{}, STORAGE], ids=["eidetic", "storage"])
@pytest.mark.parametrize("known", [20, START - 1])
def test_a_cache_that_has_read_the_text_gives_the_same(fields, known):
    model = build(**fields)
    cache = read(model, IDS[:, :known])
    before = copy.deepcopy(cache)
    for row in (0, 1, -1):
        ours = attribute(model, IDS, START, cache=cache, row=row)
        assert ours.row == row % 2
        alone = attribute(model, IDS[[row]], START)
        if known == START - 1:
            same(ours._replace(row=0), alone)
        else:  # neutral queries stand elsewhere, everything else does not
            assert torch.equal(ours.beyond.round(decimals=8), alone.beyond.round(decimals=8))
    assert cache.get_seq_length() == known
    for ours, theirs in zip(cache.layers, before.layers):
        assert all(torch.equal(value, theirs.states()[name]) for name, value in ours.states().items())


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_pads_are_never_counted(side, cached):
    model, row = build(**STORAGE), IDS[:1]
    at = {"left": 0, "right": START, "inside": 15}[side]
    padded = torch.cat([row[:, :at], torch.full((1, 6), 7), row[:, at:]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, at : at + 6] = 0
    padded, mask = torch.cat([padded, padded.flip(1)]), torch.cat([mask, torch.ones_like(mask)])
    cache = read(model, padded[:, :30], mask[:, :30]) if cached else None
    ours = attribute(model, padded, START + 6, cache=cache, attention_mask=mask)
    known = 30 - (6 if at < 30 else 0)
    same(ours, attribute(model, row, START, cache=read(model, row[:, :known]) if cached else None))
    assert max(p.last for p in ours.passages(9)) < START


def test_a_mask_may_end_with_the_prompt():
    model, mask = build(), torch.ones(2, START, dtype=torch.int64)
    mask[0, :4] = 0
    whole = torch.cat([mask, torch.ones(2, 40 - START, dtype=torch.int64)], dim=1)
    same(attribute(model, IDS, START, attention_mask=mask), attribute(model, IDS, START, attention_mask=whole))


def test_the_model_stays_as_it_is():
    model = build().train()
    attribute(model, IDS, START)
    assert model.training and not any(parameter.grad is not None for parameter in model.parameters())


# Passages ------------------------------------------------------------------------------------------------------------
def looking_for_itself(**fields) -> BMojoForCausalLM:
    """A model whose tokens attend to tokens that are as they are: queries equal keys, no positions."""
    model = build(num_hidden_layers=1, rope_parameters=None, **fields)
    with torch.no_grad():
        keys = 4 * torch.eye(8, 16, dtype=torch.float64)
        attention = model.model.layers[0].self_attn
        attention.k_proj.weight.copy_(keys)
        attention.q_proj.weight.copy_(keys.view(2, 1, 4, 16).expand(2, 2, 4, 16).reshape(16, 16))
    return model


def test_the_passage_that_an_answer_repeats_comes_first():
    model = looking_for_itself(**{**STORAGE, "storage_size": 16})
    text = torch.randint(0, 50, (1, 200), generator=torch.Generator().manual_seed(2))
    needle = torch.arange(50, 58)[None]
    ids = torch.cat([text[:, :90], needle, text[:, 90:], needle, needle[:, :1]], dim=1)
    found = attribute(model, ids, 209)  # its queries are the needle's tokens but the first
    first, *others = found.passages()
    assert first.first >= 90 and first.last < 98 and first.score > 0.5
    assert first.layers == (0,) and all(passage.layers == () for passage in others)
    alone = [found.passages(1, token=token)[0] for token in range(len(found.answer) - 1)]
    hits = [passage.first >= 90 and passage.last < 98 for passage in alone]
    assert sum(hits) > len(hits) / 2  # four channels a head do not tell all tokens apart
    text = show_passages(found, TOKENIZER).to_text()
    assert text.index("1. ") < text.index("2. ") and f"tokens {first.first} to {first.last}" in text


def made(votes: dict[int, float], ids: list[int], start: int, layers: int = 1) -> Attribution:
    """An answer of one token; vote i is that of layer i % layers."""
    heads = -(-len(votes) // layers)
    positions, weights = torch.zeros(1, layers, heads, dtype=torch.int64), torch.zeros(1, layers, heads)
    for index, (place, weight) in enumerate(votes.items()):
        positions[0, index % layers, index // layers] = place
        weights[0, index % layers, index // layers] = weight
    beyond = torch.full((1, layers), 0.25)
    return Attribution(0, ids, range(start, len(ids)), 4, list(range(layers)), positions, weights, beyond)


def test_near_votes_are_one_passage_and_scores_are_shares():
    found = made({10: 1.0, 13: 2.0, 60: 1.5, 40: 0.5}, [1] * 81, 80, layers=2)
    first, second, third = found.passages()
    assert (first.first, first.last, second.first, third.first) == (10, 13, 60, 40)
    assert [passage.score for passage in (first, second, third)] == pytest.approx([0.6, 0.3, 0.1])
    assert first.votes == pytest.approx((0.2, 0.0, 0.0, 0.4)) and sum(first.votes) == pytest.approx(first.score)
    assert (first.layers, second.layers, third.layers) == ((1,), (0,), ())
    assert found.passages(1) == [first]
    chain = made(dict.fromkeys(range(20, 60, 3), 1.0), [1] * 81, 80)
    (whole,) = chain.passages()
    assert (whole.first, whole.last, whole.score) == (20, 59, pytest.approx(1.0))


def test_text_that_fits_the_window_draws_on_nothing():
    found = attribute(build(window_size=64), IDS, START)
    assert found.passages() == [] and float(found.beyond.sum()) == 0
    view = show_passages(found, TOKENIZER)
    assert "0% of the attention" in view.to_text() and view.empty in view.to_text()
    assert view.empty in view.to_html()


# Pictures ------------------------------------------------------------------------------------------------------------
HOSTILE = 'a <script>alert("x")</script> & \x1b[31m b\n\tc'


def test_html_is_escaped_and_text_steers_no_terminal():
    ids = encode(HOSTILE)
    places = dict.fromkeys(range(0, len(ids), 3), 1.0)
    view = show_passages(made(places, ids + encode("<b>\x1b"), len(ids)), TOKENIZER)
    shown = view._repr_html_()
    assert "<script" not in shown and "<b>" not in shown and "\x1b" not in shown
    body = re.sub(r"<style>.*?</style>|<[^>]+>", "", shown)
    assert html.escape('<script>alert("x")</script> &') in body.replace("·", " ")
    assert "\x1b" not in view.to_text()
    assert "\x1b[31m" not in view.to_ansi()


def test_marks_levels_and_context():
    ids = encode("0123456789" * 4)
    view = show_passages(made({20: 4.0, 21: 1.0, 22: 2.0}, ids, 30), TOKENIZER, around=3)
    (shown,) = view.passages
    assert shown.pieces == [(0, "789"), (4, "0"), (1, "1"), (2, "2"), (0, "345")]
    assert view.to_text().endswith("   789\u27e60\u27e71\u27e62\u27e7345")
    assert "100% of the votes, first of 1 of 1 layers; tokens 20 to 22, 8 before the answer" in view.to_text()
    assert 'class="kept4">0<' in view.to_html() and 'class="kept1">1<' in view.to_html()
    assert "\x1b[48;5;166;38;5;16m0\x1b[0m" in view.to_ansi()
    edge = show_passages(made({2: 1.0, 28: 1.0}, ids, 30), TOKENIZER)
    assert [len("".join(text for _, text in p.pieces)) for p in edge.passages] == [15, 14]  # ends, and the answer, cut


def test_print_has_colours_on_a_terminal_alone(monkeypatch):
    view = show_passages(made({5: 1.0}, encode("0123456789"), 9), TOKENIZER)
    assert str(view) == view.to_text()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert str(view) == view.to_ansi()
    monkeypatch.setenv("NO_COLOR", "1")
    assert repr(view) == view.to_text()


def test_one_token_of_the_answer():
    found = attribute(build(), IDS, START)
    assert show_passages(found, TOKENIZER, token=-1).heading.startswith("token 6 of the answer")


# Bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(start=0), "start=0: must be a column of input_ids with something before it, 1 to 39"),
        (dict(start=40), "start=40"),
        (dict(start=True), "start=True"),
        (dict(row=2), "row=2: input_ids has 2 rows"),
        (dict(input_ids=IDS[0]), r"input_ids: must be a tensor \[batch, tokens\]"),
        (dict(input_ids=IDS.tolist()), "input_ids: must be"),
        (dict(attention_mask=torch.ones(2, 41)), r"attention_mask: \[2, 41\] for input_ids \[2, 40\]"),
        (dict(attention_mask=torch.ones(40)), r"attention_mask: \[40\]"),
        (dict(attention_mask=torch.eye(2, 40)), "start=33: the answer has no real token"),
        (dict(model=torch.nn.Linear(2, 2)), "model=Linear: must be a B'MOJO model"),
    ],
)
def test_bad_arguments_are_named(change, said):
    with pytest.raises(ValueError, match=said):
        attribute(**(dict(model=build(), input_ids=IDS, start=START) | change))


def test_caches_that_do_not_fit_are_refused():
    model = build()
    with pytest.raises(ValueError, match="cache: has read 33 columns, and the answer begins at start=33"):
        attribute(model, IDS, START, cache=read(model, IDS[:, :33]))
    with pytest.raises(ValueError, match="cache: has 1 rows but input_ids 2"):
        attribute(model, IDS, START, cache=read(model, IDS[:1, :20]))
    cache = read(model, IDS[:, :20])
    cache.reset()
    with pytest.raises(ValueError, match="cache: is empty"):
        attribute(model, IDS, START, cache=cache)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="attention_mask: row 0 has 3 pads among the 20 columns"):
        attribute(model, IDS, START, cache=read(model, IDS[:, :20], mask))
    with pytest.raises(ValueError, match="mask"):
        attribute(model, IDS, START, cache=read(model, IDS[:, :20], mask), attention_mask=mask.flip(1))


def test_bad_numbers_of_passages_are_named():
    found = made({5: 1.0}, encode("0123456789"), 9)
    for count in (0, 1.0, True):
        with pytest.raises(ValueError, match=f"count={count!r}: must be an integer of at least 1"):
            found.passages(count)
    with pytest.raises(ValueError, match="token=1: the answer has 1 tokens"):
        found.passages(token=1)
    with pytest.raises(ValueError, match="around=-1: must be an integer of at least 0"):
        show_passages(found, TOKENIZER, around=-1)
