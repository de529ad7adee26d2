"""One dispatch per operation: every implementation against its oracle, who is chosen when, and what is said about it.

What needs a GPU or a package that only runs there is stood in for by `kernel_stubs`: the stubs refuse what the real
functions refuse. `device_type` is then replaced, so that tensors on the CPU count as CUDA tensors.
"""

import copy
import importlib
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import kernel_stubs
import pytest
import torch
from kernel_stubs import CALLS, DECLARED, FUNCTIONS, LAYERS, install, oracle_s6
from oracles import oracle_eidetic, oracle_output_innovation, oracle_ssd, randomize_
from test_attention_ops import SCALING, generator, one_by_one, three_sets
from tiny import MIXED_LAYERS, SIZES, VOCAB, WINDOW

from modeling_bmojo import BMojoConfig, BMojoForCausalLM, dispatch_bmojo, explain_kernels, kernels_cuda, kernels_hub
from modeling_bmojo.dispatch_bmojo import (
    COVERED,
    ENVIRONMENT,
    OPERATIONS,
    TORCH,
    Kernels,
    Situation,
    make_plan,
    triton_attention_form,
    triton_form,
    triton_forms,
)
from modeling_bmojo.kernels_cuda import KERNELS
from modeling_bmojo.memory_ops import NEVER


# Without a GPU the package's Triton kernels run in Triton's interpreter; it has to be switched on before they load.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

EXACT = dict(rtol=1e-10, atol=1e-10)
FP32 = dict(rtol=1e-5, atol=1e-5)
PACKAGES = ("causal_conv1d", "mamba_ssm")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    """Every test chooses afresh, whatever the environment of the test run says."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    CALLS.clear()
    dispatch_bmojo.forget()
    yield
    dispatch_bmojo.forget()


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors count as CUDA tensors, and TF32 is allowed."""
    monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    monkeypatch.setattr(dispatch_bmojo, "_tf32_allowed", lambda: True)


@pytest.fixture
def installed(monkeypatch):
    """causal-conv1d and mamba-ssm, stood in for."""
    install(monkeypatch, *PACKAGES)


# Parity: one suite over every implementation -------------------------------------------------------------------------
def registered() -> list:
    """(operation, backend, form) of everything there is: what is added to a table is tested here."""
    forms = [(op, "torch", form) for op, form in TORCH.items()]
    for op, kernel in KERNELS.items():
        forms.append((op, "cuda", kernel.form(FUNCTIONS[kernel.name])))
        forms.append((op, "hub", kernels_hub.hub_form(op, LAYERS[kernel.name]()).call))
    forms += [(op, "triton", form.call) for op, form in triton_forms().items()]
    return [pytest.param(*entry, id="-".join(entry[:2])) for entry in forms]


def draw(seed):
    rng = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)


def conv_case(tokens, batch, started, seed):
    """x, weight, bias, history and the sum over taps."""
    normal, channels, taps = draw(seed), 16, 4
    inputs = [normal(batch, tokens, channels), normal(channels, taps), normal(channels)]
    inputs.append(normal(batch, taps - 1, channels) if started else None)

    def oracle(x, weight, bias, history):
        past = x.new_zeros(batch, taps - 1, channels) if history is None else history
        line = torch.cat([past, x], dim=1)
        rows = [(line[:, t : t + taps] * weight.T).sum(1) + bias for t in range(tokens)]
        return torch.stack(rows, dim=1) if rows else x

    return inputs, oracle


def scan_case(tokens, batch, started, seed):
    normal, heads, groups, channels, width = draw(seed), 4, 2, 3, 5
    dt = torch.nn.functional.softplus(normal(batch, tokens, heads) - 1)
    inputs = [normal(batch, tokens, heads, channels), dt, -torch.exp(normal(heads))]
    inputs += [normal(batch, tokens, groups, width), normal(batch, tokens, groups, width)]
    inputs += [normal(heads) if seed % 2 else None, normal(batch, heads, channels, width) if started else None]
    return inputs, oracle_ssd


def s6_case(tokens, batch, started, seed):
    normal, inner, width = draw(seed), 6, 5
    dt = torch.nn.functional.softplus(normal(batch, tokens, inner) - 1)
    inputs = [normal(batch, tokens, inner), dt, -torch.exp(normal(inner, width))]
    inputs += [normal(batch, tokens, width), normal(batch, tokens, width)]
    inputs += [normal(inner) if seed % 2 else None, normal(batch, inner, width) if started else None]
    return inputs, oracle_s6


def innovation_case(tokens, batch, started, seed):
    normal, taps, size = draw(seed), 3, 7
    y, history = normal(batch, tokens, size), normal(batch, taps, size) if started else torch.zeros(batch, taps, size)

    def oracle(y, history):
        line = torch.cat([history, y], dim=1)
        rows = [oracle_output_innovation(row, taps)[taps:] for row in line]
        return torch.stack([torch.as_tensor(row, dtype=y.dtype) for row in rows])

    return [y, history.double()], oracle


