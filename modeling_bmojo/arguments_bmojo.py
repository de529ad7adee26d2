"""Which arguments a forward takes, and what it refuses: nothing that carries a meaning is passed over.

transformers, trainers and other libraries hand models keyword arguments of their own, and rename them. A name that this
code does not know may be a cache, packing lengths or another mask; ignoring it gives other text without a word. So:

    a value of None passes, whatever its name: it says nothing
    a name in HARMLESS passes if its value means nothing to this model, by the rule that stands there
    everything else is refused
"""

from collections.abc import Callable
from typing import Any

import torch

from .compat_bmojo import CACHE_NAME
from .configuration_bmojo import BMojoConfig
from .fields_bmojo import fields_with, plain


def _always(value: Any) -> bool:
    return True


def _only(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: value is wanted


def _all_zero(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (torch.compiler.is_compiling() or not bool(value.any()))


def _known_inside(value: Any) -> bool:
    """Whether it is a dict of arguments none of which is refused; raises ValueError for one that is."""
    if isinstance(value, dict):
        refuse_unknown(value)
    return isinstance(value, dict)


# Unknown names that pass, and for which values. Each is here because somebody in transformers' own code passes it.
HARMLESS: dict[str, Callable[[Any], bool]] = {
    # read by transformers' decorators around forward
    "output_attentions": _always,
    "output_hidden_states": _always,
    "return_dict": _always,
    # the loss's, which the heads hand on to it
    "num_items_in_batch": _always,
    "ignore_index": _always,
    "shift_labels": _always,
    # follow from cu_seq_lens_q, which is read; cu_seq_lens_k is compared with it
    "max_length_q": _always,
    "max_length_k": _always,
    "cu_seq_lens_k": _always,
    # generate()'s, for stop strings; it hands them on with everything else (`transformers serve` always gives them)
    "tokenizer": _always,
    "assistant_tokenizer": _always,
    # of transformers' pipeline over devices: what else the first stage was called with
    "kwargs": _known_inside,
    # ask for what this model does anyway, or for what it does not have
    "is_causal": _only(True),
    "output_router_logits": _only(False),
    "token_type_ids": _all_zero,
}
# What to do about names that are known to carry a meaning.
REMEDIES = {
    "token_type_ids": "there are no segments here: call the tokenizer with return_token_type_ids=False",
    "is_causal": "every layer reads from left to right; leave it out",
    "cache_params": f"pass a BMojoCache as {CACHE_NAME}",
    "past_key_value": f"pass a BMojoCache as {CACHE_NAME}",
    "attn_mask": "pass attention_mask, [batch, tokens] with 1 = real and 0 = pad",
    "padding_mask": "pass attention_mask, [batch, tokens] with 1 = real and 0 = pad",
    "cu_seqlens": "pass cu_seq_lens_q, or seq_idx",
    "labels": "a model without a head has no loss; use BMojoForCausalLM",
}


def refuse_unknown(arguments: dict[str, Any]) -> None:
    """Raise ValueError for the first of the left-over keyword arguments of a forward that carries a meaning."""
    for name, value in arguments.items():
        if value is None or (name in HARMLESS and HARMLESS[name](value)):
            continue
        shown = f"{type(value).__name__} of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else value
        remedy = REMEDIES.get(name, "leave it out, or pass it under the name that this model's forward documents")
        raise ValueError(f"{name}={shown!s}: B'MOJO does not know this argument and cannot pass over it; {remedy}.")


def packing_lengths(cu_seq_lens_q: torch.Tensor | None, arguments: dict[str, Any]) -> torch.Tensor | None:
    """`cu_seq_lens_q`, after a look at what came with it.

    Raises:
        ValueError: if `cu_seq_lens_k` stands alone or differs: a query reads the sequence that it is in.
    """
    keys = arguments.get("cu_seq_lens_k")
    if keys is None or keys is cu_seq_lens_q:
        return cu_seq_lens_q
    if cu_seq_lens_q is None or not torch.equal(keys.cpu(), cu_seq_lens_q.cpu()):
        raise ValueError(
            f"cu_seq_lens_k={keys.tolist()}: must equal cu_seq_lens_q, because each packed sequence reads itself; pass "
            "the same lengths for both."
        )
    return cu_seq_lens_q


def built_fields(config: BMojoConfig) -> dict[str, Any]:
    """Return the fields that a model's layers are made of, with their values now."""
    return {name: plain(getattr(config, name)) for name in fields_with(type(config), live=False)}


def check_built(built: dict[str, Any], config: BMojoConfig) -> None:
    """Raise ValueError if a field that the layers were made of has changed since: they would not follow it."""
    for name, value in built.items():
        now = getattr(config, name)
        if now != value and plain(now) != value:
            raise ValueError(
                f"{name}={now!r}: the model was built with {value!r} and its layers keep that; set it back, or build "
                f"or load a model with it: from_pretrained(folder, {name}={now!r})."
            )
