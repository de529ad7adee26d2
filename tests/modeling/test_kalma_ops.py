"""Gated KalmaNet: every form against a loop and `torch.linalg.solve`; states, gradients."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo import kalma_ops
from modeling_bmojo.kalma_ops import chunk_kalma, naive_kalma, predict_kalma_input, step_kalma
from tests.oracles import chebyshev_solution, oracle_kalma


EXACT = dict(rtol=1e-9, atol=1e-9)
FORMS = [naive_kalma, chunk_kalma]


def draw(tokens, batch=2, heads=2, channels=3, width=5, dtype=torch.float64, seed=0):
    """Random inputs in the order of the ops' arguments: x, log decays, mix, B, C, initial_state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, queries = (torch.nn.functional.normalize(normal(batch, tokens, heads, width), dim=-1) for _ in range(2))
    shares = normal(batch, tokens, heads, 1).sigmoid()
    gates = -torch.nn.functional.softplus(normal(batch, tokens, heads)), normal(batch, tokens, heads).sigmoid()
    read = normal(batch, heads, channels + width, 7)  # values above keys of seven tokens, which the state has read
    inputs = [shares * normal(batch, tokens, heads, channels), *gates, shares * keys, queries]
    return [value.to(dtype) for value in (*inputs, read @ read[:, :, channels:].mT)]


def run_steps(x, log_decay, mix, B, C, initial_state=None, chunk_size=64, steps=30, ridge=0.02):
    """`step_kalma` over all tokens, the state handed on."""
    outputs, state = [], None if initial_state is None else initial_state.clone()
    for t in range(x.shape[1]):
        given = (value[:, t : t + 1] for value in (x, log_decay, mix, B, C))
        y, state = step_kalma(*given, state, chunk_size, steps, ridge)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def gradients(function, inputs, weights):
    """Gradients in every input, with outputs and final states under random weights."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    y, final = function(*leaves)
    return torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), leaves)


def assert_same(found, expected):
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **EXACT)


def test_every_form_has_the_same_signature():
    assert inspect.signature(naive_kalma) == inspect.signature(chunk_kalma) == inspect.signature(step_kalma)


@pytest.mark.parametrize("form", [*FORMS, run_steps])
@pytest.mark.parametrize("sizes", [dict(), dict(batch=1, heads=1, channels=1, width=1)], ids=str)
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("rule", [(30, 0.02), (4, 0.3)])
def test_form_equals_the_recurrence(form, sizes, started, rule):
    *inputs, state = draw(9, **sizes)
    state = state if started else None
    with torch.no_grad():
        found = form(*inputs, None if state is None else state.clone(), 4, *rule)
    assert_same(found, oracle_kalma(*inputs, state, *rule))


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_chunk_edges(length, offset, monkeypatch):
    """T around the ends of chunks, which are no longer than `LENGTH`, and of the runs that are taken at once."""
    monkeypatch.setattr(kalma_ops, "RUN", 2 * 2 * 2 * length)  # two chunks of two rows of two heads
    inputs = draw(3 * min(length, kalma_ops.LENGTH) + offset)
    assert_same(chunk_kalma(*inputs, chunk_size=length), naive_kalma(*inputs))


@pytest.mark.parametrize("form", FORMS)
def test_no_tokens_leave_the_state(form):
    *inputs, state = draw(tokens=0)
    y, final = form(*inputs, state)
    assert y.shape == inputs[0].shape
    assert torch.equal(final, state)
    _, final = form(*inputs, None)
    assert final.shape == state.shape and not final.any()
    assert predict_kalma_input(inputs[0], inputs[1], *inputs[3:]).shape == inputs[0].shape


def test_step_takes_one_token_only():
    with pytest.raises(ValueError, match="2 tokens"):
        step_kalma(*draw(tokens=2))


@torch.no_grad()
def test_a_step_writes_into_the_state_it_is_given():
    *inputs, state = draw(1)
    _, after = step_kalma(*inputs, state)
    assert after.data_ptr() == state.data_ptr()


@pytest.mark.parametrize("form", [*FORMS, run_steps])
@pytest.mark.parametrize("tokens", [1, 9])
def test_gradients_equal_those_of_the_recurrence(form, tokens):
    inputs = draw(tokens)
    weights = [torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])]
    expected = gradients(oracle_kalma, inputs, weights)
    assert all(value.abs().max() > 0.05 for value in expected)
    assert_same(gradients(lambda *leaves: form(*leaves, chunk_size=4), inputs, weights), expected)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 2), st.integers(1, 3), st.integers(1, 8), st.integers(0, 9)
)
def test_any_chunking_is_the_recurrence(tokens, length, batch, heads, steps, seed):
    inputs = draw(tokens, batch, heads, seed=seed)
    assert_same(chunk_kalma(*inputs, length, steps), naive_kalma(*inputs, length, steps))


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 20), st.integers(0, 20))
def test_any_split_hands_the_state_on(before, after):
    *inputs, state = draw(before + after)
    whole = chunk_kalma(*inputs, state, 6)
    first, between = chunk_kalma(*(value[:, :before] for value in inputs), state, 6)
    second, final = chunk_kalma(*(value[:, before:] for value in inputs), between, 6)
    assert_same((torch.cat([first, second], dim=1), final), whole)


@pytest.mark.parametrize("form", [*FORMS, run_steps])
@pytest.mark.parametrize("started", [True, False])
def test_a_token_that_writes_nothing_and_decays_nothing_is_passed_over(form, started):
    """As pads are. Before anything was written the state says 0, and nothing becomes infinite in it."""
    x, log_decay, mix, B, C, state = draw(9)
    state = state if started else torch.zeros_like(state)
    leaves = [value.requires_grad_() for value in (0 * x, 0 * log_decay, mix, 0 * B, C, state.clone())]
    y, final = form(*leaves, 4)
    torch.testing.assert_close(final, state, rtol=0, atol=0)
    assert started or not y.any()
    assert all(value.isfinite().all() for value in torch.autograd.grad(final.sum() + y.sum(), leaves))


# The regression ------------------------------------------------------------------------------------------------------
def solved(state, query, channels, ridge=0.02):
    """U (H + lambda I)^-1 query, `[B, H, P]`, by torch's solver."""
    U, H = state[:, :, :channels], state[:, :, channels:]
    penalty = ridge * H.square().sum((-2, -1), keepdim=True).sqrt()
    return (U @ torch.linalg.solve(H + penalty * torch.eye(H.shape[-1], dtype=H.dtype), query[..., None]))[..., 0]


