"""Configuration of B'MOJO: fields, derived defaults and validation; no tensors.

Sources: B'MOJO (Zancato et al., NeurIPS 2024, arXiv 2407.06324), Algorithm 1, section 3.3; Mamba-2 (arXiv 2405.21060);
Mamba (arXiv 2312.00752).
"""

import math
from dataclasses import field
from typing import Any, NamedTuple

import torch
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .compat_bmojo import CACHE_NAMES
from .config_files_bmojo import FileConfig
from .kernels_forms import KERNEL_BACKENDS
from .register_bmojo import register_names


LAYER_TYPES = ("bmojo", "full_attention", "sliding_attention", "linear_attention")
INNOVATIONS = ("output", "state", "key")
QK_NORMS = (None, "head", "full")
NORM_POSITIONS = ("pre", "post")
SSM_TYPES = ("mamba2", "mamba")

# Before anything of transformers asks for our names.
register_names()


class LayerSpec(NamedTuple):
    """What one layer remembers, and the sizes of its states (tokens, heads, channels).

    window: W, visible tokens including the query itself; None means every past token (full attention).
    slots: M, eidetic slots. fading: F, fading tokens. stride: s, SSM outputs per fading token (1 where F = 0).
    taps: outputs that the predictor averages (0: keeps none). averages_keys: the predictor is the mean of all keys.
    """

    kind: str
    window: int | None
    slots: int
    fading: int
    stride: int
    taps: int
    averages_keys: bool
    kv_heads: int
    head_dim: int
    hidden: int
    ssm_heads: int
    ssm_head_dim: int
    ssm_state: int
    conv_channels: int
    conv_kernel: int

    @property
    def has_attention(self) -> bool:
        return self.kind != "linear_attention"

    @property
    def has_ssm(self) -> bool:
        return self.kind in ("bmojo", "linear_attention")

    @property
    def delayed(self) -> int:
        """W / s, fading tokens that are made but not yet beyond the window (0 where F = 0)."""
        return self.window // self.stride if self.fading else 0


