"""causal-conv1d and mamba-ssm behind this package's signatures: the same maps as `ssm_ops` and `s6_ops`, on CUDA.

    out_t = bias + sum_j weight[:, j] x_{t - K + 1 + j}                      causal_conv1d_fn, causal_conv1d_update
    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T;  y_t = S_t C_t + D x_t       mamba_chunk_scan_combined,
                                                                             selective_state_update, selective_scan_fn

A form is built around an upstream function, taken from the installed package or from a hub repository: both have the
same leading arguments, which are therefore passed by position. No module's weights are ever handed over, only tensors.
Each rule below was read in causal-conv1d 1.4.0 and 1.7.0 and in mamba-ssm 2.2.4 and 2.3.2.

Shapes: B batch, T tokens, C channels, K conv taps, H heads, P channels per head, N state channels, G groups, I inner
channels of the S6 form.
"""

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from .kernels_forms import Form


# What the compiled kernels know; the state and the time steps are fp32 whatever the model's dtype is.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tokens per chunk of mamba-ssm's scan: its own default. `ssm_chunk_size` is a matter of the CPU's caches.
SCAN_CHUNK = 256
# Elements by which the convolution reads: strides, offset and channels must be multiples of it.
VECTOR = 8
MAX_S6_STATE = 256


class Kernel(NamedTuple):
    """An upstream function and what it can do.

    package: as pip names it. module, name: where the function lives. form: wraps the function into our signature.
    backward: gradients flow through it. narrow: takes x, B, C in the model's dtype, beside fp32 time steps and state.
    rounds: multiplies fp32 numbers in TF32. refuse: of a call's arguments, why this call is not for it, or None.
    """

    package: str
    module: str
    name: str
    form: Callable
    backward: bool = True
    narrow: bool = False
    rounds: bool = False
    refuse: Callable | None = None

    def bound(self, backend: str, call: Callable | None) -> Form:
        """Return the entry of a table for `call`, which wraps the package's function or, in "hub", the one of its
        name."""
        source = "hub" if backend == "hub" else self.package
        return Form(backend, f"{source}: {self.name}", call, self.narrow, self.refuse, self.backward)


@functools.cache
def load(module: str, name: str) -> tuple[Callable | None, str]:
    """Return the function `name` of `module` and "", or None and why not. A broken package may raise anything."""
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name), ""
    except ModuleNotFoundError as error:
        if error.name == package:
            return None, f"{package} is not installed"
        return None, f"{package} cannot be imported (ModuleNotFoundError: {error})"
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        return None, f"{package} cannot be imported ({type(error).__name__}: {first_line})"


# Convolution ---------------------------------------------------------------------------------------------------------
def refuse_conv(x, weight, bias, history=None) -> str | None:
    """Why causal-conv1d cannot run this convolution: x `[B, T, C]`, weight `[C, K]`."""
    channels, taps = weight.shape
    if not 2 <= taps <= 4:
        return f"causal-conv1d has 2 to 4 taps, the model {taps}"
    return (
        f"causal-conv1d needs a multiple of {VECTOR} channels, the model has {channels}" if channels % VECTOR else None
    )