@pytest.mark.parametrize("form", [*FORMS, run_steps])
def test_many_steps_are_the_solution(form):
    """And 30 are it to a thousandth of its size: rho of the published ridge takes 1 / 1.33 of the error per step."""
    x, log_decay, mix, B, C, state = draw(7)
    found = {steps: form(x, log_decay, torch.ones_like(mix), B, C, state, 4, steps)[0] for steps in (30, 500)}
    for t in range(7):
        state = naive_kalma(*(value[:, t : t + 1] for value in (x, log_decay, mix, B, C)), state, steps=1)[1]
        wanted = solved(state, C[:, t], 3)
        torch.testing.assert_close(found[500][:, t], wanted, rtol=1e-10, atol=1e-10)
        assert (found[30][:, t] - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_the_prediction_is_the_regression_on_all_tokens_before(tokens):
    x, log_decay, mix, B, C, state = draw(tokens)
    said = predict_kalma_input(x, log_decay, B, C, state, 8)
    converged = predict_kalma_input(x, log_decay, B, C, state, 8, 500)
    for t in range(tokens):
        wanted = [
            [S[:3] @ chebyshev_solution(S[3:], query, 30, 0.02) for S, query in zip(*row)]
            for row in zip(state, C[:, t])
        ]
        torch.testing.assert_close(said[:, t], torch.stack([torch.stack(row) for row in wanted]), **EXACT)
        torch.testing.assert_close(converged[:, t], solved(state, C[:, t], 3), **EXACT)
        state = naive_kalma(*(value[:, t : t + 1] for value in (x, log_decay, mix, B, C)), state, steps=1)[1]


def test_what_was_never_written_is_predicted_as_nothing():
    x, log_decay, _, B, C, _ = draw(3)
    assert not predict_kalma_input(x, log_decay, B, C)[:, 0].any()


def test_keys_that_are_alike_are_told_apart():
    """Values of two keys at a small angle come back: a sum, of which each key reads both, cannot."""
    keys = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)[None, :, None]
    values = torch.eye(2, dtype=torch.float64)[None, :, None]
    nothing, all_of_it = torch.zeros(1, 2, 1, dtype=torch.float64), torch.ones(1, 2, 1, dtype=torch.float64)
    _, state = chunk_kalma(values, nothing, all_of_it, keys, keys, ridge=1e-4)
    back = predict_kalma_input(values, nothing, torch.zeros_like(keys), keys, state, steps=900, ridge=1e-4)
    torch.testing.assert_close(back, values, rtol=0, atol=2e-3)


def test_long_texts_keep_their_precision():
    """float32 against float64 over many chunks, beside the loop's own rounding: no term of |H|_F cancels another.

    A state is rounded by the decays of one chunk, of which the loop multiplies the last few alone."""
    exact = draw(200, batch=1, width=16)
    rounded = [value.float() for value in exact]
    expected = chunk_kalma(*exact)
    for found, loop, wanted in zip(chunk_kalma(*rounded), naive_kalma(*rounded), expected):
        error, floor = ((value.double() - wanted).norm() for value in (found, loop))
        assert error < max(2 * floor, 1e-6 * wanted.norm()) and error < 1e-5 * wanted.norm()