def expiry_case(tokens, batch, started, seed):
    """Keys with ties; the memory after each token by scores that are compared one at a time."""
    window, slots, block = 3, 2, 4
    keys = torch.randint(0, 5, (batch, tokens), generator=torch.Generator().manual_seed(seed)).double()
    inputs = [keys, torch.ones_like(keys, dtype=torch.bool), window, slots, block, tokens + window]

    def oracle(keys, valid, *sizes):
        rows = [oracle_eidetic(row, window, slots) for row in keys.tolist()]
        expiry = torch.tensor([expiry for _, expiry in rows], dtype=torch.float64).reshape(keys.shape)
        kept = [[sorted(sets[t]) for t in range(0, tokens + window, block)] for sets, _ in rows]
        return expiry, kept

    return inputs, oracle


def attention_sets(tokens, batch, past, seed, window=5, fading=2, block=4) -> list:
    """[eidetic | fading | local] and how each offers its keys, as the operation takes them."""
    _, members = three_sets(generator(seed), tokens, window, 3, fading, past, block, batch)
    (eidetic, index), (faded, _), (local, _) = members
    return [
        [eidetic, index.expand(batch, -1, -1)],
        [faded, (1 - window - fading, -window)],
        [local, (1 - window, 0)],
    ]


def attention_case(tokens, batch, started, seed):
    sets = attention_sets(tokens, batch, 6 if started else 0, seed)
    query = torch.randn(batch, tokens, 4, 6, generator=generator(seed + 1), dtype=torch.float64)

    def oracle(query, sets, block, scaling):
        indices = [offered[0] if isinstance(offered, torch.Tensor) else None for _, offered in sets]
        return one_by_one(query, [(keyset, index) for (keyset, _), index in zip(sets, indices)], block)

    return [query, sets, 4, SCALING], oracle


CASES = {
    "conv": conv_case,
    "conv_step": conv_case,
    "chunk_scan": scan_case,
    "scan_step": scan_case,
    "s6_scan": s6_case,
    "s6_step": s6_case,
    "innovation": innovation_case,
    "expiry": expiry_case,
    "memory_attention": attention_case,
}


