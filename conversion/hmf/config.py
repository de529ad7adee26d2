"""config.json of hybrid-model-factory: read, checked, and turned into a `BMojoConfig`.

Every key must be known; those that repeat others must agree with them. What a key means was read from
`hybrid_zoo/models/hybrid_qwen3` and `hybrid_zoo/layers` of awslabs/hybrid-model-factory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from modeling_bmojo import BMojoConfig

from .mixers import MIXERS, Mixer, sizes_of


MODEL_TYPE = "hybrid_qwen3"
ATTENTION, WINDOW, BMOJO = "*", "SWA", "BMF"  # tokens of the pattern that are no pure mixer
NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hybrid_override_pattern"),
)
# Fields that mean the same in both, with what their config class has for them.
BACKBONE = {
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
SECTIONS = ("bmojo_config", "swa_config", *(mixer.section for mixer in MIXERS))
FILE = "take the file that came with the weights"  # the remedy, where a file was changed
# No result depends on these: the pattern says which layers slide, and runtimes set the rest anew.
UNREAD = ("layer_types", "use_sliding_window", "sliding_window", "max_window_layers", "batch_size", "auto_map")
OF_BMOJO = {
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "rms_norm_eps",
}


@dataclass(frozen=True)
class Layout:
    """What a config.json says.

    tokens: of the pattern, one per layer. mixer: the SSM of all layers that have one, or None. section: its settings,
    with defaults filled. tied: whether fading tokens share the projections of the others. config: ours.
    stated: theirs, with defaults filled.
    """

    tokens: list[str]
    mixer: Mixer | None
    section: dict[str, Any]
    tied: bool
    config: BMojoConfig
    stated: dict[str, Any]


def read_layout(stated: Mapping[str, Any], what: str) -> Layout:
    """Return the layout of a source.

    Args:
        stated: its config.json. what: its name in messages.

    Raises:
        ValueError: another model type, quantised weights, an unknown key, token or mixer, a missing section, or a
            setting that a B'MOJO model has no field for.
    """
    _check_kind(stated, what)
    values = {**BACKBONE, **stated}
    tokens = _tokens(values, what)
    bmojo = _bmojo_section(values, what) if BMOJO in tokens else None
    mixer = _mixer(tokens, bmojo, what)
    section = {} if mixer is None else _section(values, mixer, what)
    fields = {name: values[name] for name in (*NEEDED, *BACKBONE) if name != "hybrid_override_pattern"}
    fields |= {"qk_norm": "head", "mlp_bias": False, "rope_parameters": _rope(values, what)}
    fields |= {"layer_types": [_kind(token) for token in tokens], "eidetic_size": 0, "fading_size": 0}
    window = _window(values, tokens, bmojo, what)
    if window is not None:
        fields["window_size"] = window
    tied = bmojo is None or bmojo["tie_attn_weights"]
    if bmojo is not None:
        fields |= {"fading_size": window, "tie_fading_projections": tied, "tie_fading_queries": tied}
    if mixer is not None:
        fields |= _ssm_fields(values, mixer, section, what)
    return Layout(tokens, mixer, section, tied, BMojoConfig(**fields), values)


def _check_kind(stated: Mapping[str, Any], what: str) -> None:
    if stated.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{what}: model_type={stated.get('model_type')!r}: must be {MODEL_TYPE!r}, the published checkpoints of "
            "hybrid-model-factory; a Transformer becomes a B'MOJO model by conversion.graft."
        )
    if stated.get("quantization_config"):
        raise ValueError(
            f"{what}: holds quantised weights (quantization_config in its config.json); give the unquantised "
            "checkpoint."
        )
    known = {*NEEDED, *BACKBONE, *ROPE, *SECTIONS, *UNREAD, *PreTrainedConfig().to_dict(), "torch_dtype", "dtype"}
    known |= {"architectures", "transformers_version", "_name_or_path", "quantization_config"}
    unknown = sorted(stated.keys() - known)
    if unknown:
        raise ValueError(
            f"{what}: config.json has unknown keys: {', '.join(unknown)}; what they change is not known here, so "
            "remove them only if nothing depends on them."
        )
    missing = [name for name in NEEDED if stated.get(name) is None]
    if missing:
        raise ValueError(f"{what}: config.json lacks {', '.join(missing)}; {FILE}.")


def _tokens(values: Mapping[str, Any], what: str) -> list[str]:
    pattern, layers = values["hybrid_override_pattern"], values["num_hidden_layers"]
    tokens = pattern.split("-") if isinstance(pattern, str) else []
    known = (ATTENTION, WINDOW, BMOJO, *(mixer.token for mixer in MIXERS))
    unknown = [f"{token!r} (layer {index})" for index, token in enumerate(tokens) if token not in known]
    if unknown:
        raise ValueError(
            f"{what}: hybrid_override_pattern={pattern!r}: unknown {', '.join(unknown)}; the layers that can be "
            f"read are {', '.join(known)} (fused and dual layers are of training stages, and not published)."
        )
    if len(tokens) != layers:
        raise ValueError(
            f"{what}: hybrid_override_pattern={pattern!r}: names {len(tokens)} layers, num_hidden_layers={layers}; "
            f"{FILE}."
        )
    if values.get("layer_types") not in (None, tokens):
        raise ValueError(f"{what}: layer_types={values['layer_types']}: is not hybrid_override_pattern; remove it.")
    return tokens


def _bmojo_section(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    section = _stated_section(values, "bmojo_config", BMOJO, what)
    if section.get("window_size") is None or section.get("ssm_mixer") is None:
        raise ValueError(f"{what}: bmojo_config lacks window_size or ssm_mixer; {FILE}.")
    known = {"window_size", "tie_attn_weights", "ssm_mixer", *OF_BMOJO}
    _refuse_unknown(section, known, "bmojo_config", what)
    _check_derived(section, OF_BMOJO, values, "bmojo_config", what)
    tied = section.get("tie_attn_weights", True)
    if not isinstance(tied, bool):
        raise ValueError(f"{what}: bmojo_config.tie_attn_weights={tied!r}: must be true or false.")
    return {**section, "tie_attn_weights": tied}


def _stated_section(values: Mapping[str, Any], name: str, token: str, what: str) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{what}: {name}={section!r}: config.json must say how its {token} layers are built; {FILE}.")
    return section


def _refuse_unknown(section: Mapping[str, Any], known: set[str], name: str, what: str) -> None:
    unknown = sorted(f"{name}.{key}" for key in section.keys() - known)
    if unknown:
        raise ValueError(
            f"{what}: config.json has unknown keys: {', '.join(unknown)}; what they change is not known here."
        )


def _check_derived(
    section: Mapping[str, Any], derived: Mapping[str, Any], values: Mapping[str, Any], name: str, what: str
) -> None:
    """Refuse a key that repeats something and says something else: their code takes the original (ValueError)."""
    sizes = sizes_of(values)
    for key, origin in derived.items():
        if key not in section:
            continue
        if isinstance(origin, dict):
            inner = section[key] if isinstance(section[key], dict) else {"value": section[key]}
            _refuse_unknown(inner, set(origin), f"{name}.{key}", what)
            _check_derived(inner, origin, values, f"{name}.{key}", what)
            continue
        wanted = origin if not isinstance(origin, str) else sizes.get(origin, values.get(origin))
        if section[key] != wanted:
            raise ValueError(
                f"{what}: {name}.{key}={section[key]!r}: must be {wanted!r}, as the rest of config.json says; {FILE}."
            )


def _mixer(tokens: list[str], bmojo: Mapping[str, Any] | None, what: str) -> Mixer | None:
    """Return the one SSM of all layers that have one."""
    found = {mixer.token: mixer for mixer in MIXERS if mixer.token in tokens}
    if bmojo is not None:
        name = str(bmojo["ssm_mixer"]).lower()
        own = next((mixer for mixer in MIXERS if name in mixer.names), None)
        if own is None:
            names = ", ".join(mixer.names[0] for mixer in MIXERS)
            raise ValueError(f"{what}: bmojo_config.ssm_mixer={bmojo['ssm_mixer']!r}: must be one of {names}.")
        found[own.token] = own
    if len(found) > 1:
        raise ValueError(
            f"{what}: hybrid_override_pattern has SSMs of several kinds ({', '.join(found)}); all layers of a B'MOJO "
            "model share one ssm_type, and no published checkpoint has two."
        )
    return next(iter(found.values()), None)


def _section(values: Mapping[str, Any], mixer: Mixer, what: str) -> dict[str, Any]:
    """Return the mixer's settings, with their defaults."""
    stated = _stated_section(values, mixer.section, mixer.token, what)
    _refuse_unknown(stated, {*mixer.settings, *mixer.derived}, mixer.section, what)
    _check_derived(stated, mixer.derived, values, mixer.section, what)
    section = {name: stated.get(name, setting.default) for name, setting in mixer.settings.items()}
    for name, setting in mixer.settings.items():
        if setting.only is not None and section[name] not in setting.only:
            raise ValueError(
                f"{what}: {mixer.section}.{name}={section[name]!r}: must be {setting.only[0]!r}; a B'MOJO model has no "
                f"{setting.why}, and no published checkpoint needs it."
            )
        if isinstance(setting.default, bool) and not isinstance(section[name], bool):
            raise ValueError(f"{what}: {mixer.section}.{name}={section[name]!r}: must be true or false.")
    if section.get("kv_learnable_residual") and section.get("kv_proj_rank") is None:
        section["kv_learnable_residual"] = False  # as their code reads it
    return section


