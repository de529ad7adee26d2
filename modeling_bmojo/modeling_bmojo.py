"""B'MOJO as a Transformers model (Zancato et al., NeurIPS 2024, Algorithm 1; arXiv 2407.06324).

    u = norm(h);  y, e = fading(u);  h += o_proj(attention(q(u), [eidetic | fading | local]));  h += mlp(norm(h))

One decoder layer covers every layer type: `"bmojo"` (all memories), `"sliding_attention"` (the window alone),
`"full_attention"` (no window), `"linear_attention"` (the SSM alone). With `norm_position="post"` norms stand behind:
u = h;  h += norm(o_proj(...));  h += norm(mlp(h)).

Shapes: B batch, T tokens, E hidden size, H query heads, D head dim, S token positions so far.
"""

from contextlib import nullcontext

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .arguments_bmojo import built_fields, check_built, packing_lengths, refuse_unknown
from .attention_bmojo import BMojoAttention, BMojoRMSNorm
from .buffers_bmojo import WideBuffers
from .cache_bmojo import BMojoCache
from .cache_layer_bmojo import BMojoCacheLayer
from .cache_tree_bmojo import register as register_cache_tree
from .compat_bmojo import CACHE_NAME, CACHE_NAMES, SHARDS_BY_DTYPE, cache_of, one_cache
from .configuration_bmojo import FADING_MEMORIES, BMojoConfig
from .distance_bmojo import TurnTables
from .generation_bmojo import BMojoGenerationMixin
from .inputs_bmojo import build_rows, carry_last, check_cache, check_columns, check_tokens, new_token_mask
from .kernels_hub import offer_slots, take_kernels
from .layer_memory_bmojo import LayerMemory
from .layout_bmojo import Rows, Turns, sequence_starts
from .linear_bmojo import avoid_packing, project
from .memory_ops import widest
from .parallel_bmojo import HEAD_PIPELINE_PLAN, HEAD_TENSOR_PLAN, is_elsewhere, matching, whole_heads
from .peft_bmojo import NoPrompts
from .regions_bmojo import Regions
from .rollback_bmojo import Columns, read_waiting, read_with_rollback
from .share_bmojo import Share


logger = logging.get_logger(__name__)

MLP_BLOCK = 1024  # tokens of a prompt that pass an MLP at once on a CPU: its wide activations stay small


