"""The models that are compared, by name: equal in bytes of state and in parameters.

Two numbers are solved for. k, the size of a model's memory (window, slots, state channels), is the largest whose cache
takes at most the wanted bytes; the width of the MLP is the one whose parameters come closest to the wanted number. All
are `BMojoForCausalLM`, whose attention, window, Mamba, Mamba-2 and gated delta layers equal transformers' classes
(docs/model.md, "The family"). Those three have twice the model's width inside, as published, and the MLP that all
others have.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM

from ..common.running import meta_model
from ..common.settings import refuse_unknown


BYTES_TOLERANCE = 0.07  # of the wanted bytes; a step of k is a token's key and value, or one state channel
PARAMETERS_TOLERANCE = 0.01
FADING = 1  # fading tokens of B'MOJO layers, the paper's recurrent form, but every W-th alone, so that one waits
CHANNELS = 4  # state channels of the SSM of a B'MOJO layer in the paper's form
CHANNELS_PER_TOKEN = 4  # of one whose fading tokens have no delay
SLOTTED_CHANNELS = 12  # of one that has more slots instead
GAIN = 10.0  # of the gradient of the innovation test
DIRECT = dict(fading_size=1, fading_delay=0, innovation="key", ssm_num_groups=1)  # of both
FETCHED = 16  # tokens that a query fetches from a storage


@dataclass(frozen=True)
class Sizes:
    """What all models share. width: of the model; parameters: without embeddings; state_bytes: of one text's memory."""

    width: int
    heads: int
    layers: int
    vocabulary: int
    parameters: int
    state_bytes: int


@dataclass(frozen=True)
class Kind:
    """A model by name.

    about: one line. layers: the types of two layers, repeated. memory: from k to memory fields of `BMojoConfig`.
    ranked: whether its memory has the wanted bytes; else it grows with the text, and k is not solved for.
    """

    about: str
    layers: tuple[str, str]
    memory: Callable[[int, Sizes], dict[str, Any]]
    ranked: bool = True


