"""One dispatch per operation: every call chooses its implementation from the tensors it is given.

    conv, conv_step        the short causal convolution, of many tokens and of one
    chunk_scan, scan_step  the Mamba-2 recurrence, of many tokens and of one
    s6_scan, s6_step       the same of the S6 form
    innovation, expiry     the innovation of every token, and which tokens are kept (Algorithm 1, line 3)
    memory_attention       attention over [eidetic | fading | local] (Algorithm 1, line 5)

In the order of preference: "hub" (kernels that transformers fetched, `use_kernels=True`), "cuda" (causal-conv1d and
mamba-ssm), "triton" (this package's kernels), "torch". All forms of an operation have the torch form's signature. A
tensor on the CPU never reaches a CUDA kernel. docs/kernels.md says what is chosen when.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .attention_ops import memory_attention
from .kernels_attention import triton_block_attention
from .kernels_common import INTERPRETED, unavailable
from .kernels_cuda import DTYPES, KERNELS, Kernel, load
from .kernels_memory import output_innovation as triton_innovation
from .kernels_memory import select as triton_select
from .kernels_ssm import causal_conv as triton_conv
from .kernels_ssm import step_ssd as triton_step
from .memory_ops import output_innovation, select
from .s6_ops import chunk_s6, step_s6
from .ssm_ops import causal_conv, chunk_ssd, step_ssd


# A fixed name: a checkpoint that brings its own copy of this file shares the logger, and with it "once per process".
logger = logging.get_logger("modeling_bmojo.kernels")

ENVIRONMENT = "BMOJO_KERNEL_BACKEND"
KERNEL_BACKENDS = ("auto", "hub", "cuda", "triton", "torch")
PREFERENCE = ("hub", "cuda", "triton", "torch")
TORCH = {
    "conv": causal_conv,
    "conv_step": causal_conv,
    "chunk_scan": chunk_ssd,
    "scan_step": step_ssd,
    "s6_scan": chunk_s6,
    "s6_step": step_s6,
    "innovation": output_innovation,
    "expiry": select,
    "memory_attention": memory_attention,
}
MAX_HEAD_DIM = 256  # of the Triton attention
SCANS = ("chunk_scan", "scan_step", "s6_scan", "s6_step")
# Which operations a backend is for. Forcing it is about these; others are chosen as if nothing had been forced.
COVERED = {
    "hub": frozenset(KERNELS),
    "cuda": frozenset(KERNELS),
    "triton": frozenset({"conv", "conv_step", "scan_step", "innovation", "expiry", "memory_attention"}),
    "torch": frozenset(TORCH),
}
OPERATIONS = tuple(TORCH)


class Form(NamedTuple):
    """One implementation of one operation.

    label: its name for people. call: with the torch form's signature; None in a `Plan` for a hub kernel, which belongs
    to a model.
    narrow: takes x, B and C of a scan in the model's dtype. refuse: of a call's arguments, why it cannot, or None.
    backward: gradients flow through it.
    """

    backend: str
    label: str
    call: Callable | None
    narrow: bool = False
    refuse: Callable | None = None
    backward: bool = True


def triton_forms() -> dict[str, Form]:
    """The package's own kernels by operation. Runs once, when triton has been imported."""
    return {
        "conv": triton_form(triton_conv),
        "conv_step": triton_form(triton_conv),
        "scan_step": triton_form(triton_step),
        "innovation": triton_form(triton_innovation),
        "expiry": triton_form(triton_select),
        "memory_attention": triton_attention_form(triton_block_attention),
    }


def triton_form(call: Callable, refuse: Callable | None = None, backward: bool = True) -> Form:
    """The table's entry for a Triton kernel with the signature of the torch form."""
    return Form("triton", f"triton: {call.__name__}", call, refuse=refuse, backward=backward)


