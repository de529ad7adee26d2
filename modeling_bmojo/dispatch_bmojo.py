"""One dispatch per operation: every call chooses its implementation from the tensors it is given.

    conv, conv_step        the short causal convolution, of many tokens and of one
    chunk_scan, scan_step  the Mamba-2 recurrence, of many tokens and of one
    s6_scan, s6_step       the same of the S6 form
    delta_scan, delta_step the same of the gated delta rule
    kalma_scan, kalma_step the same of Gated KalmaNet
    innovation, expiry     the innovation of every token, and which tokens are kept (Algorithm 1, line 3)
    memory_attention       attention over [eidetic | fading | local] (Algorithm 1, line 5)

In the order of preference: "hub" (kernels that transformers fetched, `use_kernels=True`), "cuda" (causal-conv1d and
mamba-ssm), "triton" (this package's kernels), "torch". All forms of an operation have the torch form's signature. A
tensor on the CPU never reaches a CUDA kernel. docs/kernels.md says what is chosen when.
"""

import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .attention_ops import memory_attention
from .delta_ops import chunk_delta, step_delta
from .kalma_ops import chunk_kalma, step_kalma
from .kernels_attention import KERNELS as TRITON_ATTENTION
from .kernels_common import INTERPRETED, tf32_allowed, unavailable
from .kernels_cuda import DTYPES, KERNELS, load
from .kernels_forms import KERNEL_BACKENDS, PREFERENCE, Form, torch_form
from .kernels_memory import KERNELS as TRITON_MEMORY
from .kernels_ssm import KERNELS as TRITON_SSM
from .memory_ops import output_innovation, select
from .s6_ops import chunk_s6, step_s6
from .ssm_ops import causal_conv, chunk_ssd, step_ssd


# A fixed name: a checkpoint that brings its own copy of this file shares the logger, and with it "once per process".
logger = logging.get_logger("modeling_bmojo.kernels")

ENVIRONMENT = "BMOJO_KERNEL_BACKEND"
TORCH = {
    "conv": causal_conv,
    "conv_step": causal_conv,
    "chunk_scan": chunk_ssd,
    "scan_step": step_ssd,
    "s6_scan": chunk_s6,
    "s6_step": step_s6,
    "delta_scan": chunk_delta,
    "delta_step": step_delta,
    "kalma_scan": chunk_kalma,
    "kalma_step": step_kalma,
    "innovation": output_innovation,
    "expiry": select,
    "memory_attention": memory_attention,
}
TRITON = {**TRITON_SSM, **TRITON_MEMORY, **TRITON_ATTENTION}
OPERATIONS = tuple(TORCH)
SCANS = ("chunk_scan", "scan_step", "s6_scan", "s6_step", "delta_scan", "delta_step", "kalma_scan", "kalma_step")
# Which operations a backend is for. Forcing it is about these; others are chosen as if nothing had been forced.
COVERED = {"hub": KERNELS.keys(), "cuda": KERNELS.keys(), "triton": TRITON.keys(), "torch": TORCH.keys()}
# Hub kernels belong to a model, and are not here. What can be imported of "cuda" enters together, when that is first
# considered: a compiler that is tracing a model must not see this grow from one operation to the next.
FORMS: dict[str, dict[str, Form]] = {
    "cuda": {},
    "triton": TRITON,
    "torch": {op: torch_form(call) for op, call in TORCH.items()},
}
_ORDERS: dict[tuple, tuple[str, ...]] = {}
_TOLD: set[str] = set()


class Refusal(NamedTuple):
    """Why a backend is passed over, and what would help. package: what would have to be installed, or None."""

    reason: str
    remedy: str
    package: str | None = None


