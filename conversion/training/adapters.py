"""An adapter for a model, from the `lora:` section of the settings: PEFT's configuration, and the names it may hold.

PEFT passes over target modules that a model does not have as long as one of them is there. A misspelt name then trains
less than was asked for, without a word, so every name is looked up first.
"""

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from modeling_bmojo import bmojo_lora_config

from .settings import LoraSettings


if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTABLE = (nn.Linear, nn.Embedding)


def lora_config(model: nn.Module, lora: LoraSettings) -> "LoraConfig":
    """PEFT's LoraConfig of the `lora:` section for this model (ValueError: what the recipe cannot do with it)."""
    chosen = {"lora_alpha": lora.alpha, "target_modules": lora.target_modules, "modules_to_save": lora.modules_to_save}
    return bmojo_lora_config(
        model,
        lora.recipe,
        ssm_scalars=lora.ssm_scalars,
        r=lora.r,
        lora_dropout=lora.dropout,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        **{name: value for name, value in chosen.items() if value is not None},
    )


def check_names(model: nn.Module, lora: LoraSettings) -> None:
    """Refuse targets and modules to save that match nothing in the model (ValueError)."""
    everything = [name for name, _ in model.named_modules() if name]
    linear = [name for name, module in model.named_modules() if isinstance(module, ADAPTABLE)]
    if lora.target_modules is not None and lora.target_modules != "all-linear":
        _refuse_unmatched("target_modules", lora.target_modules, linear, "remove it: the recipe names what there is")
    if lora.modules_to_save:
        _refuse_unmatched("modules_to_save", lora.modules_to_save, everything, "remove what is not there")


def _refuse_unmatched(key: str, given: str | Sequence[str], names: Iterable[str], remedy: str) -> None:
    if isinstance(given, str):
        missed = [] if any(_matches(given, name) for name in names) else [given]
    else:
        missed = [item for item in given if not any(name == item or name.endswith(f".{item}") for name in names)]
    if missed or not given:
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names if not name.endswith("norm")))
        what = "is empty" if not given else f"{', '.join(map(repr, missed))} matches nothing in the model"
        raise ValueError(f"lora.{key}={given!r}: {what}; known names: {known}; or {remedy}.")


def _matches(pattern: str, name: str) -> bool:
    """As PEFT reads a text: a regular expression for the whole name."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(
            f"lora.target_modules={pattern!r}: is no regular expression ({error}); give a list."
        ) from error


def merged_names(adapted: nn.Module) -> list[str]:
    """Return the parameters that merging will change, as the merged model names them.

    These are the weights of the adapted modules and all of those that train in full (`modules_to_save`).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    found = []
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            found += [f"{name}.{part}" for part, _ in module.original_module.named_parameters()]
        elif isinstance(module, BaseTunerLayer):
            found.append(f"{name}.weight")
    return found
