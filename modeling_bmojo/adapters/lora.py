"""LoRA configurations for B'MOJO.

    recipe     low-rank pairs on                                             trained in full
    "lora"     q, k, v, o; the SSM's in, out (and x, dt) projections; MLP    -
    "hylora"   the same                                                      the short convolutions

HyLoRA is the recipe of Expansion Span (arXiv 2412.13328). The convolutions are depthwise: a low-rank pair on one is as
large as itself and cannot be merged, so they train in full. The SSM's scalars (A_log, dt_bias, D) are one small module,
trained in full on request. Both are `modules_to_save`, so that they are saved and switched with the adapter;
parameters that are merely unfrozen are lost on save.

PEFT is optional: it is imported by who asks for a configuration.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..configuration_bmojo import FADING_MEMORIES, BMojoConfig
from ..peft_bmojo import ATTENTION, FADING_ATTENTION, FADING_QUERIES, MLP, all_targets


if TYPE_CHECKING:
    try:
        from peft import LoraConfig
    except ImportError:
        LoraConfig = Any


RECIPES = ("lora", "hylora")
CONVOLUTION, SCALARS = "conv", "scalars"  # names of the modules that a recipe may train in full
TASKS = {
    "BMojoForCausalLM": "CAUSAL_LM",
    "BMojoForSequenceClassification": "SEQ_CLS",
    "BMojoForTokenClassification": "TOKEN_CLS",
    "BMojoForQuestionAnswering": "QUESTION_ANS",
    "BMojoModel": "FEATURE_EXTRACTION",
}


def projections(config: BMojoConfig) -> list[str]:
    """Return names of the projections (linear maps inside layers) that a model of `config` has."""
    specs = [config.layer_spec(index) for index in range(config.num_hidden_layers)]
    untied = not config.tie_fading_projections and any(spec.fading for spec in specs)
    names = [*ATTENTION] * any(spec.has_attention for spec in specs) + [*FADING_ATTENTION] * untied
    names += [*FADING_QUERIES] * (untied and not config.tie_fading_queries)
    if any(spec.has_ssm for spec in specs):
        names += FADING_MEMORIES[config.ssm_type].projections(config)
    return names + [*MLP] * (config.intermediate_size > 0)


def _check_in_full(in_full: list[str], config: BMojoConfig, wish: str) -> None:
    """Raise ValueError unless the model's fading memories have the modules that are to be trained in full."""
    if not any(config.layer_spec(index).has_ssm for index in range(config.num_hidden_layers)):
        raise ValueError(f"{wish}: trains {in_full} of the SSMs in full, and this model has no SSM; use recipe='lora'.")
    missing = [name for name in in_full if name not in FADING_MEMORIES[config.ssm_type].modules]
    if missing:
        raise ValueError(
            f"{wish}: trains {in_full} of the SSMs in full, and those of ssm_type={config.ssm_type!r} have no "
            f"{missing[0]!r}; use recipe='lora', and name modules of theirs in modules_to_save."
        )


def bmojo_lora_config(
    model_or_config: nn.Module | BMojoConfig | None = None,
    recipe: str = "lora",
    *,
    ssm_scalars: bool = False,
    **options: Any,
) -> "LoraConfig":
    """Return a `peft.LoraConfig` for B'MOJO.

    Args:
        model_or_config: a B'MOJO model or configuration: only projections that it has are named, and the task type
            follows the model's head. None: every name there is, which suits any B'MOJO language model.
        recipe: "lora" or "hylora", see the module's docstring.
        ssm_scalars: train A_log, dt_bias and D of every SSM in full as well; they are saved with the adapter.
        options: fields of `LoraConfig` (`r`, `lora_alpha`, `lora_dropout`, `use_dora`, `use_rslora`, ...), which win
            over the recipe; `modules_to_save` adds to it. Defaults here: `r=16`, `lora_alpha=2 r`.

    Returns:
        the configuration for `peft.get_peft_model(model, config)`.

    Raises:
        ImportError: without PEFT.
        ValueError: for an unknown recipe, a rank below 1, something that is no B'MOJO, full training of modules that
            it does not have, or DoRA on weights with rows of zeros, if a model is given.
        TypeError: from PEFT, for options that `LoraConfig` does not have.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r}: must be one of {list(RECIPES)}; DoRA is use_dora=True with either.")
    rank = options.get("r", 16)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"r={rank!r}: the rank must be a whole number of at least 1; give e.g. 16.")
    config = None if model_or_config is None else _config_of(model_or_config)
    in_full = [CONVOLUTION] * (recipe == "hylora") + [SCALARS] * bool(ssm_scalars)
    if in_full and config is not None:
        _check_in_full(in_full, config, f"recipe={recipe!r}" if recipe == "hylora" else "ssm_scalars=True")
    try:
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists
    except ImportError as error:
        raise ImportError(f"bmojo_lora_config needs PEFT ({error}): pip install 'modeling-bmojo[train]'.") from error
    defaults = {
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": all_targets() if config is None else projections(config),
        "task_type": TASKS.get(type(_unwrapped(model_or_config)).__name__, "CAUSAL_LM"),
    }
    in_full += [name for name in options.pop("modules_to_save", None) or [] if name not in in_full]
    options = {name: value for name, value in options.items() if value is not None or name not in defaults}
    built = LoraConfig(**{**defaults, **options, "modules_to_save": in_full or None})
    if built.use_dora and isinstance(model_or_config, nn.Module):
        model = _unwrapped(model_or_config)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        linear = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear)]
        named = {name.removesuffix(".base_layer"): each for name, each in linear if each is not head}
        if built.target_modules != "all-linear":
            named = {name: each for name, each in named.items() if check_target_module_exists(built, name)}
        _check_rows(named)
    return built


def _check_rows(targets: dict[str, nn.Linear]) -> None:
    """Refuse DoRA where a target has a row of zeros (ValueError): divided by its length, 0, all is NaN.

    The SSMs of a fresh graft are such: they start with nothing to say, with rows of zeros in in_proj.
    """
    empty = {name.rpartition(".")[2] for name, module in targets.items() if _has_empty_row(module.weight)}
    if empty:
        rest = list(dict.fromkeys(name.rpartition(".")[2] for name in targets))
        raise ValueError(
            f"use_dora=True: DoRA divides by the length of every row of a weight, and {', '.join(sorted(empty))} has "
            "rows of zeros, as in a fresh graft, so all would be NaN; train them first (conversion.align, train: new), "
            f"or leave them out: target_modules={[name for name in rest if name not in empty]}."
        )


def _has_empty_row(weight: torch.Tensor) -> bool:
    if weight.device.type == "meta" or not weight.is_floating_point() or weight.ndim != 2:
        return False  # no values to look at, or packed ones
    return bool((weight.detach().abs().amax(dim=1) == 0).any())


def _unwrapped(model: Any) -> Any:
    """Return the transformers model inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config_of(model_or_config: Any) -> BMojoConfig:
    config = getattr(model_or_config, "config", model_or_config)
    if getattr(config, "model_type", None) != "bmojo":
        name = type(model_or_config).__name__
        raise ValueError(f"model_or_config={name}: must be a B'MOJO model or BMojoConfig; pass one, or nothing.")
    return config
