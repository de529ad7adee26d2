"""The models that stand side by side in an evaluation, all from one copy of the source's weights.

    source         the source by transformers' own class, full attention (or what its layers do)
    window         the layers that a graft converts see the last W tokens and nothing else
    sinks          the same and the first S tokens of the text (attention sinks)
    equal_memory   `window` and `sinks` with a window as large as the bytes of our memory allow: two rows
    fresh          a graft that was not trained
    graft          a checkpoint folder: aligned, fine-tuned, or grafted otherwise
    press          the source with a cache that NVIDIA's kvpress compresses, for RULER's tasks (presses.py)

The windows are `BMojoForCausalLM` itself, whose sliding layers equal transformers' (tests/modeling/test_family.py),
so they are exact at any length and cost O(T W). Sinks are its eidetic memory with a constant innovation: nothing beats
the first S tokens, and of equals the older stays. Nothing is trained or written here.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM

from ..common.running import assembled
from ..grafting.pipeline import Plan, build_tensors
from ..grafting.sources import weight_hashes
from .presses import PressedSource


ROWS = ("source", "window", "sinks", "equal_memory", "fresh")
# Of the graft's memories nothing but a window, and what is asked for beside it.
NO_MEMORIES = {"eidetic_size": 0, "innovation": "constant", "fading_size": 0}


@dataclass(frozen=True)
class Row:
    """One model of the table.

    window: W of its windowed layers, None without. slots: tokens kept beyond it. facts: what the model is made of, as
    plain data: a measurement is repeated when they change. build: makes the model, in evaluation mode.
    """

    name: str
    kind: str
    window: int | None
    slots: int
    facts: dict[str, Any]
    build: Callable[[], nn.Module] = field(repr=False)


class Models:
    """Builds the rows on `device` in `dtype`; the tensors of the source are read once and shared."""

    def __init__(self, plan: Plan, device: torch.device, dtype: torch.dtype):
        self.plan, self.device, self.dtype = plan, device, dtype
        self.files = weight_hashes(plan.source.path)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The fresh graft's tensors; the other rows take from it what they have."""
        return {name: value.to(self.device) for name, value in build_tensors(self.plan).items()}

    def _row(self, name: str, kind: str, config: BMojoConfig) -> Row:
        facts = {"kind": kind, "config": config.to_dict(), "source": self.files, "name": self.plan.settings.source}
        if kind == "fresh":
            facts["settings"] = self.plan.settings.as_dict()
        build = lambda: assembled(config, self.tensors)  # noqa: E731
        return Row(name, kind, config.window_size, config.eidetic_size, facts, build)

    def _plain(self, **changes: Any) -> BMojoConfig:
        """Return the graft's config without its memories: their fields are at their defaults."""
        config, memory = self.plan.config, BMojoConfig.fields_with(role="memory")
        names = [name for name in BMojoConfig.fields_with() if name not in memory]
        kept = {name: copy.deepcopy(getattr(config, name)) for name in names}
        kinds = {"layer_types": list(config.layer_types), "dtype": config.dtype}
        return BMojoConfig(**kept, **{**kinds, **NO_MEMORIES, **changes})

    def source(self) -> Row:
        facts = {"kind": "source", "source": self.files, "name": self.plan.settings.source}
        return Row("source", "source", None, 0, facts, self._load_source)

    def _load_source(self) -> nn.Module:
        """Return the source's parameters in `dtype`; its buffers (RoPE's frequencies) stay as they are."""
        model = self.plan.source.load_model(self.dtype).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(self.device, self.dtype)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        return model.requires_grad_(False)

    def window(self, size: int, name: str, kind: str = "window") -> Row:
        kinds = ["sliding_attention" if kind == "bmojo" else kind for kind in self.plan.config.layer_types]
        return self._row(name, kind, self._plain(window_size=size, layer_types=kinds))

    def sinks(self, count: int, size: int, name: str, kind: str = "sinks") -> Row:
        return self._row(name, kind, self._plain(window_size=size, eidetic_size=count))

    def pressed(self, press: str, python: str, like: Row, made_by: Mapping[str, Any]) -> Row:
        """Return the source with a cache that `press` compresses to the bytes of the row `like`.

        Args:
            made_by: versions and worker, of `presses.check_presses`.
        """
        facts = {"kind": "press", "press": press, "like": like.name, "its": like.facts, "source": self.files}
        facts |= {"name": self.plan.settings.source, "made_by": made_by}
        build = lambda: PressedSource(  # noqa: E731
            python, press, self._load_source(), self.plan.source.tokenizer(), self.dtype
        )
        return Row(f"{press}, bytes of {like.name}", "press", None, 0, facts, build)

    def fresh(self) -> Row:
        return self._row("fresh graft", "fresh", self.plan.config)

    def graft(self, folder: Path, name: str, config: BMojoConfig, overrides: Mapping[str, Any]) -> Row:
        facts = {"kind": "graft", "config": config.to_dict(), "files": weight_hashes(folder)}
        build = lambda: self._load_graft(folder, overrides)  # noqa: E731
        return Row(name, "graft", config.window_size, config.eidetic_size, facts, build)

    def _load_graft(self, folder: Path, overrides: Mapping[str, Any]) -> nn.Module:
        model, info = BMojoForCausalLM.from_pretrained(folder, dtype=self.dtype, output_loading_info=True, **overrides)
        wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        if wrong or info["mismatched_keys"]:
            raise ValueError(f"graft {str(folder)!r} does not load completely: {wrong or info['mismatched_keys']}.")
        return model.to(self.device).eval().requires_grad_(False)


def equal_memory_window(config: BMojoConfig, dtype: torch.dtype) -> int:
    """Return tokens whose bare keys and values take the bytes of our memory, over the layers that are B'MOJO layers.

    The bytes are those of every state of these layers in a cache that has read more than W tokens. The window is not
    charged for positions and the like, which a cache of its own could do without.
    """
    cache, probe = BMojoCache(config), torch.empty(1, 1, 1, dtype=dtype, device="meta")
    ours = [layer for layer in cache.layers if layer.spec.kind == "bmojo"]
    for layer in ours:
        layer.lazy_initialization(probe)
    per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return sum(layer.nbytes for layer in ours) // (len(ours) * per_token)
