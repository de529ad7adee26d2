"""The parts of a layer's memory: what every one of them declares and does.

A layer's memory is a list of parts (window and eidetic memory, fading tokens, or every past token). Each takes in the
tokens that the layer reads and says what their queries may see: keys and values, offered to one softmax. Prefill,
chunked prefill and decoding ask the same thing; one token is a block of one. A part is entered in
`configuration_bmojo.PARTS`; the cache holds whatever states it declares.

Tokens that a bounded part keeps lie in the layer's key buffer, one buffer for all parts, each with its own places: a
decoding step attends to it as it lies, without a copy. What lies elsewhere is offered beside it.

Shapes: R mixer rows, T tokens, H query heads, G key/value heads, D head dim, S entries, L block length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from .attention_ops import BlockKeys, KeySet, Lazy, Whole
from .dispatch_bmojo import Kernels
from .distance_bmojo import Far
from .states_bmojo import State


class LayerSpec(NamedTuple):
    """What kind of layer it is, and how much it remembers.

    window: W, visible tokens including the query itself; None means every past token (full attention).
    slots: M, eidetic slots. fading: F, fading tokens. stride: s, SSM outputs per fading token (1 where F = 0).
    has_ssm: whether it has a fading memory. blocks: fading tokens of each level that are means of `stride` tokens and
    more (0: they are SSM outputs). stored: K, tokens that a query fetches from the storage. delay: d, tokens from an
    SSM output to the first query that sees it; None: W.
    """

    kind: str
    window: int | None
    slots: int
    fading: int
    stride: int
    has_ssm: bool
    blocks: int = 0
    stored: int = 0
    delay: int | None = None  # last: caches that were pickled before there was one end here

    @property
    def has_attention(self) -> bool:
        return self.kind != "linear_attention"

    @property
    def delayed(self) -> int:
        """d / s, fading tokens that are made but not yet shown (0 where F = 0)."""
        return self.waits // self.stride if self.fading else 0

    @property
    def waits(self) -> int:
        """Return d, how many tokens a fading token waits before it is shown."""
        return self.window if self.delay is None else self.delay

    @property
    def alone(self) -> int | None:
        """How many of a text's first queries see the tokens before them and nothing else; None: all."""
        if not self.fading or self.window is None:
            return self.window
        return min(self.window, self.waits + self.stride - 1)


class Tokens(NamedTuple):
    """T new tokens of R mixer rows, as a layer's memory reads them.

    query: `[R, T, H, D]`; keys, values: `[R, T, G, D]`; query and keys at their positions (RoPE).
    innovation: `[R, T]`, or None where nobody asks. lengths: `[R]` real tokens, which come first; None: all.
    fading: keys and values `[R, n, G, D]` of the fading tokens that these tokens make, or None.
    front: the first `front` queries see nothing but the new tokens before them, and no part offers them anything.
    block: L, queries that share what is offered to them. steps: one token, whose states are written in place.
    counted: of a step: a number, `layer.columns`, says what every row has read. needs_grad: a gradient is wanted.
    wants_left: some part asks what the others let go. scaling: sigma, of the scores.
    sketches: int8 `[R, T, G, r]` of the keys, or None. asked: makes what the queries ask them,
    `[R, T, H, r]` (`sketch_bmojo`); or None.
    far: what pairs beyond `max_rope_distance` need, or None if there are none. apart: fading tokens are asked by
    queries of their own.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    innovation: torch.Tensor | None
    lengths: torch.Tensor | None
    fading: tuple[torch.Tensor, torch.Tensor] | None
    front: int
    block: int
    steps: bool
    counted: bool
    needs_grad: bool
    wants_left: bool
    scaling: float = 1.0
    sketches: torch.Tensor | None = None
    asked: Callable[[], torch.Tensor] | None = None
    far: Far | None = None
    apart: bool = False

    @property
    def queries(self) -> int:
        """Return queries that something is offered to; the first of them is at coordinate 0."""
        return self.query.shape[1] - self.front

    def real(self) -> torch.Tensor:
        """Real tokens of each row, `[R]`."""
        if self.lengths is not None:
            return self.lengths
        return torch.full((self.query.shape[0],), self.query.shape[1], device=self.query.device)

    def positions(self, layer: Any) -> torch.Tensor:
        """`[R, T]`, each token's position in its row, -1 for a pad."""
        lengths = self.real()
        seen = lengths.new_zeros(lengths.shape) if layer is None else layer.seen
        offset = torch.arange(self.query.shape[1], device=self.query.device)
        return torch.where(offset < lengths[:, None], seen[:, None] + offset, -1)


