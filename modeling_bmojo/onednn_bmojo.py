"""fp32 products of a linear map by oneDNN, which is built into torch, with gradients.

    y = x W^T + b        dx = g W,  dW = g^T x,  db = sum of g        x [..., I], W [O, I], y and g [..., O]

torch's own fp32 product on x86 CPUs is MKL's, which runs a few rows on one thread, whatever the number of threads, and
on CPUs that are not Intel's leaves half of their width unused; oneDNN, which torch takes for 16 bits, does neither
(docs/performance.md has the figures). Where there is no MKL, torch's product is another one, and stays.
"""

import torch
from torch.autograd import forward_ad


WORTH = 1 << 18  # products of two numbers, from which on oneDNN's longer call is paid back
WORTH_WITH_GRADIENT = 1 << 21  # and that of a backward pass in Python

# torch.compile's own operator: (x, W, b, what follows, its scalars and its algorithm).
_built_in = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
_linear = torch.ops.mkldnn._linear_pointwise.default if _built_in else None


def suits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `product` takes x `[..., I]`, W `[O, I]` and b `[O]`, tensors on a CPU, W contiguous, and is worth it.

    Not under modes that see every operation that torch dispatches, such as the counting of FLOPs, nor in what
    torch.func transforms or torch.jit traces: they may not know this one.
    """
    worth = WORTH_WITH_GRADIENT if torch.is_grad_enabled() else WORTH
    return (
        _linear is not None
        and x.numel() * weight.shape[0] >= worth
        and x.dtype == torch.float32
        and type(x) is torch.Tensor
        and (bias is None or (bias.dtype == x.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and torch.backends.mkldnn.enabled
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x W^T + b `[..., O]` of what `suits`."""
    if torch.is_grad_enabled():
        return _Product.apply(x, weight, bias)
    return _linear(x, weight, bias, "none", [], "")


def _times(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x W^T of matrices; differentiably where a gradient of the gradient is wanted.

    W or its transpose must be contiguous: with other strides oneDNN takes a hundred times as long. x may be anything.
    """
    if torch.is_grad_enabled():
        return x @ weight.t()
    return _linear(x, weight, None, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.shape = x.shape
        return _linear(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, dx, dw, db = grad.reshape(-1, grad.shape[-1]).contiguous(), None, None, None
        if ctx.needs_input_grad[0]:
            dx = _times(rows, weight.t()).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            # This way round it is the faster one.
            dw = _times(x.reshape(-1, x.shape[-1]).t(), rows.t()).t().contiguous()
        if ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db


__all__ = ["product", "suits"]
