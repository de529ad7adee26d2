"""A decoding step as a module of tensors alone: what ONNX, OpenVINO and other runtimes take.

    logits, *states = step(input_ids, *states)

The states are those of a fixed cache (`cache_fixed_bmojo`), by name and in one order; going in and coming out they have
the same shapes, so that one program reads the first token of a text and every later one.

Shapes: B rows, V vocabulary.
"""

import copy
import json
from collections.abc import Sequence

import torch
from torch import nn

from .cache_bmojo import BMojoCache
from .cache_tree_bmojo import flatten, unflatten
from .compat_bmojo import CACHE_NAME, cache_of


class DecodingStep(nn.Module):
    """One token of each row through a language model.

    inputs, outputs: the names of what it takes and returns, in that order: "input_ids", "attention_mask" if it takes
    one, the states; "logits" and the states as "next.<name>". A state is called "columns" or "<layer>.<state>".

    Args:
        model: a `BMojoForCausalLM` in evaluation mode. cache: a fixed cache of it, as the program is to begin.
        masked: whether it takes a mask `[B, 1]` int64, 1 = real token, 0 = pad. It keeps no fingerprint of which
            columns were pads, which other runtimes get wrong: `check_mask` then compares numbers alone.

    Raises:
        ValueError: for a cache that is not fixed, or a model in training.

    Example:

    ```python
    >>> step = DecodingStep(model, BMojoCache(model.config).fix(model))
    >>> with torch.no_grad():
    ...     program = torch.export.export(step, step.example(), strict=False)
    ```
    """

    def __init__(self, model: nn.Module, cache: BMojoCache, masked: bool = False):
        super().__init__()
        if not cache.fixed:
            raise ValueError("cache: it is not fixed, and its shapes follow the text; pass cache.fix(...).")
        if model.training:
            raise ValueError("model: it is in training, where a step keeps gradients; call model.eval() first.")
        self.model, self.masked = model, masked
        if masked:
            cache = copy.deepcopy(cache)
            cache.layers[0].pads = None
        leaves, self._context = flatten(cache)
        self._first = [leaf.clone() for leaf in leaves]
        layers = json.loads(self._context)[1]
        names = ["columns", *(f"{layer}.{name}" for layer, own in enumerate(layers) for name in own)]
        self.inputs = ["input_ids", *(["attention_mask"] if masked else []), *names]
        self.outputs = ["logits", *(f"next.{name}" for name in names)]

    def forward(self, input_ids: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Read `[B, 1]` token ids.

        Args:
            others: the mask `[B, 1]` if it takes one, then the states, which are not changed.

        Returns:
            logits `[B, 1, V]`, and the states after the token.
        """
        mask, states = (others[0], others[1:]) if self.masked else (None, others)
        cache = self.cache([state.clone() for state in states])
        out = self.model(input_ids, attention_mask=mask, **{CACHE_NAME: cache})
        return (out.logits, *flatten(cache_of(out))[0])

    def example(self) -> tuple[torch.Tensor, ...]:
        """Return inputs of the first call: token 0, a mask of ones if it takes one, and the states of the cache it was
        made with."""
        batch = self._first[1].shape[0]
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=self._first[0].device)
        masks = (torch.ones_like(ids),) if self.masked else ()
        return (ids, *masks, *(state.clone() for state in self._first))

    def cache(self, states: Sequence[torch.Tensor]) -> BMojoCache:
        """Return the fixed cache that these states are, on the tensors themselves; `unfix()` makes it one that
        `generate()` continues."""
        return unflatten(list(states), self._context)


__all__ = ["DecodingStep"]
