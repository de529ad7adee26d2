"""The S6 ops against the recurrence: outputs, final states, gradients of every form, states carried over."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo import s6_ops
from modeling_bmojo.s6_ops import chunk_s6, naive_s6, predict_s6_input, step_s6
from tests.oracles import oracle_s6, oracle_s6_prediction, oracle_s6_token


FORMS = [naive_s6, chunk_s6]
EXACT = dict(rtol=1e-10, atol=1e-10)


def draw(tokens, batch=2, inner=6, width=5, dtype=torch.float64, seed=0):
    """Random inputs in the order of the ops' arguments: x, dt, A, B, C, D, initial_state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(batch, tokens, inner) - 1)
    values = [normal(batch, tokens, inner), dt, -torch.exp(normal(inner, width)), normal(batch, tokens, width)]
    values += [normal(batch, tokens, width), normal(inner), normal(batch, inner, width)]
    return [value.to(dtype) for value in values]


def run_steps(x, dt, A, B, C, D=None, initial_state=None, chunk_size=64):
    """`step_s6` over all tokens, the state handed on."""
    outputs, state = [], initial_state
    for t in range(x.shape[1]):
        one = slice(t, t + 1)
        y, state = step_s6(x[:, one], dt[:, one], A, B[:, one], C[:, one], D, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def gradients(function, inputs, weights):
    """Gradients in every input, with outputs and final states under random weights."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    y, final = function(*leaves)
    return torch.autograd.grad((y * weights[0]).sum() + (final * weights[1]).sum(), leaves)


def test_every_form_has_the_same_signature():
    assert inspect.signature(naive_s6) == inspect.signature(chunk_s6) == inspect.signature(step_s6)


@pytest.mark.parametrize("form", [*FORMS, run_steps])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [(6, 5), (1, 4), (4, 1)], ids=str)
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_form_equals_the_recurrence(form, batch, sizes, skip, started):
    x, dt, A, B, C, D, state = draw(11, batch, *sizes)
    D, state = D if skip else None, state if started else None
    y, final = form(x, dt, A, B, C, D, state, 4)
    expected_y, expected_final = oracle_s6(x, dt, A, B, C, D, state)
    torch.testing.assert_close(y, expected_y, **EXACT)
    torch.testing.assert_close(final, expected_final, **EXACT)


@pytest.mark.parametrize("length", [1, 2, 4, 5, 16, 31, 64])
@pytest.mark.parametrize("offset", [-1, 0, 1, 2, 7])
@pytest.mark.parametrize("chunks", [1, 3])
def test_chunk_edges(length, offset, chunks):
    """Chunks of every shape: one token, a square, a rest that the columns do not cover; T around their ends."""
    tokens = chunks * length + offset
    inputs = draw(tokens, seed=tokens)
    y, final = chunk_s6(*inputs, chunk_size=length)
    expected_y, expected_final = naive_s6(*inputs)
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
        step_s6(*draw(tokens=2))


@pytest.mark.parametrize("form", [chunk_s6, run_steps])
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 26])
def test_gradients_equal_those_of_the_recurrence(form, tokens):
    inputs = draw(tokens)
    weights = [torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])]
    expected = gradients(oracle_s6, inputs, weights)
    assert all(value.abs().max() > 0.1 for value in expected)
    for actual, wanted in zip(
        gradients(lambda *leaves: form(*leaves, chunk_size=8), inputs, weights), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, **EXACT)
    for actual, wanted in zip(gradients(naive_s6, inputs, weights), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **EXACT)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_any_chunking_has_the_gradients_of_the_recurrence(tokens, length, batch, inner, width, data):
    """Also where only some inputs want a gradient."""
    inputs = draw(tokens, batch, inner, width, seed=tokens)
    weights = [torch.randn_like(inputs[0]), torch.randn_like(inputs[-1])]
    wanted = data.draw(st.lists(st.booleans(), min_size=7, max_size=7).filter(any), label="with gradient")

    def run(form):
        leaves = [value.clone().requires_grad_(wants) for value, wants in zip(inputs, wanted, strict=True)]
        y, final = form(*leaves, chunk_size=length)
        loss = (y * weights[0]).sum() + (final * weights[1]).sum()
        return y, final, *torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])

    for actual, expected in zip(run(chunk_s6), run(naive_s6), strict=True):
        torch.testing.assert_close(actual, expected, **EXACT)


def test_gradients_where_only_one_result_is_used():
    inputs = draw(20)
    for used in (0, 1):
        leaves = [value.clone().requires_grad_() for value in inputs]
        (gradient,) = torch.autograd.grad(chunk_s6(*leaves, chunk_size=8)[used].sum(), leaves[:1])
        (expected,) = torch.autograd.grad(naive_s6(*leaves)[used].sum(), leaves[:1])
        torch.testing.assert_close(gradient, expected, **EXACT)


def test_a_second_derivative_is_refused():
    """The backward pass is written by hand: it must not pretend to be differentiable."""
    leaves = [value.requires_grad_() for value in draw(5)]
    (gradient,) = torch.autograd.grad(chunk_s6(*leaves)[0].square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("form", [*FORMS, run_steps])
def test_zero_time_step_holds_the_state(form):
    x, dt, A, B, C, D, state = draw(tokens=9)
    _, final = form(x, torch.zeros_like(dt), A, B, C, D, state, 4)
    assert torch.equal(final, state)
    holes = torch.tensor([0, 3, 4, 8])
    dt[:, holes] = 0
    real = torch.tensor([1, 2, 5, 6, 7])
    y, final = form(x, dt, A, B, C, D, state, 4)
    alone, alone_final = oracle_s6(x[:, real], dt[:, real], A, B[:, real], C[:, real], D, state)
    torch.testing.assert_close(y[:, real], alone, **EXACT)
    torch.testing.assert_close(final, alone_final, **EXACT)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8), st.integers(0, 10**6))
def test_any_split_carries_the_state(pieces, length, seed):
    x, dt, A, B, C, D, state = draw(sum(pieces), batch=1, seed=seed)
    whole, whole_final = chunk_s6(x, dt, A, B, C, D, state, length)
    outputs, start = [], 0
    for size in pieces:
        part = slice(start, start + size)
        form = step_s6 if size == 1 else chunk_s6
        y, state = form(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, state, length)
        outputs.append(y)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1), whole, **EXACT)
    torch.testing.assert_close(state, whole_final, **EXACT)


@pytest.mark.parametrize("length", [16, 64, 200])
def test_fp32_error_stays_near_the_noise_floor(length):
    """Root mean square distance from float64, in units of the fp32 recurrence's own distance; gradients too."""
    ratios = []
    for seed in range(4):
        exact = draw(tokens=200, inner=16, width=16, seed=seed)
        single = [value.float() for value in exact]
        weights = [torch.randn_like(exact[0]), torch.randn_like(exact[-1])]
        low = [weight.float() for weight in weights]

        def run(form, inputs, weights, **chunk):
            return *form(*inputs, **chunk), *gradients(lambda *leaves: form(*leaves, **chunk), inputs, weights)

        for truth, floor, actual in zip(
            run(naive_s6, exact, weights),
            run(naive_s6, single, low),
            run(chunk_s6, single, low, chunk_size=length),
            strict=True,
        ):
            noise = (floor - truth).square().mean().sqrt()
            assert noise > 0
            ratios.append(((actual - truth).square().mean().sqrt() / noise).item())
    assert max(ratios) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strong_decay_stays_finite(dtype):
    """A chunk's products of decays underflow: nothing may divide by them, in outputs or gradients."""
    inputs = [value.to(dtype).requires_grad_() for value in draw(tokens=12)]
    scaled = [inputs[0], inputs[1] * 100, inputs[2] * 10, *inputs[3:]]
    y, final = chunk_s6(*scaled, chunk_size=9)
    found = torch.autograd.grad(y.sum() + final.sum(), inputs)
    assert all(torch.isfinite(value).all() for value in (y, final, *found))
    expected, _ = oracle_s6(*[value.detach() for value in scaled])
    torch.testing.assert_close(y.detach(), expected, rtol=1e-4, atol=1e-4)


def test_future_tokens_do_not_reach_back():
    inputs = draw(tokens=20)
    before, _ = chunk_s6(*inputs, chunk_size=9)
    changed = [value.clone() for value in inputs]
    for value in (changed[0], changed[1], changed[3], changed[4]):
        value[:, 13:] *= 3
    after, _ = chunk_s6(*changed, chunk_size=9)
    assert torch.equal(before[:, :13], after[:, :13])
    assert not torch.equal(before[:, 13:], after[:, 13:])


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 10])
def test_prediction_reads_the_state_before_the_write(tokens, started):
    x, dt, A, B, _, _, state = draw(tokens)
    state = state if started else None
    actual = predict_s6_input(x, dt, A, B, state, 4)
    for row in range(x.shape[0]):
        carried = torch.zeros_like(A) if state is None else state[row]
        for t in range(tokens):
            expected = oracle_s6_prediction(carried, dt[row, t], A, B[row, t])
            torch.testing.assert_close(actual[row, t], expected, **EXACT)
            carried, _ = oracle_s6_token(carried, x[row, t], dt[row, t], A, B[row, t], B[row, t])


