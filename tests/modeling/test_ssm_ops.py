"""The state space ops against the recurrence: outputs, final states, gradients of every form, states carried over."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo.memory_ops import prediction_error
from modeling_bmojo.ssm_ops import causal_conv, chunk_ssd, naive_ssd, predict_input, step_ssd
from tests.oracles import oracle_ssd, oracle_ssd_token, oracle_state_innovation, oracle_state_prediction


FORMS = [naive_ssd, chunk_ssd]
EXACT = dict(rtol=1e-10, atol=1e-10)


def draw(tokens, batch=2, heads=4, groups=2, channels=3, width=5, dtype=torch.float64, seed=0):
    """Random inputs in the order of the ops' arguments: x, dt, A, B, C, D, initial_state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(batch, tokens, heads) - 1)
    A = -torch.exp(normal(heads))
    values = [normal(batch, tokens, heads, channels), dt, A, normal(batch, tokens, groups, width)]
    values += [normal(batch, tokens, groups, width), normal(heads), normal(batch, heads, channels, width)]
    return [value.to(dtype) for value in values]


def run_steps(x, dt, A, B, C, D=None, initial_state=None, chunk_size=64):
    """`step_ssd` over all tokens, the state handed on."""
    outputs, state = [], initial_state
    for t in range(x.shape[1]):
        one = slice(t, t + 1)
        y, state = step_ssd(x[:, one], dt[:, one], A, B[:, one], C[:, one], D, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def test_every_form_has_the_same_signature():
    assert inspect.signature(naive_ssd) == inspect.signature(chunk_ssd) == inspect.signature(step_ssd)


@pytest.mark.parametrize("form", [*FORMS, run_steps])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_form_equals_the_recurrence(form, groups, skip, started):
    x, dt, A, B, C, D, state = draw(tokens=11, groups=groups)
    D, state = D if skip else None, state if started else None
    y, final = form(x, dt, A, B, C, D, state, 4)
    expected_y, expected_final = oracle_ssd(x, dt, A, B, C, D, state)
    torch.testing.assert_close(y, expected_y, **EXACT)
    torch.testing.assert_close(final, expected_final, **EXACT)


@pytest.mark.parametrize("length", [1, 4, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1, 2, 7])
@pytest.mark.parametrize("chunks", [1, 3])
def test_chunk_edges(length, offset, chunks):
    tokens = chunks * length + offset
    if length == 64:
        tokens = 64 + offset
    inputs = draw(tokens=tokens, seed=tokens)
    y, final = chunk_ssd(*inputs, chunk_size=length)
    expected_y, expected_final = naive_ssd(*inputs)
    assert y.shape == inputs[0].shape
    torch.testing.assert_close(y, expected_y, **EXACT)
    torch.testing.assert_close(final, expected_final, **EXACT)


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_state(form):
    inputs = draw(tokens=0)
    y, final = form(*inputs)
    assert y.shape == inputs[0].shape
    assert torch.equal(final, inputs[-1])
    _, final = form(*inputs[:-1], None)
    assert final.shape == inputs[-1].shape and not final.any()


def test_step_takes_one_token_only():
    with pytest.raises(ValueError, match="2 tokens"):
        step_ssd(*draw(tokens=2))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_step_without_gradient_overwrites_its_state(groups, skip, transposed):
    x, dt, A, B, C, D, state = [value.requires_grad_() for value in draw(tokens=1, groups=groups)]
    D = D if skip else None
    expected, after = step_ssd(x, dt, A, B, C, D, state)
    state = state.detach().mT.contiguous().mT if transposed else state.detach().clone()
    with torch.no_grad():
        y, final = step_ssd(x, dt, A, B, C, D, state)
    assert final is state
    torch.testing.assert_close(y, expected.detach(), **EXACT)
    torch.testing.assert_close(state, after.detach(), **EXACT)


def test_step_with_gradient_leaves_its_state_alone():
    inputs = draw(tokens=1)
    before = inputs[-1].clone()
    _, final = step_ssd(*inputs)
    assert torch.equal(inputs[-1], before) and not torch.equal(final, before)


@pytest.mark.parametrize("form", [chunk_ssd, run_steps])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9])
def test_gradients_equal_those_of_the_recurrence(form, tokens):
    inputs = draw(tokens=tokens)
    weights = [torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])]

    def gradients(function):
        leaves = [value.clone().requires_grad_() for value in inputs]
        y, final = function(*leaves)
        return torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), leaves)

    expected = gradients(oracle_ssd)
    for actual, wanted in zip(gradients(lambda *leaves: form(*leaves, chunk_size=4)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **EXACT)
    for actual, wanted in zip(gradients(naive_ssd), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **EXACT)


@pytest.mark.parametrize("form", [*FORMS, run_steps])
def test_zero_time_step_holds_the_state(form):
    x, dt, A, B, C, D, state = draw(tokens=9)
    _, final = form(x, torch.zeros_like(dt), A, B, C, D, state, 4)
    assert torch.equal(final, state)
    holes = torch.tensor([0, 3, 4, 8])
    dt[:, holes] = 0
    real = torch.tensor([1, 2, 5, 6, 7])
    y, final = form(x, dt, A, B, C, D, state, 4)
    alone, alone_final = oracle_ssd(x[:, real], dt[:, real], A, B[:, real], C[:, real], D, state)
    torch.testing.assert_close(y[:, real], alone, **EXACT)
    torch.testing.assert_close(final, alone_final, **EXACT)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8), st.integers(0, 10**6))