def triton_attention_form(call: Callable) -> Form:
    """The entry for a kernel `(query, sets, block, scaling) -> out`, which forms no weights and knows no dropout."""

    def attention(query, sets, block, scaling, dropout=0.0, implementation="sdpa", columns=None):
        return call(query, sets, block, scaling), None

    def refuse(query, sets, block, scaling, dropout=0.0, implementation="sdpa", columns=None) -> str | None:
        if columns is not None or implementation != "sdpa":
            return "attention weights, or attn_implementation='eager', were asked for"
        if query.shape[-1] > MAX_HEAD_DIM:
            return f"it holds heads of at most {MAX_HEAD_DIM} channels, the model's have {query.shape[-1]}"
        return "it has no dropout" if dropout else None

    return triton_form(attention, refuse)._replace(label=f"triton: {call.__name__}")


class Refusal(NamedTuple):
    """Why a backend is passed over, and what would help. package: what would have to be installed, or None."""

    reason: str
    remedy: str
    package: str | None = None


class Plan(NamedTuple):
    """forms: to be tried in this order. passed: backend to `Refusal`. forced: the setting that forces, or None."""

    forms: tuple[Form, ...]
    passed: dict[str, Refusal]
    forced: str | None


class Situation(NamedTuple):
    """What a choice depends on: device type, dtype, whether gradients are recorded, the setting, loaded hub kernels.

    hub: the operations with a hub kernel for this device; None if nobody asked for hub kernels.
    """

    device: str
    dtype: torch.dtype
    grad: bool = False
    backend: str = "auto"
    hub: tuple[str, ...] | None = None


