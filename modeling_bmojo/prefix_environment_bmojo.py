"""A `PrefixMemory` for programs that call `generate()` by themselves, as `transformers serve` does.

    BMOJO_PREFIX_MEMORY       the folder of a `PrefixMemory`: prompts that begin with a text that it knows go on from it
    BMOJO_PREFIX_KEEP         n: prompts are kept in it, too, every n tokens and at their end; unset: nothing is kept
    BMOJO_PREFIX_MAX_BYTES    of all its files; needed with BMOJO_PREFIX_KEEP, as requests decide what is written

Environment variables, because whoever starts a program sets them. A field of the exported folder, or of a generation
configuration, which requests to a server may carry, would let others say where this machine writes.

Shapes: T tokens.
"""

import os
from typing import Any

import torch

from .cache_bmojo import BMojoCache
from .prefix_bmojo import PrefixMemory


FOLDER, KEEP, MAX_BYTES = "BMOJO_PREFIX_MEMORY", "BMOJO_PREFIX_KEEP", "BMOJO_PREFIX_MAX_BYTES"


def known_by_environment(model, prompt: Any, options: dict[str, Any]) -> BMojoCache | None:
    """Return a cache that has read the longest known beginning of a prompt, None if there is none or none is asked for.

    A call that no prefix memory takes (a batch, pads, embeddings, a draft, a model in training mode) gets None: what it
    is refused where it asks for one, it did not ask for.

    Args:
        model: whose `generate()` asks. prompt: `[1, T]` tokens. options: of the call, `generation_config` included.

    Raises:
        ValueError: for numbers that are none, and as `PrefixMemory` does. OSError: if the folder cannot be written.
    """
    folder = os.environ.get(FOLDER)
    every, max_bytes = _number(KEEP, "tokens"), _number(MAX_BYTES, "bytes")
    if not folder:
        if every is not None or max_bytes is not None:
            raise ValueError(f"{KEEP} and {MAX_BYTES} are for a prefix memory: name its folder in {FOLDER}.")
        return None
    if every is not None and max_bytes is None:
        raise ValueError(
            f"{KEEP}={every}: what is kept grows with every new prompt; set {MAX_BYTES}, the bytes of all files."
        )
    if model.training or not _takes_a_prefix(prompt, options):
        return None
    prefixes = PrefixMemory(model, folder, max_bytes)
    # generate() needs a token to go on from.
    cache = prefixes.longest(prompt) if every is None else prefixes.read(prompt[:, :-1], every=every)
    if cache is not None:
        cache.one_for_all = True
    return cache


def _takes_a_prefix(prompt: Any, options: dict[str, Any]) -> bool:
    if not isinstance(prompt, torch.Tensor) or prompt.is_floating_point() or prompt.dim() != 2:
        return False
    if prompt.shape[0] != 1 or prompt.shape[1] < 2 or options.get("use_cache") is False or options.get("is_assistant"):
        return False
    mask, pad = options.get("attention_mask"), options.get("pad_token_id")
    if mask is None:  # transformers then takes this number for pads
        return pad is None or not bool((prompt == pad).any())
    return bool(mask.all())


def _number(name: str, unit: str) -> int | None:
    """Return what an environment variable says; "" counts as unset."""
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise ValueError(f"{name}={value!r}: must be a number of {unit} >= 1; correct it or unset it.")
    return int(value)


__all__ = ["known_by_environment"]
