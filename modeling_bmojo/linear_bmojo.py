"""Linear map for decoding on CPUs: the product with few rows on all threads.

    y = x W^T + b                    x [..., I], W [O, I], y [..., O]

Decoding waits for W to come from memory, and the fp32 product of a few rows with W runs on one thread, whatever the
number of threads. Cut into as many parts of O as there are threads, the same dot products run on all of them.
"""

from functools import cache

import torch
from torch import nn


FEW_ROWS = 8  # from about 16 rows on, the plain product uses all threads well (docs/performance.md)


class BMojoLinear(nn.Linear):
    """`nn.Linear`; a handful of rows in fp32 on a CPU, without gradient, go through all threads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu" or not self._splits(x):
            return super().forward(x)
        parts = parts_for(self.out_features, torch.get_num_threads())
        weight = self.weight.view(parts, -1, self.in_features).transpose(1, 2)
        rows = x.reshape(1, -1, self.in_features).expand(parts, -1, -1)
        out = torch.bmm(rows, weight).transpose(0, 1).reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _splits(self, x: torch.Tensor) -> bool:
        return (
            0 < x.numel() <= FEW_ROWS * self.in_features
            and x.dtype == torch.float32
            and self.weight.dtype == torch.float32
            and type(self.weight) is nn.Parameter  # no tensor subclass: it may be sharded or quantised
            and self.weight.is_contiguous()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and parts_for(self.out_features, torch.get_num_threads()) > 1
        )


def make_plain(model: nn.Module) -> None:
    """Turns every `BMojoLinear` into `nn.Linear` itself, in place.

    For models that are about to be quantised: transformers' replacement for bitsandbytes (and for fine-grained fp8)
    takes `nn.Linear` alone and passes over its subclasses without a word, so nothing would be in 4 bits.
    """
    for module in model.modules():
        if type(module) is BMojoLinear:
            module.__class__ = nn.Linear  # the subclass adds a forward pass and no state


@cache
def parts_for(size: int, threads: int) -> int:
    """Equal parts of `size` rows that keep `threads` threads busy; 1 if there are none, or there is one thread."""
    if threads == 1:
        return 1
    return next((parts for parts in range(threads, 4 * threads + 1) if size % parts == 0), 1)
