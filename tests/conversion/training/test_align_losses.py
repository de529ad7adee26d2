"""The alignment's losses against their formulas, written out on full logits in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversion.training.losses import Head, logit_losses, relative_error


E, V = 5, 11


def naive_kl(logits, theirs, tau):
    """tau^2 sum_t sum_v p (log p - log q), one token after another."""
    total = 0
    for student, teacher in zip(logits, theirs):
        q, p = (student / tau).softmax(-1), (teacher / tau).softmax(-1)
        total = total + tau**2 * (p * (p.log() - q.log())).sum()
    return total


def naive_ce(logits, targets):
    return sum(-row.softmax(-1)[target].log() for row, target in zip(logits, targets.tolist()))


def case(tokens, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight = draw(tokens, E).requires_grad_(), draw(V, E).requires_grad_()
    return hidden, weight, draw(tokens, E + 2), draw(V, E + 2), torch.randint(V, (tokens,), generator=generator)


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("tokens", [0, 1, 4, 7])
@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
@pytest.mark.parametrize("wanted", ["kl", "ce", "both"])
def test_chunked_logit_losses_and_gradients(wanted, chunk, tokens, tau):
    hidden, weight, teacher, teacher_weight, targets = case(tokens)
    heads = Head(weight, 2.0), Head(teacher_weight, 0.5)
    with_kl, with_ce = wanted != "ce", wanted != "kl"
    kl, ce = logit_losses(
        hidden, heads[0], teacher if with_kl else None, heads[1] if with_kl else None,
        targets if with_ce else None, tau, chunk,
    )  # fmt: skip
    logits, theirs = hidden @ weight.T / 2.0, teacher @ teacher_weight.T / 0.5
    expected_kl = naive_kl(logits, theirs, tau) if with_kl and tokens else torch.zeros((), dtype=torch.float64)
    expected_ce = naive_ce(logits, targets) if with_ce and tokens else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(kl, torch.as_tensor(expected_kl).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ce, torch.as_tensor(expected_ce).detach(), rtol=1e-12, atol=1e-12)
    if not tokens:
        return
    found = torch.autograd.grad(0.7 * kl - 0.3 * ce, (hidden, weight))
    wanted_sum = (0.7 * expected_kl if with_kl else 0) - (0.3 * expected_ce if with_ce else 0)
    for ours, theirs in zip(found, torch.autograd.grad(wanted_sum, (hidden, weight))):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_no_gradient_is_formed_where_none_is_asked_for():
    hidden, weight, teacher, teacher_weight, targets = case(4)
    kl, ce = logit_losses(hidden.detach(), Head(weight.detach()), teacher, Head(teacher_weight), targets)
    assert not kl.requires_grad and not ce.requires_grad
    kl, _ = logit_losses(hidden, Head(weight.detach()), teacher, Head(teacher_weight), None)
    kl.backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


def test_kl_is_zero_and_flat_at_the_teacher():
    hidden, weight, *_ = case(6)
    kl, _ = logit_losses(hidden, Head(weight), hidden.detach(), Head(weight.detach()), None)
    kl.backward()
    assert abs(kl.item()) < 1e-14 and hidden.grad.abs().max() < 1e-14


@given(st.integers(1, 6), st.integers(0, 100))
def test_kl_per_token_does_not_depend_on_the_number_of_tokens(repeats, seed):
    """Twice the same text is twice the sum over twice the tokens; no form of `batchmean` over rows does that."""
    hidden, weight, teacher, teacher_weight, targets = case(3, seed)
    once = logit_losses(hidden, Head(weight), teacher, Head(teacher_weight), targets)
    more = logit_losses(
        hidden.repeat(repeats, 1),
        Head(weight),
        teacher.repeat(repeats, 1),
        Head(teacher_weight),
        targets.repeat(repeats),
    )
    for one, many in zip(once, more):
        torch.testing.assert_close(many / (3 * repeats), one / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_hidden_states_are_summed_in_float32(dtype):
    hidden, weight, teacher, teacher_weight, targets = case(300, dtype=dtype)
    kl, ce = logit_losses(hidden, Head(weight), teacher, Head(teacher_weight), targets)
    (kl + ce).backward()
    assert kl.dtype == ce.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == dtype
    logits, theirs = (hidden.double() @ weight.double().T).detach(), teacher.double() @ teacher_weight.double().T
    torch.testing.assert_close(kl.detach().double(), naive_kl(logits, theirs, 1.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(ce.detach().double(), naive_ce(logits, targets), rtol=1e-4, atol=0)


def test_logits_are_not_rounded_under_autocast():
    """A student near its teacher, and large logits: rounded to bfloat16, kl is several times what it should be."""
    hidden, weight, *_, targets = case(50, dtype=torch.float32)
    student = (hidden + 1e-2 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))).detach()
    results = []
    for on in (False, True):
        given = student.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            kl, ce = logit_losses(given, Head(10 * weight), hidden.detach(), Head(10 * weight.detach()), targets)
        kl.backward()
        results.append((kl.detach(), ce.detach(), given.grad))
    (kl, ce, gradient), (found, also, under) = results
    torch.testing.assert_close(torch.stack([found, also]), torch.stack([kl, ce]), rtol=1e-6, atol=0)
    assert (under - gradient).norm() < 1e-2 * gradient.norm()


def rows(count, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, count, tokens, E, generator=generator, dtype=torch.float64)
    return student, teacher, torch.rand(count, tokens, generator=generator) < 0.6


def naive_relative_error(student, teacher, counted):
    total = 0.0
    for ours, theirs, mask in zip(student, teacher, counted):
        if mask.any():
            error, scale = (ours - theirs)[mask].square().sum(), theirs[mask].square().sum()
            total += mask.sum() * error / scale
    return torch.as_tensor(total, dtype=torch.float64)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 50))
def test_relative_error(count, tokens, seed):
    student, teacher, counted = rows(count, tokens, seed)
    whole = relative_error(student, teacher, counted)
    torch.testing.assert_close(whole, naive_relative_error(student, teacher, counted), rtol=1e-12, atol=1e-14)
    # Micro-batches add up, pads add nothing, and the teacher's scale cancels out.
    parts = [relative_error(student[i : i + 1], teacher[i : i + 1], counted[i : i + 1]) for i in range(count)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)
    pads = torch.full((count, 3, E), 7.0, dtype=torch.float64)
    longer = [torch.cat([value, pads * sign], 1) for value, sign in ((student, 1), (teacher, -1))]
    padded = relative_error(*longer, torch.cat([counted, counted.new_zeros(count, 3)], 1))
    torch.testing.assert_close(padded, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(relative_error(9 * student, 9 * teacher, counted), whole, rtol=1e-12, atol=1e-14)
    zeros = torch.zeros_like(student)
    torch.testing.assert_close(relative_error(zeros, teacher, counted), counted.sum().double(), rtol=1e-12, atol=0)
    assert relative_error(teacher, teacher, counted) == 0


def test_relative_error_of_a_silent_teacher_stays_finite():
    zeros, counted = torch.zeros(1, 2, E), torch.ones(1, 2, dtype=torch.bool)
    assert relative_error(zeros, zeros, counted) == 0