def _mamba(kind: str) -> Callable[[int, Sizes], dict[str, Any]]:
    def memory(k: int, sizes: Sizes) -> dict[str, Any]:
        inner = dict(ssm_num_heads=2 * sizes.heads, ssm_head_dim=sizes.width // sizes.heads, ssm_num_groups=1)
        return dict(ssm_type=kind, ssm_state_size=k, **inner)

    return memory


def _stack(k: int, sizes: Sizes) -> dict[str, Any]:
    return {**_mamba("mamba2")(k, sizes), "window_size": k}


def _bmojo(innovation: str | None, **more: Any) -> Callable[[int, Sizes], dict[str, Any]]:
    """k tokens, half of them the window; without a test all of them are."""

    def memory(k: int, sizes: Sizes) -> dict[str, Any]:
        window = k if innovation is None else (k + 1) // 2
        fading = dict(fading_size=FADING, fading_stride=window, ssm_state_size=CHANNELS, ssm_num_groups=1)
        test = {} if innovation is None else {"innovation": innovation}
        return dict(window_size=window, eidetic_size=k - window, **fading, **test, **more)

    return memory


def _direct(slots: bool) -> Callable[[int, Sizes], dict[str, Any]]:
    """k state channels, a token for `CHANNELS_PER_TOKEN` of them; queries see what the SSM answers to their own token.

    slots: half of the tokens are kept ones.
    """

    def memory(k: int, sizes: Sizes) -> dict[str, Any]:
        tokens = -(-k // CHANNELS_PER_TOKEN)
        window = (tokens + 1) // 2 if slots else tokens
        return dict(window_size=window, eidetic_size=tokens - window, ssm_state_size=k, **DIRECT)

    return memory


def _slotted(gain: float) -> Callable[[int, Sizes], dict[str, Any]]:
    """k tokens, all but a quarter of them kept ones. The SSM has no short convolution, whose state takes two tokens:
    what it binds, `taps` bind for every model.

    gain: of the gradient of the innovation test, 0: none.
    """

    def memory(k: int, sizes: Sizes) -> dict[str, Any]:
        window = max(1, k // 4)
        ssm = dict(ssm_state_size=SLOTTED_CHANNELS, ssm_conv_kernel=1)
        return dict(window_size=window, eidetic_size=k - window, innovation_gradient=gain, **ssm, **DIRECT)

    return memory


def _hybrid(k: int, sizes: Sizes) -> dict[str, Any]:
    """As many state channels as tokens; the B'MOJO layer has no fading tokens and, as its test reads none, no SSM."""
    window = (k + 1) // 2
    memory = dict(window_size=window, eidetic_size=k - window, innovation="constant", fading_size=0)
    return {**_mamba("mamba2")(k, sizes), **memory}


ATTENTION, WINDOW, SSM, BMOJO = "full_attention", "sliding_attention", "linear_attention", "bmojo"
MODELS: dict[str, Kind] = {
    "full_attention": Kind("all keys and values: a ceiling", (ATTENTION,) * 2, lambda k, sizes: {}, ranked=False),
    "window": Kind("sliding window", (WINDOW,) * 2, lambda k, sizes: {"window_size": k}),
    "mamba": Kind("Mamba", (SSM,) * 2, _mamba("mamba")),
    "mamba2": Kind("Mamba-2", (SSM,) * 2, _mamba("mamba2")),
    "gated_delta": Kind("Gated DeltaNet", (SSM,) * 2, _mamba("gated_delta")),
    "kalmanet": Kind("Gated KalmaNet", (SSM,) * 2, _mamba("kalmanet")),
    "jamba": Kind("Mamba-2, then full attention", (SSM, ATTENTION), lambda k, sizes: _stack(16, sizes), ranked=False),
    "samba": Kind("Mamba-2, then a sliding window", (SSM, WINDOW), _stack),
    "bmojo_f": Kind("B'MOJO-F: window and fading tokens", (BMOJO,) * 2, _bmojo(None)),
    "bmojo_output": Kind("B'MOJO, the paper's test on outputs", (BMOJO,) * 2, _bmojo("output")),
    "bmojo_state": Kind("B'MOJO, test on the SSM's input", (BMOJO,) * 2, _bmojo("state")),
    "bmojo_key": Kind("B'MOJO, test on keys", (BMOJO,) * 2, _bmojo("key")),
    "bmojo_constant": Kind("B'MOJO that keeps the first tokens", (BMOJO,) * 2, _bmojo("constant")),
    "bmojo_direct": Kind("B'MOJO, test on keys, queries see the SSM's own answer", (BMOJO,) * 2, _direct(True)),
    "bmojo_f_direct": Kind("B'MOJO-F, queries see the SSM's own answer", (BMOJO,) * 2, _direct(False)),
    "bmojo_slots": Kind("B'MOJO like bmojo_direct, more slots and no convolution", (BMOJO,) * 2, _slotted(0.0)),
    "bmojo_learnt": Kind("bmojo_slots, whose test has a gradient", (BMOJO,) * 2, _slotted(GAIN)),
    "bmojo_hybrid": Kind("Mamba-2, then B'MOJO that keeps the first tokens", (SSM, BMOJO), _hybrid),
    "bmojo_storage": Kind("B'MOJO with storage: a ceiling", (BMOJO,) * 2, _bmojo("key", storage_size=FETCHED), False),
}
OVERRIDES = tuple(
    name for name in BMojoConfig.fields_with(role="memory") if name not in ("layer_types", "ssm_chunk_size")
)


@dataclass(frozen=True)
class Model:
    """A model that was checked. name: how its results are called; overrides: memory fields on top of its kind's."""

    name: str
    kind: str
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def ranked(self) -> bool:
        """Whether its memory has the wanted bytes: not with a storage, which grows with the text."""
        return MODELS[self.kind].ranked and not dict(self.overrides).get("storage_size")

    def config(self, sizes: Sizes, length: int) -> BMojoConfig:
        """Return the configuration whose bytes and parameters are the wanted ones.

        Args:
            length: tokens of the longest text that is read.

        Raises:
            ValueError: no size of the memory takes the wanted bytes, or the mixers alone have more parameters.
        """
        k, mlp = _solved(self, replace(sizes, vocabulary=2))
        return self.build(sizes, k, mlp, max_position_embeddings=length)

    def keeps(self, sizes: Sizes) -> bool:
        """Whether one of its layers has an eidetic memory."""
        config = self.build(sizes, 16, 1)
        return any(config.layer_spec(index).slots for index in range(sizes.layers))

    def build(self, sizes: Sizes, k: int, mlp: int, **more: Any) -> BMojoConfig:
        """Return the configuration with a memory of size k and an MLP of width `mlp`."""
        kind = MODELS[self.kind]
        return BMojoConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=mlp,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            initializer_range=sizes.width**-0.5,
            layer_types=[kind.layers[index % 2] for index in range(sizes.layers)],
            **{**kind.memory(k, sizes), **dict(self.overrides)},
            **more,
        )


@lru_cache(maxsize=4096)
def _solved(model: Model, sizes: Sizes) -> tuple[int, int]:
    """Return the size k of the memory and the width of the MLP; neither depends on the vocabulary."""
    k = _memory(model, sizes) if model.ranked else max(2, sizes.state_bytes // (16 * sizes.width))
    return k, _mlp(model, sizes, k)


def _memory(model: Model, sizes: Sizes) -> int:
    """Return the largest k whose bytes are at most the wanted ones (ValueError: none comes near them)."""

    def takes(k: int) -> int:
        return constant_bytes(model.build(sizes, k, 0))

    wanted, low, high = sizes.state_bytes, 2, 4
    if takes(low) > wanted:
        raise ValueError(
            f"state_bytes={wanted:,}: {model.name} needs {takes(low):,} bytes at least at width {sizes.width} with "
            f"{sizes.layers} layers; give more bytes, or a smaller width."
        )
    while takes(high) <= wanted:
        if takes(high) == takes(2 * high):  # fields of its own say how large its memory is
            break
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if takes(middle) <= wanted else (low, middle)
    if takes(low) < (1 - BYTES_TOLERANCE) * wanted:
        fixed = takes(low) == takes(high)
        found = f"{takes(low):,} bytes by its own fields" if fixed else f"{takes(low):,} or {takes(high):,} bytes"
        remedy = "leave one of them out" if fixed else "give more bytes, or a smaller width"
        raise ValueError(
            f"state_bytes={wanted:,}: {model.name} takes {found}, and must come within {BYTES_TOLERANCE:.0%}; {remedy}."
        )
    return low


def _mlp(model: Model, sizes: Sizes, k: int) -> int:
    """Return the width of the MLP that makes the parameters the wanted ones (ValueError: none does)."""

    def counts(mlp: int) -> int:
        return parameters(model.build(sizes, k, mlp))

    wanted, one = sizes.parameters, counts(1)
    mlp = 1 + round((wanted - one) / (counts(2) - one))
    if mlp < 1:
        raise ValueError(
            f"parameters={wanted:,}: {model.name} has {one:,} without an MLP worth the name at width {sizes.width}; "
            "give more parameters, or a smaller width."
        )
    if abs(counts(mlp) - wanted) > PARAMETERS_TOLERANCE * wanted:
        raise ValueError(
            f"parameters={wanted:,}: {model.name} comes to {counts(mlp):,}, not within {PARAMETERS_TOLERANCE:.0%}; "
            "give more parameters."
        )
    return mlp


def constant_bytes(config: BMojoConfig) -> int:
    """Return the bytes that a cache in fp32 takes before it grows, if it does: all states of all layers, one row."""
    cache, probe = BMojoCache(config), torch.empty(1, 1, 1, dtype=torch.float32, device="meta")
    for layer in cache.layers:
        layer.lazy_initialization(probe)
    return cache.nbytes


def parameters(config: BMojoConfig) -> int:
    """Return the number of parameters without embeddings and output matrix."""
    model = meta_model(config)
    return sum(p.numel() for p in model.parameters()) - 2 * config.vocab_size * config.hidden_size


@torch.no_grad()
def bytes_read(model: BMojoForCausalLM, length: int) -> int:
    """Return the bytes of the memory after `length` tokens were read, from the cache itself."""
    cache = BMojoCache(model.config)
    ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache.nbytes


def models_of(entries: Any) -> list[Model]:
    """Return the models that the list `models:` names.

    Args:
        entries: names of `MODELS`, or mappings `{model: bmojo_key, name: decays, eidetic_decay: 0.05}` with memory
            fields of `BMojoConfig`.

    Raises:
        ValueError: an unknown model or field, one name twice.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"models={entries!r}: must be a list of some of {list(MODELS)}.")
    found = []
    for entry in entries:
        values = dict(entry) if isinstance(entry, Mapping) else {"model": entry}
        kind = values.pop("model", None)
        if kind not in MODELS:
            raise ValueError(f"models: {kind!r} is no model; known are {', '.join(MODELS)}.")
        name = str(values.pop("name", kind))
        refuse_unknown(values, OVERRIDES, f"models: {name}.")
        unfit = [field for field, value in values.items() if isinstance(value, list | dict)]
        if unfit:
            raise ValueError(f"models: {name}: {unfit} must be single values, not lists or sections.")
        found.append(Model(name, kind, tuple(sorted(values.items()))))
    names = [model.name for model in found]
    if len(set(names)) != len(names):
        raise ValueError(f"models: the names {names} must be distinct; give them with {{model: ..., name: ...}}.")
    return found
