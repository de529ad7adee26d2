"""Configuration of B'MOJO: fields, derived defaults and validation; no tensors.

Sources: B'MOJO (Zancato et al., NeurIPS 2024, arXiv 2407.06324), Algorithm 1, section 3.3; Mamba-2 (arXiv 2405.21060);
Mamba (arXiv 2312.00752); Gated DeltaNet (arXiv 2412.06464); Gated KalmaNet (arXiv 2511.21016).
"""

import math
from typing import Any

from .compat_bmojo import CACHE_NAMES
from .config_rules_bmojo import BackboneConfig
from .eidetic_bmojo import EideticMemory
from .fading_bmojo import HEAD_PATTERNS, FadingMemory
from .fading_delta_bmojo import GatedDeltaFadingMemory
from .fading_kalma_bmojo import GatedKalmaFadingMemory
from .fading_s6_bmojo import S6FadingMemory
from .fading_ssd_bmojo import SSDFadingMemory
from .fading_tokens_bmojo import FadingTokens
from .fields_bmojo import backbone, fields_with, memory, reject, require_choice, require_int, require_number, speed
from .full_context_bmojo import FullContext
from .innovation_bmojo import ConstantInnovation, Innovation, KeyInnovation, OutputInnovation, StateInnovation
from .kernels_forms import KERNEL_BACKENDS
from .parallel_bmojo import PIPELINE_PLAN, TENSOR_PLAN
from .parts_bmojo import LayerSpec, MemoryPart
from .register_bmojo import register_names
from .storage_bmojo import Storage


# What there is, one entry each: nothing else lists them.
INNOVATIONS: dict[str, type[Innovation]] = {
    each.name: each for each in (OutputInnovation, StateInnovation, KeyInnovation, ConstantInnovation)
}
FADING_MEMORIES: dict[str, type[FadingMemory]] = {
    each.name: each for each in (SSDFadingMemory, S6FadingMemory, GatedDeltaFadingMemory, GatedKalmaFadingMemory)
}
# In the order in which they take tokens in: what a part lets go is for those behind it.
PARTS: list[type[MemoryPart]] = [FadingTokens, EideticMemory, FullContext, Storage]

DECAY_CLOCKS = ("tokens", "innovation")

# Before anything of transformers asks for our names.
register_names()


