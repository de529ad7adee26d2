"""LayerMemory: the memories of one layer, put together from what the configuration says.

    parts         what offers keys to the attention (`parts_bmojo`), in the order of `configuration_bmojo.PARTS`
    innovation    how the layer judges tokens, if it keeps some (`innovation_bmojo`)
    fading        the class of its SSM, if it has one (`fading_bmojo`)

The model's layer reads with it, the cache's layer allocates by it; both build it from the same configuration.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .attention_ops import Apart, BlockKeys, Lazy, Seen, Whole, by_block, some_blocks
from .configuration_bmojo import FADING_MEMORIES, INNOVATIONS, PARTS
from .dispatch_bmojo import Kernels
from .distance_bmojo import step_correction, with_distances
from .fading_tokens_bmojo import FadingTokens
from .innovation_bmojo import SIGNALS
from .memory_ops import cast
from .parts_bmojo import LayerSpec, MemoryPart, Tokens
from .share_bmojo import Share
from .states_bmojo import State


OF_THE_SSM = ("output", "prediction")
OF_SOME_HEADS = ("key", "prediction")  # signals of which a device has what its heads say
CONV = "conv"  # a state whose channels are of several kinds
# Names that mean something else on a cache's layer.
OF_THE_CACHE = {
    *dir(CacheLayerMixin),
    *("is_initialized", "memory", "names", "spec", "columns", "even", "unfinished", "device", "started", "states"),
    *(
        "restore",
        "elsewhere",
        "pass_by",
        "saves",
        "pages",
        "store",
        "index",
        "paged",
        "paged_fields",
        "in_pages",
        "on_host",
        "keep_on_host",
        "kept",
        "back_to",
        "_follows",
        "_unread",
        "_host_pages",
        "_dense",
        "_mirrors",
        "paged_states",
        "stored_nbytes",
        "by_token",
        "of_all_heads",
        "_take_share",
        "counts",
        "prepare",
        "advance",
        "nbytes",
        "_map",
        "to",
        "seen",
        "pads",
        "last_hidden",
    ),
}


class LayerMemory:
    """See the module's docstring.

    With a share of the heads it is sized for that: `whole` is what it is a share of, `cuts` where each state is cut.

    Args:
        config: the model's configuration. layer_idx: which layer. share: of the heads, None: all are here.
    """

    # No `__dict__`: transformers' exporters look for tensors in every attribute that they find in a cache, and rebuild
    # the tuples on their way.
    __slots__ = ("bounded", "declared", "fading", "hidden", "innovation", "parts", "signal", "spec", "takes_left")
    __slots__ += ("cuts", "share", "whole")

    def __init__(self, config: PreTrainedConfig, layer_idx: int, share: Share | None = None):
        self.share, self.whole, whole_config = share, self, config
        if share is not None:
            self.whole, config = LayerMemory(config, layer_idx), share.config(config)
        self.spec: LayerSpec = config.layer_spec(layer_idx)
        self.parts: list[MemoryPart] = [part(config, self.spec) for part in PARTS if part.belongs(config, self.spec)]
        judged = self.spec.slots > 0 or (self.spec.stored > 0 and config.storage_decay > 0)
        self.innovation = INNOVATIONS[config.innovation](config) if judged else None
        self.signal = None if self.innovation is None else self.innovation.signal
        self._check_signal()
        if share is not None and self.innovation is not None:
            self._share_innovation(share)
        self.fading = FADING_MEMORIES[config.ssm_type] if self.spec.has_ssm else None
        self.hidden = config.hidden_size
        places = 0
        for part in self.parts:
            part.settle(places)
            places += part.places
        self.bounded = bool(self.parts) and all(part.bounded for part in self.parts)
        self.takes_left = any(part.takes_left for part in self.parts)
        self.declared = self._declared(config, places)
        self.cuts = {} if share is None else self._cuts(whole_config, share)

    def __setstate__(self, state: tuple | dict) -> None:
        """Take what was pickled in a cache, also before there were `__slots__`."""
        for name, value in (state[1] if isinstance(state, tuple) else state).items():
            setattr(self, name, value)
        if not hasattr(self, "whole"):  # pickled before there were shares
            self.cuts, self.share, self.whole = {}, None, self

    def _share_innovation(self, share: Share) -> None:
        """Let the test add up over the devices. Raise ValueError for one that would judge by one device's heads."""
        if self.signal in OF_SOME_HEADS and not self.innovation.adds_up:
            raise ValueError(
                f"innovation={self.innovation.name!r}: judges by the {self.signal} of one device's heads, so that each "
                "device would keep other tokens; add up over self.share in its score and set adds_up = True, or load "
                "with tp_plan=BMojoForCausalLM.whole_heads_plan(config)."
            )
        self.innovation.share = share

    def _cuts(self, config: PreTrainedConfig, share: Share) -> dict[str, tuple[int, list[list[slice]]]]:
        """Return, for each state that has other sizes than all heads have together, its axis (of the tensor `[B, ...]`)
        that is cut, and which slices of it each device has."""
        found = {}
        for name, state in self.whole.declared.items():
            sizes = list(zip(state.shape, self.declared[name].shape))
            axis = next((axis for axis, (whole, here) in enumerate(sizes) if whole != here), None)
            if axis is not None:
                devices, whole = share.devices(), sizes[axis][0]
                slices = [[each.part(whole)] for each in devices]
                if name == CONV:
                    slices = [self.fading.channel_slices(config, each) for each in devices]
                found[name] = axis + 1, slices
        return found

    def _check_signal(self) -> None:
        """Raise ValueError for a signal that there is not, or not in this layer."""
        if self.signal not in SIGNALS:
            name = self.innovation.name
            raise ValueError(
                f"innovation={name!r}: its signal={self.signal!r} must be one of {list(SIGNALS)}; change it."
            )
        if self.signal in OF_THE_SSM and not self.spec.has_ssm:
            raise ValueError(
                f"innovation={self.innovation.name!r}: judges by the SSM's {self.signal}, and the layer has no SSM; "
                "set has_ssm = True in its class."
            )

    def _declared(self, config: PreTrainedConfig, places: int) -> dict[str, State]:
        states: dict[str, State] = {}

        def add(owner: str, declared: dict[str, State]) -> None:
            twice = (states.keys() | OF_THE_CACHE) & declared.keys()
            if twice:
                raise ValueError(
                    f"{owner} declares the state {min(twice)!r}: the name is taken, by another memory of the layer or "
                    "by the cache; give it a name of its own."
                )
            states.update(declared)

        if places:
            entry = State((config.num_key_value_heads, places, config.head_dim))
            states |= {"keys": entry, "values": entry}
            states |= {"positions": State((places,), "count", fill=-1), "innovations": State((places,), "wide")}
        for part in self.parts:
            add(type(part).__name__, part.states())
        if self.innovation is not None:
            add(type(self.innovation).__name__, self.innovation.states(config))
        if self.fading is not None:
            add(self.fading.__name__, self.fading.states(config))
        return states

    def dtype(self, found: dict[str, torch.dtype]) -> torch.dtype | None:
        """Return the dtype of the activations that states of these dtypes were allocated for; None if no state
        tells."""
        kinds = ("model", "wide")
        told = (name for kind in kinds for name, state in self.declared.items() if state.kind == kind)
        return next((found[name] for name in told if name in found), None)

    def __deepcopy__(self, memo: dict) -> "LayerMemory":
        """Return itself: it holds sizes and no tensors, and copies of a cache share it."""
        return self

    def part(self, kind: type[MemoryPart]) -> Any:
        """Return the layer's part of this class, or None."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def front(self, tokens: int, layer: Any) -> int:
        """How many of the first queries see nothing but the new tokens before them: the plain causal triangle."""
        started = layer is not None and layer.started
        return 0 if started or not self.bounded else min(tokens, self.spec.alone)

    def observe(self, tokens: Tokens, layer: Any, kernels: Kernels) -> list:
        """Let every part take the tokens in; what their queries see, as offers of one softmax (`attention_ops`).

        Args:
            layer: the layer's states, or None.
        """
        if not tokens.steps:
            return self._observe(tokens, layer, kernels)
        with torch.no_grad():
            return self._observe(tokens, layer, kernels)

    def _observe(self, tokens: Tokens, layer: Any, kernels: Kernels) -> list:
        offers, left, full = [], [], True
        for part in self.parts:
            observed = part.observe(tokens, layer, left, kernels)
            apart = tokens.apart and isinstance(part, FadingTokens)
            offers += [Apart(each) for each in observed.offers] if apart else observed.offers
            full = full and observed.full
            if observed.left is not None:
                left.append(observed.left)
        if tokens.steps and tokens.apart:
            offers = [*self._buffer_apart(tokens, layer, full), *offers]
        elif tokens.steps and "positions" in self.declared:
            of_one = bool(offers) and all(isinstance(each, Seen) for each in offers)
            offers.insert(0, (self._buffer_now if of_one else self._buffer)(tokens, layer, full))
        if tokens.far is None or tokens.queries <= 0:
            return offers
        done = Lazy | Seen
        return [each if isinstance(each, done) else self._within_distance(each, tokens, layer) for each in offers]

    def _within_distance(self, offer, tokens: Tokens, layer: Any) -> Lazy:
        """Return the offer with distances of at most D_max."""
        block = min(tokens.block, tokens.queries)
        whole = by_block(offer, tokens.queries, block)
        query, now = (value[:, tokens.front :] for value in (tokens.query, tokens.positions(layer)))
        far = tokens.far._replace(query=tokens.far.query[:, tokens.front :])

        def make(blocks: slice) -> list[BlockKeys]:
            part = some_blocks(whole, blocks)
            return [with_distances(part, far, query, now, blocks.start * block, block)]

        return Lazy(whole.keys.shape[3], make)

    def _buffer(self, tokens: Tokens, layer: Any, full: bool) -> Whole:
        """Return the key buffer after a step: its entries are exactly what the token sees."""
        visible = None if full else self._visible(tokens, layer)[:, None]
        return Whole(*layer.by_token(), visible, layer.positions)

    def _visible(self, tokens: Tokens, layer: Any) -> torch.Tensor:
        """Which entries of the key buffer hold what the token of a step sees, `[B, S]`."""
        visible = layer.positions >= 0
        if tokens.lengths is not None:
            # A row that reads a pad sees anything at all: a softmax over nothing would be NaN.
            visible = visible | (tokens.lengths <= 0)[:, None]
        return visible

    def _buffer_apart(self, tokens: Tokens, layer: Any, full: bool) -> tuple[Seen, Apart]:
        """Return the key buffer after a step in two: without the fading tokens, and these."""
        dtype, own, bias = tokens.query.dtype, self.part(FadingTokens).own, None
        keys, values = cast(layer.keys, dtype), cast(layer.values, dtype)
        if not full:
            bias = torch.where(self._visible(tokens, layer), 0.0, -torch.inf).to(dtype)[:, None, None]

        def places(which: slice) -> Seen:
            seen = None if bias is None else bias[..., which]
            return Seen(keys[:, :, which], values[:, :, which], seen, layer.positions[:, which])

        return places(slice(own.stop, None)), Apart(places(own))  # fading tokens are the first in `PARTS`

    def _buffer_now(self, tokens: Tokens, layer: Any, full: bool) -> Seen:
        """Return the same for a step whose rows have all read as much, with distances of at most D_max."""
        dtype, bias = tokens.query.dtype, None
        keys, values = cast(layer.keys, dtype), cast(layer.values, dtype)
        if not full:
            bias = torch.where(layer.positions >= 0, 0.0, -torch.inf).to(dtype)[:, None, None]
        if tokens.far is not None and (self.spec.slots or self.spec.fading):  # the window is within D_max
            query, far = (value[:, 0].unflatten(1, (keys.shape[1], -1)) for value in (tokens.query, tokens.far.query))
            origin = layer.positions[:, None].expand(-1, keys.shape[1], -1)
            change = step_correction(tokens.far, query, far, keys, origin, layer.columns)
            if change is not None:
                bias = change.to(dtype) if bias is None else bias + change.to(dtype)
        return Seen(keys, values, bias, layer.positions)

    def arranged(self, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copy of the states that do not tell how the text was cut when it was read (`MemoryPart.arrange`)."""
        states = {name: value.clone() for name, value in states.items()}
        for part in self.parts:
            part.arrange(states)
        return states

    def check(self, states: dict[str, torch.Tensor], seen: torch.Tensor) -> None:
        """Raise ValueError unless the states are what `seen` `[B]` tokens can leave."""
        for part in self.parts:
            part.check(states, seen)


__all__ = ["LayerMemory"]
