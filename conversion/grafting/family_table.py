"""The table of source families: how each supported Transformer maps onto the one parameterised B'MOJO backbone.

A family is a row of data: where each backbone field of `BMojoConfig` comes from in the source's config (`fields`), what
the architecture fixes (`constants`), what it must not ask for (`required`), how tensors are called (`renames`), which
hold several of ours (`splits`) and which are left behind with the reason (`dropped`). A new family is a new row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


# Backbone field of BMojoConfig -> field of the source's config. Every family has these.
COMMON_FIELDS = {
    name: name
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "use_cache",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
        "rope_parameters",
        "attention_dropout",
    )
}

COMMON_DROPPED = (
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "recomputed from rope_parameters"),
    (r"model\.rotary_emb\.(original_)?inv_freq", "recomputed from rope_parameters"),
)


@dataclass(frozen=True)
class Family:
    """One supported source architecture.

    fields: BMojoConfig field -> source config field, on top of COMMON_FIELDS.
    optional_fields: the same, read only where the source has the field and it is not None.
    constants: BMojoConfig field -> value that the architecture implies.
    required: source config field -> (the only value that the backbone can express, what it cannot).
    renames: (regex, replacement) on tensor names, the first match wins.
    splits: (regex, replacements): a tensor whose rows are those of several targets, one after the other.
    dropped: (regex, reason) of tensors that are left behind.
    """

    name: str
    model_type: str
    architecture: str
    fields: Mapping[str, str] = field(default_factory=dict)
    optional_fields: Mapping[str, str] = field(default_factory=lambda: {"head_dim": "head_dim"})
    constants: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    splits: tuple[tuple[str, tuple[str, ...]], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()


_BIAS_EVERYWHERE = {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"}
_NO_BIAS = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_NO_DROPOUT = (0.0, "dropout of embeddings and residuals")

FAMILIES = (
    Family(
        name="Llama",
        model_type="llama",
        architecture="LlamaForCausalLM",
        fields={**_BIAS_EVERYWHERE, "mlp_bias": "mlp_bias"},
    ),
    Family(name="Mistral", model_type="mistral", architecture="MistralForCausalLM", constants=_NO_BIAS),
    Family(
        name="Qwen2",
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        constants={"attention_bias": True, "attention_output_bias": False, "mlp_bias": False},
    ),
    Family(
        name="Qwen3",
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        fields=_BIAS_EVERYWHERE,
        constants={"qk_norm": "head", "mlp_bias": False},
    ),
    Family(
        name="SmolLM3",
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        fields={**_BIAS_EVERYWHERE, "mlp_bias": "mlp_bias"},
        optional_fields={"head_dim": "head_dim", "no_rope_layers": "no_rope_layers"},
    ),
    Family(
        name="Phi-3",
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        constants=_NO_BIAS,
        required={"resid_pdrop": _NO_DROPOUT, "embd_pdrop": _NO_DROPOUT},
        splits=(
            (r"(.*\.self_attn\.)qkv_proj\.weight", (r"\1q_proj.weight", r"\1k_proj.weight", r"\1v_proj.weight")),
            (r"(.*\.mlp\.)gate_up_proj\.weight", (r"\1gate_proj.weight", r"\1up_proj.weight")),
        ),
    ),
    Family(
        name="Granite",
        model_type="granite",
        architecture="GraniteForCausalLM",
        fields={**_BIAS_EVERYWHERE, "mlp_bias": "mlp_bias", **{name: name for name in _MULTIPLIERS}},
    ),
    Family(
        name="OLMo2",
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        fields=_BIAS_EVERYWHERE,
        constants={"qk_norm": "full", "norm_position": "post", "mlp_bias": False},
    ),
)
