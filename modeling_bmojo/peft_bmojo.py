"""What PEFT is told about B'MOJO: the default targets of an adapter, and that prompt methods do not fit its memory.

PEFT is optional and never imported by importing this. Its table of default targets is filled when PEFT itself is.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

from torch import nn

from .configuration_bmojo import FADING_MEMORIES


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FADING_ATTENTION = ("fading_k_proj", "fading_v_proj")
FADING_QUERIES = ("fading_q_proj",)
MLP = ("gate_proj", "up_proj", "down_proj")

# PEFT's tables, and the submodule that its prompt methods, and nothing else, ask a model for when they wrap it.
PEFT_TABLES = "peft.utils.constants"
PROMPT_PROBE = "embeddings.word_embeddings"


def all_targets() -> list[str]:
    """Return every projection that a layer of some type has. PEFT passes over names that a model does not have."""
    fading = (name for form in FADING_MEMORIES.values() for name in form.maps)
    return list(dict.fromkeys((*ATTENTION, *FADING_ATTENTION, *FADING_QUERIES, *fading, *MLP)))


def fill_tables(tables: Any) -> None:
    """Add the default targets of "bmojo" to PEFT's module of tables; a user's own entry stays."""
    lora = getattr(tables, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", None)
    if lora is not None:  # a PEFT without this table asks for target_modules by itself
        lora.setdefault("bmojo", all_targets())


class _FillsTables:
    """Import finder that lets PEFT's module of tables be found as ever, and fills the tables when it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != PEFT_TABLES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_fill(module: Any) -> None:
                run(module)
                fill_tables(module)

            spec.loader.exec_module = run_and_fill
        return spec


def register_with_peft() -> None:
    """Make "bmojo" known to PEFT: now if PEFT is loaded, else as soon as it is. Importing PEFT takes a moment and can
    fail for reasons of its own, which is no business of who only wants to run a model."""
    if PEFT_TABLES in sys.modules:
        fill_tables(sys.modules[PEFT_TABLES])
    elif not any(type(finder).__name__ == _FillsTables.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _FillsTables())


register_with_peft()


class NoPrompts:
    """For models: refuses PEFT's prompt methods while they wrap the model, before anything is trained."""

    def get_submodule(self, target: str) -> nn.Module:
        """`nn.Module.get_submodule`.

        Raises:
            ValueError: for the submodule that only PEFT's prompt methods look for.
        """
        if target == PROMPT_PROBE:
            raise ValueError(
                "peft_config: prompt tuning, prefix tuning and p-tuning do not fit a B'MOJO memory. Virtual tokens are "
                f"tokens like others: they leave the window of window_size={self.config.window_size} and are forgotten "
                "unless they surprise a layer, so a long text would lose its prompt; and a prefix of keys and values "
                "brings no SSM state to continue from. Adapt weights instead: bmojo_lora_config(model)."
            )
        return super().get_submodule(target)