def test_any_split_carries_the_state(pieces, length, seed):
    x, dt, A, B, C, D, state = draw(tokens=sum(pieces), batch=1, seed=seed)
    whole, whole_final = chunk_ssd(x, dt, A, B, C, D, state, length)
    outputs, start = [], 0
    for size in pieces:
        part = slice(start, start + size)
        form = step_ssd if size == 1 else chunk_ssd
        y, state = form(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state, length)
        outputs.append(y)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **EXACT)
    torch.testing.assert_close(state, whole_final, **EXACT)


@pytest.mark.parametrize("length", [16, 32, 64])
def test_fp32_error_stays_near_the_noise_floor(length):
    """Root mean square distance from float64, in units of the fp32 recurrence's own distance.

    Summed log decays cancel in the chunked form; the scan in transformers, which sums segments, measures 1.0 to 1.4.
    """
    ratios = []
    for seed in range(4):
        exact = draw(tokens=200, channels=16, width=16, seed=seed)
        single = [value.float() for value in exact]
        for truth, floor, actual in zip(
            naive_ssd(*exact), naive_ssd(*single), chunk_ssd(*single, chunk_size=length), strict=True
        ):
            noise = (floor - truth).square().mean().sqrt()
            assert noise > 0
            ratios.append(((actual - truth).square().mean().sqrt() / noise).item())
    assert max(ratios) < 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_decay_stays_finite(dtype):
    """exp of a chunk's summed decays underflows and its inverse overflows: neither may reach outputs or gradients."""
    inputs = [value.to(dtype).requires_grad_() for value in draw(tokens=12)]
    scaled = [inputs[0], inputs[1] * 100, inputs[2] * 10, *inputs[3:]]
    y, final = chunk_ssd(*scaled, chunk_size=8)
    gradients = torch.autograd.grad(y.sum() + final.sum(), inputs)
    assert all(torch.isfinite(value).all() for value in (y, final, *gradients))
    expected, _ = oracle_ssd(*[value.detach() for value in scaled])
    torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-4)


def test_future_tokens_do_not_reach_back():
    inputs = draw(tokens=20)
    before, _ = chunk_ssd(*inputs, chunk_size=8)
    changed = [value.clone() for value in inputs]
    for value in (changed[0], changed[1], changed[3], changed[4]):
        value[:, 13:] *= -1.5 if value.dim() == 4 else 3
    after, _ = chunk_ssd(*changed, chunk_size=8)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 10])
def test_prediction_reads_the_state_before_the_write(tokens, started):
    x, dt, A, B, _, _, state = draw(tokens=tokens)
    state = state if started else None
    actual = predict_input(x, dt, A, B, state, 4)
    for row in range(x.shape[0]):
        carried = torch.zeros(4, 3, 5, dtype=x.dtype) if state is None else state[row]
        for t in range(tokens):
            expected = oracle_state_prediction(carried, dt[row, t], A, B[row, t])
            torch.testing.assert_close(actual[row, t], expected, **EXACT)
            carried, _ = oracle_ssd_token(carried, x[row, t], dt[row, t], A, B[row, t], B[row, t])
    innovation = prediction_error(x.flatten(2), actual.flatten(2))
    torch.testing.assert_close(innovation, oracle_state_innovation(x, dt, A, B, state), **EXACT)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 3, 9])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_history", [True, False])
def test_causal_conv_is_a_sum_over_the_last_tokens(taps, tokens, with_bias, with_history):
    generator = torch.Generator().manual_seed(taps)
    x = torch.randn(2, tokens, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, taps, generator=generator, dtype=torch.float64)
    bias = torch.randn(6, generator=generator, dtype=torch.float64) if with_bias else None
    past = torch.randn(2, taps - 1, 6, generator=generator, dtype=torch.float64)
    past = past if with_history else torch.zeros_like(past)
    actual = causal_conv(x, weight, bias, past if with_history else None)
    rows = torch.cat([past, x], dim=1)
    expected = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    for t in range(tokens):
        for j in range(taps):
            expected[:, t] += weight[:, j] * rows[:, t + j]
    torch.testing.assert_close(actual, expected, **EXACT)


def test_causal_conv_history_continues_a_sequence():
    x = torch.randn(1, 12, 3, dtype=torch.float64)
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole = causal_conv(x, weight, bias)
    parts = [causal_conv(x[:, :5], weight, bias), causal_conv(x[:, 5:], weight, bias, x[:, 2:5])]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