def cast(value, dtype):
    """Tensors of real numbers in `dtype`, wherever they are."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(part, dtype) for part in value))
    return [cast(part, dtype) for part in value] if isinstance(value, list) else value


def tensors(result) -> list[torch.Tensor]:
    return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]


def compare_expiry(result, expected):
    expiry, kept = expected
    torch.testing.assert_close(result.expiry.double().masked_fill(result.expiry == NEVER, torch.inf), expiry)
    found = [[sorted(slot for slot in block if slot >= 0) for block in row] for row in result.slots.tolist()]
    assert found == kept


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
    triton = triton_forms()
    return [
        param
        for param in registered()
        for op, backend, _ in [param.values]
        if op not in ("expiry", "innovation")
        and (backend == "torch" or (triton[op] if backend == "triton" else KERNELS[op]).backward)
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


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else []


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


# The choice ----------------------------------------------------------------------------------------------------------
def chosen(op, **situation) -> list[str]:
    situation = {"device": "cuda", "dtype": torch.bfloat16} | situation
    return [form.backend for form in make_plan(op, Situation(**situation)).forms]


SSM = ("conv", "conv_step", "chunk_scan", "scan_step")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta"])
def test_elsewhere_than_on_cuda_it_is_torch(op, device, installed):
    assert chosen(op, device=device) == ["torch"]


@pytest.mark.parametrize("op", SSM)
def test_installed_packages_come_before_torch_on_cuda(op, installed):
    plan = make_plan(op, Situation("cuda", torch.bfloat16))
    assert plan.forms[0].backend == "cuda" and plan.forms[-1].backend == "torch"
    assert plan.forms[0].narrow == (op in ("chunk_scan", "scan_step"))


def test_each_package_counts_for_itself(monkeypatch):
    install(monkeypatch, "causal_conv1d")
    assert chosen("conv")[0] == "cuda" and "cuda" not in chosen("chunk_scan")
    assert make_plan("chunk_scan", Situation("cuda", torch.bfloat16)).passed["cuda"].package == "mamba-ssm"


@pytest.mark.parametrize("op", SSM)
def test_dtype_and_gradients_decide(op, installed):
    assert "cuda" not in chosen(op, dtype=torch.float64)
    assert ("cuda" in chosen(op, grad=True)) == (op in ("conv", "chunk_scan"))


def test_fp32_is_not_rounded_to_tf32_unless_pytorch_may(installed, monkeypatch):
    """mamba-ssm's scan multiplies in TF32; PyTorch's own products do so only when the user allows it."""
    assert "cuda" not in chosen("chunk_scan", dtype=torch.float32)
    assert "TF32" in make_plan("chunk_scan", Situation("cuda", torch.float32)).passed["cuda"].reason
    assert chosen("chunk_scan", dtype=torch.float32, backend="cuda") == ["cuda"]
    for op in ("conv", "conv_step", "scan_step"):
        assert chosen(op, dtype=torch.float32)[0] == "cuda"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert chosen("chunk_scan", dtype=torch.float32)[0] == "cuda"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_switch_for_tf32_is_read_at_every_call(installed, on_gpu, monkeypatch):
    inputs = cast(scan_case(3, 1, False, 0)[0], torch.float32)
    for allowed in (True, False):
        CALLS.clear()
        monkeypatch.setattr(dispatch_bmojo, "_tf32_allowed", lambda: allowed)  # noqa: B023
        Kernels().run("chunk_scan", *inputs)
        assert ["mamba_chunk_scan_combined"] * allowed == CALLS


def test_hub_kernels_come_first_where_they_were_asked_for(installed):
    assert chosen("conv", hub=("conv",))[:2] == ["hub", "cuda"]
    assert chosen("chunk_scan", hub=("conv",))[0] == "cuda"
    reasons = [make_plan("conv", Situation("cuda", torch.bfloat16, hub=hub)).passed["hub"].reason for hub in (None, ())]
    assert "not asked for" in reasons[0] and "loaded no hub kernel" in reasons[1]


def test_hub_kernels_are_for_the_device_that_they_were_loaded_for():
    """A model that was moved to the CPU afterwards does not run kernels of a GPU there."""
    kernels, inputs = Kernels(), cast(conv_case(3, 1, False, 0)[0], torch.float32)
    kernels.hub = {"conv": kernels_hub.hub_form("conv", LAYERS["causal_conv1d_fn"]())}
    kernels.hub_device = "cuda"
    kernels.run("conv", *inputs)
    assert CALLS == []
    kernels.hub_device = "cpu"
    kernels.run("conv", *inputs)
    assert CALLS == ["causal_conv1d_fn"]


def test_triton_forms_join_by_their_table(monkeypatch):
    """One entry each; here with stand-ins, since kernels are added file by file."""

    def expiry(keys, valid, window, slots, block, queries, held=0, past=0):
        return "expiry by triton"

    def attention(query, offers, block, scaling):
        return "attention by triton"

    def conv(x, weight, bias, history=None):
        return "conv by triton"

    table = {
        "expiry": triton_form(expiry),
        "memory_attention": triton_attention_form(attention),
        "conv": triton_form(conv, backward=False),
    }
    monkeypatch.setattr(dispatch_bmojo, "triton_forms", lambda: table)
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=True))
    monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    assert chosen("expiry") == ["triton", "torch"] and chosen("conv") == ["triton", "torch"]
    assert chosen("conv", grad=True) == ["torch"] and chosen("conv", device="cpu") == ["torch"]
    assert "no Triton kernel" in make_plan("innovation", Situation("cuda", torch.float32)).passed["triton"].reason
    kernels, query = Kernels(), torch.zeros(1, 1, 2, 2)
    assert kernels.run("expiry", query, None, 1, 1, 1, 1) == "expiry by triton"
    assert kernels.run("memory_attention", query, [], 1, 1.0) == ("attention by triton", None)
    sets = attention_sets(4, 2, 0, seed=0)
    query = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    for options in (dict(columns=4, implementation="eager"), dict(dropout=0.5), dict(implementation="eager")):
        out, _ = kernels.run("memory_attention", query, sets, 4, SCALING, **options)
        assert isinstance(out, torch.Tensor)


def fake_load(monkeypatch, **present):
    """`load` that finds or misses packages by name, whatever is installed here."""
    real = kernels_cuda.load

    def load(module, name):
        package = module.partition(".")[0]
        if package in present:
            return (object(), "") if present[package] else (None, f"{package} is not installed")
        return real(module, name)

    load.cache_clear = real.cache_clear
    return load


# Forcing a backend ---------------------------------------------------------------------------------------------------
FORCED = [
    ("conv", "cuda", dict(device="cpu"), "it needs CUDA tensors, these are on 'cpu'; move the model to a GPU"),
    ("chunk_scan", "cuda", dict(), "mamba_ssm is not installed; pip install mamba-ssm"),
    ("conv_step", "cuda", dict(), "causal_conv1d is not installed; pip install causal-conv1d"),
    ("expiry", "triton", dict(device="cpu"), "it needs CUDA tensors, these are on 'cpu'; move the model to a GPU"),
    ("conv", "hub", dict(), "hub kernels were not asked for; load with from_pretrained(..., use_kernels=True)"),
    ("conv", "hub", dict(hub=()), "transformers loaded no hub kernel of it for 'cuda'; set 'auto'"),
]


@pytest.mark.parametrize("op, backend, situation, reason", FORCED)
def test_a_forced_backend_that_is_missing_is_an_error(op, backend, situation, reason, monkeypatch):
    monkeypatch.setattr(dispatch_bmojo, "INTERPRETED", False)
    with pytest.raises(ValueError) as error:
        chosen(op, backend=backend, **situation)
    assert str(error.value).startswith(f"kernel_backend={backend!r}: cannot run operation {op!r}: {reason}")


@pytest.mark.parametrize(
    "op, situation, reason",
    [
        ("scan_step", dict(grad=True), "selective_state_update has no backward; call under torch.no_grad()"),
        ("conv", dict(dtype=torch.float64), "it does not compute in torch.float64; load the model in float32"),
    ],
)
def test_a_forced_backend_that_cannot_is_an_error(op, situation, reason, installed):
    with pytest.raises(ValueError, match=f"kernel_backend='cuda': cannot run operation '{op}': {reason}"):
        chosen(op, backend="cuda", **situation)


@pytest.mark.parametrize("taps, channels, reason", [(5, 16, "2 to 4 taps, the model 5"), (4, 12, "multiple of 8")])
def test_a_call_of_other_sizes_goes_on_to_the_next_form(taps, channels, reason, installed, on_gpu):
    """Sizes are seen at the call: the next form takes it, and a forced one is an error."""
    x, weight, bias = torch.randn(2, 5, channels), torch.randn(channels, taps), torch.randn(channels)
    following = triton_forms()["conv"].call
    torch.testing.assert_close(Kernels().run("conv", x, weight, bias), following(x, weight, bias), rtol=0, atol=0)
    assert CALLS == []
    forced = Kernels(BMojoConfig(kernel_backend="cuda"))
    with pytest.raises(
        ValueError, match=rf"kernel_backend='cuda': cannot run operation 'conv': .*{reason}.*; set it to"
    ):
        forced.run("conv", x, weight, bias)


@pytest.mark.parametrize("backend", ["cuda", "hub", "triton"])
def test_forcing_is_about_what_a_backend_covers(backend, installed):
    """Operations that a backend has not by nature are chosen as if nothing had been forced."""
    for op in set(OPERATIONS) - COVERED[backend]:
        assert chosen(op, backend=backend) == chosen(op, backend="auto")
    assert COVERED["cuda"] == COVERED["hub"] == set(KERNELS) and COVERED["torch"] == set(OPERATIONS)


@pytest.mark.parametrize("op", OPERATIONS)
def test_torch_can_always_be_forced(op, installed):
    assert chosen(op, backend="torch") == ["torch"]


def test_the_environment_wins(installed, monkeypatch):
    def setting(value):
        monkeypatch.setenv(ENVIRONMENT, value)
        dispatch_bmojo.forget()

    setting("torch")
    assert chosen("conv", backend="cuda") == ["torch"]
    setting("auto")
    assert chosen("conv", backend="torch")[0] == "cuda"
    setting("cuda")
    with pytest.raises(ValueError, match=r"^BMOJO_KERNEL_BACKEND='cuda': cannot run operation 'conv': it needs CUDA"):
        chosen("conv", device="cpu")
    setting("")
    assert chosen("conv", backend="torch") == ["torch"]


def test_the_environment_is_read_once(monkeypatch):
    """At the first operation: looking it up takes longer than the choice itself."""
    kernels, inputs = Kernels(), cast(conv_case(3, 1, False, 0)[0], torch.float32)
    kernels.run("conv", *inputs)
    monkeypatch.setenv(ENVIRONMENT, "cuda")
    kernels.run("conv", *inputs)
    dispatch_bmojo.forget()
    with pytest.raises(ValueError, match="needs CUDA"):
        kernels.run("conv", *inputs)


def test_unknown_backends_are_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"kernel_backend='cudnn': must be one of \['auto', 'hub', 'cuda', 'triton'"):
        BMojoConfig(kernel_backend="cudnn")
    monkeypatch.setenv(ENVIRONMENT, "fast")
    dispatch_bmojo.forget()
    with pytest.raises(ValueError, match=r"BMOJO_KERNEL_BACKEND='fast': must be one of \['auto'"):
        chosen("conv")


def test_the_backend_is_no_part_of_a_caches_identity():
    model = tiny_model()
    with torch.no_grad():
        cache = model(input_ids=torch.arange(9)[None] % VOCAB).past_key_values
        model.config.kernel_backend = "torch"
        cache.check(model.config)


# Packages ------------------------------------------------------------------------------------------------------------
def test_a_broken_package_keeps_its_reason(tmp_path, monkeypatch):
    """`import mamba_ssm` pulls in much and may raise anything."""
    package = tmp_path / "mamba_ssm"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('CUDA driver too old\\nand more lines')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    install(monkeypatch, "causal_conv1d")
    refusal = make_plan("chunk_scan", Situation("cuda", torch.bfloat16)).passed["cuda"]
    assert refusal.reason == "mamba_ssm cannot be imported (RuntimeError: CUDA driver too old)"
    assert chosen("chunk_scan")[-1] == "torch" and chosen("conv")[0] == "cuda"
    with pytest.raises(
        ValueError, match=r"cannot be imported \(RuntimeError: CUDA driver too old\); pip install mamba-ssm"
    ):
        chosen("chunk_scan", backend="cuda")


def test_a_package_without_the_function_keeps_its_reason(monkeypatch):
    install(monkeypatch, "causal_conv1d")
    monkeypatch.delattr(sys.modules["causal_conv1d"], "causal_conv1d_update")
    assert "AttributeError" in make_plan("conv_step", Situation("cuda", torch.bfloat16)).passed["cuda"].reason
    assert chosen("conv")[0] == "cuda"


def test_a_choice_is_made_once(installed, on_gpu, monkeypatch):
    """Decoding imports nothing and makes no plan anew."""
    kernels, inputs = Kernels(), cast(conv_case(1, 1, True, 0)[0], torch.float32)
    with torch.no_grad():
        kernels.run("conv_step", *inputs)
        monkeypatch.setattr(dispatch_bmojo, "make_plan", None)
        monkeypatch.setattr(importlib, "import_module", None)
        kernels.run("conv_step", *inputs)
    assert CALLS == ["causal_conv1d_update"] * 2


def test_a_form_stays_the_same_object(installed):
    """A compiler guards on it: another object of the same kind would compile the model again."""
    first, second = (make_plan(op, Situation("cuda", torch.bfloat16)).forms[0] for op in ("conv", "conv"))
    assert first.call is second.call


def test_nothing_is_imported_for_the_cpu(tmp_path):
    """Neither importing the package nor running it on a CPU imports triton, causal_conv1d or mamba_ssm."""
    code = (
        "import sys, torch; from modeling_bmojo import BMojoConfig, BMojoForCausalLM\n"
        "config = BMojoConfig(vocab_size=9, hidden_size=16, intermediate_size=8, num_hidden_layers=1, "
        "num_attention_heads=2, window_size=3, eidetic_size=2)\n"
        "BMojoForCausalLM(config)(input_ids=torch.arange(8)[None])\n"
        "print(sorted({'causal_conv1d', 'mamba_ssm', 'kernels'} & set(sys.modules)))"
    )
    names = {"causal_conv1d": "raise RuntimeError", "mamba_ssm": "raise RuntimeError"}
    for name, text in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    assert python(code, tmp_path).stdout.strip() == "[]"


def python(code: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs `code` in a process of its own that finds packages in `folders`, the checkout and the tests."""
    root = Path(dispatch_bmojo.__file__).parents[1]
    paths = [*map(str, folders), str(root), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **variables}
    environment.pop(ENVIRONMENT, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


# The one message -----------------------------------------------------------------------------------------------------
@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(dispatch_bmojo.logger, "warning_once", messages.append)
    return messages


def run_all(kernels=None):
    kernels = kernels or Kernels()
    with torch.no_grad():
        kernels.run("conv", *cast(conv_case(3, 1, False, 0)[0], torch.bfloat16))
        kernels.run("conv_step", *cast(conv_case(1, 1, True, 0)[0], torch.bfloat16))
        kernels.run("chunk_scan", *cast(scan_case(3, 1, False, 0)[0], torch.float32))
        kernels.run("conv", *cast(conv_case(3, 1, False, 0)[0], torch.float32))


def test_a_gpu_user_is_told_once_what_is_missing(said, on_gpu, monkeypatch):
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=True))
    run_all()
    run_all(Kernels(BMojoConfig()))
    assert len(said) == 1
    assert "causal_conv1d is not installed; mamba_ssm is not installed" in said[0]
    assert "pip install causal-conv1d mamba-ssm" in said[0] and "triton" not in said[0]