# Memory and steps ----------------------------------------------------------------------------------------------------
class Sizes(torch.overrides.TorchFunctionMode):
    """The largest tensor that any function returned, in numbers, and how many functions ran."""

    def __init__(self):
        super().__init__()
        self.largest = self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.untyped_storage().nbytes() // result.element_size())
        return result


@pytest.mark.parametrize("with_gradient", [True, False])
def test_memory_does_not_grow_with_the_text(with_gradient):
    """No tensor holds the states of more than one chunk; with gradients one state per chunk is kept in pieces."""
    found = {}
    for tokens in (400, 1600):
        inputs = [value.requires_grad_(with_gradient) for value in draw(tokens, batch=1, inner=16, width=12)]
        with Sizes() as sizes:
            chunk_s6(*inputs, chunk_size=64)
        found[tokens] = sizes.largest
    states = 16 * 12
    assert found[400] == 2 * 64 * states and found[1600] == max(2 * 64 * states, 1600 * 16)


def test_a_chunk_of_wide_states_is_shortened(monkeypatch):
    """The result is that of any other chunk, the workspace stays below the limit of numbers."""
    inputs = draw(300, batch=2, inner=8, width=4)
    expected, _ = chunk_s6(*inputs, chunk_size=64)
    monkeypatch.setattr(s6_ops, "CPU_CHUNK_NUMBERS", 25 * 2 * 8 * 4)
    with Sizes() as sizes:
        actual, _ = chunk_s6(*inputs, chunk_size=64)
    assert sizes.largest == max(2 * 25 * 2 * 8 * 4, 300 * 2 * 8)
    torch.testing.assert_close(actual, expected, **EXACT)


def test_python_steps_grow_far_slower_than_the_tokens():
    """About 3 sqrt(K) operations for a chunk of K tokens, where the recurrence takes several per token."""
    inputs = draw(1024, batch=1, inner=2, width=2)
    with Sizes() as small:
        chunk_s6(*inputs, chunk_size=64)
    with Sizes() as large:
        chunk_s6(*inputs, chunk_size=1024)
    with Sizes() as naive:
        naive_s6(*inputs)
    assert large.calls < 600 < small.calls < 1024 / 64 * 100 < naive.calls / 4