class Choice(NamedTuple):
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

    def forms(self, op: str, x: torch.Tensor) -> list[Form]:
        """Return the forms that a call of `op` on tensors like `x` tries, in order; gradients as recorded now.

        Raises:
            ValueError: if a forced backend cannot run `op`.
        """
        device, hub = device_type(x), None
        if self.hub is not None:
            hub = tuple(self.hub) if self.hub_device == device else ()
        order = _order(op, device, x.dtype, torch.is_grad_enabled(), self.backend, hub)
        return [self.hub[op] if backend == "hub" else FORMS[backend][op] for backend in order]

    def run(self, op: str, *args, **kwargs):
        """Run `op`. The first argument is the tensor whose device and dtype decide; returns what the torch form does.

        Raises:
            ValueError: if a forced backend cannot run this call; it names operation, backend, reason and remedy.
        """
        for form in self.forms(op, args[0]):
            reason = None if form.refuse is None else form.refuse(*args, **kwargs)
            if reason is None:
                return form.call(*(_widened(args) if op in SCANS and not form.narrow else args), **kwargs)
        raise _unavailable(op, *_wish(self.backend), Refusal(reason, "set it to 'auto'"))

    def input_dtype(self, op: str, x: torch.Tensor, wide: torch.dtype) -> torch.dtype:
        """Return the dtype in which the scan `op` wants x, B and C: x's own, or `wide`."""
        return x.dtype if self.forms(op, x)[0].narrow else wide


def device_type(tensor: torch.Tensor) -> str:
    """Return the kind of device that a tensor is on, "cuda" for AMD's GPUs too."""
    return "cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type


def _widened(args: tuple) -> tuple:
    """x, dt, A, B, C, ... of a scan, with x, B and C in the dtype of the time steps."""
    x, dt, A, B, C, *rest = args
    if x.dtype == dt.dtype == B.dtype == C.dtype:
        return args
    wide = torch.promote_types(x.dtype, dt.dtype)
    return (x.to(wide), dt, A, B.to(wide), C.to(wide), *rest)


# The choice ----------------------------------------------------------------------------------------------------------
@torch.compiler.assume_constant_result
def _order(op: str, *situation) -> tuple[str, ...]:
    """Return the backends of `choose`, remembered. To torch.compile it is a constant: nothing in here is traced.

    Takes the fields of `Situation` one by one, because a compiler takes only plain values for constants.
    """
    device, dtype, _, backend, hub = situation
    exact = dtype == torch.float32 and (device == "cuda" or bool(hub)) and not tf32_allowed()
    order = _ORDERS.get((op, situation, exact))
    if order is None:
        choice = choose(op, Situation(*situation))
        order = _ORDERS[op, situation, exact] = tuple(form.backend for form in choice.forms)
        if device == "cuda" and _wish(backend)[1] == "auto":
            _tell_what_is_missing(choice)
    return order


def choose(op: str, situation: Situation) -> Choice:
    """Which implementations of `op`, one of `OPERATIONS`, a call in this situation may use, best first.

    The environment variable wins over the situation's backend.

    Raises:
        ValueError: for an unknown backend, or a forced one that cannot run `op` in this situation.
    """
    if op not in TORCH:
        raise ValueError(
            f"operation {op!r}: must be one of {list(TORCH)}; enter its torch form in dispatch_bmojo.TORCH."
        )
    source, backend = _wish(situation.backend)
    forced = backend != "auto" and op in COVERED[backend]
    forms, passed = [], {}
    for name in (backend,) if forced else PREFERENCE:
        refusal = next(_refusals(name, op, situation, forced), None)
        if refusal is None:
            forms.append(KERNELS[op].bound("hub", None) if name == "hub" else FORMS[name][op])
        elif forced:
            raise _unavailable(op, source, backend, refusal)
        else:
            passed[name] = refusal
    return Choice(tuple(forms), passed, source if forced else None)


def _refusals(backend: str, op: str, now: Situation, forced: bool) -> Iterator[Refusal]:
    """Why `backend` cannot run `op` now: what is to be said first comes first, and what follows may not apply."""
    if op not in COVERED[backend]:
        yield Refusal("it has no such operation", "")
    if backend == "hub":
        if now.hub is None:
            yield Refusal("hub kernels were not asked for", "load with from_pretrained(..., use_kernels=True)")
        elif op not in now.hub:
            yield Refusal(f"transformers loaded no hub kernel of it for {now.device!r}", "set 'auto'")
    # Triton's interpreter runs kernels on the CPU, slowly: only for who forces them.
    elif backend != "torch" and now.device != "cuda" and not (backend == "triton" and forced and INTERPRETED):
        yield Refusal(f"it needs CUDA tensors, these are on {now.device!r}", "move the model to a GPU, or set 'auto'")
    if backend == "triton":
        jit, reason = load("triton", "jit")
        if jit is None:
            yield Refusal(reason, "pip install triton", "triton")
        too_old = unavailable("cuda") if now.device == "cuda" and torch.cuda.is_available() else None
        if too_old is not None:
            yield Refusal(too_old, "set 'auto'")
        if now.grad and not TRITON[op].backward:
            yield _no_backward(TRITON[op].label)
    elif backend != "torch":
        yield from _upstream_refusals(backend, op, now, forced)