def test_only_what_is_missing_is_named(said, on_gpu, monkeypatch):
    install(monkeypatch, "causal_conv1d")
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=True))
    run_all()
    assert len(said) == 1 and "mamba_ssm is not installed" in said[0] and "causal_conv1d" not in said[0]


@pytest.mark.parametrize("setting", ["torch", "auto"])
def test_nobody_else_is_told_anything(said, setting, monkeypatch):
    """On the CPU, with a forced backend, or with everything installed."""
    run_all()
    monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    monkeypatch.setattr(dispatch_bmojo, "_tf32_allowed", lambda: True)
    if setting == "auto":
        install(monkeypatch, *PACKAGES)
    run_all(Kernels(BMojoConfig(kernel_backend=setting)))
    assert said == []


def test_the_message_goes_through_transformers_logger(on_gpu, monkeypatch, caplog):
    monkeypatch.setattr(dispatch_bmojo, "load", fake_load(monkeypatch, triton=False))
    monkeypatch.setattr(dispatch_bmojo.logger, "propagate", True)
    with caplog.at_level("WARNING"):
        run_all()
        run_all()
    assert [r.levelname for r in caplog.records if "explain_kernels" in r.getMessage()] == ["WARNING"]


# Models --------------------------------------------------------------------------------------------------------------
def tiny_model(dtype=torch.float32, **fields):
    model = BMojoForCausalLM(BMojoConfig(**SIZES | MIXED_LAYERS | fields))
    return randomize_(model).to(dtype).eval()


