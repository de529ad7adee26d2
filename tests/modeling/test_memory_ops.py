"""Innovation and eidetic selection against the streaming definitions of `oracles`, ties and edges included."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo import BMojoConfig, memory_ops
from modeling_bmojo.cache_layer_bmojo import BMojoCacheLayer
from modeling_bmojo.dispatch_bmojo import Kernels
from modeling_bmojo.memory_ops import (
    INNOVATION_EPS,
    NEVER,
    blocked_expiry,
    heap_expiry,
    key_innovation,
    output_innovation,
    prediction_error,
    retention_key,
    select,
)
from modeling_bmojo.parts_bmojo import Tokens
from tests.oracles import INNOVATION_EPS as ORACLE_EPS
from tests.oracles import (
    EideticMemory,
    oracle_eidetic,
    oracle_key_innovation,
    oracle_output_innovation,
    scale_free_error,
)


EXACT = dict(rtol=1e-12, atol=1e-12)
WINDOWS, SLOTS, BLOCKS = st.integers(1, 9), st.integers(0, 12), st.integers(1, 20)
# Few distinct values: most comparisons are ties.
TIED = st.lists(st.integers(0, 3), min_size=1, max_size=60)
DECAYS = st.sampled_from([0.0, 0.05, 0.7])


def closed_form(keys, window, slots):
    """design.md, section 2: expiry_s = W + max(s, p_s), p_s the M-th earliest token that beats s."""
    result = []
    for s, key in enumerate(keys):
        rivals = [r for r, other in enumerate(keys) if other > key or (other == key and r < s)]
        if slots == 0:
            result.append(s + window)
        elif len(rivals) < slots:
            result.append(math.inf)
        else:
            result.append(window + max(s, rivals[slots - 1]))
    return result


def as_floats(expiry):
    return [math.inf if value >= NEVER else float(value) for value in expiry.tolist()]


def keys_of(innovations, decay):
    values = torch.tensor([innovations], dtype=torch.float64)
    return retention_key(values, torch.arange(len(innovations))[None], decay)


# Innovation ----------------------------------------------------------------------------------------------------------
def test_error_is_scale_free_and_symmetric():
    generator = torch.Generator().manual_seed(0)
    value, other = torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64)
    error = prediction_error(value, other)
    assert error.shape == (3, 7)
    torch.testing.assert_close(error[1, 2], scale_free_error(value[1, 2], other[1, 2]), **EXACT)
    torch.testing.assert_close(prediction_error(1000 * value, 1000 * other), error, **EXACT)
    torch.testing.assert_close(prediction_error(other, value), error, **EXACT)
    assert prediction_error(value, value).abs().max() == 0
    torch.testing.assert_close(prediction_error(value, -value), torch.full_like(error, 2.0), rtol=1e-9, atol=1e-9)
    assert prediction_error(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [0.0, 0.0]
    assert INNOVATION_EPS == ORACLE_EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_error_is_computed_in_fp32_at_least(dtype):
    """300 squared overflows float16; the test of a token must not."""
    value = torch.full((1, 1, 64), 300.0, dtype=dtype)
    error = prediction_error(value, -value)
    assert error.dtype == torch.promote_types(dtype, torch.float32)
    assert error.item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("tokens", [1, 3, 12])
def test_output_innovation_token_by_token(taps, tokens):
    y = torch.randn(2, tokens, 6, generator=torch.Generator().manual_seed(taps), dtype=torch.float64)
    actual = output_innovation(y, torch.zeros(2, taps, 6, dtype=torch.float64))
    expected = torch.stack([oracle_output_innovation(row, taps) for row in y])
    torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize("block", [1, 4, 5])
@pytest.mark.parametrize("taps", [1, 4, 6])
@pytest.mark.parametrize("tokens", [2, 4, 5, 11, 12, 13])
def test_output_innovation_in_blocks(monkeypatch, block, taps, tokens):
    """Blocks smaller than the text, at their edges; a block is never smaller than what a prediction needs."""
    monkeypatch.setattr(memory_ops, "INNOVATION_BLOCK", block)
    y = torch.randn(2, tokens, 6, dtype=torch.float64)
    actual = output_innovation(y, torch.zeros(2, taps, 6, dtype=torch.float64))
    torch.testing.assert_close(actual, torch.stack([oracle_output_innovation(row, taps) for row in y]))


@pytest.mark.parametrize("split", [1, 2, 5, 11])
def test_output_innovation_continues_from_its_history(split):
    y = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros = torch.zeros(2, 4, 6, dtype=torch.float64)
    whole = output_innovation(y, zeros)
    history = torch.cat([zeros, y[:, :split]], dim=1)[:, -4:]
    parts = [output_innovation(y[:, :split], zeros), output_innovation(y[:, split:], history)]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("heads", [1, 3])
def test_key_innovation_token_by_token(heads, tokens):
    keys = torch.randn(2, tokens, heads, 5, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    actual = key_innovation(keys, keys.new_zeros(2, heads, 5), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(actual, torch.stack([oracle_key_innovation(row) for row in keys]), **EXACT)
    assert actual[:, 0].tolist() == pytest.approx([1.0, 1.0])  # nothing could predict the first


@pytest.mark.parametrize("split", [1, 2, 5, 11])
def test_key_innovation_continues_from_a_sum_and_a_count(split):
    keys = torch.randn(2, 12, 3, 5, generator=torch.Generator().manual_seed(split), dtype=torch.float64)
    before = keys[:, :split].sum(dim=1)
    after = key_innovation(keys[:, split:], before, torch.full((2,), split))
    whole = key_innovation(keys, torch.zeros_like(before), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(after, whole[:, split:], **EXACT)


@pytest.mark.parametrize("block", [1, 4, 5])
@pytest.mark.parametrize("tokens", [1, 4, 5, 11])
def test_key_innovation_in_blocks(monkeypatch, block, tokens):
    monkeypatch.setattr(memory_ops, "KEY_BLOCK", block)
    keys = torch.randn(2, tokens, 3, 5, dtype=torch.float64)
    before = torch.randn(2, 1, 3, 5, dtype=torch.float64)
    actual = key_innovation(keys, before[:, 0], torch.ones(2, dtype=torch.int64))
    whole = torch.stack([oracle_key_innovation(row) for row in torch.cat([before, keys], dim=1)])
    torch.testing.assert_close(actual, whole[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_key_repeated_is_no_surprise(dtype):
    """However the mean is summed up: by itself, behind another key, at once or from a sum that the cache keeps."""
    key, other = torch.randn(2, 1, 1, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype).mul(300)
    keys, zeros = key.expand(1, 3000, 3, 8), torch.zeros(1, 3, 8, dtype=torch.float64)
    assert key_innovation(keys, zeros, torch.zeros(1, dtype=torch.int64))[0, 1:].abs().max() == 0
    after = key_innovation(keys, key[:, 0].double() * 70_001, torch.full((1,), 70_001))
    assert after.abs().max() == 0
    mixed = key_innovation(torch.cat([other, keys], dim=1), zeros, torch.zeros(1, dtype=torch.int64))[0, 2:]
    assert (mixed[1:] <= mixed[:-1]).all()  # each less surprising than the one before it


def test_key_innovation_of_narrow_keys_is_computed_in_fp32():
    keys = torch.full((1, 3, 1, 64), 300.0, dtype=torch.float16)  # 300 squared overflows float16
    error = key_innovation(keys, torch.zeros(1, 1, 64), torch.zeros(1, dtype=torch.int64))
    assert error.dtype == torch.float32 and error.tolist() == [[1.0, 0.0, 0.0]]


def test_first_token_is_a_surprise():
    y = torch.randn(1, 3, 6, dtype=torch.float64)
    assert output_innovation(y, torch.zeros(1, 4, 6, dtype=torch.float64))[0, 0].item() == pytest.approx(1.0)


# Retention keys ------------------------------------------------------------------------------------------------------
def test_without_decay_the_key_is_the_innovation():
    assert keys_of([0.5, 0.0, 2.0], 0.0).tolist() == [[0.5, 0.0, 2.0]]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-6, 2.0), min_size=2, max_size=20), st.floats(1e-3, 1.0), st.integers(0, 100))
def test_static_key_orders_like_the_faded_score(innovations, decay, later):
    """At every later time t, the order of the keys is the order of e_s exp(-g (t - s))."""
    memory, now = EideticMemory(slots=0, decay=decay), len(innovations) + later
    keys = keys_of(innovations, decay)[0].tolist()
    scores = [memory.score((s, value, None), now) for s, value in enumerate(innovations)]
    for r in range(len(keys)):
        for s in range(r):
            if not math.isclose(scores[r], scores[s], rel_tol=1e-9):
                assert (keys[r] > keys[s]) == (scores[r] > scores[s])


def test_static_key_survives_where_the_score_underflows():
    """exp(-g (t - s)) is 0 in float64 after 800 / g tokens; the static key still tells the tokens apart."""
    assert EideticMemory(0, 1.0).score((0, 1.0, None), 10**6) == 0.0
    keys = retention_key(torch.tensor([[1.0, 1.0, 0.9]]), torch.tensor([[0, 10**6, 10**6]]), 1.0)[0]
    assert keys[1] > keys[2] > keys[0]


# Expiry --------------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=300)
@given(TIED, WINDOWS, SLOTS, DECAYS, BLOCKS)
def test_expiry_equals_replace_the_minimum_with_ties(innovations, window, slots, decay, block):
    """Closed form, heap and tensor form against the memory run literally, with scores evaluated at time t."""
    _, expected = oracle_eidetic(innovations, window, slots, decay)
    keys = keys_of(innovations, decay)
    assert closed_form(keys[0].tolist(), window, slots) == expected
    assert heap_expiry(keys[0].tolist(), window, slots) == expected
    assert as_floats(blocked_expiry(keys, window, slots, block)[0]) == expected


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10**6), st.integers(1, 150), WINDOWS, SLOTS, DECAYS, BLOCKS)
def test_expiry_equals_replace_the_minimum_on_real_values(seed, length, window, slots, decay, block):
    innovations = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    _, expected = oracle_eidetic(innovations, window, slots, decay)
    keys = keys_of(innovations, decay)
    assert heap_expiry(keys[0].tolist(), window, slots) == expected
    assert as_floats(blocked_expiry(keys, window, slots, block)[0]) == expected


@pytest.mark.parametrize("window", [1, 5])
def test_no_slots_is_a_sliding_window(window):
    keys = torch.rand(1, 40)
    assert blocked_expiry(keys, window, 0)[0].tolist() == [s + window for s in range(40)]
    assert heap_expiry(keys[0].tolist(), window, 0) == [s + window for s in range(40)]


@pytest.mark.parametrize("slots", [40, 41, 1000])
def test_enough_slots_keep_everything(slots):
    assert as_floats(blocked_expiry(torch.rand(1, 40), 3, slots)[0]) == [math.inf] * 40


@pytest.mark.parametrize("values", ["rising", "falling", "equal"])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_extreme_orders(values, block):
    """Rising keys keep the last M, falling and equal keys (older wins) the first M."""
    keys = {"rising": torch.arange(50.0), "falling": -torch.arange(50.0), "equal": torch.ones(50)}[values][None]
    kept = [s for s, end in enumerate(as_floats(blocked_expiry(keys, 4, 6, block)[0])) if end == math.inf]
    assert kept == (list(range(44, 50)) if values == "rising" else list(range(6)))


def test_rows_are_independent():
    keys = torch.randint(0, 4, (5, 70), generator=torch.Generator().manual_seed(0)).double()
    together = blocked_expiry(keys, 4, 3, 16)
    for row in range(5):
        assert torch.equal(together[row], blocked_expiry(keys[row : row + 1], 4, 3, 16)[0])


def test_rows_of_a_long_stream():
    """Larger than any block: T = 3,000 against the package's heap, which the sweeps above tie to the oracle."""
    keys = torch.rand(2, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = blocked_expiry(keys, 64, 32)
    for row in range(2):
        assert as_floats(actual[row]) == heap_expiry(keys[row].tolist(), 64, 32)


@settings(deadline=None, max_examples=200)
@given(TIED, WINDOWS, st.integers(1, 8), DECAYS, st.integers(1, 12), st.data())
def test_selection_continues_a_stream(innovations, window, slots, decay, block, data):
    """`select` on the memory and window held after k tokens, plus new tokens, sees what an unbroken stream sees."""
    length = len(innovations)
    k = data.draw(st.integers(0, length - 1))
    sets, expiry = oracle_eidetic(innovations, window, slots, decay)
    kept = sorted(sets[k - 1]) if k else []
    listed = kept + [-1] * (slots - len(kept)) + list(range(k - window, length))
    valid = torch.tensor([[position >= 0 for position in listed]])
    keys = keys_of(innovations, decay)[:, torch.tensor(listed).clamp(min=0)].masked_fill(~valid, math.inf)
    queries = length - k
    result = select(keys, valid, window, slots, block, queries, held=slots, past=window)

    for column, position in enumerate(listed):
        end = result.expiry[0, column].item()
        if position < 0:
            assert end < 0
        else:
            assert min(end, queries) == min(expiry[position] - k, queries)
    for index in range(math.ceil(queries / block)):
        held = {listed[column] for column in result.slots[0, index].tolist() if column >= 0}
        assert held == sets[k + index * block]
        assert len(result.slots[0, index]) == slots


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False), WINDOWS, st.integers(1, 5), DECAYS, st.integers(0, 5))
def test_cache_step_is_the_streaming_rule(random, window, slots, decay, fading):
    """One token at a time, two rows that advance at different times; every entry holds what its position stands for."""
    length = 3 * (window + slots)
    rows = [[random.randrange(4) for _ in range(length)] for _ in range(2)]
    sets = [oracle_eidetic(row, window, slots, decay)[0] for row in rows]
    config = BMojoConfig(
        vocab_size=8,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        window_size=window,
        eidetic_size=slots,
        fading_size=fading,
        eidetic_decay=decay,
    )
    layer, kernels = BMojoCacheLayer(config, 0), Kernels(config)
    layer.prepare(torch.zeros(2, 1, 4))
    counts = [0, 0]
    while min(counts) < length:
        active = [count < length and random.random() < 0.7 for count in counts]
        now = torch.tensor(counts)
        tag = now.float().view(2, 1, 1, 1).expand(2, 1, 1, 4)
        error = torch.tensor([[row[min(count, len(row) - 1)]] for row, count in zip(rows, counts, strict=True)])
        faded = (tag + 0.25, tag + 0.75) if fading else None
        lengths = torch.tensor(active, dtype=torch.int64)
        sizes = dict(front=0, block=1, steps=True, counted=False, needs_grad=False, wants_left=False)
        tokens = Tokens(tag, tag, tag + 0.5, error.float(), lengths, faded, **sizes)
        layer.memory.observe(tokens, layer, kernels)
        layer.advance(lengths, 1)
        counts = [count + step for count, step in zip(counts, active, strict=True)]
        for row, count in enumerate(counts):
            t = count - 1
            local = set(range(max(0, t - window + 1), t + 1))
            kept = set(sets[row][t]) if count else set()
            beyond = set(range(max(0, t - window - fading + 1), max(0, t - window + 1)))
            assert_entries(layer, row, fading, kept, beyond, local)


def assert_entries(layer, row, fading, kept, beyond, local):
    """The visible fading tokens and the pool (eidetic and window tokens) are exactly these, each with its own data."""
    for offset, part, expected in ((0.25, slice(0, fading), beyond), (0.0, slice(fading, None), kept | local)):
        positions = layer.positions[row, part]
        held = positions[positions >= 0]
        assert sorted(held.tolist()) == sorted(expected)
        keys, values = layer.keys[row, 0, part, 0][positions >= 0], layer.values[row, 0, part, 0][positions >= 0]
        assert torch.equal(keys, held + offset)
        assert torch.equal(values, held + 0.5 + offset)
