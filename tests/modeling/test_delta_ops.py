"""The gated delta rule: every form against a loop and transformers' Qwen3-Next functions; states, gradients."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from modeling_bmojo import delta_ops
from modeling_bmojo.delta_ops import chunk_delta, naive_delta, predict_delta_input, step_delta
from tests.oracles import oracle_delta


EXACT = dict(rtol=1e-10, atol=1e-10)
FORMS = [naive_delta, chunk_delta]


def draw(tokens, batch=2, heads=4, groups=2, channels=3, width=5, dtype=torch.float64, seed=0):
    """Random inputs in the order of the ops' arguments: x, log decays, beta, B, C, initial_state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys, queries = (torch.nn.functional.normalize(normal(batch, tokens, groups, width), dim=-1) for _ in range(2))
    values = [normal(batch, tokens, heads, channels), -torch.nn.functional.softplus(normal(batch, tokens, heads))]
    values += [normal(batch, tokens, heads).sigmoid(), keys, queries, normal(batch, heads, channels, width)]
    return [value.to(dtype) for value in values]


def run_steps(x, log_decay, beta, B, C, initial_state=None, chunk_size=64):
    """`step_delta` over all tokens, the state handed on."""
    outputs, state = [], None if initial_state is None else initial_state.clone()
    for t in range(x.shape[1]):
        y, state = step_delta(*(value[:, t : t + 1] for value in (x, log_decay, beta, B, C)), state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def gradients(function, inputs, weights):
    """Gradients in every input, with outputs and final states under random weights."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    y, final = function(*leaves)
    return torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), leaves)


def test_every_form_has_the_same_signature():
    assert inspect.signature(naive_delta) == inspect.signature(chunk_delta) == inspect.signature(step_delta)


@pytest.mark.parametrize("form", [*FORMS, run_steps])
@pytest.mark.parametrize("sizes", [dict(), dict(batch=1, heads=3, groups=3), dict(heads=1, groups=1, width=1)], ids=str)
@pytest.mark.parametrize("started", [True, False])
def test_form_equals_the_recurrence(form, sizes, started):
    *inputs, state = draw(11, **sizes)
    state = state if started else None
    with torch.no_grad():
        y, final = form(*inputs, None if state is None else state.clone(), 4)
    expected_y, expected_final = oracle_delta(*inputs, state)
    torch.testing.assert_close(y, expected_y, **EXACT)
    torch.testing.assert_close(final, expected_final, **EXACT)


@pytest.mark.parametrize("length", [1, 2, 5, 16])
@pytest.mark.parametrize("offset", [-1, 0, 1, 2])
@pytest.mark.parametrize("chunks", [1, 3])
def test_chunk_edges(length, offset, chunks, monkeypatch):
    """T around the ends of chunks, and of the runs of chunks that are taken at once."""
    monkeypatch.setattr(delta_ops, "RUN", 2 * length)
    tokens = chunks * length + offset
    inputs = draw(tokens, seed=tokens)
    y, final = chunk_delta(*inputs, chunk_size=length)
    expected_y, expected_final = naive_delta(*inputs)
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
    assert predict_delta_input(*inputs[:4]).shape == inputs[0].shape


def test_step_takes_one_token_only():
    with pytest.raises(ValueError, match="2 tokens"):
        step_delta(*draw(tokens=2))


@torch.no_grad()
def test_a_step_writes_into_the_state_it_is_given():
    *inputs, state = draw(1)
    _, after = step_delta(*inputs, state)
    assert after.data_ptr() == state.data_ptr()


@pytest.mark.parametrize("form", [*FORMS, run_steps])
@pytest.mark.parametrize("tokens", [1, 8, 9, 26])
def test_gradients_equal_those_of_the_recurrence(form, tokens):
    inputs = draw(tokens)
    weights = [torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])]
    expected = gradients(oracle_delta, inputs, weights)
    assert all(value.abs().max() > 0.05 for value in expected)
    found = gradients(lambda *leaves: form(*leaves, chunk_size=8), inputs, weights)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **EXACT)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.integers(0, 9)
)
def test_any_chunking_is_the_recurrence(tokens, length, batch, groups, repeat, seed):
    inputs = draw(tokens, batch, groups * repeat, groups, seed=seed)
    for actual, expected in zip(chunk_delta(*inputs, chunk_size=length), naive_delta(*inputs), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 20), st.integers(0, 20))
def test_any_split_hands_the_state_on(before, after):
    *inputs, state = draw(before + after)
    whole = chunk_delta(*inputs, state, 6)
    first, between = chunk_delta(*(value[:, :before] for value in inputs), state, 6)
    second, final = chunk_delta(*(value[:, before:] for value in inputs), between, 6)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole[0], **EXACT)
    torch.testing.assert_close(final, whole[1], **EXACT)


@pytest.mark.parametrize("form", [*FORMS, run_steps])
def test_a_token_that_writes_nothing_and_decays_nothing_is_passed_over(form):
    x, log_decay, beta, B, C, state = draw(9)
    with torch.no_grad():
        _, final = form(x, torch.zeros_like(log_decay), torch.zeros_like(beta), B, C, state.clone(), 4)
    torch.testing.assert_close(final, state, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_the_prediction_is_what_the_rule_subtracts(tokens):
    """From the definition: after a token of beta 1 the state says x_t under its key; before it, the prediction."""
    x, log_decay, beta, B, _, state = draw(tokens, groups=4)
    said = predict_delta_input(x, log_decay, beta, B, state, 8)
    for t in range(tokens):
        decayed = state * log_decay[:, t].exp()[..., None, None]
        torch.testing.assert_close(said[:, t], torch.einsum("bhpn,bhn->bhp", decayed, B[:, t]), **EXACT)
        one = slice(t, t + 1)
        state = naive_delta(x[:, one], log_decay[:, one], beta[:, one], B[:, one], B[:, one], state)[1]


def test_a_full_write_is_read_back():
    """With beta 1 the state says of a key exactly what was written last under it: what a sum cannot."""
    x, log_decay, _, B, _, state = draw(6, groups=4)
    _, after = chunk_delta(x, log_decay, torch.ones_like(log_decay), B, B, state, 4)
    torch.testing.assert_close(torch.einsum("bhpn,bhn->bhp", after, B[:, -1]), x[:, -1], **EXACT)


# transformers' Qwen3-Next --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("started", [True, False])
def test_equals_transformers(theirs, tokens, started):
    """It computes in float32; its queries are scaled by 1 / sqrt(N) inside, its state lies `[N, P]`."""
    *inputs, state = draw(tokens, width=8, dtype=torch.float32)
    x, log_decay, beta, B, C = inputs
    state = state if started else None
    expected, final = theirs(
        C, B, x, g=log_decay, beta=beta, initial_state=None if state is None else state.mT, output_final_state=True
    )
    y, after = chunk_delta(x, log_decay, beta, B, C * 8**-0.5, state)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, final.mT, rtol=1e-4, atol=1e-5)


def test_long_texts_keep_their_precision():
    """float32 against float64 over many chunks: the system of a chunk is well conditioned."""
    exact = draw(2000, batch=1, width=16)
    y, final = chunk_delta(*(value.float() for value in exact))
    expected, last = chunk_delta(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final.double(), last, rtol=1e-4, atol=1e-5)