def read_and_decode(model, ids, mask):
    """Logits of one prefill, of a second one that continues, and of tokens one at a time, with left pads."""
    with torch.no_grad():
        outputs = [model(input_ids=ids[:, :13], attention_mask=mask[:, :13])]
        for start, stop in [(13, 20), *((t, t + 1) for t in range(20, ids.shape[1]))]:
            past = outputs[0].past_key_values
            outputs.append(model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past))
    return torch.cat([output.logits for output in outputs], dim=1)


def padded_batch(columns=26):
    ids = torch.randint(0, VOCAB, (2, columns))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("innovation", ["output", "state"])
def test_torch_equals_auto_on_the_cpu_exactly(innovation, installed):
    """And with every package installed, no tensor of the CPU reaches any of them."""
    batch = padded_batch()
    auto, forced = (
        read_and_decode(tiny_model(innovation=innovation, kernel_backend=backend), *batch)
        for backend in ("auto", "torch")
    )
    assert torch.equal(auto, forced) and CALLS == []


@pytest.mark.parametrize("innovation", ["output", "state"])
@pytest.mark.parametrize("ssm_type", ["mamba2", "mamba"])
def test_a_model_on_the_packages_equals_a_model_on_torch(innovation, ssm_type, installed, on_gpu):
    """Prefill, a prefill that continues, decoding and pads: the whole path of states through the wrappers."""
    batch, fields = padded_batch(), dict(innovation=innovation, ssm_type=ssm_type)
    wanted = read_and_decode(tiny_model(kernel_backend="torch", **fields), *batch)
    assert CALLS == []
    got = read_and_decode(tiny_model(**fields), *batch)
    other = "selective_scan_fn" if ssm_type == "mamba2" else "mamba_chunk_scan_combined"
    assert set(CALLS) == set(DECLARED) - {other}
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ssm_type", ["mamba2", "mamba"])
def test_a_model_on_triton_equals_a_model_on_torch(ssm_type):
    """In Triton's interpreter, on the CPU; the scan, which has no Triton kernel, stays what it was."""
    batch = padded_batch()
    wanted = read_and_decode(tiny_model(ssm_type=ssm_type), *batch)
    got = read_and_decode(tiny_model(ssm_type=ssm_type, kernel_backend="triton"), *batch)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_triton_is_passed_over_on_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch_bmojo, "unavailable", lambda device: f"{device} is too old")
    assert chosen("expiry") == ["torch"]
    assert make_plan("expiry", Situation("cuda", torch.float32)).passed["triton"].reason == "cuda is too old"


