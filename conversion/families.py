"""Source families: how each supported Transformer maps onto the one parameterised B'MOJO backbone.

A family is a row of data: where each backbone field of `BMojoConfig` comes from in the source's config (`fields`), what
is fixed by the architecture (`constants`), how tensor names translate (`renames`) and which tensors are left behind
with the reason (`dropped`). All families below use Llama's tensor names. A new family is a new row of `FAMILIES`.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modeling_bmojo import BMojoConfig


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

# Fields of BMojoConfig that a graft may set; all others are facts of the source.
MEMORY_FIELDS = (
    "window_size",
    "eidetic_size",
    "eidetic_decay",
    "innovation",
    "innovation_taps",
    "fading_size",
    "fading_stride",
    "tie_fading_projections",
    "memory_block_size",
    "ssm_type",
    "ssm_num_heads",
    "ssm_head_dim",
    "ssm_state_size",
    "ssm_num_groups",
    "ssm_time_step_rank",
    "ssm_conv_kernel",
    "ssm_conv_bias",
    "ssm_conv_act",
    "ssm_projected",
    "ssm_proj_bias",
    "ssm_gated",
    "ssm_norm",
    "ssm_chunk_size",
    "ssm_time_step_min",
    "ssm_time_step_max",
    "ssm_time_step_floor",
    "ssm_scalars_in_fp32",
    "ssm_time_step_limit",
)


@dataclass(frozen=True)
class Family:
    """One supported source architecture.

    fields: BMojoConfig field -> source config field, on top of COMMON_FIELDS.
    optional_fields: the same, read only where the source has the field and it is not None.
    constants: BMojoConfig field -> value that the architecture implies.
    renames: (regex, replacement) on tensor names, the first match wins.
    dropped: (regex, reason) of tensors that are left behind.
    """

    name: str
    model_type: str
    architecture: str
    fields: Mapping[str, str] = field(default_factory=dict)
    optional_fields: Mapping[str, str] = field(default_factory=lambda: {"head_dim": "head_dim"})
    constants: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()


_BIAS_EVERYWHERE = {"attention_bias": "attention_bias", "attention_output_bias": "attention_bias"}
_NO_BIAS = {"attention_bias": False, "attention_output_bias": False, "mlp_bias": False}

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
)


def supported_architectures() -> str:
    """The supported architectures as one line for messages."""
    return ", ".join(family.architecture for family in FAMILIES)


def family_named(model_type: str | None, architectures: Iterable[str] | None = None) -> Family:
    """The family of a `model_type` and, where the source states them, its `architectures`.

    Raises:
        ValueError: for anything but the supported architectures, which the message lists.
    """
    architectures = list(architectures or ())
    for family in FAMILIES:
        if family.model_type == model_type and (not architectures or family.architecture in architectures):
            return family
    found = ", ".join(architectures) or f"model_type={model_type!r}"
    raise ValueError(
        f"source architecture {found} is not supported; the graft supports {supported_architectures()}. "
        "Add a row to conversion/families.py for another one."
    )


def family_of(config: Any) -> Family:
    """The family of a source config (a `PreTrainedConfig`)."""
    return family_named(getattr(config, "model_type", None), getattr(config, "architectures", None))


def source_layer_types(config: Any) -> list[str]:
    """`"full_attention"` or `"sliding_attention"` for each layer of the source."""
    window = getattr(config, "sliding_window", None)
    stated = getattr(config, "layer_types", None)
    if stated:
        kinds = list(stated)
    else:
        kinds = ["sliding_attention" if window is not None else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"layer_types of the source holds {unknown}; the graft reads full_attention and sliding_attention only."
        )
    return kinds


def source_window(config: Any) -> int | None:
    """Tokens that the source's sliding layers see, the query included; None where no layer slides."""
    return config.sliding_window if "sliding_attention" in source_layer_types(config) else None


def chosen_layers(layers: str | list[int], count: int) -> list[int]:
    """Indices of the layers that become B'MOJO layers.

    Raises:
        ValueError: `layers` is neither "all" nor a list of distinct indices in [0, count).
    """
    if layers == "all":
        return list(range(count))
    is_list = isinstance(layers, list) and all(type(index) is int for index in layers)
    if not is_list or not layers or len(set(layers)) != len(layers) or not all(0 <= index < count for index in layers):
        raise ValueError(
            f"layers={layers!r}: must be 'all' or a list of distinct layer indices from 0 to {count - 1}, at least one."
        )
    return sorted(layers)


def backbone_fields(config: Any) -> dict[str, Any]:
    """The backbone fields of `BMojoConfig` that a source config implies."""
    family = family_of(config)
    stated = {name: getattr(config, source) for name, source in {**COMMON_FIELDS, **family.fields}.items()}
    fields = copy.deepcopy(stated)
    fields["attention_dropout"] = fields["attention_dropout"] or 0.0
    for name, source in family.optional_fields.items():
        value = getattr(config, source, None)
        if value is not None:
            fields[name] = value
    fields.update(family.constants)
    if fields.get("no_rope_layers") is not None:
        fields["no_rope_layers"] = [int(value) for value in fields["no_rope_layers"]][: config.num_hidden_layers]
    return fields


def bmojo_config_for(source_config: Any, overrides: Mapping[str, Any], layers: str | list[int] = "all") -> BMojoConfig:
    """The B'MOJO config of a graft: facts of the source, the chosen layers, and `overrides` of the memory fields.

    Layers that are not chosen stay what they are in the source, full or sliding attention. All windowed layers share
    one `window_size`; it defaults to the source's own window where the source has one.

    Raises:
        ValueError: unsupported source, an override that is no memory field, or a contradiction between the two.
    """
    for name in overrides:
        if name not in MEMORY_FIELDS:
            raise ValueError(
                f"{name}={overrides[name]!r}: not a field that a graft may set; it is a fact of the source."
            )
    kinds = source_layer_types(source_config)
    window = source_window(source_config)
    for index in chosen_layers(layers, source_config.num_hidden_layers):
        kinds[index] = "bmojo"
    memory = dict(overrides)
    if window is not None:
        memory.setdefault("window_size", window)
        if "sliding_attention" in kinds and memory["window_size"] != window:
            kept = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
            raise ValueError(
                f"window_size={memory['window_size']}: layers {kept} stay sliding-window layers of the source, whose "
                f"sliding_window is {window}, and all windowed layers share one size; "
                f"set window_size={window} or graft those layers too."
            )
    return BMojoConfig(**backbone_fields(source_config), layer_types=kinds, **memory)


def target_of(config: Any, name: str) -> tuple[str | None, str]:
    """Where a source tensor goes: `(target name, "")`, or `(None, reason)` where it is left behind on purpose."""
    family = family_of(config)
    for pattern, reason in family.dropped + COMMON_DROPPED:
        if re.fullmatch(pattern, name):
            return None, reason
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return None, "tied to model.embed_tokens.weight"
    for pattern, replacement in family.renames:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name), ""
    return name, ""