class Left(NamedTuple):
    """Tokens that a part lets go: what a storage takes in.

    keys, values: `[R, S, G, D]`. positions: `[R, S]`, -1 = no token. innovations: `[R, S]`.
    out_at: `[R, S]`, the query (0 is the first one that is offered something) from which on the part does not show the
    token any more; if it still does, `NEVER` or beyond the row's last real token, `tokens.real() - 1 - tokens.front`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    innovations: torch.Tensor
    out_at: torch.Tensor


class Observed(NamedTuple):
    """What a part says of the tokens that it has taken in.

    offers: what their queries may see, beside the key buffer. full: of a step: all the part's places in the key buffer
    hold tokens that the query sees. left: tokens that it lets go, or None.
    """

    offers: "list[tuple[KeySet, tuple[int, int] | torch.Tensor] | BlockKeys | Whole | Lazy]" = []
    full: bool = True
    left: Left | None = None


class MemoryPart:
    """One memory of a layer. It holds sizes and no tensors: those are states of the cache.

    places: entries in the layer's key buffer. first, own: where they begin, and which they are. takes_left: it takes in
    what the parts before it in `PARTS` let go. bounded: it offers nothing to the first queries of a text, as many
    as `LayerSpec.alone` says, which the layer answers without asking (`Tokens.front`).

    Args:
        config: the model's configuration. spec: the layer's.
    """

    places = 0
    takes_left = False
    bounded = False

    def __init__(self, config: PreTrainedConfig, spec: LayerSpec):
        self.spec = spec

    @classmethod
    def check_config(cls, config: PreTrainedConfig) -> None:
        """Raise ValueError (field, value, rule, remedy) for a value of this part's own fields that breaks a rule."""

    def settle(self, first: int) -> None:
        """Take the places from `first` on."""
        self.first, self.own = first, slice(first, first + self.places)

    @classmethod
    def belongs(cls, config: PreTrainedConfig, spec: LayerSpec) -> bool:
        """Whether a layer of this kind has the part."""
        raise NotImplementedError

    def states(self) -> dict[str, State]:
        """Return its states beside the key buffer."""
        return {}

    def observe(self, tokens: Tokens, layer: Any, left: list[Left], kernels: Kernels) -> Observed:
        """Take the tokens in, and say what their queries see. A step runs without gradients.

        Args:
            layer: the layer's states, which are moved on; None: nothing was read before, and nothing is kept.
            left: what the parts before this one let go, by these tokens.
        """
        raise NotImplementedError

    def make_room(self, layer: Any, columns: int) -> None:
        """Let the layer's states that follow the text have room for so many more columns; `observe` does it by itself
        where a number says how much was read."""

    def check(self, states: dict[str, torch.Tensor], seen: torch.Tensor) -> None:
        """Raise ValueError unless `states` are what `seen` `[B]` tokens can leave: a file may say anything."""

    def arrange(self, states: dict[str, torch.Tensor]) -> None:
        """Put its entries of `states` (copies) into an order that does not tell how the text was cut when it was read,
        and zeros where nothing lies: to compare two caches of one text."""


def require(rules: dict[str, torch.Tensor], what: str) -> None:
    """Raise ValueError for the first rule that is broken. rules: by what is wrong, where it is, `[B, ...]` bool."""
    for wrong, where in rules.items():
        if bool(where.any()):
            row = int(where.flatten(1).any(dim=1).to(torch.int8).argmax())
            raise ValueError(f"row {row}: {what} {wrong}")


__all__ = ["LayerSpec", "Left", "MemoryPart", "Observed", "Tokens"]