def _upstream_refusals(backend: str, op: str, now: Situation, forced: bool) -> Iterator[Refusal]:
    """Return what a function of the packages cannot do, wherever it comes from, and that a package is missing."""
    kernel = KERNELS[op]
    if now.dtype not in DTYPES:
        yield Refusal(f"it does not compute in {now.dtype}", "load the model in float32, bfloat16 or float16")
    if kernel.rounds and now.dtype == torch.float32 and not forced and not tf32_allowed():
        yield Refusal(
            "it multiplies fp32 numbers in TF32, which PyTorch's settings do not allow",
            "torch.set_float32_matmul_precision('high') allows it, and forcing the backend does",
        )
    if now.grad and not kernel.backward:
        yield _no_backward(kernel.name)
    if backend == "cuda" and op not in (FORMS["cuda"] or _load_cuda()):
        reason, remedy = load(kernel.module, kernel.name)[1], f"pip install {kernel.package} (it compiles with nvcc)"
        yield Refusal(reason, remedy, kernel.package)


def _no_backward(name: str) -> Refusal:
    return Refusal(f"{name} has no backward", "call under torch.no_grad(), or set 'auto'")


def _load_cuda() -> dict[str, Form]:
    """Import the packages and fill their table with what is there."""
    found = {op: load(kernel.module, kernel.name)[0] for op, kernel in KERNELS.items()}
    FORMS["cuda"] |= {op: KERNELS[op].bound("cuda", KERNELS[op].form(call)) for op, call in found.items() if call}
    return FORMS["cuda"]


def _wish(backend: str) -> tuple[str, str]:
    """Return the setting that decides, and its value."""
    source, value = ("kernel_backend", backend) if environment() is None else (ENVIRONMENT, environment())
    if value not in KERNEL_BACKENDS:
        raise ValueError(f"{source}={value!r}: must be one of {list(KERNEL_BACKENDS)}; pick one of them.")
    return source, value


@functools.cache
def environment() -> str | None:
    """Return the environment variable, as it was when the process first asked; "" counts as unset."""
    return os.environ.get(ENVIRONMENT) or None


def _unavailable(op: str, source: str, backend: str, refusal: Refusal) -> ValueError:
    return ValueError(f"{source}={backend!r}: cannot run operation {op!r}: {refusal.reason}; {refusal.remedy}.")


def forget() -> None:
    """Forget what was imported, chosen and read from the environment: for tests, and after installing a package."""
    for memory in (FORMS["cuda"], _ORDERS, _TOLD):
        memory.clear()
    load.cache_clear()
    environment.cache_clear()


def _tell_what_is_missing(choice: Choice) -> None:
    """Once per process: which packages would make this GPU faster."""
    better = PREFERENCE[: PREFERENCE.index(choice.forms[0].backend)]
    if _TOLD or not any(choice.passed[name].package for name in better):
        return
    wanted = {kernel.package: (kernel.module, kernel.name) for kernel in KERNELS.values()}
    missing = {package: load(*place)[1] for package, place in (wanted | {"triton": ("triton", "jit")}).items()}
    names = [package for package, reason in missing.items() if reason]
    _TOLD.update(names)
    logger.warning_once(
        f"B'MOJO runs on a GPU without its fastest kernels: {'; '.join(filter(None, missing.values()))}. The results "
        f"are the same, only slower. Install them with: pip install {' '.join(names)} (causal-conv1d and mamba-ssm "
        "compile with nvcc). modeling_bmojo.explain_kernels(model) shows what each operation uses."
    )
