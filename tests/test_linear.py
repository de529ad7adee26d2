"""BMojoLinear: the same numbers as nn.Linear, on all threads where a CPU decodes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modeling_bmojo.linear_bmojo import FEW_ROWS, BMojoLinear, parts_for


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def pair(size_in, size_out, bias, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = BMojoLinear(size_in, size_out, bias=bias).to(dtype)
    plain = nn.Linear(size_in, size_out, bias=bias).to(dtype)
    plain.load_state_dict(linear.state_dict())
    return linear, plain


@pytest.fixture
def products(monkeypatch):
    """How often the product was cut into parts."""
    calls, real = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: calls.append(args) or real(*args))
    return calls


@pytest.mark.parametrize("shape", [(1, 1), (1, FEW_ROWS), (FEW_ROWS, 1), (3, 2), (1,), ()])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_few_rows_are_cut_and_equal(two_threads, products, shape, bias):
    linear, plain = pair(24, 30, bias)
    x = torch.randn(*shape, 24)
    torch.testing.assert_close(linear(x), plain(x), rtol=1e-6, atol=1e-6)
    assert linear(x).shape == plain(x).shape and len(products) == 2


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 10), st.integers(1, 5), st.booleans())
def test_any_size_equals_a_plain_linear(size_in, size_out, rows, threads, bias):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        linear, plain = pair(size_in, size_out, bias)
        x = torch.randn(1, rows, size_in)
        with torch.no_grad():
            torch.testing.assert_close(linear(x), plain(x), rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


def test_gradients_go_through_the_plain_product(two_threads, products):
    linear, plain = pair(24, 30, True)
    x = torch.randn(1, 1, 24)
    for module in (linear, plain):
        module(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, plain.weight.grad, rtol=0, atol=0)
    assert products == []


@torch.no_grad()
def test_other_inputs_take_the_plain_product(two_threads, products):
    linear, plain = pair(24, 30, True)
    for x in (torch.randn(1, FEW_ROWS + 1, 24), torch.randn(1, 0, 24)):
        torch.testing.assert_close(linear(x), plain(x), rtol=0, atol=0)
    narrow, plain_narrow = pair(24, 30, True, torch.bfloat16)
    x = torch.randn(1, 1, 24, dtype=torch.bfloat16)
    torch.testing.assert_close(narrow(x), plain_narrow(x), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(1, 1, 24)).dtype == torch.bfloat16
    prime, plain_prime = pair(24, 31, True)
    torch.testing.assert_close(prime(torch.ones(1, 1, 24)), plain_prime(torch.ones(1, 1, 24)), rtol=0, atol=0)
    torch.set_num_threads(1)
    linear(torch.randn(1, 1, 24))
    assert products == []


def test_parts_keep_every_thread_busy_or_there_are_none():
    assert parts_for(576, 2) == 2 and parts_for(393, 2) == 3 and parts_for(131, 2) == 1
    assert parts_for(576, 1) == 1 and parts_for(576, 5) == 6 and parts_for(7, 8) == 1
