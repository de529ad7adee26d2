"""How a model is cut over devices: the plans that transformers reads, and stages of a pipeline.

A tensor plan cuts every large map by its rows or columns, the vocabulary too. What is between them is replicated:
attention, innovation test and SSM run on all heads on every device, so that all of them judge a token by the same
numbers, keep the same tokens, bit for bit, and hold the same cache. Norms, convolutions, scalars, sketches, the two
small maps of `"mamba"` and those of `ssm_expand_rank` are whole on every device.

A pipeline gives each device some of the layers; its cache holds the states of those.
"""

import re

from torch import nn
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer


# Rows are cut and the outputs gathered, or columns are cut and the outputs added up; between gate and down nothing is.
_MAPS = {
    **{f"self_attn.{name}": "colwise_gather_output" for name in ("q_proj", "k_proj", "v_proj")},
    **{f"self_attn.{name}": "colwise_gather_output" for name in ("fading_q_proj", "fading_k_proj", "fading_v_proj")},
    "self_attn.o_proj": "rowwise_split_input",
    "fading.in_proj": "colwise_gather_output",
    "fading.out_proj": "rowwise_split_input",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
TENSOR_PLAN = {"embed_tokens": "embedding_rowwise"} | {f"layers.*.{name}": style for name, style in _MAPS.items()}
HEAD_TENSOR_PLAN = {"lm_head": "colwise_gather_output"}

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


def is_elsewhere(layer: nn.Module) -> bool:
    """Whether another stage of a pipeline has this layer."""
    return isinstance(layer, PipelineIdentityLayer)


__all__ = ["HEAD_PIPELINE_PLAN", "HEAD_TENSOR_PLAN", "PIPELINE_PLAN", "TENSOR_PLAN", "is_elsewhere", "matching"]
