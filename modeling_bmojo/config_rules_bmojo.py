"""Rules of the configuration's backbone fields: the Transformer around the memories. What breaks one raises ValueError.

The memories' rules are theirs (`innovation_bmojo`, `fading_bmojo`) and `configuration_bmojo`'s.
"""

import math

import torch
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .config_files_bmojo import FileConfig
from .fields_bmojo import is_int, is_number, reject, require_choice, require_int, require_number


LAYER_TYPES = ("bmojo", "full_attention", "sliding_attention", "linear_attention")
QK_NORMS = (None, "head", "full")
NORM_POSITIONS = ("pre", "post")


class BackboneConfig(FileConfig):
    """The part of `BMojoConfig` that checks the Transformer."""

    def _validate_types(self) -> None:
        """Check the types that filling in defaults relies on, and that reading a saved configuration does."""
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not isinstance(dtype, torch.dtype):
            reject("dtype", self.dtype, "must be a torch dtype or its name", "e.g. 'bfloat16'")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            require_int(self, name, 1, "give a positive size")
        for name in ("layer_types", "no_rope_layers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list | tuple):
                reject(name, value, "must be a list with one entry per layer, or None", "give a list")
        limit = self.ssm_time_step_limit
        if not isinstance(limit, list | tuple) or not all(is_number(value) for value in limit):
            reject("ssm_time_step_limit", limit, "must be two numbers 0 <= low < high", "use [0, inf] for none")
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, dict):
            reject("rope_parameters", self.rope_parameters, "must be a dict or None", "None is for no positions")

    def _validate_rope(self) -> None:
        rope = self.rope_parameters
        for name in ("rope_theta", "partial_rotary_factor"):
            # The constructor takes these older names into rope_parameters. Set later they would be heard by who loads
            # the saved configuration, and by nobody before.
            if name in vars(self):
                reject(name, getattr(self, name), "is no attribute", f"set config.rope_parameters[{name!r}]")
        if rope is None:
            return
        types = ["default", *ROPE_INIT_FUNCTIONS]
        if rope.get("rope_type") not in types:
            reject("rope_parameters", rope, f"its rope_type must be one of {types}", "pick one of them")
        theta = rope.get("rope_theta")
        if not is_number(theta) or not 0 < theta < math.inf:
            reject("rope_parameters", rope, "its rope_theta must be a positive number", "e.g. 10000.0")
        share = rope.get("partial_rotary_factor", 1.0)
        if not is_number(share) or not 0 < share <= 1:
            reject("rope_parameters", rope, "its partial_rotary_factor must lie in (0, 1]", "1 turns every channel")
        if int(self.head_dim * share) % 2:
            reject("head_dim", self.head_dim, "RoPE turns channels in pairs, so it must be even", "change it")
        try:
            self.validate_rope()
        except KeyError as error:
            reject("rope_parameters", rope, str(error.args[0]), "add the missing keys")

    def validate_token_ids(self) -> None:
        """Override transformers' warning: an id outside the vocabulary is an error."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list | tuple) else [value]:
                if token is not None and not (is_int(token) and 0 <= token < self.vocab_size):
                    reject(name, value, f"must lie in [0, vocab_size={self.vocab_size})", "or leave it None")

    def _validate_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            require_int(self, name, 1, "give a positive size")
        require_int(self, "max_position_embeddings", 1, "give the length that the positions were made for")
        require_number(self, "rms_norm_eps", 0, True, "e.g. 1e-6")
        require_number(self, "initializer_range", 0, False, "e.g. 0.02")
        require_choice(self, "hidden_act", tuple(ACT2CLS))
        require_choice(self, "ssm_conv_act", tuple(ACT2CLS))
        require_int(self, "head_dim", 1, "give a positive size or leave it None")
        require_int(self, "intermediate_size", 0, "give the MLP's width, or 0 for layers without an MLP")
        require_choice(self, "qk_norm", QK_NORMS)
        require_choice(self, "norm_position", NORM_POSITIONS)
        for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
            if getattr(self, name) is not None or name != "attention_multiplier":
                require_number(self, name, 0, True, "leave it out for a model without it")
        if self.num_attention_heads % self.num_key_value_heads:
            reject(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"must divide num_attention_heads={self.num_attention_heads}",
                "query heads share key/value heads in equal groups",
            )
        if not is_number(self.attention_dropout) or not 0.0 <= self.attention_dropout < 1.0:
            reject("attention_dropout", self.attention_dropout, "must lie in [0, 1)", "give a probability")

    def validate_layer_type(self) -> None:
        """Override transformers' closed list of layer types by B'MOJO's own."""
        if self.layer_types is None:  # the constructor has filled it; it was taken away since
            reject("layer_types", None, "must be a list with one entry per layer", "give a list")
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                reject(f"layer_types[{index}]", kind, f"must be one of {list(LAYER_TYPES)}", "pick one of them")
        for name in ("layer_types", "no_rope_layers"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_hidden_layers:
                reject(
                    name,
                    values,
                    f"has {len(values)} entries but num_hidden_layers={self.num_hidden_layers}",
                    "give one entry per layer",
                )
        if self.no_rope_layers is not None and any(value not in (0, 1) for value in self.no_rope_layers):
            reject("no_rope_layers", self.no_rope_layers, "must hold 0 (no RoPE) or 1 (RoPE) per layer")

    @property
    def sliding_window(self):
        """What transformers' caches ask a layer of type "sliding_attention": they cannot hold a B'MOJO memory."""
        raise _OtherWindow(
            "sliding_window: BMojoConfig has window_size instead, because DynamicCache, StaticCache and their kin keep "
            "keys and values alone; build BMojoCache(model.config), or pass nothing to have one built."
        )


class _OtherWindow(AttributeError, ValueError):
    """So that `getattr(config, name, None)` and `hasattr` find no such attribute, and whoever needs it is told why."""


__all__ = ["BackboneConfig"]
