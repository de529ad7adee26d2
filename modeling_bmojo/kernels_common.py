"""What the Triton kernels share: the guarded import, whether a device can run them, and one way to launch.

Triton compiles for CUDA devices. With TRITON_INTERPRET=1 in the environment before Triton is first imported, it
interprets instead: the same kernels run on CPU tensors, slowly, which is how they are tested where no GPU is.
Without Triton this module and the kernel modules still import; `TRITON_MISSING` then says why nothing can be launched.
"""

import contextlib
from functools import partial
from types import SimpleNamespace

import torch


# Sizes that follow the length of the text. Triton compiles a kernel anew where a size is 1 and where it is a multiple
# of 16, unless it is told that this is no use.
VARYING = ("tokens", "stored", "offered", "blocks", "queries", "held", "first", "i_b")

try:
    import triton
    import triton.language as tl

    TRITON_MISSING: str | None = None
    # Triton's own functions were decorated when it was imported, by the environment of that moment: ours follow them.
    INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
    jit = partial(type(tl.sum), do_not_specialize=VARYING)
except (ImportError, OSError) as error:
    TRITON_MISSING = f"triton cannot be imported ({error}): pip install 'triton>=3.1' (Linux)"
    INTERPRETED = False
    triton = None
    # Stands in for the names that the kernels' definitions mention.
    tl = SimpleNamespace(constexpr=lambda value: value, float32=None, float64=None)

    def jit(function):
        return function


MIN_CAPABILITY = (8, 0)
# The interpreter multiplies bfloat16 bit patterns as integers and cuts off where a GPU rounds.
EMULATE = tl.constexpr(INTERPRETED)


def unavailable(device: torch.device | str) -> str | None:
    """Why the Triton kernels cannot run on tensors of `device`; None if they can."""
    device = torch.device(device)
    if TRITON_MISSING is not None:
        return TRITON_MISSING
    if INTERPRETED and device.type in ("cpu", "cuda"):
        return None
    if device.type != "cuda":
        return f"Triton compiles for CUDA, not for {device.type}; TRITON_INTERPRET=1 interprets on the CPU (slow)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"Triton needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer"
    return None


def launch(kernel, programs: int, *arguments, **options) -> None:
    """Run `programs` instances of a kernel on the device of its first argument.

    Raises:
        RuntimeError: if the kernels cannot run there, with the reason.
    """
    device = arguments[0].device
    reason = unavailable(device)
    if reason is not None:
        raise RuntimeError(f"{reason}; use the torch form of this operation")
    if programs == 0:
        return
    # Triton launches on the current device, which need not be the tensors' own (device_map="auto").
    place = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with place:
        kernel[(programs,)](*arguments, **options)


def tf32_allowed() -> bool:
    """Whether torch's own fp32 products may use TF32; off by default. Reading the older flag fails once the newer one
    was set."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch >= 2.9
    return torch.backends.cuda.matmul.allow_tf32 if setting is None else setting == "tf32"


def power_of_two(value: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `value` and at least `least`."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def wide(dtype: torch.dtype):
    """Return the Triton type in which inputs of `dtype` are accumulated: float64 for float64, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@jit
def narrow(value, dtype: tl.constexpr):
    """`value` rounded to `dtype`, to the nearest and to even among equals, also where Triton interprets."""
    if EMULATE and dtype == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        value = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return value.to(dtype)


@jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """total + left right, accumulated in the type of `total`."""
    if EMULATE and left.dtype == tl.bfloat16:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)
