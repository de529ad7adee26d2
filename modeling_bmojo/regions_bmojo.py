"""Compiled decoding: the step of one layer is compiled, and every layer of its kind runs it.

A compiler that takes the whole model unrolls its layers: thirty times the program, minutes of compiling. The layers of
a kind differ in tensors alone, so that one program serves them all, if nothing in it is a number that belongs to a
layer or to a token. So a region is a layer's `transform`, which is given the layer's own states, and these say by
tensors how much was read (`BMojoCacheLayer.told_by_tensors`).

Compiled are steps of one token per row, where a CPU waits for many small operations; texts of more tokens differ in
length, and their time is that of large products. Where a compiler writes a product of one row better than the library
does (`linear_bmojo`), the head's is compiled as well.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from .layout_bmojo import Rows
from .linear_bmojo import is_one_narrow_row, project


def _transform(layer: nn.Module, hidden_states: torch.Tensor, rows: Rows, cache: Any):
    return layer.transform(hidden_states, rows, cache)


def _head(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return project(linear, x)


class Regions:
    """The compiled programs of a model, one per kind of layer.

    Args:
        config: the model's configuration. options: of `torch.compile`.

    Raises:
        ValueError: for a storage.
    """

    def __init__(self, config: Any, options: dict[str, Any]):
        if config.storage_size:
            instead = "storage_size=0, fading_mass=False" if config.fading_mass else "storage_size=0"
            raise ValueError(
                f"storage_size={config.storage_size}: a step that fetches from a storage follows the text in its "
                f"shapes and cannot be compiled once for all tokens; load the model with {instead}."
            )
        self.options = options
        self.programs: dict[str, Callable] = {}

    def take(self, rows: Rows, cache: Any, columns: int) -> bool:
        """Whether a forward of so many columns runs compiled: a step without gradient, of which nobody wants the
        attention weights."""
        if columns != 1 or cache is None or rows.columns is not None or rows.layout is not None:
            return False
        return cache.layers[0].started and not (torch.is_grad_enabled() or torch.compiler.is_compiling())

    @staticmethod
    def listening() -> AbstractContextManager:
        """Within it programs look for hooks at every call: left to itself, torch.compile takes it that those of a
        program's first module are those of all, so that a hook inside one layer would be heard in every layer or in
        none."""
        return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)

    def transform(self, layer: nn.Module, hidden_states: torch.Tensor, rows: Rows, cache: Any):
        """`layer.transform` of these arguments, compiled; within `listening`."""
        cache.prepare(hidden_states, layer.memory)
        with cache.told_by_tensors(hidden_states.shape[1]):
            return self._program(_transform, layer.spec.kind)(layer, hidden_states, rows, cache)

    def project(self, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """`project` of these arguments; compiled if it is of one row on a CPU, without gradient."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (x.is_cpu and is_one_narrow_row(x)):
            return project(head, x)
        with self.listening():
            return self._program(_head, "head")(head, x.reshape(-1).view(x.shape))  # strides as every row has them

    def _program(self, function: FunctionType, kind: str) -> Callable:
        if kind not in self.programs:
            # The compiler counts the variants of a code object and gives up after a few: one for each kind and model.
            code = function.__code__.replace(co_name=f"transform_{kind}")
            self.programs[kind] = torch.compile(FunctionType(code, globals()), **self.options)
        return self.programs[kind]

    def __reduce__(self) -> tuple:
        """Copy and pickle the options alone: programs are made anew."""
        return _renewed, (self.options,)


def _renewed(options: dict[str, Any]) -> Regions:
    regions = Regions.__new__(Regions)
    regions.options, regions.programs = options, {}
    return regions


__all__ = ["Regions"]