def _ssm_fields(values: Mapping[str, Any], mixer: Mixer, section: Mapping[str, Any], what: str) -> dict[str, Any]:
    heads, dim = values["num_attention_heads"], values["head_dim"]
    fields = {"ssm_num_heads": heads, "ssm_head_dim": dim, "ssm_state_size": dim}
    fields |= {"ssm_num_groups": values["num_key_value_heads"], **mixer.fields}
    for name, setting in mixer.settings.items():
        if setting.becomes is not None:
            fields[setting.becomes] = section[name]
    unknown = sorted(fields.keys() - set(BMojoConfig.fields_with()))
    if unknown:
        raise ValueError(
            f"{what}: its layers have the mixer {mixer.names[0]!r}, and this version of modeling_bmojo cannot run it "
            f"(no {', '.join(unknown)}); use a newer one."
        )
    if fields.get("ssm_expand_rank") is not None and heads == values["num_key_value_heads"]:
        raise ValueError(
            f"{what}: {mixer.section}.kv_proj_rank={section['kv_proj_rank']}: every query head has its own key, so "
            "their code leaves these maps out; set it to null and remove their tensors."
        )
    return fields


def _rope(values: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Return the RoPE parameters; older files say them in two keys."""
    stated = values.get("rope_parameters")
    if stated is None and values.get("rope_theta") is not None:
        stated = {"rope_type": "default", "rope_theta": values["rope_theta"], **(values.get("rope_scaling") or {})}
    if not isinstance(stated, dict) or stated.get("rope_theta") is None:
        raise ValueError(f"{what}: rope_parameters={stated!r}: must say rope_type and rope_theta.")
    return {"rope_type": "default", **stated}


def _window(values: Mapping[str, Any], tokens: list[str], bmojo: Mapping[str, Any] | None, what: str) -> int | None:
    """Return W, tokens that a query sees, itself included: one for all windowed layers; None: there are none."""
    found = {}
    if bmojo is not None:
        found["bmojo_config.window_size"] = _power_of_two(bmojo["window_size"], what)
    if WINDOW in tokens:
        section = _stated_section(values, "swa_config", WINDOW, what)
        _refuse_unknown(section, {"window_size"}, "swa_config", what)
        size = section.get("window_size")
        if type(size) is not int or size < 1:
            raise ValueError(f"{what}: swa_config.window_size={size!r}: must be a whole number of tokens, 1 or more.")
        found["swa_config.window_size"] = size
    if len(set(found.values())) > 1:
        raise ValueError(
            f"{what}: {' and '.join(f'{name}={size}' for name, size in found.items())}: all windowed layers of a "
            "B'MOJO model share one window_size, and no published checkpoint has two."
        )
    return next(iter(found.values()), None)


def _power_of_two(size: Any, what: str) -> int:
    """Return W of a B'MOJO-F layer: 2^n, which older files call 2^n - 1 (their vLLM plugin reads those so, too)."""
    window = size + size % 2 if type(size) is int else 0
    if window < 1 or window & (window - 1):
        raise ValueError(
            f"{what}: bmojo_config.window_size={size!r}: must be a power of two, or one less (which means the power); "
            f"{FILE}."
        )
    return window


def _kind(token: str) -> str:
    return {ATTENTION: "full_attention", WINDOW: "sliding_attention", BMOJO: "bmojo"}.get(token, "linear_attention")


__all__ = ["Layout", "read_layout"]
