"""One parity suite over every implementation of every operation, and what the wrappers promise beyond the arithmetic.

What needs a GPU or a package that only runs there is stood in for by `kernel_stubs`: the stubs refuse what the real
functions refuse.
"""

import importlib
import inspect

import pytest
import torch

from modeling_bmojo import kernels_cuda, kernels_hub
from modeling_bmojo.dispatch_bmojo import (
    OPERATIONS,
    TORCH,
    TRITON,
)
from modeling_bmojo.kernels_cuda import KERNELS
from tests.modeling.kernels import kernel_stubs
from tests.modeling.kernels.dispatch_cases import (
    CASES,
    EXACT,
    FP32,
    cast,
    compare_expiry,
    conv_case,
    draw,
    flat,
    registered,
    s6_case,
    tensors,
)
from tests.modeling.kernels.kernel_stubs import DECLARED, FUNCTIONS, LAYERS


pytestmark = pytest.mark.usefixtures("nothing_remembered")


@pytest.mark.parametrize("batch, started", [(1, False), (2, True), (2, False)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("op, backend, form", registered())
def test_form_equals_its_oracle(op, backend, form, tokens, batch, started):
    """Outputs and states; sweeps no token, one, and the edges of chunks and blocks."""
    tokens = 1 if op.endswith("_step") else tokens
    tokens = max(tokens, 1) if op in ("expiry", "memory_attention") else tokens
    started = started and not (op == "s6_scan" and backend in ("cuda", "hub"))
    inputs, oracle = CASES[op](tokens, batch, started, seed=tokens)
    dtype, close = (torch.float64, EXACT) if backend == "torch" else (torch.float32, FP32)
    with torch.no_grad():
        result = form(*cast(inputs, dtype))
        if op == "expiry":
            return compare_expiry(result, oracle(*inputs))
        expected = tensors(oracle(*inputs))
    for got, want in zip(tensors(result), expected, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        torch.testing.assert_close(got.double(), want, **close)


def differentiable() -> list:
    """Forms through which gradients flow."""
    return [
        param
        for param in registered()
        for op, backend, _ in [param.values]
        if op not in ("expiry", "innovation")
        and (backend == "torch" or (TRITON[op] if backend == "triton" else KERNELS[op]).backward)
    ]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
@pytest.mark.parametrize("op, backend, form", differentiable())
def test_gradients_of_a_form_equal_its_oracles(op, backend, form, tokens, started):
    """Gradients of every input, of y and of the final state, whatever the state before was."""
    tokens = 1 if op.endswith("_step") else tokens
    started = started and not (op == "s6_scan" and backend in ("cuda", "hub"))
    outputs = 1 if op in ("conv", "conv_step", "memory_attention") or (op, backend) == ("s6_scan", "cuda") else 2
    outputs = 1 if (op, backend) == ("s6_scan", "hub") else outputs
    dtype, close = (torch.float64, EXACT) if backend == "torch" else (torch.float32, dict(rtol=1e-4, atol=1e-4))
    found = []
    for function, kind in ((form, dtype), (CASES[op](tokens, 2, started, tokens)[1], torch.float64)):
        inputs = cast(CASES[op](tokens, 2, started, seed=tokens)[0], kind)
        leaves = [value for value in flat(inputs) if value.is_floating_point()]
        for leaf in leaves:
            leaf.requires_grad_()
        result = tensors(function(*inputs))[:outputs]
        weights = [draw(7)(*value.shape).to(kind) for value in result]
        loss = sum((value * weight).sum() for value, weight in zip(result, weights))
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for got, want in zip(*found, strict=True):
        if want is None or got is None:
            assert not any(value is not None and value.any() for value in (got, want))
            continue
        torch.testing.assert_close(got.double(), want, **close)


@pytest.mark.parametrize("op, backend, form", registered())
def test_every_form_has_the_torch_forms_signature(op, backend, form):
    reference = TORCH.get(op, TORCH["scan_step" if op.endswith("step") else "chunk_scan"])
    wanted = {name: (value.kind, value.default) for name, value in inspect.signature(reference).parameters.items()}
    assert {n: (v.kind, v.default) for n, v in inspect.signature(form).parameters.items()} == wanted


def test_every_operation_is_tested():
    assert set(CASES) == set(OPERATIONS) | set(KERNELS)
    assert {param.values[0] for param in registered()} == set(CASES)


# What the wrappers promise beyond the arithmetic ---------------------------------------------------------------------
def test_stubs_are_declared_as_upstream_declares_the_functions():
    assert {name: kernel_stubs.declared(function) for name, function in FUNCTIONS.items()} == DECLARED


# Where transformers defines the functions of these names, whose parameters a hub kernel has to have.
TRANSFORMERS = {
    "causal_conv1d_fn": ("mamba2", "causal_conv1d_fn"),
    "causal_conv1d_update": ("mamba2", "causal_conv1d_update"),
    "mamba_chunk_scan_combined": ("mamba2", "mamba2_chunk_scan"),
    "selective_state_update": ("mamba2", "mamba2_selective_state_update"),
    "selective_scan_fn": ("mamba", "mamba_selective_scan"),
}


@pytest.mark.parametrize("name", sorted(kernels_hub.SLOTS))
def test_slots_have_the_parameters_of_transformers_functions(name):
    slot = inspect.signature(kernels_hub._empty_slot(name))
    family, function = TRANSFORMERS[name]
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    own, layer = inspect.signature(getattr(module, function)), inspect.signature(LAYERS[name].forward)
    assert list(slot.parameters) == list(own.parameters) == list(layer.parameters)[1:]
    assert [p.kind for p in slot.parameters.values()] == [p.kind for p in own.parameters.values()]


def test_slots_cover_what_the_kernels_name():
    assert set(kernels_hub.SLOTS) == {kernel.name for kernel in KERNELS.values()}
    with pytest.raises(ValueError, match=r"causal_conv1d_fn: no hub kernel was loaded; load the model with"):
        kernels_hub._empty_slot("causal_conv1d_fn")()


@pytest.mark.parametrize("offset, width", [(0, 16), (8, 32), (3, 32), (8, 29), (5, 21)])
@pytest.mark.parametrize("started", [False, True])
def test_conv_takes_slices_of_a_projection(offset, width, started):
    """The mixer's input is a slice of in_proj's output: the kernel reads vectors and wants even strides."""
    (_, weight, bias, history), oracle = conv_case(9, 2, started, seed=1)
    x = draw(2)(2, 9, width)[:, :, offset : offset + 16]
    form = KERNELS["conv"].form(FUNCTIONS["causal_conv1d_fn"])
    result = form(*cast([x.float(), weight, bias, history], torch.float32))
    sliced = torch.empty(2, 9, width).copy_(draw(2)(2, 9, width))[:, :, offset : offset + 16]
    assert torch.equal(form(sliced, *cast([weight, bias, history], torch.float32)), result)
    torch.testing.assert_close(result.double(), oracle(x, weight, bias, history), **FP32)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("function, make", [("causal_conv1d_update", "cuda"), ("causal_conv1d_update", "hub")])
def test_conv_step_leaves_the_history(taps, function, make):
    """The cache moves it on itself: a pad must not. One column of history is contiguous either way round."""
    source = FUNCTIONS[function] if make == "cuda" else LAYERS[function]()
    history = torch.randn(2, taps - 1, 8)
    before = history.clone()
    with torch.no_grad():
        KERNELS["conv_step"].form(source)(torch.randn(2, 1, 8), torch.randn(8, taps), None, history)
    assert torch.equal(history, before)


@torch.no_grad()
def test_a_step_without_gradient_overwrites_the_state_or_leaves_it():
    """Mamba-2's writes into the state that it is given, as torch's does; S6's state arrives as a view and is copied."""
    for op in ("scan_step", "s6_step"):
        inputs = cast(CASES[op](1, 2, True, seed=0)[0], torch.float32)
        before = inputs[-1].clone()
        _, after = KERNELS[op].form(FUNCTIONS["selective_state_update"])(*inputs)
        assert not torch.equal(after, before)
        assert torch.equal(inputs[-1], after if op == "scan_step" else before)


@pytest.mark.parametrize("op", ["scan_step", "s6_step"])
def test_a_step_takes_one_token(op):
    inputs = cast(CASES[op](2, 1, True, seed=0)[0], torch.float32)
    with pytest.raises(ValueError, match=r"x has 2 tokens: step_\w+ takes exactly one; use chunk_"):
        KERNELS[op].form(FUNCTIONS["selective_state_update"])(*inputs)


def test_a_gradient_that_upstream_drops_is_an_error():
    """The selective scan ignores the gradient of its last state; y alone trains as it should."""
    inputs = cast(s6_case(5, 2, False, seed=1)[0], torch.float32)
    inputs[0].requires_grad_()
    y, state = KERNELS["s6_scan"].form(FUNCTIONS["selective_scan_fn"])(*inputs)
    (y.sum() + state.detach().sum()).backward(retain_graph=True)
    assert inputs[0].grad.any()
    with pytest.raises(
        ValueError, match=r"kernel_backend: .* no gradient of its last state; set kernel_backend='torch'"
    ):
        (y.sum() + state.sum()).backward()


def test_selective_scan_refuses_a_state():
    inputs = cast(s6_case(5, 2, True, seed=1)[0], torch.float32)
    with pytest.raises(ValueError, match=r"initial_state: .* cannot continue from a state; set kernel_backend='auto'"):
        KERNELS["s6_scan"].form(FUNCTIONS["selective_scan_fn"])(*inputs)
    assert "at most 256" in kernels_cuda.refuse_s6(*inputs[:2], torch.zeros(6, 257), *inputs[3:5])