class BMojoConfig(BackboneConfig):
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
        eidetic_decay: g >= 0, a kept token's score fades as e * exp(-g * age).
        decay_clock: what age is counted in. `"tokens"`: tokens read since; `"innovation"`: the innovations of all
            tokens since, so that steady text ages little what is kept, and a change of source much.
        innovation: `"output"`: predict the SSM's output from its last outputs (paper, Algorithm 1);
            `"state"`: predict the SSM's input by reading the state with the token's own write key;
            `"key"`: predict the token's attention key by the mean of all keys before it (best on grafts, docs/log.md);
            `"constant"`: all tokens are equal and of equals the older stays: the first M tokens (attention sinks).
        innovation_taps: k, outputs averaged by the predictor of `"output"`.
        innovation_gradient: c >= 0, which changes gradients alone: a kept token's innovation gets c times the gradient
            that a factor of its value would have, so that the test learns to keep what is of use (docs/model.md). 0,
            the paper's form: selection is discrete, no gradient says what it costs. 10 for models from scratch.
        fading_size: F, SSM outputs that join the attention as fading tokens; 0 switches them off.
        fading_delay: d, tokens between an SSM output and the first query that sees it, 0 to W. `None` is W, the paper's
            form: fading tokens come from just beyond the window and sum up what has left it. 0: a query sees what the
            SSM answers to its own token, and nothing has to wait. A fresh graft wants W: before it learned anything an
            SSM has no answers.
        fading_stride: s, only every s-th SSM output becomes a fading token (at positions s - 1, 2 s - 1, ...), so that
            F of them reach back F s tokens; must divide `fading_delay`, or `window_size` where that is `None`. 1 is the
            paper's form.
        fading_mass: what a fading token is. False: one SSM output at every s-th position (the paper's form). True: the
            mean key and value of s tokens that have left the window, which counts for as many tokens as are neither
            kept nor fetched (log of their number on its score); the newest F blocks of s tokens, before them F of 2 s,
            F of 4 s and so on, so that the whole past is there, up to `max_rope_distance`.
        storage_size: K, stored tokens that every query fetches per key/value head (docs/model.md, "Storage"); 0 stores
            nothing.
        storage_candidates: C, stored tokens that the sketch names, of which exact scores choose K; `None`: all.
        storage_sketch_size: r, bytes of a key's sketch, per key/value head; `None`: none (with all as candidates).
        storage_decay: lambda >= 0, what is added to a stored token's score, in the choice alone, per innovation since
            the text began: old tokens are fetched less where much has changed since.
        storage_limit: N, the newest stored tokens that are offered; `None`: all. The first tokens of a text are what
            attention leans on: keep them with `eidetic_size`, 4 and more.
        max_rope_distance: D_max, the largest distance that RoPE turns by in a `"bmojo"` layer: a token further away is
            attended to as if at D_max. `None`: no limit. Three quarters of what a source was trained on: the last
            quarter it has hardly seen (docs/log.md).
        max_rope_distance_start: position of the first query that `max_rope_distance` holds for; those before it turn by
            any distance. A source's positions: up to there a model that stores all is what its source is.
        tie_fading_projections: fading tokens use `k_proj` and `v_proj` (True) or their own projections (False).
        tie_fading_queries: fading tokens are asked by the queries of the others, and share q- and k-norm (True); or
            have a q_proj and norms of their own (False; hybrid-model-factory's untied B'MOJO-F).
        memory_block_size: queries that share one gathered set of keys in prefill and training; changes speed and
            memory, never the result.
        kernel_backend: which implementations run. `"auto"` takes the fastest one that each call's tensors allow;
            `"torch"`, `"triton"`, `"cuda"` (the packages causal-conv1d and mamba-ssm) and `"hub"` (kernels fetched by
            `from_pretrained(..., use_kernels=True)`) insist on one for the operations that it covers, and are errors
            where it cannot run. The environment variable `BMOJO_KERNEL_BACKEND` wins. See docs/kernels.md.
        ssm_type: the fading memory, `"mamba2"`, `"mamba"` (S6, the one of B'MOJO's paper: N decays and one time step
            per channel; set `ssm_state_size=16` as published, its cost grows with N), `"gated_delta"` (Gated DeltaNet:
            a token replaces what the state holds under its key) or `"kalmanet"` (Gated KalmaNet: queries are answered
            by the ridge regression of all values on all keys).
        ssm_num_heads, ssm_head_dim: `None` follows the attention's heads and head_dim. Their product is the SSM's inner
            width, and that is all `"mamba"` takes from them (published: twice the hidden size).
        ssm_head_pattern: what the heads of a group share: `"multi_value"`: B and C, each has its own x (Mamba-2);
            `"multi_query"`: x and B, each has its own C (grouped-query attention: values, keys and queries). For
            `"mamba2"` and `"gated_delta"`; `"kalmanet"` is always the second, and `"mamba"` has no heads.
        ssm_num_groups: groups of such heads; `None` follows the key/value heads. `"mamba"` has one B and one C for all
            channels: 1 or `None`.
        ssm_state_size: N, state channels per SSM channel (published: 128 for Mamba-2, 16 for Mamba).
        ssm_time_step_rank: only for `"mamba"`, the numbers per token that all time steps are made from; `None` is
            hidden_size / 16, rounded up.
        ssm_solver_steps, ssm_ridge: of `"kalmanet"`, Chebyshev steps of its regression, and lambda / |H|_F > 0: the
            smaller, the more it trusts what it read, and the more steps it needs.
        ssm_expand_rank: only with `"multi_query"`, of `"kalmanet"` and `"gated_delta"`: the rank r of learned maps from
            the groups' keys and values to each head's own; `None`: heads of a group have the same.
        ssm_conv_kernel, ssm_conv_bias, ssm_conv_act: the short causal convolution over x, B and C (`"mamba"`: over x),
            its activation.
        ssm_projected: True: the SSM reads learned maps of the layer's input and its output goes through out_proj
            (Mamba-2). False: it reads the input itself and its output goes out as it is, which saves both products;
            needs ssm_num_heads * ssm_head_dim == hidden_size. B, C, time steps and the gate are learned either way.
        ssm_proj_bias: biases in the SSM's in_proj and out_proj.
        ssm_qk_norm: RMSNorm of every head of B and of C, before the convolution (only `"mamba2"`).
        ssm_gated: multiply the output by silu(z). ssm_norm: grouped RMSNorm after the gate (`"gated_delta"` and
            `"kalmanet"`: RMSNorm of each head before it); `None` is True, False for `"mamba"`, which has no such norm.
            ssm_norm_eps: what it adds to a mean of squares; `None` follows rms_norm_eps.
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
    base_model_tp_plan = TENSOR_PLAN
    base_model_pp_plan = PIPELINE_PLAN

    vocab_size: int = backbone(32000, live=True)
    hidden_size: int = backbone(2048)
    intermediate_size: int = backbone(5632)
    num_hidden_layers: int = backbone(24)
    num_attention_heads: int = backbone(32)
    num_key_value_heads: int | None = backbone()
    head_dim: int | None = backbone()
    hidden_act: str = backbone("silu")
    max_position_embeddings: int = backbone(2048, live=True)
    initializer_range: float = backbone(0.02, results=False, live=True)
    rms_norm_eps: float = backbone(1e-6)
    use_cache: bool = backbone(True, results=False, live=True)
    pad_token_id: int | None = backbone(results=False, live=True)
    bos_token_id: int | None = backbone(results=False, live=True)
    eos_token_id: int | list[int] | None = backbone(results=False, live=True)
    tie_word_embeddings: bool = backbone(False, results=False, live=True)
    rope_parameters: dict | None = backbone(dict, factory=True)
    attention_bias: bool = backbone(False)
    attention_output_bias: bool | None = backbone()
    mlp_bias: bool = backbone(False)
    qk_norm: str | None = backbone()
    norm_position: str = backbone("pre")
    embedding_multiplier: float = backbone(1.0, live=True)
    attention_multiplier: float | None = backbone()
    residual_multiplier: float = backbone(1.0)
    logits_scaling: float = backbone(1.0, live=True)
    attention_dropout: float = backbone(0.0, results=False)
    no_rope_layers: list[int] | None = backbone()

    layer_types: list[str] | None = memory(None)
    window_size: int = memory(512)
    eidetic_size: int = memory(64)
    eidetic_decay: float = memory(0.0)
    decay_clock: str = memory("tokens")
    innovation: str = memory("output")
    innovation_taps: int = memory(4)
    innovation_gradient: float = memory(0.0, results=False)
    fading_size: int = memory(1)
    fading_delay: int | None = memory(None)
    fading_stride: int = memory(1)
    fading_mass: bool = memory(False)
    tie_fading_projections: bool = memory(True)
    tie_fading_queries: bool = memory(True)
    storage_size: int = memory(0)
    storage_candidates: int | None = memory(None)
    storage_sketch_size: int | None = memory(None)
    storage_decay: float = memory(0.0)
    storage_limit: int | None = memory(None)
    max_rope_distance: int | None = memory(None)
    max_rope_distance_start: int = memory(0)
    memory_block_size: int = speed(64)
    kernel_backend: str = speed("auto", live=True)

    ssm_type: str = memory("mamba2")
    ssm_num_heads: int | None = memory(None)
    ssm_head_dim: int | None = memory(None)
    ssm_state_size: int = memory(64)
    ssm_num_groups: int | None = memory(None)
    ssm_head_pattern: str = memory("multi_value")
    ssm_qk_norm: bool = memory(False)
    ssm_time_step_rank: int | None = memory(None)
    ssm_solver_steps: int = memory(30)
    ssm_ridge: float = memory(0.02)
    ssm_expand_rank: int | None = memory(None)
    ssm_conv_kernel: int = memory(4)
    ssm_conv_bias: bool = memory(True)
    ssm_conv_act: str = memory("silu")
    ssm_projected: bool = memory(True)
    ssm_proj_bias: bool = memory(False)
    ssm_gated: bool = memory(True)
    ssm_norm: bool | None = memory(None)
    ssm_norm_eps: float | None = memory(None)
    ssm_chunk_size: int = speed(64)
    ssm_time_step_min: float = memory(0.001, results=False, live=True)
    ssm_time_step_max: float = memory(0.1, results=False, live=True)
    ssm_time_step_floor: float = memory(1e-4, results=False, live=True)
    ssm_scalars_in_fp32: bool = memory(True, results=False, live=True)
    ssm_time_step_limit: list[float] | tuple[float, float] = memory((0.0, math.inf))

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

    def _fill_defaults(self) -> None:
        heads, hidden = self.num_attention_heads, self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = heads
        if self.head_dim is None:
            if hidden % heads:
                reject("head_dim", None, f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
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
        if self.ssm_type in FADING_MEMORIES:  # else `validate` says so
            FADING_MEMORIES[self.ssm_type].fill(self)
        self.ssm_time_step_limit = list(self.ssm_time_step_limit)

    def validate(self) -> None:
        """Check every rule between the fields.

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

    def _validate_memory(self) -> None:
        require_int(self, "window_size", 1, "the window counts the query itself; use 'full_attention' for no window")
        require_int(self, "eidetic_size", 0, "use 0 to switch the long-term eidetic memory off")
        require_int(self, "fading_size", 0, "use 0 to switch fading tokens off")
        require_int(self, "fading_stride", 1, "use 1 to make every SSM output a fading token")
        require_choice(self, "fading_mass", (True, False))
        self._validate_fading_delay()
        require_int(self, "memory_block_size", 1, "give the queries per block of the memory attention")
        for test in INNOVATIONS.values():
            test.check(self)
        for part in PARTS:
            part.check_config(self)
        self._validate_distance()
        self._validate_fading_queries()
        require_choice(self, "innovation", tuple(INNOVATIONS))
        require_choice(self, "kernel_backend", KERNEL_BACKENDS)
        require_number(self, "eidetic_decay", 0, False, "use 0 for no forgetting")
        require_number(self, "innovation_gradient", 0, False, "use 0 for a selection without gradient")
        if self.innovation_gradient and not INNOVATIONS[self.innovation].learns:
            able = [name for name, test in INNOVATIONS.items() if test.learns]
            rule = f"innovation={self.innovation!r} has scores without gradient"
            reject("innovation_gradient", self.innovation_gradient, rule, f"leave it at 0, or take one of {able}")
        require_choice(self, "decay_clock", DECAY_CLOCKS)

    def _validate_fading_delay(self) -> None:
        delay, said = self.fading_delay, "fading_delay"
        if delay is None:
            delay, said = self.window_size, "window_size"
        else:
            require_int(self, said, 0, "0 shows every query what the SSM answers to its own token")
        if not self.fading_size:
            return
        if delay > self.window_size:
            reject(said, delay, f"must be at most window_size={self.window_size}", "give 0 to W, or null for W")
        if self.fading_mass and self.fading_delay is not None:
            reject(said, delay, "is of SSM outputs, and fading_mass=True has none", "leave it out")
        if not self.fading_mass and delay % self.fading_stride:
            rule = "a fading token becomes visible as one is made; give a divisor"
            reject("fading_stride", self.fading_stride, f"must divide {said}={delay}", rule)

    def _validate_distance(self) -> None:
        require_int(self, "max_rope_distance_start", 0, "it is a position; 0 is all")
        if self.max_rope_distance is None:
            if self.max_rope_distance_start:
                raise ValueError(
                    f"max_rope_distance_start={self.max_rope_distance_start}: says from where max_rope_distance holds, "
                    "which is None; give a distance, or leave it at 0."
                )
            return
        least = self.window_size - 1
        require_int(self, "max_rope_distance", max(least, 0), f"the window alone spans {least}; null is no limit")

    def _validate_fading_queries(self) -> None:
        require_choice(self, "tie_fading_queries", (True, False))
        if self.tie_fading_queries:
            return
        needed = {
            "tie_fading_projections": (False, "what has queries of its own has keys of its own"),
            "fading_mass": (False, "means of tokens are asked as tokens are"),
            "max_rope_distance": (None, "these queries are not turned back"),
        }
        for name, (value, reason) in needed.items():
            if getattr(self, name) != value:
                rule = f"needs {name}={value!r}, which is {getattr(self, name)!r}, because {reason}"
                reject("tie_fading_queries", False, rule, "change one of the two")

    def _validate_ssm_extras(self) -> None:
        """Check the fields that only some forms of the SSM have."""
        require_choice(self, "ssm_qk_norm", (True, False))
        if self.ssm_norm_eps is not None:
            require_number(self, "ssm_norm_eps", 0, True, "e.g. 1e-5, or None to follow rms_norm_eps")
        if self.ssm_qk_norm and self.ssm_type != "mamba2":
            rule = f"needs ssm_type='mamba2'; {self.ssm_type!r} has keys of length 1, or none"
            reject("ssm_qk_norm", True, rule, "leave it out")
        if self.ssm_head_pattern != "multi_value" and self.ssm_type == "mamba":
            rule = "must be 'multi_value' with ssm_type='mamba', which has no heads"
            reject("ssm_head_pattern", self.ssm_head_pattern, rule, "leave it out")

    def _validate_ssm(self) -> None:
        require_choice(self, "ssm_type", tuple(FADING_MEMORIES))
        for name in ("ssm_num_heads", "ssm_head_dim", "ssm_state_size", "ssm_num_groups", "ssm_conv_kernel"):
            require_int(self, name, 1, "give a positive size")
        require_int(self, "ssm_chunk_size", 1, "give the tokens per chunk of the scan")
        if self.ssm_num_heads % self.ssm_num_groups:
            reject(
                "ssm_num_groups",
                self.ssm_num_groups,
                f"must divide ssm_num_heads={self.ssm_num_heads}",
                "SSM heads share B and C in equal groups",
            )
        require_choice(self, "ssm_head_pattern", HEAD_PATTERNS)
        require_choice(self, "ssm_projected", (True, False))
        self._validate_ssm_extras()
        inner = self.ssm_num_heads * self.ssm_head_dim
        if not self.ssm_projected and inner != self.hidden_size:
            reject(
                "ssm_projected",
                self.ssm_projected,
                f"ssm_num_heads={self.ssm_num_heads} times ssm_head_dim={self.ssm_head_dim} must be "
                f"hidden_size={self.hidden_size}, because the SSM reads and writes the layer's channels themselves",
                "change them, or set ssm_projected=True",
            )
        require_int(self, "ssm_solver_steps", 1, "30 is published")
        require_number(self, "ssm_ridge", 0, True, "e.g. 0.02")
        memory = FADING_MEMORIES[self.ssm_type]
        if self.ssm_expand_rank is not None and not (memory.expands and memory.shares_values(self)):
            rule = f"must be None with ssm_type={self.ssm_type!r} and ssm_head_pattern={self.ssm_head_pattern!r}"
            reject("ssm_expand_rank", self.ssm_expand_rank, rule, "only shared keys are expanded")
        if self.ssm_expand_rank is not None:
            require_int(self, "ssm_expand_rank", 1, "None has no such maps")
        FADING_MEMORIES[self.ssm_type].check(self)
        limit = self.ssm_time_step_limit
        if len(limit) != 2 or not 0 <= limit[0] < limit[1]:
            reject("ssm_time_step_limit", limit, "must be two numbers 0 <= low < high", "use [0, inf] for none")
        require_number(self, "ssm_time_step_floor", 0, False, "e.g. 1e-4")
        require_number(self, "ssm_time_step_max", 0, True, "e.g. 0.1")
        require_number(self, "ssm_time_step_min", 0, True, "e.g. 0.001")
        if self.ssm_time_step_min > self.ssm_time_step_max:
            reject(
                "ssm_time_step_min",
                self.ssm_time_step_min,
                f"must lie in (0, ssm_time_step_max={self.ssm_time_step_max}]",
                "give the smaller one first",
            )

    @classmethod
    def fields_with(cls, **said: Any) -> tuple[str, ...]:
        """Return names of the fields of which all this is said: `role` ("backbone", "memory", "speed"), `results`
        (whether the field changes them) and `live` (whether it may change on a model that is built)."""
        return fields_with(cls, **said)

    def layer_spec(self, layer_idx: int) -> LayerSpec:
        """Return what kind of layer `layer_idx` is, and how much it remembers (see `LayerSpec`)."""
        kind = self.layer_types[layer_idx]
        remembers = kind == "bmojo"
        # Only then: layers whose test reads no SSM have had one all the same, and their checkpoints hold it.
        blind = remembers and self.eidetic_size > 0 and not INNOVATIONS[self.innovation].has_ssm
        return LayerSpec(
            kind=kind,
            window=self.window_size if kind in ("bmojo", "sliding_attention") else None,
            slots=self.eidetic_size if remembers else 0,
            fading=self.fading_size if remembers and not self.fading_mass else 0,
            stride=self.fading_stride if remembers and self.fading_size else 1,
            delay=self.fading_delay,
            blocks=self.fading_size if remembers and self.fading_mass else 0,
            stored=self.storage_size if remembers else 0,
            has_ssm=kind == "linear_attention" or (remembers and not (blind and self.fading_size == 0)),
        )

    @property
    def alone(self) -> int:
        """How many of a text's first tokens see nothing but the tokens before them, in every B'MOJO layer: up to there
        a fresh graft is its source (W, or less with a `fading_delay`)."""
        specs = (self.layer_spec(index) for index, kind in enumerate(self.layer_types) if kind == "bmojo")
        return min((spec.alone for spec in specs), default=self.window_size)


__all__ = ["BMojoConfig"]
