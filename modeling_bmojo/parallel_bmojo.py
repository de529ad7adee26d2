"""How a model is cut over devices: the plans that transformers reads, and stages of a pipeline.

A tensor plan cuts every large map by its rows or columns, the vocabulary too, and gives each device a share of the
heads (`share_bmojo`): of attention, memories, cache and SSM. All judge a token by the same sum over their heads, so all
keep the same tokens. Norms, convolutions, scalars and sketches are whole on every device, and each uses its part.

A pipeline gives each device some of the layers; its cache holds the states of those.
"""

import re

from torch import nn
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from .share_bmojo import HEADS_STYLE, WHOLE_HEADS_STYLE


# Between a map that is cut by its rows and one that is cut by its columns a device has a share of what is there: heads
# of attention and SSM, channels of an MLP. Of in_proj, whose rows are of several kinds, the outputs are gathered.
_MAPS = {
    **{f"self_attn.{prefix}{name}_proj": "colwise" for prefix in ("", "fading_") for name in "qkv"},
    "self_attn.o_proj": "rowwise",
    "fading.in_proj": "colwise_gather_output",
    "fading.x_proj": "rowwise",
    "fading.dt_proj": "colwise",
    "fading.out_proj": "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
TENSOR_PLAN = {"embed_tokens": "embedding_rowwise", "layers.*": HEADS_STYLE}
TENSOR_PLAN |= {f"layers.*.{name}": style for name, style in _MAPS.items()}
HEAD_TENSOR_PLAN = {"lm_head": "colwise_gather_output"}
# The same styles where all have the whole of what is between two maps.
_WHOLE = {"colwise": "colwise_gather_output", "rowwise": "rowwise_split_input", HEADS_STYLE: WHOLE_HEADS_STYLE}

# What goes into each part and comes out, in order: a pipeline is cut between parts, and between layers.
PIPELINE_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "rows"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}
HEAD_PIPELINE_PLAN = {"lm_head": (["hidden_states"], ["logits"])}


def matching(plan: dict[str, str], model: nn.Module) -> dict[str, str]:
    """Return the rules of a plan that name a module of this model; which maps there are depends on the configuration,
    and transformers takes a rule without a module for a slip."""
    names = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in model.named_modules()}
    return {rule: style for rule, style in plan.items() if rule in names}


def whole_heads(plan: dict[str, str]) -> dict[str, str]:
    """Return the rules of a plan that differ if every device has all heads, as they are then."""
    within = ("layers.*.self_attn.", "layers.*.fading.")
    of_heads = {
        rule: style for rule, style in plan.items() if rule.endswith("layers.*") or any(w in rule for w in within)
    }
    return {rule: _WHOLE[style] for rule, style in of_heads.items() if style in _WHOLE}


def is_elsewhere(layer: nn.Module) -> bool:
    """Whether another stage of a pipeline has this layer."""
    return isinstance(layer, PipelineIdentityLayer)


__all__ = [
    "HEAD_PIPELINE_PLAN",
    "HEAD_TENSOR_PLAN",
    "PIPELINE_PLAN",
    "TENSOR_PLAN",
    "is_elsewhere",
    "matching",
    "whole_heads",
]