def conv_form(kernel: Callable, takes_history: bool = True) -> Callable:
    """`causal_conv` by `causal_conv1d_fn`. The hub's function takes no initial states and would silently drop them."""

    def causal_conv(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `ssm_ops.causal_conv`, with gradients; see `refuse_conv` for the shapes that the kernel takes."""
        if x.shape[1] == 0:
            return x
        if history is None:
            return kernel(_aligned(x).transpose(1, 2), weight, bias).transpose(1, 2)
        history = history.to(x.dtype)
        if takes_history:
            start = _aligned(history).transpose(1, 2)
            return kernel(_aligned(x).transpose(1, 2), weight, bias, initial_states=start).transpose(1, 2)
        joined = torch.cat([history, x], dim=1).transpose(1, 2)
        return kernel(joined, weight, bias).transpose(1, 2)[:, history.shape[1] :]

    return causal_conv


def conv_step_form(kernel: Callable) -> Callable:
    """`causal_conv` of new tokens by `causal_conv1d_update`, which has no backward."""

    def causal_conv(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `ssm_ops.causal_conv`, without gradients."""
        if history is None:
            history = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
        # A copy: the kernel moves the state on in place, and here the cache does that (a pad must not move it).
        state = history.to(x.dtype, copy=True).transpose(1, 2)
        return kernel(x.transpose(1, 2), state, weight, bias).transpose(1, 2)

    return causal_conv


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """`[B, T, C]` such that its transpose is "channel last" to the kernel: a slice of a wide projection may not be."""
    if torch.compiler.is_compiling():  # an offset into the storage is nothing that a compiler knows
        aligned = x.is_contiguous()
    else:
        numbers = (x.stride(0), x.stride(1), x.storage_offset())
        aligned = x.stride(2) == 1 and all(number % VECTOR == 0 for number in numbers)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


# Mamba-2 -------------------------------------------------------------------------------------------------------------
def scan_form(kernel: Callable) -> Callable:
    """`chunk_ssd` by `mamba_chunk_scan_combined`: gradients also through the initial and the final state."""

    def chunk_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        chunk_size: int = 64,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ssm_ops.chunk_ssd`; y in x's dtype, the state in fp32. `chunk_size` is not used."""
        if x.shape[1] == 0:
            return torch.zeros_like(x), _state(initial_state, dt, x.shape[0], *x.shape[2:], B.shape[3])
        # Time steps arrive positive (softplus and clamp are the mixer's); upstream's defaults leave them so.
        return kernel(x, dt, A, B, C, SCAN_CHUNK, D=D, initial_states=initial_state, return_final_states=True)

    return chunk_ssd


def scan_step_form(kernel: Callable) -> Callable:
    """`step_ssd` by `selective_state_update`, which has no backward."""

    def step_ssd(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        chunk_size: int = 64,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ssm_ops.step_ssd` without gradients: the state is overwritten; y in x's dtype, the state in fp32."""
        _one_token(x, "step_ssd", "chunk_ssd")
        batch, _, heads, channels = x.shape
        width = B.shape[3]
        state = _state(initial_state, dt, batch, heads, channels, width)

        def spread(value: torch.Tensor) -> torch.Tensor:  # stride 0 tells the kernel that a head has one value
            return value[..., None].expand(*value.shape, channels)

        # Upstream fails without a bias of the time step and without D, though both are declared optional.
        zero = torch.zeros_like(A)
        rate = A[:, None, None].expand(heads, channels, width)
        skip = spread(zero if D is None else D)
        y = kernel(state, x[:, 0], spread(dt[:, 0]), rate, B[:, 0], C[:, 0], skip, dt_bias=spread(zero))
        return y[:, None], state

    return step_ssd


# Mamba (S6) ----------------------------------------------------------------------------------------------------------
def refuse_s6(x, dt, A, B, C, D=None, initial_state=None, chunk_size=64) -> str | None:
    """Why mamba-ssm's selective scan cannot run this call: A `[I, N]`."""
    if initial_state is not None:
        return "mamba-ssm's selective scan starts from zeros and cannot continue from a state"
    if A.shape[1] > MAX_S6_STATE:
        return f"mamba-ssm's selective scan has at most {MAX_S6_STATE} state channels, the model {A.shape[1]}"
    return None


class _StateWithoutGradient(torch.autograd.Function):
    """Upstream drops the gradient of the last state without a word; asking for it is an error here."""

    @staticmethod
    def forward(ctx, state: torch.Tensor) -> torch.Tensor:
        return state.view_as(state)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> None:
        raise ValueError(
            "kernel_backend: mamba-ssm's selective scan has no gradient of its last state; "
            "set kernel_backend='torch' to train through the state."
        )


def s6_form(kernel: Callable) -> Callable:
    """`chunk_s6` by `selective_scan_fn`: gradients of y; a gradient of the state is refused with an error."""

    def chunk_s6(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        chunk_size: int = 64,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `s6_ops.chunk_s6` from zeros: x, dt `[B, T, I]`, A `[I, N]`, B, C `[B, T, N]`, D `[I]`, all in fp32."""
        if x.shape[1] == 0:
            return torch.zeros_like(x), _state(initial_state, dt, x.shape[0], *A.shape)
        reason = refuse_s6(x, dt, A, B, C, D, initial_state)
        if reason is not None:
            raise ValueError(f"initial_state: {reason}; set kernel_backend='auto'.")
        x, dt, B, C = (value.transpose(1, 2) for value in (x, dt, B, C))
        y, state = kernel(x, dt, A, B, C, D=D, return_last_state=True)
        return y.transpose(1, 2), _StateWithoutGradient.apply(state)

    return chunk_s6


def s6_step_form(kernel: Callable) -> Callable:
    """`step_s6` by `selective_state_update`, which has no backward."""

    def step_s6(
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        chunk_size: int = 64,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `s6_ops.step_s6`, without gradients."""
        _one_token(x, "step_s6", "chunk_s6")
        state = _state(initial_state, dt, x.shape[0], *A.shape).clone()
        zero = A.new_zeros(A.shape[0])
        skip = zero if D is None else D
        y = kernel(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], skip, dt_bias=zero)
        return y[:, None], state

    return step_s6


def _state(initial_state: torch.Tensor | None, like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_zeros(shape) if initial_state is None else initial_state


def _one_token(x: torch.Tensor, step: str, many: str) -> None:
    if x.shape[1] != 1:
        raise ValueError(f"x has {x.shape[1]} tokens: {step} takes exactly one; use {many} for more.")


CONV, SCAN = "causal_conv1d", "mamba_ssm.ops.triton.ssd_combined"
STEP, S6 = "mamba_ssm.ops.triton.selective_state_update", "mamba_ssm.ops.selective_scan_interface"
KERNELS = {
    "conv": Kernel("causal-conv1d", CONV, "causal_conv1d_fn", conv_form, refuse=refuse_conv),
    "conv_step": Kernel(
        "causal-conv1d", CONV, "causal_conv1d_update", conv_step_form, backward=False, refuse=refuse_conv
    ),
    "chunk_scan": Kernel("mamba-ssm", SCAN, "mamba_chunk_scan_combined", scan_form, narrow=True, rounds=True),
    "scan_step": Kernel("mamba-ssm", STEP, "selective_state_update", scan_step_form, backward=False, narrow=True),
    "s6_scan": Kernel("mamba-ssm", S6, "selective_scan_fn", s6_form, refuse=refuse_s6),
    "s6_step": Kernel("mamba-ssm", STEP, "selective_state_update", s6_step_form, backward=False),
}