def test_training_on_the_packages_equals_training_on_torch(installed, on_gpu):
    ids = torch.randint(0, VOCAB, (2, 3 * WINDOW))
    gradients = []
    for backend in ("torch", "auto"):
        model = tiny_model(kernel_backend=backend).train()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(CALLS) == {"causal_conv1d_fn", "mamba_chunk_scan_combined"}
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-3, atol=1e-5, msg=name)


def test_the_scan_of_a_bf16_model_gets_bf16_and_an_fp32_state(installed, on_gpu, monkeypatch):
    """At the model's precision the kernels read half as much; time steps, decays and state stay in fp32."""
    seen = []
    real = kernel_stubs.mamba_chunk_scan_combined

    def spy(x, dt, A, B, C, chunk_size, D=None, **kwargs):
        y, state = real(x, dt, A, B, C, chunk_size, D=D, **kwargs)
        seen.append((x.dtype, dt.dtype, A.dtype, B.dtype, D.dtype, y.dtype, state.dtype))
        return y, state

    monkeypatch.setattr(sys.modules["mamba_ssm.ops.triton.ssd_combined"], "mamba_chunk_scan_combined", spy)
    model = tiny_model(torch.bfloat16)
    with torch.no_grad():
        cache = model(input_ids=torch.randint(0, VOCAB, (1, 9))).past_key_values
    narrow, wide = torch.bfloat16, torch.float32
    assert set(seen) == {(narrow, wide, wide, narrow, wide, narrow, wide)}
    assert cache.layers[0].ssm.dtype == wide


def test_narrow_inputs_are_widened_for_forms_that_need_it():
    """A scan that falls back to torch computes in fp32 whatever its inputs came in."""
    inputs = cast(scan_case(9, 2, True, seed=1)[0], torch.float32)
    narrow = [value.bfloat16() if index in (0, 3, 4) else value for index, value in enumerate(inputs)]
    wide = [value.bfloat16().float() if index in (0, 3, 4) else value for index, value in enumerate(inputs)]
    for got, want in zip(Kernels().run("chunk_scan", *narrow), TORCH["chunk_scan"](*wide)):
        assert torch.equal(got, want)


def test_the_configuration_is_obeyed_at_every_call():
    model = tiny_model()
    ids = torch.arange(9)[None] % VOCAB
    model(input_ids=ids)
    model.config.kernel_backend = "cuda"
    with pytest.raises(ValueError, match="kernel_backend='cuda': cannot run operation 'conv'"):
        model(input_ids=ids)


def test_copies_keep_their_own_setting():
    model = tiny_model()
    other = copy.deepcopy(model)
    other.config.kernel_backend = "torch"
    assert model.model.layers[0].fading.kernels.config.kernel_backend == "auto"
    assert other.model.layers[0].fading.conv.kernels.config is other.config
    restored = pickle.loads(pickle.dumps(model))
    assert restored.model.layers[0].self_attn.kernels.config.kernel_backend == "auto"