class Kernels:
    """The operations of one module, each call dispatched.

    Args:
        config: whose `kernel_backend` is obeyed, read at every call; None is "auto".
    """

    def __init__(self, config: PreTrainedConfig | None = None):
        self.config = config
        # What transformers loaded from the hub for this model, by operation; None if nobody asked.
        self.hub: dict[str, Form] | None = None
        self.hub_device: str | None = None

    @property
    def backend(self) -> str:
        """The configuration's wish."""
        if self.config is None:
            return "auto"
        if torch.compiler.is_compiling():
            return self.config.kernel_backend
        # Past transformers' own attribute lookup, which takes longer than the whole choice.
        return object.__getattribute__(self.config, "kernel_backend")

    def order(self, op: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
        """The backends that a call of `op` on tensors of this kind tries, in order; gradients as recorded now.

        Raises:
            ValueError: if a forced backend cannot run `op`.
        """
        hub = None
        if self.hub is not None:
            hub = tuple(self.hub) if self.hub_device == device else ()
        return _order(op, device, dtype, torch.is_grad_enabled(), self.backend, hub)

    def run(self, op: str, *args, **kwargs):
        """Runs `op`. The first argument is the tensor whose device and dtype decide; returns what the torch form does.

        Raises:
            ValueError: if a forced backend cannot run this call; it names operation, backend, reason and remedy.
        """
        for backend in self.order(op, device_type(args[0]), args[0].dtype):
            form = self.hub[op] if backend == "hub" else _FORMS[backend, op]
            reason = None if form.refuse is None else form.refuse(*args, **kwargs)
            if reason is None:
                return form.call(*(_widened(args) if op in SCANS and not form.narrow else args), **kwargs)
        source, backend = _wish(self.backend)
        raise _unavailable(op, source, backend, Refusal(reason, "set it to 'auto'"))

    def input_dtype(self, op: str, x: torch.Tensor, wide: torch.dtype) -> torch.dtype:
        """The dtype in which the scan `op` wants x, B and C: x's own, or `wide`."""
        backend = self.order(op, device_type(x), x.dtype)[0]
        form = self.hub[op] if backend == "hub" else _FORMS[backend, op]
        return x.dtype if form.narrow else wide


def device_type(tensor: torch.Tensor) -> str:
    """The kind of device that a tensor is on, "cuda" for AMD's GPUs too."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def _widened(args: tuple) -> tuple:
    """x, dt, A, B, C, ... of a scan, with x, B and C in the dtype of the time steps."""
    x, dt, A, B, C, *rest = args
    wide = torch.promote_types(x.dtype, dt.dtype)
    return (x.to(wide), dt, A, B.to(wide), C.to(wide), *rest)


# What is there -------------------------------------------------------------------------------------------------------
# Forms by backend and operation, hub kernels excepted. A backend's forms enter together, when it is first considered:
# a compiler that is tracing a model must not see this grow from one operation to the next.
_FORMS: dict[tuple[str, str], Form] = {
    ("torch", op): Form("torch", f"torch: {form.__module__.rpartition('.')[2]}.{form.__name__}", form)
    for op, form in TORCH.items()
}
_LOADED: set[str] = set()
_ORDERS: dict[tuple, tuple[str, ...]] = {}
_TOLD: set[str] = set()


def forget() -> None:
    """Forgets what was imported, chosen and read from the environment: for tests, and after installing a package."""
    for key in [key for key in _FORMS if key[0] != "torch"]:
        del _FORMS[key]
    for memory in (_LOADED, _ORDERS, _TOLD):
        memory.clear()
    load.cache_clear()
    environment.cache_clear()


def _load_cuda() -> None:
    for op, kernel in KERNELS.items():
        function, _ = load(kernel.module, kernel.name)
        if function is not None:
            label = f"{kernel.package}: {kernel.name}"
            _FORMS["cuda", op] = Form(
                "cuda", label, kernel.form(function), kernel.narrow, kernel.refuse, kernel.backward
            )


def _load_triton() -> None:
    if load("triton", "jit")[0] is not None:
        _FORMS.update({("triton", op): form for op, form in triton_forms().items()})


def _form(backend: str, op: str) -> Form | None:
    if backend not in _LOADED:
        _LOADED.add(backend)
        {"cuda": _load_cuda, "triton": _load_triton}.get(backend, tuple)()
    return _FORMS.get((backend, op))


# The choice ----------------------------------------------------------------------------------------------------------
@torch.compiler.assume_constant_result
def _order(
    op: str, device: str, dtype: torch.dtype, grad: bool, backend: str, hub: tuple[str, ...] | None
) -> tuple[str, ...]:
    """The backends of `make_plan`, remembered. To torch.compile it is a constant: nothing in here is traced."""
    exact = dtype == torch.float32 and (device == "cuda" or bool(hub)) and not _tf32_allowed()
    key = (op, device, dtype, grad, backend, hub, exact)
    order = _ORDERS.get(key)
    if order is None:
        plan = make_plan(op, Situation(device, dtype, grad, backend, hub))
        order = _ORDERS[key] = tuple(form.backend for form in plan.forms)
        if device == "cuda" and _wish(backend)[1] == "auto":
            _tell_what_is_missing(plan)
    return order


def make_plan(op: str, situation: Situation) -> Plan:
    """Which implementations of `op`, one of `OPERATIONS`, a call in this situation may use, best first.

    The environment variable wins over the situation's backend.

    Raises:
        ValueError: for an unknown backend, or a forced one that cannot run `op` in this situation.
    """
    source, backend = _wish(situation.backend)
    if backend != "auto" and op in COVERED[backend]:
        form = _candidate(backend, op, situation, forced=True)
        if isinstance(form, Refusal):
            raise _unavailable(op, source, backend, form)
        return Plan((form,), {}, source)
    forms, passed = [], {}
    for name in PREFERENCE:
        form = _candidate(name, op, situation, forced=False)
        if isinstance(form, Refusal):
            passed[name] = form
        else:
            forms.append(form)
    return Plan(tuple(forms), passed, None)


@functools.cache
def environment() -> str | None:
    """The environment variable, as it was when the process first asked; "" counts as unset."""
    return os.environ.get(ENVIRONMENT) or None


def _wish(backend: str) -> tuple[str, str]:
    """The setting that decides, and its value."""
    source, value = "kernel_backend", backend
    if environment() is not None:
        source, value = ENVIRONMENT, environment()
    if value not in KERNEL_BACKENDS:
        raise ValueError(f"{source}={value!r}: must be one of {list(KERNEL_BACKENDS)}; pick one of them.")
    return source, value


def _unavailable(op: str, source: str | None, backend: str, refusal: Refusal) -> ValueError:
    return ValueError(f"{source}={backend!r}: cannot run operation {op!r}: {refusal.reason}; {refusal.remedy}.")


def _candidate(backend: str, op: str, situation: Situation, forced: bool) -> Form | Refusal:
    """The form of `op` on `backend`, or why there is none in this situation."""
    if op not in COVERED[backend]:
        return Refusal("it has no such operation", "")
    if backend == "torch":
        return _FORMS["torch", op]
    if backend == "triton":
        return _triton_candidate(op, situation, forced)
    kernel = KERNELS[op]
    refusal = _hub_refusal(op, situation) if backend == "hub" else _device_refusal(situation.device)
    refusal = refusal or _kernel_refusal(kernel, situation, forced)
    if refusal is not None:
        return refusal
    if backend == "hub":
        return Form("hub", f"hub: {kernel.name}", None, kernel.narrow, kernel.refuse, kernel.backward)
    form, remedy = _form("cuda", op), f"pip install {kernel.package} (it compiles with nvcc)"
    return form or Refusal(load(kernel.module, kernel.name)[1], remedy, kernel.package)


def _device_refusal(device: str) -> Refusal | None:
    if device == "cuda":
        return None
    return Refusal(f"it needs CUDA tensors, these are on {device!r}", "move the model to a GPU, or set 'auto'")


def _hub_refusal(op: str, situation: Situation) -> Refusal | None:
    if situation.hub is None:
        return Refusal("hub kernels were not asked for", "load with from_pretrained(..., use_kernels=True)")
    if op not in situation.hub:
        return Refusal(f"transformers loaded no hub kernel of it for {situation.device!r}", "set 'auto'")
    return None


def _kernel_refusal(kernel: Kernel, situation: Situation, forced: bool) -> Refusal | None:
    """What an upstream function cannot do, wherever it comes from."""
    if situation.dtype not in DTYPES:
        return Refusal(f"it does not compute in {situation.dtype}", "load the model in float32, bfloat16 or float16")
    if kernel.rounds and situation.dtype == torch.float32 and not forced and not _tf32_allowed():
        return Refusal(
            "it multiplies fp32 numbers in TF32, which PyTorch's settings do not allow",
            "torch.set_float32_matmul_precision('high') allows it, and forcing the backend does",
        )
    return _backward_refusal(kernel.name, kernel.backward, situation)


def _backward_refusal(name: str, backward: bool, situation: Situation) -> Refusal | None:
    if backward or not situation.grad:
        return None
    return Refusal(f"{name} has no backward", "call under torch.no_grad(), or set 'auto'")


def _triton_candidate(op: str, situation: Situation, forced: bool) -> Form | Refusal:
    # Triton's interpreter runs kernels on the CPU, slowly: only for who forces them.
    refusal = None if forced and INTERPRETED else _device_refusal(situation.device)
    if refusal is not None:
        return refusal
    jit, reason = load("triton", "jit")
    if jit is None:
        return Refusal(reason, "pip install triton", "triton")
    too_old = unavailable("cuda") if situation.device == "cuda" and torch.cuda.is_available() else None
    if too_old is not None:
        return Refusal(too_old, "set 'auto'")
    form = _form("triton", op)
    if form is None:
        return Refusal("this version has no Triton kernel of it", "set 'auto'")
    return _backward_refusal(form.label, form.backward, situation) or form


def _tf32_allowed() -> bool:
    """PyTorch's switch for fp32 matrix products on CUDA; off by default."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32


def _tell_what_is_missing(plan: Plan) -> None:
    """Once per process: which packages would make this GPU faster."""
    better = PREFERENCE[: PREFERENCE.index(plan.forms[0].backend)]
    if _TOLD or not any(plan.passed[name].package for name in better):
        return
    wanted = {kernel.package: (kernel.module, kernel.name) for kernel in KERNELS.values()} | {
        "triton": ("triton", "jit")
    }
    missing = {package: load(*place)[1] for package, place in wanted.items()}
    names = [package for package, reason in missing.items() if reason]
    _TOLD.update(names)
    logger.warning_once(
        f"B'MOJO runs on a GPU without its fastest kernels: {'; '.join(filter(None, missing.values()))}. The results "
        f"are the same, only slower. Install them with: pip install {' '.join(names)} (causal-conv1d and mamba-ssm "
        "compile with nvcc). modeling_bmojo.explain_kernels(model) shows what each operation uses."
    )