class BMojoRotaryEmbedding(WideBuffers):
    """RoPE tables for any of transformers' RoPE types (`rope_parameters["rope_type"]`).

    Inverse frequencies are transformers' fp32 values, whatever the model's dtype: in fewer bits far tokens would turn
    at random. Their product with the position is float64: in fp32, an angle of position 10,000,000 is wrong by up to
    half a radian.
    """

    def __init__(self, config: BMojoConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        tables = {"default": self.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}
        inv_freq, self.attention_scaling = tables[self.rope_type](config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)
        self._made: tuple[torch.Tensor, tuple, TurnTables] | None = None

    @staticmethod
    def compute_default_rope_parameters(config: BMojoConfig, *args, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[D / 2]` and the scaling of cos and sin (1)."""
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[B, T, 1, D]` in x's dtype, for positions `[B, T]`; the first half of sin is negated."""
        cos, sin = self.turn(position_ids[..., None], self.attention_scaling)
        return cos.to(x.dtype), sin.to(x.dtype)

    def turn(self, positions: torch.Tensor, scaling: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[..., D]` of positions `[...]`, as wide as the device has numbers; the first half of sin is
        negated."""
        wide = widest(positions.device)
        angles = positions[..., None].to(wide) * self.inv_freq.to(device=positions.device, dtype=wide)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def turns(self, x: torch.Tensor, longest: int | None) -> Turns | None:
        """Return RoPE at the distances that storage and far tokens need; None if nobody asks.

        Args:
            x: whose dtype and device the tables have. longest: tokens of the longest row, read before or now; None: no
                number says it.
        """
        config = self.config
        limit = config.max_rope_distance
        # Where no number says how long the text is, masks say which pairs are far.
        counts = longest is not None
        far = limit is not None and (not counts or (longest - 1 > limit and longest > config.max_rope_distance_start))
        sketched = config.storage_size > 0 and config.storage_sketch_size is not None
        if not (far or sketched):
            return None

        def table(distance: int) -> tuple[torch.Tensor, torch.Tensor]:
            cos, sin = self.turn(torch.tensor(distance, device=x.device), self.attention_scaling)
            return cos.to(x.dtype), sin.to(x.dtype)

        turn = self._tables(longest, x) if far and counts and not torch.compiler.is_compiling() else self.turn
        return Turns(turn, table(config.window_size) if sketched else None, table(limit) if far else None)

    def _tables(self, longest: int, x: torch.Tensor) -> TurnTables:
        """Return what turns by positions below `longest`, made anew where there is none for as many."""
        wide = torch.promote_types(x.dtype, torch.float32)
        own = self.inv_freq  # dynamic RoPE types put another one in its place
        made_of = x.device, wide, None if own.is_inference() else own._version
        made = self._made
        if made is None or made[0] is not own or made[1] != made_of or not made[2].reach(longest):
            with torch.inference_mode(False):  # training may need them next
                self._made = own, made_of, TurnTables.made(self.turn, longest, x.device, wide)
        return self._made[2]


class BMojoMLP(nn.Module):
    """Gated MLP, as in Llama."""

    def __init__(self, config: BMojoConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or not x.is_cpu or torch.compiler.is_compiling() or x.shape[1] <= MLP_BLOCK:
            return self._map(x)
        return torch.cat([self._map(part) for part in x.split(MLP_BLOCK, dim=1)], dim=1)

    def _map(self, x: torch.Tensor) -> torch.Tensor:
        return project(self.down_proj, self.act_fn(project(self.gate_proj, x)) * project(self.up_proj, x))


class BMojoDecoderLayer(GradientCheckpointingLayer):
    """One layer of any type; see the module's docstring for the equation."""

    memory: LayerMemory | None = None  # of a share of the heads; None: all are here

    def __init__(self, config: BMojoConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.spec = config.layer_spec(layer_idx)
        self.norm_after = config.norm_position == "post"
        self.residual_multiplier = config.residual_multiplier
        self.has_mlp = config.intermediate_size > 0
        if not self.norm_after:
            self.input_layernorm = BMojoRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.spec.has_attention:
            self.self_attn = BMojoAttention(config, layer_idx)
        if self.spec.has_ssm:
            self.fading = FADING_MEMORIES[config.ssm_type](config, layer_idx)
        if self.norm_after or self.has_mlp:
            self.post_attention_layernorm = BMojoRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.has_mlp:
            self.mlp = BMojoMLP(config)
            if self.norm_after:
                self.post_feedforward_layernorm = BMojoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def accept_config(self, config: BMojoConfig) -> None:
        """Remember what the configuration says now, with the weights as they are: for code that has changed it."""
        self.spec = config.layer_spec(self.layer_idx)
        share = None if self.memory is None else self.memory.share
        memory = LayerMemory(config, self.layer_idx, share)
        if share is not None:
            self.memory = memory
        if self.spec.has_attention:
            self.self_attn.accept_memory(memory)

    def accept_share(self, share: Share) -> None:
        """Compute, remember and keep in the cache this share of the heads from now on (`share_bmojo`).

        Raises:
            ValueError: if the heads cannot be shared out so.
        """
        config = self.config
        share.check(config, self.spec.has_ssm)
        self.memory = LayerMemory(config, self.layer_idx, share)
        if self.spec.has_attention:
            self.self_attn.accept_share(config, share)
            self.self_attn.accept_memory(self.memory)
        if self.spec.has_ssm:
            self.fading.accept_share(config, share)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: Rows,
        past_key_values: BMojoCache | None = None,
        regions: Regions | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states `[B, T, E]` to the same, and the attention weights `[B, H, T, S]` or None.

        Args:
            regions: what runs the layer compiled; None: it runs as it is. Hooks on the layer stay outside of it.
        """
        cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        transform = BMojoDecoderLayer.transform if regions is None else regions.transform
        return transform(self, hidden_states, rows, cache)

    def transform(
        self, hidden_states: torch.Tensor, rows: Rows, cache: BMojoCacheLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do what `forward` says, with the layer's own states. Nothing in here tells one layer of a kind from the next:
        compiled for one it is compiled for all of them."""
        normed = hidden_states if self.norm_after else self.input_layernorm(hidden_states)
        update, weights = self.mix(normed, rows, cache)
        if cache is not None:
            cache.advance(rows.lengths[0], hidden_states.shape[1])
        if self.norm_after:
            update = self.post_attention_layernorm(update)
        hidden_states = torch.add(hidden_states, update, alpha=self.residual_multiplier)
        if self.has_mlp:
            hidden_states = torch.add(hidden_states, self._feed_forward(hidden_states), alpha=self.residual_multiplier)
        return hidden_states, weights

    def _feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.norm_after:
            return self.post_feedforward_layernorm(self.mlp(hidden_states))
        return self.mlp(self.post_attention_layernorm(hidden_states))

    def mix(
        self,
        hidden_states: torch.Tensor,
        rows: Rows,
        cache: BMojoCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sequence mixing alone: fading memory, then attention, without norms, residual and MLP.

        Args:
            hidden_states: `[B, T, E]`, normed as the layer does it. rows: how they are cut into mixer rows. cache: the
                layer's states.

        Returns:
            what the layer adds to its input, `[B, T, E]`, and the attention weights `[B, H, T, S]` or None.
        """
        if cache is not None:
            cache.prepare(hidden_states, self.memory)
        y = predictions = None
        if self._runs_ssm(rows, hidden_states.shape[1], cache is not None):
            y, predictions = self.fading(hidden_states, rows, cache, self._signal() == "prediction")
        if not self.spec.has_attention:
            return y, None
        return self.self_attn(hidden_states, rows, y, predictions, cache)

    def _signal(self) -> str | None:
        """Return what the layer's innovation test judges by."""
        return self.self_attn.memory.signal if self.spec.has_attention else None

    def check_hooks(self, rows: Rows, columns: int, cached: bool) -> None:
        """Raise ValueError for hooks on tied projections, before anything has run: `BMojoAttention.check_hooks`."""
        if self.spec.has_attention and self._runs_ssm(rows, columns, cached):
            self.self_attn.check_hooks(rows, columns)

    def _runs_ssm(self, rows: Rows, columns: int, cached: bool) -> bool:
        """Whether somebody reads the SSM.

        Without a cache nobody asks for the SSM of a bmojo layer while no query sees more than the tokens before it; in
        training it runs all the same, because data-parallel training waits for a gradient of every parameter. With
        F = 0 and an innovation that is not measured on it nobody ever does.
        """
        if not self.spec.has_ssm or self.training or self.spec.kind != "bmojo":
            return self.spec.has_ssm
        longest = columns if rows.layout is None else rows.layout.longest
        unread = not cached and longest <= self.spec.alone
        return not unread and (self.spec.fading > 0 or self._signal() in ("output", "prediction"))


def _without_fp32(config: BMojoConfig) -> set[str]:
    """Return the modules that a model of `config` lacks or has in its own dtype, of those that may stay in fp32."""
    specs = [config.layer_spec(layer_idx) for layer_idx in range(config.num_hidden_layers)]
    scalars = any(spec.has_ssm for spec in specs) and "scalars" in FADING_MEMORIES[config.ssm_type].modules
    sketch = any(spec.stored > 0 for spec in specs) and config.storage_sketch_size is not None
    has = {"scalars": scalars and config.ssm_scalars_in_fp32, "sketch": sketch}
    return {name for name, there in has.items() if not there}


class BMojoPreTrainedModel(NoPrompts, PreTrainedModel):
    """Weight initialisation and what B'MOJO models declare to transformers."""

    config_class = BMojoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BMojoDecoderLayer"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _is_stateful = False  # assisted decoding may run: its caches take back what was drafted (`rollback_bmojo`)
    _keep_in_fp32_modules_strict = ["scalars", "sketch"]
    # A folder may hold sketches of keys, and its model be loaded without storage.
    _keys_to_ignore_on_load_unexpected = [r"self_attn\.sketch\."]
    _can_record_outputs = {
        "hidden_states": BMojoDecoderLayer,
        "attentions": OutputRecorder(BMojoDecoderLayer, index=1),
    }

    def __init__(self, config: BMojoConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # transformers takes a name without a module for a slip.
        without, names = _without_fp32(config), self._keep_in_fp32_modules_strict
        self._keep_in_fp32_modules_strict = [name for name in names if name not in without]

    @classmethod
    def from_pretrained(cls, *args, config=None, distributed_config=None, **kwargs):
        """Load as transformers' method does; see there. FSDP2 that makes no shard by dtype gets SSM scalars in the
        model's dtype."""
        if getattr(distributed_config, "fsdp_size", 1) > 1 and not SHARDS_BY_DTYPE:
            logger.warning_once(
                "FSDP2 of this transformers takes one dtype per layer: loading with ssm_scalars_in_fp32=False. Newer "
                "versions (tested: 5.23) keep A_log, dt_bias and D in float32."
            )
            if isinstance(config, BMojoConfig):
                config.ssm_scalars_in_fp32 = False
            else:
                kwargs["ssm_scalars_in_fp32"] = False
        return super().from_pretrained(*args, config=config, distributed_config=distributed_config, **kwargs)

    def init_parallel_plans(self) -> None:
        """Override transformers' method: of the plans of the class and the configuration, take what this model has."""
        super().init_parallel_plans()
        self._tp_plan = matching(self._tp_plan, self)

    @classmethod
    def whole_heads_plan(cls, config: BMojoConfig) -> dict[str, str]:
        """Return the `tp_plan` of a `DistributedConfig` under which every device has all heads and the whole cache, and
        only maps are split: for heads that cannot be shared out equally, and for storages in a directory."""
        with torch.device("meta"):
            return whole_heads(cls(config).tp_plan)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict: dict, *args, **kwargs) -> dict:
        """Override transformers' method, which puts a weight together anew under each of the names it is tied to."""
        found = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        if found is state_dict:
            return found
        return {name: value for name, value in found.items() if name not in model_to_save.all_tied_weights_keys}

    def compile_regions(self, on: bool = True, **options) -> None:
        """Compile decoding: from now on a step of one token per row runs the layers compiled, with one program for all
        layers of a kind. Everything else runs as before.

        The first step waits for the compiler, which needs a C++ compiler on CPUs; later processes find the program on
        disk. Results are those of the plain step up to rounding (docs/performance.md).

        Args:
            on: False: run as before. options: of `torch.compile`.

        Raises:
            ValueError: for a storage, whose steps follow the text in their shapes, and where devices share the heads.
        """
        shared = [layer for layer in self.base_model.layers if getattr(getattr(layer, "memory", None), "share", None)]
        if on and shared:
            raise ValueError(
                f"compile_regions: {len(shared)} layers have a share of their heads (tp_size), and what devices tell "
                "each other was never compiled; decode without it, or load with "
                "tp_plan=BMojoForCausalLM.whole_heads_plan(config)."
            )
        self.base_model._regions = Regions(self.config, options) if on else None

    def set_submodule(self, target: str, module: nn.Module, *args, **kwargs) -> None:
        """`nn.Module.set_submodule`, by which transformers puts quantised modules into a model."""
        if avoid_packing(module):
            logger.info(f"{target}: its sizes do not fit bitsandbytes' 4-bit kernel for CPUs; there it dequantises.")
        super().set_submodule(target, module, *args, **kwargs)

    def set_use_kernels(self, use_kernels: bool, *args, **kwargs) -> None:
        """Override transformers' method, which `from_pretrained(..., use_kernels=True)` and `train()` call: hub kernels
        that it finds for the SSM become the first choice of this model's operations (docs/kernels.md)."""
        if use_kernels:
            offer_slots(self)
        super().set_use_kernels(use_kernels, *args, **kwargs)
        take_kernels(self, bool(use_kernels))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if callable(getattr(module, "initialise", None)):
            module.initialise(self.config)
        elif getattr(module, "initial_bound", None) is not None:  # a class of its own would hide it from tools
            init.uniform_(module.weight, -module.initial_bound, module.initial_bound)


class BMojoModel(BMojoPreTrainedModel):
    """Token embeddings, decoder layers and the final norm."""

    _auto_class = "AutoModel"
    _regions: Regions | None = None  # what runs its layers compiled, where that was asked for

    def __init__(self, config: BMojoConfig):
        config.validate()
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([BMojoDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = BMojoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = None if config.rope_parameters is None else BMojoRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.accept_config()
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache: BMojoCache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids: `[B, T]`. inputs_embeds: `[B, T, E]`, instead of input_ids.
            attention_mask: `[B, T]`, or `[B, P + T]` with a cache that has read P columns, the first P as they were
                read; 1 = real token, 0 = pad, in any pattern. Pads take no part in anything; their output is that of
                the last real token before them, zeros where there is none.
            position_ids: `[B, T]`; default: real tokens counted from what the cache has seen. A position that is not
                beyond the one before it starts another, packed sequence; sequences do not see each other.
            past_key_values, cache: two names of one argument, a `BMojoCache` to continue (transformers 5.24 renames the
                first to the second); no gradient flows into what it holds.
            use_cache: build and return one; default: the config's `use_cache`, but not in training.
            seq_idx: `[B, T]` index of the packed sequence of each token. cu_seq_lens_q: their cumulated lengths.
            Others: only names in `arguments_bmojo.HARMLESS`, or None.

        Returns:
            `last_hidden_state` `[B, T, E]`, the cache (under the name that this transformers has for it), and on demand
            `hidden_states` and `attentions` (`[B, H, T, S]` per attention layer; a column adds the weight on the
            token itself and on its fading token, as far as both are seen). Weights are formed in plain PyTorch,
            whatever the attention implementation.

        Raises:
            ValueError: for empty input, ids outside the vocabulary, a mask of another kind or shape or with another
                past than the cache's, a cache of another model or batch size, packed sequences with a cache, arguments
                of unknown meaning, or a configuration that was changed after the model was built.
        """
        refuse_unknown(kwargs)
        if not torch.compiler.is_compiling():
            check_built(self._built, self.config)
        past_key_values = one_cache(past_key_values, cache)
        check_tokens(self.config, input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.embedding_multiplier != 1.0 and not is_elsewhere(self.layers[0]):
            inputs_embeds = inputs_embeds * self.config.embedding_multiplier
        batch, columns = inputs_embeds.shape[:2]
        past = 0
        if past_key_values is not None:
            check_cache(past_key_values, self.config, batch)
            past_key_values.claim(self)
            if self.gradient_checkpointing and self.training:
                raise ValueError(
                    f"{CACHE_NAME} in training with gradient checkpointing: recomputation would not find the states "
                    "as they were; switch one of them off, or call model.eval() to generate."
                )
            past = past_key_values.known_length()
        mask = new_token_mask(attention_mask, batch, columns, past, past_key_values)
        new = Columns(inputs_embeds, mask, position_ids)
        packing = {"seq_idx": seq_idx, "cu_seq_lens": packing_lengths(cu_seq_lens_q, kwargs)}
        if past_key_values is None or past_key_values.rollback is None:
            return self._read(new, past_key_values, packing, use_cache, **kwargs)
        check_columns(batch, columns, position_ids, seq_idx)
        return read_with_rollback(self, new, past_key_values, packing, **kwargs)

    @capture_outputs
    def _read(
        self, new: Columns, past_key_values: BMojoCache | None, packing: dict, use_cache: bool | None = None, **kwargs
    ):
        """Read columns that were checked. Decorated, so that `output_hidden_states` and `output_attentions` are what
        the layers give, and `return_dict` is honoured."""
        inputs_embeds, mask, position_ids = new
        output_attentions = kwargs.pop("output_attentions", None)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        rows, packed = build_rows(
            inputs_embeds, mask, position_ids, packing, past_key_values, self.rotary_emb, bool(output_attentions)
        )
        # Packed sequences end in many states: there is no single one to continue from.
        if past_key_values is None and not packed and self._wants_cache(use_cache):
            past_key_values = BMojoCache(self.config)

        here = [index for index, layer in enumerate(self.layers) if not is_elsewhere(layer)]
        for index in here:
            self.layers[index].check_hooks(rows, inputs_embeds.shape[1], past_key_values is not None)
        if past_key_values is not None:
            past_key_values.begin(mask)
            past_key_values.pass_by(here, inputs_embeds, rows.lengths[0])
        hidden_states = inputs_embeds
        compiled = self._regions is not None and self._regions.take(rows, past_key_values, hidden_states.shape[1])
        more = {"regions": self._regions} if compiled else {}
        with self._regions.listening() if compiled else nullcontext():
            for index in here:
                hidden_states, _ = self.layers[index](hidden_states, rows=rows, past_key_values=past_key_values, **more)
        last_hidden = None if past_key_values is None else past_key_values.layers[-1].last_hidden
        hidden_states = carry_last(self.norm(hidden_states), mask, last_hidden)
        if past_key_values is not None:
            past_key_values.finish(hidden_states[:, -1], hidden_states.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE_NAME: past_key_values})

    @torch.no_grad()
    def read_waiting(self, cache: BMojoCache) -> None:
        """Read what waits in a cache after `crop`; the cache asks for it."""
        read_waiting(self, cache)

    def accept_config(self) -> None:
        """Say that the layers are what the configuration says now: for code that has changed both."""
        self._built = built_fields(self.config)

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            return self.config.use_cache and not self.training
        if use_cache and self.training and self.gradient_checkpointing:
            logger.warning_once("use_cache=True is incompatible with gradient checkpointing; building no cache.")
            return False
        return use_cache


class BMojoForCausalLM(BMojoPreTrainedModel, BMojoGenerationMixin):
    """B'MOJO with a language modelling head."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = HEAD_TENSOR_PLAN
    _pp_plan = HEAD_PIPELINE_PLAN

    def __init__(self, config: BMojoConfig):
        super().__init__(config)
        self.model = BMojoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache: BMojoCache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        r"""
        Args:
            labels: `[B, T]`, -100 = ignored; shifted inside, so `labels=input_ids` trains next-token prediction.
            logits_to_keep: an int n: logits of the last n tokens only (0 = all). A 1-D tensor: of these columns. A 2-D
                integer tensor `[B, n]`: of these columns per row. A 2-D bool tensor `[B, T]`: of the True columns,
                flattened to `[number of them, V]`.
            Others: see [`BMojoModel.forward`].

        Returns:
            `loss` (if labels), `logits` `[B, T, V]`, the cache, `hidden_states`, `attentions`.

        Raises:
            ValueError: as [`BMojoModel.forward`]; for `shift_labels` without `labels`.
        """
        if labels is None and kwargs.get("shift_labels") is not None:
            raise ValueError(
                "shift_labels without labels: there would be no loss, and a sequence that is cut over several devices "
                "cannot be read by a memory; pass labels, and keep each sequence on one device."
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            **{CACHE_NAME: one_cache(past_key_values, cache)},
            **kwargs,
        )
        regions = self.model._regions
        head = project if regions is None else regions.project
        logits = head(self.lm_head, _kept(outputs.last_hidden_state, logits_to_keep))
        if self.config.logits_scaling != 1.0:
            logits = logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: cache_of(outputs)},
        )


def _kept(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Return the columns of `[B, T, E]` whose logits are wanted, before they are projected onto the vocabulary."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dim() == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


class BMojoForSequenceClassification(GenericForSequenceClassification, BMojoPreTrainedModel):
    """B'MOJO with a classification head on the last token."""

    _auto_class = "AutoModelForSequenceClassification"
    accepts_loss_kwargs = False  # the loss is a mean over rows: Trainer divides it by the accumulated steps itself

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache: BMojoCache | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """`logits` `[B, num_labels]`, and the loss of `labels` `[B]`.

        Raises:
            ValueError: for packed sequences, see `_refuse_packing`; and see [`BMojoModel.forward`].
        """
        cu_seq_lens_q = packing_lengths(cu_seq_lens_q, kwargs)
        _refuse_packing(self, input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            **_given_cache(past_key_values, cache),
            **kwargs,
        )


class BMojoForTokenClassification(GenericForTokenClassification, BMojoPreTrainedModel):
    """B'MOJO with a classification head on every token."""

    _auto_class = "AutoModelForTokenClassification"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache: BMojoCache | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """`logits` `[B, T, num_labels]`, and the loss of `labels` `[B, T]`; sequences may be packed.

        Args:
            num_items_in_batch: labels of all accumulated batches, which the loss is divided by; None: a mean.
        """
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            return_dict=True,
            **_given_cache(past_key_values, cache),
            **kwargs,
        )
        if labels is not None:
            items = {"num_items_in_batch": num_items_in_batch}
            outputs["loss"] = self.loss_function(outputs.logits, labels, self.config, **items)
        return outputs


class BMojoForQuestionAnswering(GenericForQuestionAnswering, BMojoPreTrainedModel):
    """B'MOJO with a span head for extractive question answering."""

    _auto_class = "AutoModelForQuestionAnswering"
    accepts_loss_kwargs = False

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: BMojoCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cache: BMojoCache | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """`start_logits` and `end_logits` `[B, T]`, and the loss of the positions `[B]`.

        Raises:
            ValueError: for packed sequences, see `_refuse_packing`; and see [`BMojoModel.forward`].
        """
        cu_seq_lens_q = packing_lengths(cu_seq_lens_q, kwargs)
        _refuse_packing(self, input_ids, inputs_embeds, attention_mask, position_ids, seq_idx, cu_seq_lens_q)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            **_given_cache(past_key_values, cache),
            **kwargs,
        )


def _given_cache(past_key_values: BMojoCache | None, cache: BMojoCache | None) -> dict[str, BMojoCache | None]:
    """Return the cache under the name that transformers' heads take it by."""
    return {CACHE_NAME: one_cache(past_key_values, cache)}


def _refuse_packing(
    model: BMojoPreTrainedModel,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None,
) -> None:
    """Refuse packed rows: a head with one answer per row (a class, a span) has none for each of several sequences in
    it.

    Raises:
        ValueError: for packed sequences, whichever of the three arguments tells of them.
    """
    given = {"seq_idx": seq_idx, "cu_seq_lens_q": cu_seq_lens_q, "position_ids": position_ids}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return
    check_tokens(model.config, input_ids, inputs_embeds)
    batch, columns = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
    mask = None if attention_mask is None else attention_mask[:, -columns:].to(torch.bool)
    for name in given:
        alone = {"position_ids": None, "seq_idx": None, "cu_seq_lens_q": None, name: given[name]}
        if sequence_starts(batch, columns, mask, *alone.values()) is not None:
            raise ValueError(
                f"{name} tells of several sequences in one row: {type(model).__name__} gives one answer per row; pass "
                "each sequence as a row of its own, padded."
            )


register_cache_tree()

# Auto class -> what it makes of our configuration; transformers' heads get their backbone in this way, too.
AUTO_CLASSES = {
    AutoModel: BMojoModel,
    AutoModelForCausalLM: BMojoForCausalLM,
    AutoModelForSequenceClassification: BMojoForSequenceClassification,
    AutoModelForTokenClassification: BMojoForTokenClassification,
    AutoModelForQuestionAnswering: BMojoForQuestionAnswering,
}
for _auto, _model in AUTO_CLASSES.items():
    _auto.register(BMojoConfig, _model, exist_ok=True)

__all__ = [
    "BMojoForCausalLM",
    "BMojoForQuestionAnswering",
    "BMojoForSequenceClassification",
    "BMojoForTokenClassification",
    "BMojoModel",
    "BMojoPreTrainedModel",
]
