"""Buffers that keep their width: `model.half()` and the like move them, and leave their numbers as they are."""

from torch import nn


class WideBuffers(nn.Module):
    """A module whose buffers take part in moves but in no change to a narrower dtype."""

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if self._buffers[name].element_size() < value.element_size():
                self._buffers[name] = value.to(self._buffers[name].device)
        return self


__all__ = ["WideBuffers"]
