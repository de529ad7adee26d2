"""Attention over several key sets against one softmax per query over the keys whose span contains it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo.attention_ops import KeySet, banded, block_attention, causal_attention, gathered
from tests.oracles import attend


EXACT = dict(rtol=1e-10, atol=1e-10)
GROUPS, HEADS, DIM = 2, 4, 6
SCALING = DIM**-0.5


def generator(seed):
    return torch.Generator().manual_seed(seed)


def key_set(rng, batch, begin, end, first):
    """Random keys and values for the spans `begin`, `end` [S] of coordinates, the same in every row."""
    keys, values = torch.randn(2, batch, len(begin), GROUPS, DIM, generator=rng, dtype=torch.float64)
    spans = [torch.as_tensor(side, dtype=torch.int64).expand(batch, -1) for side in (begin, end)]
    position = (torch.arange(len(begin)) + first).expand(batch, -1)
    return KeySet(keys, values, *spans, position, first)


def three_sets(rng, tokens, window, slots, fading, past, block, batch=2):
    """[eidetic | fading | local] with random expiries: (offers, list of (key set, visible [blocks or None, S]))."""
    blocks = -(-tokens // block)
    past = max(past, window + 1 - tokens)  # fewer tokens need no blocks: the model attends plainly
    coordinate = torch.arange(-past, tokens)
    local_end = coordinate + torch.randint(1, window + 1, coordinate.shape, generator=rng)
    local_end[coordinate >= 0] = torch.maximum(local_end, coordinate + 1)[coordinate >= 0]
    local = key_set(rng, batch, coordinate, local_end, -past)
    faded = key_set(rng, batch, coordinate + window, coordinate + window + fading, -past)
    stored = 2 * slots + 1
    eidetic_end = torch.randint(0, tokens + 1, (stored,), generator=rng)
    eidetic = key_set(rng, batch, torch.full((stored,), -past), eidetic_end, -past - stored)
    index = torch.stack([torch.randperm(stored, generator=rng)[:slots] for _ in range(blocks)])
    index = index.masked_fill(torch.rand(index.shape, generator=rng) < 0.3, -1)
    offers = [
        gathered(eidetic, index.expand(batch, -1, -1)),
        banded(faded, -(window + fading - 1), -window, blocks, block),
        banded(local, -(window - 1), 0, blocks, block),
    ]
    return offers, [(eidetic, index), (faded, None), (local, None)]


def one_by_one(query, sets, block):
    """The definition: per row and query one softmax over the keys with begin <= t < end that its block is offered."""
    rows = []
    for row in range(query.shape[0]):
        outputs = []
        for t in range(query.shape[1]):
            keys, values = [], []
            for members, index in sets:
                chosen = range(members.keys.shape[1]) if index is None else index[t // block].tolist()
                for i in chosen:
                    if i >= 0 and members.begin[row, i] <= t < members.end[row, i]:
                        keys.append(members.keys[row, i])
                        values.append(members.values[row, i])
            outputs.append(attend(query[row, t], keys, values))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 24),
    window=st.integers(1, 7),
    slots=st.integers(0, 4),
    fading=st.integers(1, 8),
    past=st.integers(0, 9),
    block=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_block_attention_is_one_softmax_over_what_is_visible(
    implementation, tokens, window, slots, fading, past, block, seed
):
    rng = generator(seed)
    offers, sets = three_sets(rng, tokens, window, slots, fading, past, block)
    query = torch.randn(2, tokens, HEADS, DIM, generator=rng, dtype=torch.float64)
    actual, weights = block_attention(query, offers, block, SCALING, implementation=implementation)
    assert weights is None
    torch.testing.assert_close(actual, one_by_one(query, sets, block), **EXACT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("block", [4, 16, 64])
def test_gradients_equal_those_of_the_definition(implementation, block):
    """T = 13 leaves a partly filled block, whose empty queries see nothing: they must not turn gradients into NaN."""
    rng = generator(1)
    offers_of = three_sets(rng, 13, 3, 2, 2, 5, block, batch=1)[1]
    query = torch.randn(1, 13, HEADS, DIM, generator=rng, dtype=torch.float64, requires_grad=True)
    leaves = [query]
    sets = []
    for members, index in offers_of:
        keys, values = members.keys.clone().requires_grad_(), members.values.clone().requires_grad_()
        sets.append((members._replace(keys=keys, values=values), index))
        leaves += [keys, values]
    (eidetic, index), (faded, _), (local, _) = sets
    blocks = -(-13 // block)
    offers = [
        gathered(eidetic, index[None]),
        banded(faded, -4, -3, blocks, block),
        banded(local, -2, 0, blocks, block),
    ]
    out, _ = block_attention(query, offers, block, SCALING, implementation=implementation)
    direction = torch.randn(out.shape, generator=rng, dtype=torch.float64)
    definition = one_by_one(query, sets, block)
    # A stored token that no block is offered has no gradient at all in the definition: zeros.
    actual, expected = (
        torch.autograd.grad((result * direction).sum(), leaves, materialize_grads=True) for result in (out, definition)
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.mark.parametrize("block", [5, 32])
def test_weights_by_position_sum_to_one_and_match_the_output(block):
    """A set whose values are one-hot in the position makes the output the weights themselves."""
    tokens, window = 17, 4
    coordinate = torch.arange(tokens)
    rng = generator(2)
    local = key_set(rng, 1, coordinate, coordinate + window, 0)
    one_hot = torch.eye(tokens, dtype=torch.float64)[None, :, None].expand(1, tokens, GROUPS, tokens)
    keys = torch.randn(1, tokens, GROUPS, tokens, generator=rng, dtype=torch.float64)
    local = local._replace(keys=keys, values=one_hot)
    query = torch.randn(1, tokens, HEADS, tokens, generator=rng, dtype=torch.float64)
    offers = [banded(local, -(window - 1), 0, -(-tokens // block), block)]
    out, weights = block_attention(query, offers, block, 0.3, implementation="eager", columns=tokens)
    assert weights.shape == (1, HEADS, tokens, tokens)
    torch.testing.assert_close(weights.transpose(1, 2), out, **EXACT)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, HEADS, tokens, dtype=torch.float64), **EXACT)
    assert weights.triu(1).abs().max() == 0 and weights.tril(-window).abs().max() == 0


def test_memory_budget_does_not_change_the_result(monkeypatch):
    rng = generator(3)
    offers, _ = three_sets(rng, 40, 5, 3, 2, 5, 4)
    query = torch.randn(2, 40, HEADS, DIM, generator=rng, dtype=torch.float64)
    whole, _ = block_attention(query, offers, 4, SCALING)
    monkeypatch.setattr("modeling_bmojo.attention_ops.MASK_BUDGET", 1)
    parts, _ = block_attention(query, offers, 4, SCALING)
    torch.testing.assert_close(parts, whole, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_low_precision_stays_near_float64(dtype, implementation):
    rng = generator(4)
    offers, sets = three_sets(rng, 20, 5, 3, 2, 5, 8)
    query = torch.randn(2, 20, HEADS, DIM, generator=rng, dtype=torch.float64)
    expected = one_by_one(query, sets, 8)
    low = [offer._replace(keys=offer.keys.to(dtype), values=offer.values.to(dtype)) for offer in offers]
    actual, _ = block_attention(query.to(dtype), low, 8, SCALING, implementation=implementation)
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention(implementation, explicit, groups):
    rng = generator(5)
    query = torch.randn(2, 9, HEADS, DIM, generator=rng, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 9, groups, DIM, generator=rng, dtype=torch.float64)
    visible = torch.ones(2, 9, 9, dtype=torch.bool).tril() if explicit else None
    out, weights = causal_attention(query, keys, values, visible, SCALING, implementation=implementation)
    for row in range(2):
        for t in range(9):
            expected = attend(query[row, t], list(keys[row, : t + 1]), list(values[row, : t + 1]))
            torch.testing.assert_close(out[row, t], expected, **EXACT)
    assert (weights is None) == (implementation == "sdpa")
    if weights is not None:
        assert weights.shape == (2, HEADS, 9, 9) and weights.triu(1).abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, 9, dtype=torch.float64), **EXACT)


def test_causal_attention_continues_after_past_keys():
    """3 new queries behind 6 past keys, of which one row has 2 empty: visibility is what the caller says."""
    rng = generator(6)
    query = torch.randn(2, 3, HEADS, DIM, generator=rng, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 9, GROUPS, DIM, generator=rng, dtype=torch.float64)
    visible = torch.ones(2, 3, 9, dtype=torch.bool).tril(6)
    visible[1, :, :2] = False
    out, _ = causal_attention(query, keys, values, visible, SCALING)
    for row, start in enumerate((0, 2)):
        for t in range(3):
            seen = slice(start, 7 + t)
            expected = attend(query[row, t], list(keys[row, seen]), list(values[row, seen]))
            torch.testing.assert_close(out[row, t], expected, **EXACT)


def test_scaling_is_applied():
    query = torch.zeros(1, 1, 1, 2)
    query[..., 0] = 1
    keys = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    out, _ = causal_attention(query, keys, values, torch.ones(1, 1, 2, dtype=torch.bool), math.log(3.0))
    assert out[0, 0, 0, 0].item() == pytest.approx(0.75)