@pytest.mark.parametrize("place", ["torch", "cuda", "hub"])
def test_compiles_without_graph_breaks(place, monkeypatch):
    """The choice is a constant to the compiler, also where the form is a wrapper around a function from elsewhere."""
    if place == "cuda":
        install(monkeypatch, *PACKAGES)
        monkeypatch.setattr(sys.modules["causal_conv1d"], "causal_conv1d_fn", traceable_conv)
        monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mixer = tiny_model().model.layers[0].fading
    if place == "hub":
        monkeypatch.setattr(kernel_stubs, "causal_conv1d_fn", traceable_conv)
        mixer.kernels.hub = {"conv": kernels_hub.hub_form("conv", LAYERS["causal_conv1d_fn"]())}
        mixer.kernels.hub_device = "cpu"
    compiled = torch.compile(lambda x, h: mixer.conv(mixer.conv(x, h), None), fullgraph=True, backend="eager")
    x, history = torch.randn(2, 9, 40), torch.randn(2, 3, 40)
    for _ in range(3):
        torch.testing.assert_close(compiled(x, history), mixer.conv(mixer.conv(x, history), None), rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    if place == "torch":
        step = torch.compile(mixer._scan, fullgraph=True, backend="eager")
        mixed, keys, dt = torch.randn(2, 9, 16), torch.randn(2, 9, 24), torch.randn(2, 9, 4)
        arguments = (mixed, keys, dt, torch.tensor([9, 5]), 9, None)
        torch.testing.assert_close(step(*arguments), mixer._scan(*arguments))
    torch._dynamo.reset()


def traceable_conv(x, weight, bias=None, initial_states=None, activation=None):
    """`causal_conv1d_fn` without the stub's checks, which a compiler cannot trace."""
    start = torch.zeros_like(x[:, :, : weight.shape[1] - 1]) if initial_states is None else initial_states
    return torch.nn.functional.conv1d(torch.cat([start, x], 2), weight[:, None], bias, groups=weight.shape[0])


# explain_kernels -----------------------------------------------------------------------------------------------------
def test_explain_on_the_cpu(capsys, installed):
    rows = explain_kernels(tiny_model())
    printed = capsys.readouterr().out
    assert [row.operation for row in rows] == list(OPERATIONS)
    assert all(row.inference.startswith("torch: ") and row.training == row.inference for row in rows)
    assert [row.operation for row in rows if not row.used] == ["s6_scan", "s6_step"]
    assert "s6_scan (not in this model)" in printed and "conv (not in this model)" not in printed
    assert "B'MOJO kernels for torch.float32 on cpu, kernel_backend='auto'" in printed
    assert (
        "cuda for conv, conv_step, chunk_scan, scan_step, s6_scan, s6_step" in printed
        and "these are on 'cpu'" in printed
    )


def test_explain_says_what_each_operation_uses_on_a_gpu(capsys, monkeypatch):
    install(monkeypatch, "causal_conv1d")
    rows = {row.operation: row for row in explain_kernels(tiny_model(), device="cuda", dtype=torch.bfloat16)}
    printed = capsys.readouterr().out
    assert rows["conv"].inference == rows["conv"].training == "causal-conv1d: causal_conv1d_fn"
    assert rows["conv_step"][1:3] == ("causal-conv1d: causal_conv1d_update", "triton: causal_conv")
    assert rows["conv_step"].passed["cuda"][0] == "in training, causal_conv1d_update has no backward"
    assert rows["chunk_scan"].inference == "torch: ssm_ops.chunk_ssd"
    assert rows["chunk_scan"].passed["cuda"] == (
        "mamba_ssm is not installed",
        "pip install mamba-ssm (it compiles with nvcc)",
    )
    assert rows["memory_attention"].inference == rows["memory_attention"].training == "triton: triton_block_attention"
    assert (
        "cuda for chunk_scan, scan_step, s6_scan, s6_step: mamba_ssm is not installed (pip install mamba-ssm" in printed
    )
    assert "conv_step" in printed and "causal-conv1d: causal_conv1d_update" in printed


def test_explain_looks_at_the_models_sizes(installed, capsys):
    config = BMojoConfig(ssm_conv_kernel=5, head_dim=512, attention_dropout=0.1, ssm_type="mamba")
    rows = {row.operation: row for row in explain_kernels(config, "cuda", torch.bfloat16)}
    assert rows["conv"].inference.startswith("triton") and "2 to 4 taps" in rows["conv"].passed["cuda"][0]
    assert rows["memory_attention"].inference.startswith("torch")
    assert "at most 256 channels, the model's have 512" in rows["memory_attention"].passed["triton"][0]
    assert rows["s6_scan"].inference == "mamba-ssm: selective_scan_fn"
    config = BMojoConfig(attention_dropout=0.1)
    row = {row.operation: row for row in explain_kernels(config, "cuda", torch.bfloat16)}["memory_attention"]
    assert row.inference.startswith("triton") and row.training.startswith("torch")
    assert row.passed["triton"][0] == "in training, it has no dropout"


def test_explain_shows_what_is_forced_and_what_fails(capsys, monkeypatch):
    rows = {row.operation: row for row in explain_kernels(BMojoConfig(kernel_backend="cuda"), device="cpu")}
    assert rows["conv"].inference.startswith("error: kernel_backend='cuda': cannot run operation 'conv'")
    assert rows["expiry"].inference.startswith("torch") and "error: kernel_backend='cuda'" in capsys.readouterr().out
    monkeypatch.setenv(ENVIRONMENT, "torch")
    dispatch_bmojo.forget()
    assert all(row.inference.startswith("torch") for row in explain_kernels(BMojoConfig(kernel_backend="cuda")))
    assert "BMOJO_KERNEL_BACKEND='torch'" in capsys.readouterr().out


def test_explain_marks_what_a_model_does_not_have(capsys):
    rows = {row.operation: row for row in explain_kernels(BMojoConfig(layer_types=["sliding_attention"] * 24))}
    assert [op for op, row in rows.items() if row.used] == ["expiry", "memory_attention"]
    assert "chunk_scan (not in this model)" in capsys.readouterr().out


def test_explain_tells_nobody_off(said, capsys):
    explain_kernels(device="cuda", dtype=torch.bfloat16)
    assert said == [] and "is not installed" in capsys.readouterr().out


def test_explain_wants_a_model():
    with pytest.raises(ValueError, match=r"model_or_config=Linear: must be a B'MOJO model or BMojoConfig"):
        explain_kernels(torch.nn.Linear(1, 1))


# The hub -------------------------------------------------------------------------------------------------------------
def test_without_kernels_asking_for_them_is_transformers_error():
    model = tiny_model()
    with pytest.raises(ValueError, match="Kernels are not available"):
        model.set_use_kernels(True)
    assert "_kernel_funcs" not in model.__dict__
    model.set_use_kernels(False)
    assert model.model.layers[0].fading.kernels.hub is None


HUB = """
import sys, torch
import kernels
from kernel_stubs import CALLS, LAYERS
from tiny import MIXED_LAYERS, SIZES, VOCAB
from modeling_bmojo import BMojoConfig, BMojoForCausalLM, dispatch_bmojo, explain_kernels
from transformers import AutoModelForCausalLM
from transformers.models.mamba2 import modeling_mamba2

class Local:
    def __init__(self, layer):
        self.layer = layer
    def load(self):
        return self.layer

def mixers(model):
    return [layer.fading for layer in model.model.layers if hasattr(layer, "fading")]

torch.manual_seed(0)
BMojoForCausalLM(BMojoConfig(**SIZES | MIXED_LAYERS)).save_pretrained(sys.argv[1])
load = AutoModelForCausalLM.from_pretrained
ids = torch.randint(0, VOCAB, (2, 11))

def read(model):
    with torch.no_grad():
        first = model(input_ids=ids)
        return first.logits, model(input_ids=ids[:, :1], past_key_values=first.past_key_values).logits

plain = load(sys.argv[1])
wanted = read(plain)
nowhere = load(sys.argv[1], use_kernels=True)  # transformers' mapping has kernels for GPUs only
assert mixers(nowhere)[0].kernels.hub == {}, mixers(nowhere)[0].kernels.hub
assert all(torch.equal(a, b) for a, b in zip(read(nowhere), wanted)) and CALLS == []

kernels.register_kernel_mapping({name: {"cpu": Local(layer)} for name, layer in LAYERS.items()})
model = load(sys.argv[1], use_kernels=True)
assert set(mixers(model)[0].kernels.hub) == {"conv", "conv_step", "chunk_scan", "scan_step", "s6_scan", "s6_step"}
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(read(model), wanted))
assert set(CALLS) == {"causal_conv1d_fn", "causal_conv1d_update", "selective_state_update"}, CALLS  # fp32: no TF32
CALLS.clear()
dispatch_bmojo.forget()
dispatch_bmojo._tf32_allowed = lambda: True
assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(read(model), wanted))
assert "mamba_chunk_scan_combined" in CALLS
rows = {row.operation: row for row in explain_kernels(model)}
assert rows["conv"].inference == "hub: causal_conv1d_fn", rows["conv"]
assert rows["conv_step"].training == "torch: ssm_ops.causal_conv", rows["conv_step"]
assert rows["expiry"].inference.startswith("torch")

CALLS.clear()
model.train()
model(input_ids=ids, labels=ids).loss.backward()
assert set(CALLS) == {"causal_conv1d_fn", "mamba_chunk_scan_combined"}, CALLS
model.eval()

CALLS.clear()  # another model, and transformers' own, are as they were
assert all(torch.equal(a, b) for a, b in zip(read(plain), wanted)) and CALLS == []
own = modeling_mamba2.causal_conv1d_fn
assert own.forward.__func__ is type(own).forward
model.config.kernel_backend = "hub"
read(model)
assert set(CALLS) == {"causal_conv1d_fn", "causal_conv1d_update", "mamba_chunk_scan_combined", "selective_state_update"}
plain.config.kernel_backend = "hub"
try:
    read(plain)
except ValueError as error:
    assert "hub kernels were not asked for; load with from_pretrained(..., use_kernels=True)" in str(error), error
else:
    raise AssertionError("a forced backend that nobody loaded must be an error")
model.config.kernel_backend = "auto"
model.set_use_kernels(False)
CALLS.clear()
assert all(torch.equal(a, b) for a, b in zip(read(model), wanted)) and CALLS == []
print("as it should")
"""


def test_use_kernels_reaches_the_operations(tmp_path):
    """`from_pretrained(..., use_kernels=True)`, the package `kernels` stood in for, with repositories for the CPU."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text((Path(__file__).parent / "stub_kernels.py").read_text())
    (tmp_path / "kernels-0.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
    (tmp_path / "kernels-0.dist-info" / "METADATA").write_text(metadata)
    code = f"import sys; sys.argv = ['hub', {str(tmp_path / 'model')!r}]\n{HUB}"
    assert python(code, tmp_path).stdout.strip().endswith("as it should")