class BMojoConfig(FileConfig):
    r"""
    Configuration of a [`BMojoModel`]. The backbone fields mean what they mean in `LlamaConfig`; the memory and `ssm_*`
    fields are B'MOJO's own. Contradictory values raise `ValueError` naming field, value, rule and remedy.

    Args:
        intermediate_size: width of the MLP; 0 builds layers without an MLP (a pure Mamba-2 stack).
        rope_parameters: RoPE type and its numbers, as in transformers 5; `None` means no positions at all.
        attention_bias: biases in `q_proj`, `k_proj`, `v_proj`.
        attention_output_bias: bias in `o_proj`; `None` follows `attention_bias` (Qwen2: True / False).
        qk_norm: `"head"` normalises every query and key head by RMSNorm before RoPE (Qwen3), `"full"` all heads of a
            token together (OLMo2); `None` does not.
        norm_position: `"pre"`: a layer is h + mix(norm(h)), then h + mlp(norm(h)) (Llama); `"post"`: h + norm(mix(h)),
            then h + norm(mlp(h)) (OLMo2).
        embedding_multiplier, residual_multiplier, logits_scaling: factor of the embeddings, of what every mixer and MLP
            adds, and divisor of the logits. attention_multiplier: scale of the attention's scores; `None` is
            head_dim ** -0.5 (all four: Granite).
        no_rope_layers: one 0/1 per layer, 0 = no RoPE in that layer (SmolLM3); `None` = RoPE everywhere.
        layer_types: one of `"bmojo"`, `"full_attention"`, `"sliding_attention"`, `"linear_attention"` per layer;
            `None` makes every layer `"bmojo"`.
        window_size: W, tokens that a query sees verbatim, itself included (short-term eidetic memory).
        eidetic_size: M, tokens that a layer keeps beyond its window (long-term eidetic memory); 0 switches it off.
        eidetic_decay: g >= 0, a kept token's score fades as e * exp(-g * age in tokens).
        innovation: `"output"`: predict the SSM's output from its last outputs (paper, Algorithm 1);
            `"state"`: predict the SSM's input by reading the state with the token's own write key;
            `"key"`: predict the token's attention key by the mean of all keys before it (best on grafts, docs/log.md).
        innovation_taps: k, outputs averaged by the predictor of `"output"`.
        fading_size: F, SSM outputs just beyond the window that join the attention; 0 switches them off.
        fading_stride: s, only every s-th SSM output becomes a fading token (at positions s - 1, 2 s - 1, ...), so that
            F of them reach F s tokens beyond the window; must divide `window_size`. 1 is the paper's form.
        tie_fading_projections: fading tokens use `k_proj` and `v_proj` (True) or their own projections (False).
        memory_block_size: queries that share one gathered set of keys in prefill and training; changes speed and
            memory, never the result.
        kernel_backend: which implementations run. `"auto"` takes the fastest one that each call's tensors allow;
            `"torch"`, `"triton"`, `"cuda"` (the packages causal-conv1d and mamba-ssm) and `"hub"` (kernels fetched by
            `from_pretrained(..., use_kernels=True)`) insist on one for the operations that it covers, and are errors
            where it cannot run. The environment variable `BMOJO_KERNEL_BACKEND` wins. See docs/kernels.md.
        ssm_type: the fading memory, `"mamba2"` or `"mamba"` (S6, the one of B'MOJO's paper: N decays and one time
            step per channel; set `ssm_state_size=16` as published, its cost grows with N).
        ssm_num_heads, ssm_head_dim: `None` follows the attention's heads and head_dim. Their product is the SSM's inner
            width, and that is all `"mamba"` takes from them (published: twice the hidden size).
        ssm_num_groups: groups of heads that share B and C; `None` follows the key/value heads. `"mamba"` has one B and
            one C for all channels: 1 or `None`.
        ssm_state_size: N, state channels per SSM channel (published: 128 for Mamba-2, 16 for Mamba).
        ssm_time_step_rank: only for `"mamba"`, the numbers per token that all time steps are made from; `None` is
            hidden_size / 16, rounded up.
        ssm_conv_kernel, ssm_conv_bias, ssm_conv_act: the short causal convolution over x, B and C (`"mamba"`: over x),
            its activation.
        ssm_projected: True: the SSM reads learned maps of the layer's input and its output goes through out_proj
            (Mamba-2). False: it reads the input itself and its output goes out as it is, which saves both products;
            needs ssm_num_heads * ssm_head_dim == hidden_size. B, C, time steps and the gate are learned either way.
        ssm_proj_bias: biases in the SSM's in_proj and out_proj.
        ssm_gated: multiply the output by silu(z). ssm_norm: grouped RMSNorm after the gate; `None` is True for
            `"mamba2"`, False for `"mamba"`, which has no such norm.
        ssm_chunk_size: tokens per chunk of the chunked scan, at most; changes speed and memory, never the result.
        ssm_time_step_min, ssm_time_step_max, ssm_time_step_floor: range of the initial time step.
        ssm_scalars_in_fp32: load A_log, dt_bias and D in fp32 whatever the model's dtype; False for FSDP1, which
            refuses parameters of mixed dtypes. They are computed with in fp32 either way.
        ssm_time_step_limit: the time step is clamped to this range, in prefill and in decoding alike.

    Example:

    ```python
    >>> from modeling_bmojo import BMojoConfig, BMojoForCausalLM

    >>> config = BMojoConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    ...                      vocab_size=256, window_size=16, eidetic_size=4)
    >>> model = BMojoForCausalLM(config)
    ```
    """

    model_type = "bmojo"
    _auto_class = "AutoConfig"  # save_pretrained writes this module, and all that it imports, into the folder
    keys_to_ignore_at_inference = list(CACHE_NAMES)

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = field(default_factory=dict)
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    qk_norm: str | None = None
    norm_position: str = "pre"
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    attention_dropout: float = 0.0
    no_rope_layers: list[int] | None = None

    layer_types: list[str] | None = None
    window_size: int = 512
    eidetic_size: int = 64
    eidetic_decay: float = 0.0
    innovation: str = "output"
    innovation_taps: int = 4
    fading_size: int = 1
    fading_stride: int = 1
    tie_fading_projections: bool = True
    memory_block_size: int = 64
    kernel_backend: str = "auto"

    ssm_type: str = "mamba2"
    ssm_num_heads: int | None = None
    ssm_head_dim: int | None = None
    ssm_state_size: int = 64
    ssm_num_groups: int | None = None
    ssm_time_step_rank: int | None = None
    ssm_conv_kernel: int = 4
    ssm_conv_bias: bool = True
    ssm_conv_act: str = "silu"
    ssm_projected: bool = True
    ssm_proj_bias: bool = False
    ssm_gated: bool = True
    ssm_norm: bool | None = None
    ssm_chunk_size: int = 64
    ssm_time_step_min: float = 0.001
    ssm_time_step_max: float = 0.1
    ssm_time_step_floor: float = 1e-4
    ssm_scalars_in_fp32: bool = True
    ssm_time_step_limit: list[float] | tuple[float, float] = (0.0, math.inf)

    def __post_init__(self, **kwargs):
        of_others = self._take_file_forms(kwargs)
        self._validate_types()
        no_positions = self.rope_parameters is None and not kwargs.get("rope_scaling") and "rope_theta" not in kwargs
        self._fill_defaults()
        # Before transformers sees them: it renames some layer types of other models without a word.
        self._validate_sizes()
        self.validate_layer_type()
        super().__post_init__(**kwargs, **of_others)
        if no_positions:
            self.rope_parameters = None
        self.validate()

    def _validate_types(self) -> None:
        """The types that filling in defaults relies on, and that reading a saved configuration does."""
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not isinstance(dtype, torch.dtype):
            self._reject("dtype", self.dtype, "must be a torch dtype or its name", "e.g. 'bfloat16'")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            self._require_int(name, 1, "give a positive size")
        for name in ("layer_types", "no_rope_layers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list | tuple):
                self._reject(name, value, "must be a list with one entry per layer, or None", "give a list")
        limit = self.ssm_time_step_limit
        if not isinstance(limit, list | tuple) or not all(_is_number(value) for value in limit):
            self._reject("ssm_time_step_limit", limit, "must be two numbers 0 <= low < high", "use [0, inf] for none")
        if self.rope_parameters is not None and not isinstance(self.rope_parameters, dict):
            self._reject("rope_parameters", self.rope_parameters, "must be a dict or None", "None is for no positions")

    def _fill_defaults(self) -> None:
        heads, hidden = self.num_attention_heads, self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            if hidden % heads:
                self._reject("head_dim", None, f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
            self.head_dim = hidden // heads
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.layer_types is None:
            self.layer_types = ["bmojo"] * self.num_hidden_layers
        self.layer_types = list(self.layer_types)
        if self.ssm_num_heads is None:
            self.ssm_num_heads = heads
        if self.ssm_head_dim is None:
            self.ssm_head_dim = self.head_dim
        is_mamba2 = self.ssm_type == "mamba2"
        if self.ssm_num_groups is None:
            self.ssm_num_groups = self.num_key_value_heads if is_mamba2 else 1
        if self.ssm_norm is None:
            self.ssm_norm = is_mamba2
        if self.ssm_time_step_rank is None and not is_mamba2:
            self.ssm_time_step_rank = math.ceil(hidden / 16)
        self.ssm_time_step_limit = list(self.ssm_time_step_limit)

    @staticmethod
    def _reject(name: str, value: Any, rule: str, remedy: str = "") -> None:
        raise ValueError(f"{name}={value!r}: {rule}" + (f"; {remedy}" if remedy else "") + ".")

    def validate(self) -> None:
        """Checks every rule between the fields.

        Raises:
            ValueError: naming the field, its value, the rule it breaks and the remedy.
        """
        self.warn_of_typos()
        self._validate_types()
        self._validate_sizes()
        self.validate_layer_type()
        self._validate_memory()
        self._validate_ssm()
        self._validate_rope()
        self.validate_token_ids()

    def _validate_rope(self) -> None:
        rope = self.rope_parameters
        for name in ("rope_theta", "partial_rotary_factor"):
            # The constructor takes these older names into rope_parameters. Set later they would be heard by who loads
            # the saved configuration, and by nobody before.
            if name in vars(self):
                self._reject(name, getattr(self, name), "is no attribute", f"set config.rope_parameters[{name!r}]")
        if rope is None:
            return
        types = ["default", *ROPE_INIT_FUNCTIONS]
        if rope.get("rope_type") not in types:
            self._reject("rope_parameters", rope, f"its rope_type must be one of {types}", "pick one of them")
        theta = rope.get("rope_theta")
        if not _is_number(theta) or not 0 < theta < math.inf:
            self._reject("rope_parameters", rope, "its rope_theta must be a positive number", "e.g. 10000.0")
        share = rope.get("partial_rotary_factor", 1.0)
        if not _is_number(share) or not 0 < share <= 1:
            self._reject(
                "rope_parameters", rope, "its partial_rotary_factor must lie in (0, 1]", "1 turns every channel"
            )
        if int(self.head_dim * share) % 2:
            self._reject("head_dim", self.head_dim, "RoPE turns channels in pairs, so it must be even", "change it")
        try:
            self.validate_rope()
        except KeyError as error:
            self._reject("rope_parameters", rope, str(error.args[0]), "add the missing keys")

    def validate_token_ids(self) -> None:
        """Overrides transformers' warning: an id outside the vocabulary is an error."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list | tuple) else [value]:
                if token is not None and not (_is_int(token) and 0 <= token < self.vocab_size):
                    self._reject(name, value, f"must lie in [0, vocab_size={self.vocab_size})", "or leave it None")

    def _require_number(self, name: str, minimum: float, exclusive: bool, remedy: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not (minimum < value if exclusive else minimum <= value) or value == math.inf:
            rule = f"must be a finite number {'>' if exclusive else '>='} {minimum}"
            self._reject(name, value, rule, remedy)

    def _require_int(self, name: str, minimum: int, remedy: str) -> None:
        value = getattr(self, name)
        if not _is_int(value) or value < minimum:
            self._reject(name, value, f"must be an integer >= {minimum}", remedy)

    def _require_choice(self, name: str, choices: tuple) -> None:
        value = getattr(self, name)
        if value not in choices:
            self._reject(name, value, f"must be one of {list(choices)}", "pick one of them")

    def _validate_sizes(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
            self._require_int(name, 1, "give a positive size")
        self._require_int("max_position_embeddings", 1, "give the length that the positions were made for")
        self._require_number("rms_norm_eps", 0, True, "e.g. 1e-6")
        self._require_number("initializer_range", 0, False, "e.g. 0.02")
        self._require_choice("hidden_act", tuple(ACT2CLS))
        self._require_choice("ssm_conv_act", tuple(ACT2CLS))
        self._require_int("head_dim", 1, "give a positive size or leave it None")
        self._require_int("intermediate_size", 0, "give the MLP's width, or 0 for layers without an MLP")
        self._require_choice("qk_norm", QK_NORMS)
        self._require_choice("norm_position", NORM_POSITIONS)
        for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):
            if getattr(self, name) is not None or name != "attention_multiplier":
                self._require_number(name, 0, True, "leave it out for a model without it")
        if self.num_attention_heads % self.num_key_value_heads:
            self._reject(
                "num_key_value_heads",
                self.num_key_value_heads,
                f"must divide num_attention_heads={self.num_attention_heads}",
                "query heads share key/value heads in equal groups",
            )
        if not _is_number(self.attention_dropout) or not 0.0 <= self.attention_dropout < 1.0:
            self._reject("attention_dropout", self.attention_dropout, "must lie in [0, 1)", "give a probability")

    def validate_layer_type(self) -> None:
        """Overrides transformers' closed list of layer types by B'MOJO's own."""
        if self.layer_types is None:  # the constructor has filled it; it was taken away since
            self._reject("layer_types", None, "must be a list with one entry per layer", "give a list")
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                self._reject(f"layer_types[{index}]", kind, f"must be one of {list(LAYER_TYPES)}", "pick one of them")
        for name in ("layer_types", "no_rope_layers"):
            values = getattr(self, name)
            if values is not None and len(values) != self.num_hidden_layers:
                self._reject(
                    name,
                    values,
                    f"has {len(values)} entries but num_hidden_layers={self.num_hidden_layers}",
                    "give one entry per layer",
                )
        if self.no_rope_layers is not None and any(value not in (0, 1) for value in self.no_rope_layers):
            self._reject("no_rope_layers", self.no_rope_layers, "must hold 0 (no RoPE) or 1 (RoPE) per layer")

    def _validate_memory(self) -> None:
        self._require_int("window_size", 1, "the window counts the query itself; use 'full_attention' for no window")
        self._require_int("eidetic_size", 0, "use 0 to switch the long-term eidetic memory off")
        self._require_int("fading_size", 0, "use 0 to switch fading tokens off")
        self._require_int("fading_stride", 1, "use 1 to make every SSM output a fading token")
        if self.fading_size and self.window_size % self.fading_stride:
            self._reject(
                "fading_stride",
                self.fading_stride,
                f"must divide window_size={self.window_size}",
                "a fading token becomes visible when the next one is made; give a divisor",
            )
        self._require_int("memory_block_size", 1, "give the queries per block of the memory attention")
        self._require_int("innovation_taps", 1, "the predictor needs at least one past output")
        self._require_choice("innovation", INNOVATIONS)
        self._require_choice("kernel_backend", KERNEL_BACKENDS)
        self._require_number("eidetic_decay", 0, False, "use 0 for no forgetting")

    def _validate_ssm(self) -> None:
        self._require_choice("ssm_type", SSM_TYPES)
        for name in ("ssm_num_heads", "ssm_head_dim", "ssm_state_size", "ssm_num_groups", "ssm_conv_kernel"):
            self._require_int(name, 1, "give a positive size")
        self._require_int("ssm_chunk_size", 1, "give the tokens per chunk of the scan")
        if self.ssm_num_heads % self.ssm_num_groups:
            self._reject(
                "ssm_num_groups",
                self.ssm_num_groups,
                f"must divide ssm_num_heads={self.ssm_num_heads}",
                "SSM heads share B and C in equal groups",
            )
        self._require_choice("ssm_projected", (True, False))
        inner = self.ssm_num_heads * self.ssm_head_dim
        if not self.ssm_projected and inner != self.hidden_size:
            self._reject(
                "ssm_projected",
                self.ssm_projected,
                f"ssm_num_heads={self.ssm_num_heads} times ssm_head_dim={self.ssm_head_dim} must be "
                f"hidden_size={self.hidden_size}, because the SSM reads and writes the layer's channels themselves",
                "change them, or set ssm_projected=True",
            )
        self._validate_ssm_type()
        limit = self.ssm_time_step_limit
        if len(limit) != 2 or not 0 <= limit[0] < limit[1]:
            self._reject("ssm_time_step_limit", limit, "must be two numbers 0 <= low < high", "use [0, inf] for none")
        self._require_number("ssm_time_step_floor", 0, False, "e.g. 1e-4")
        self._require_number("ssm_time_step_max", 0, True, "e.g. 0.1")
        self._require_number("ssm_time_step_min", 0, True, "e.g. 0.001")
        if self.ssm_time_step_min > self.ssm_time_step_max:
            self._reject(
                "ssm_time_step_min",
                self.ssm_time_step_min,
                f"must lie in (0, ssm_time_step_max={self.ssm_time_step_max}]",
                "give the smaller one first",
            )

    def _validate_ssm_type(self) -> None:
        """Fields that one SSM has and the other has not."""
        if self.ssm_type == "mamba2":
            if self.ssm_time_step_rank is not None:
                rule = "must be None with ssm_type='mamba2', whose time steps are projected directly"
                self._reject("ssm_time_step_rank", self.ssm_time_step_rank, rule, "leave it out")
            return
        self._require_int("ssm_time_step_rank", 1, "give a positive size, or None for hidden_size / 16")
        if self.ssm_num_groups != 1:
            rule = "must be 1 with ssm_type='mamba', whose B and C are shared by all channels"
            self._reject("ssm_num_groups", self.ssm_num_groups, rule, "leave it out")
        if not self.ssm_projected:
            rule = "must be True with ssm_type='mamba', whose time steps, B and C are made from the projected x"
            self._reject("ssm_projected", self.ssm_projected, rule, "leave it out")
        if self.ssm_norm:
            rule = "must be False with ssm_type='mamba', which has no norm after the gate"
            self._reject("ssm_norm", self.ssm_norm, rule, "leave it out")

    @property
    def sliding_window(self):
        """What transformers' caches ask a layer of type "sliding_attention": they cannot hold a B'MOJO memory."""
        raise _OtherWindow(
            "sliding_window: BMojoConfig has window_size instead, because DynamicCache, StaticCache and their kin keep "
            "keys and values alone; build BMojoCache(model.config), or pass nothing to have one built."
        )

    def layer_spec(self, layer_idx: int) -> LayerSpec:
        """What layer `layer_idx` remembers, as sizes (see `LayerSpec`)."""
        kind = self.layer_types[layer_idx]
        is_bmojo = kind == "bmojo"
        judged_by = self.innovation if is_bmojo and self.eidetic_size > 0 else None
        channels = self.ssm_num_heads * self.ssm_head_dim
        if self.ssm_type == "mamba2":
            channels += 2 * self.ssm_num_groups * self.ssm_state_size
        return LayerSpec(
            kind=kind,
            window=self.window_size if kind in ("bmojo", "sliding_attention") else None,
            slots=self.eidetic_size if is_bmojo else 0,
            fading=self.fading_size if is_bmojo else 0,
            stride=self.fading_stride if is_bmojo and self.fading_size else 1,
            taps=self.innovation_taps if judged_by == "output" else 0,
            averages_keys=judged_by == "key",
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            hidden=self.hidden_size,
            ssm_heads=self.ssm_num_heads,
            ssm_head_dim=self.ssm_head_dim,
            ssm_state=self.ssm_state_size,
            conv_channels=channels,
            conv_kernel=self.ssm_conv_kernel,
        )


class _OtherWindow(AttributeError, ValueError):
    """So that `getattr(config, name, None)` and `hasattr` find no such attribute, and whoever needs it is told why."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["BMojoConfig"]
