"""One layer's states: allocated as its memories declare them, and what transformers asks of a cache's layer.

With `seen` = real tokens of each row so far, pads never counted, every layer has these, and then what its parts, its
innovation test and its fading memory declare (docs/cache.md lists them):

    keys, values    [B, G, S, D]   the key buffer, in which the bounded parts have their places (`layer_memory_bmojo`);
                                   in a layer with full attention: every token, entry = position
    positions       [B, S]         position of each entry in its row, -1 = empty
    innovations     [B, S]         e of the entry's token, 0 where nobody judged it
    seen            [B]            real tokens of each row
    pads            [B]            first layer only: fingerprint of the pads (`cache_pads_bmojo`); None: no pads
    last_hidden     [B, E]         last layer only: the model's output for the last real token

`keys` and `values` stand head by head, as in transformers' caches and as attention reads them; tokens come and go as
`[B, T, G, D]`, like everywhere else in this package.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from .layer_memory_bmojo import LayerMemory
from .pages_bmojo import Pages
from .parts_bmojo import LayerSpec
from .pools_bmojo import Field
from .rollback_bmojo import Kept
from .share_bmojo import Cut, together
from .states_bmojo import State


COMMON = ("seen", "pads", "last_hidden")  # states of the layer itself; the others are declared by its memories


class BMojoCacheLayer(CacheLayerMixin):
    """All states of one layer. Written by the model; every operation treats every state alike, by `states()`.

    Where gradients are off it is by a block and not by a decorator: torch.compile cannot enter a decorated method of an
    object that is made inside the compiled code, as a model's own cache is.

    Args:
        config: the model's configuration. layer_idx: which layer.
    """

    pages: Any = None  # the entries of stored tokens, where a directory or host memory holds them
    store: Any = None  # that directory; the first layer starts it, with the batch size and dtype
    on_host: bool = False  # whether host memory does, wherever the model is
    elsewhere: bool = False  # whether another stage of a pipeline has the layer, and its states
    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.memory = LayerMemory(config, layer_idx)
        self.names = (*self.memory.declared, *COMMON)
        # Columns of input read, pads included: what transformers calls the sequence length. None: a tensor of the cache
        # counts them (`cache_fixed_bmojo`).
        self.columns: int | None = 0
        self.even = True  # no pad was ever read, so that `seen` is `columns` in every row
        self.unfinished = False  # first layer only: whoever wrote to the layers has not come to an end
        self.device: torch.device | None = None
        self.index = layer_idx
        for name in self.names:
            setattr(self, name, None)

    @property
    def spec(self) -> LayerSpec:
        return self.memory.spec

    @property
    def started(self) -> bool:
        """Whether the next token is one of many: anything was read, or the states of fixed shapes stand for it."""
        return self.columns is None or self.columns > 0

    # --- allocation -------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate every state for the batch size, dtype and device of `key_states` `[B, ...]`."""
        batch, dtype, self.device = key_states.shape[0], key_states.dtype, key_states.device
        if self.store is not None:
            found = self.store.start(batch, dtype) if self.index == 0 else self.store.layers
            self.pages = found[self.index]
        elif self.on_host:
            self.pages = self._host_pages(batch, dtype)
        for name, state in self.memory.declared.items():
            if not self.paged(state):
                setattr(self, name, state.new(batch, dtype, self.device))
        self.seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def _host_pages(self, batch: int, dtype: torch.dtype) -> Pages | None:
        fields = {name: Field(shape, kind or dtype) for name, (shape, kind) in self.paged_fields().items()}
        return Pages(fields, batch) if fields else None

    def keep_on_host(self) -> None:
        """Let the entries of stored tokens lie in pages in host memory from now on, those that were read included."""
        self.on_host, names = True, self.in_pages(mirrored=True)
        if not (self.is_initialized and names):
            return
        dtype = next(getattr(self, name).dtype for name in self.in_pages(mirrored=False))
        self.pages = self._host_pages(len(self.seen), dtype)
        if self.columns:
            entries = {}
            for name, field in names.items():
                value = getattr(self, name)
                last = self.memory.declared[name].grows + 1  # the axis of the entries, which are second in pages
                entries[field] = value.movedim(last, 1)[:, : self.columns]
            self.pages.write(0, **entries)
            self.pages.cut(self.seen.cpu())
        for name in self.in_pages(mirrored=False):
            setattr(self, name, None)

    def prepare(self, hidden: torch.Tensor, memory: LayerMemory | None = None) -> None:
        """Make the layer ready for input `hidden` `[B, T, E]`: allocated, on its device.

        Args:
            memory: of the layer that asks, if it has a share of the heads; None: it has all.
        """
        share = None if memory is None else memory.share
        if share is not self.memory.share:
            self._take_share(memory)
        if not self.is_initialized:
            self.lazy_initialization(hidden)
            return
        if self.seen.device != hidden.device:
            self.to(hidden.device)
            self.device = hidden.device
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if any(value.is_inference() for value in self.states().values()):
            # Read under inference_mode, continued outside (generate() uses no_grad): such tensors refuse writes.
            self._map(torch.clone)

    @contextmanager
    def told_by_tensors(self, columns: int) -> Iterator[None]:
        """Within it `columns` columns are read, and no number says how much was read before: as in a fixed cache
        (`cache_fixed_bmojo`), so that what is compiled within it holds for every step."""
        if self.columns is None:
            yield
            return
        for part in self.memory.parts:
            part.make_room(self, columns)
        before, self.columns = self.columns, None
        try:
            yield
        except BaseException:
            self.columns = before
            raise
        self.columns = before + columns

    def _take_share(self, memory: LayerMemory | None) -> None:
        """Keep what belongs to the heads of the layer that asks, of a cache of all heads or an empty one.

        Raises:
            ValueError: if the states are those of other heads, or some of them lie in pages.
        """
        mine = self.memory.share
        if self.store is not None or (self.is_initialized and (mine is not None or self.pages is not None)):
            held = "all heads" if mine is None else f"the heads of device {mine.rank} of {mine.size}"
            raise ValueError(
                f"past_key_values: layer {self.index} of the cache holds {held}, and the model's others (or their "
                "entries lie in a directory or on the host, where they are not cut); save() it where it was read and "
                "load() it here, without a directory, or load the model with tp_plan=BMojoForCausalLM."
                "whole_heads_plan(config)."
            )
        self.memory = self.memory.whole if memory is None else memory
        share = self.memory.share
        for name, (axis, slices) in self.memory.cuts.items():
            if (value := getattr(self, name)) is not None:
                setattr(self, name, Cut(share, slices[share.rank])(value, axis).clone())

    def of_all_heads(self) -> "BMojoCacheLayer":
        """Return the layer of all heads, put together from those of all devices, which ask for it together."""
        share, memory = self.memory.share, self.memory.whole
        if share is None:
            return self
        new = copy.copy(self)
        new.memory, new.pages, new.on_host = memory, None, False
        for name, value in (self.states() | self.paged_states()).items():
            if name in self.memory.cuts:
                axis, slices = self.memory.cuts[name]
                value = together(share.collect(value), slices, axis)
            setattr(new, name, value)
        return new

    def pass_by(self, hidden: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Count what another stage of a pipeline reads, as `advance` does; nothing else of it is known here.

        Args:
            hidden: `[B, T, E]`. lengths: `[B]` of its columns that are real, None: all.
        """
        if self.seen is None:
            self.seen = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
            self.device, self.is_initialized, self.elsewhere = hidden.device, True, True
        self.advance(lengths, hidden.shape[1])

    def states(self) -> dict[str, torch.Tensor]:
        """Every allocated state by name."""
        return {name: value for name in self.names if (value := getattr(self, name)) is not None}

    def paged(self, state: State) -> bool:
        """Whether a state's entries lie in pages alone."""
        return self.pages is not None and state.pages is not None and not state.mirrored

    def paged_fields(self) -> dict[str, Field]:
        """Return what pages hold: by name of the field an entry, of dtype None where that is the cache's."""
        found = {}
        for state in self.memory.declared.values():
            if state.pages is not None:
                shape = tuple(size for axis, size in enumerate(state.shape) if axis != state.grows)
                kind = None if state.kind == "model" else state.dtype(torch.float32, torch.device("cpu"))
                found[state.pages] = Field(shape, kind)
        return found

    def in_pages(self, mirrored: bool) -> dict[str, str]:
        """Return the states that may lie in pages, alone or beside a tensor, and the names of their fields."""
        declared = self.memory.declared.items()
        return {name: state.pages for name, state in declared if state.pages and mirrored >= state.mirrored}

    def paged_states(self) -> dict[str, torch.Tensor]:
        """Return copies of the states that lie in pages, as a cache without a directory would hold them."""
        if self.pages is None:
            return {}
        declared = self.memory.declared
        sizes = [getattr(self, n).shape[s.grows + 1] for n, s in declared.items() if self._grows_by_token(n, s)]
        found = {}
        for name, field in self.in_pages(mirrored=False).items():
            found[name] = self._dense(field, max(sizes, default=self.columns), self.seen)
        return found

    def _dense(self, field: str, upto: int, seen: torch.Tensor) -> torch.Tensor:
        """Return `[B, G, upto, ...]` of the pages, zeros behind a row's last entry."""
        value = self.pages.dense(field, upto)
        read = torch.arange(value.shape[2]) < seen.cpu()[:, None]
        return value.masked_fill(~read[:, None, :, None], 0)

    def _grows_by_token(self, name: str, state: State) -> bool:
        return state.grows is not None and state.needs is None and getattr(self, name) is not None

    def saves(self, name: str) -> bool:
        """Whether a state goes into the cache's file."""
        return name not in self.memory.declared or self.memory.declared[name].saved

    def restore(self, states: dict[str, torch.Tensor], columns: int) -> None:
        """Take in the states that a layer of the same kind had after `columns` columns."""
        batch, device = len(states["seen"]), states["seen"].device
        model = self.memory.dtype({name: value.dtype for name, value in states.items()})
        states = states | self._mirrors(states, columns)
        unsaved = {
            name: state.new(batch, model, device)
            for name, state in self.memory.declared.items()
            if name not in states and not self.paged(state)
        }
        for name, value in (unsaved | states).items():
            stays = name in self.memory.declared and self.memory.declared[name].on_host
            setattr(self, name, value.cpu() if stays else value)
        self.columns, self.device, self.is_initialized = columns, self.seen.device, True
        self.even = bool((self.seen == columns).all())
        if self.even:
            self.pads = None

    def _mirrors(self, states: dict[str, torch.Tensor], columns: int) -> dict[str, torch.Tensor]:
        """Return the states of which pages hold a copy, entries last, with as much room as the others have."""
        if self.pages is None:
            return {}
        seen, growing = states["seen"], [(n, s) for n, s in self.memory.declared.items() if s.grows is not None]
        room = [states[n].shape[s.grows + 1] for n, s in growing if n in states and s.needs is None]
        upto = max(room, default=columns)
        fields = self.in_pages(mirrored=True).items() - self.in_pages(mirrored=False).items()
        dense = {name: self._dense(field, upto, seen) for name, field in fields}
        return {name: value.transpose(2, 3).contiguous().to(seen.device) for name, value in dense.items()}

    # --- what parts ask ---------------------------------------------------------------------------------------------

    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views `[B, S, G, D]` of keys and values."""
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def counts(self, lengths: torch.Tensor | None) -> bool:
        """Whether a number says what every row has read, so that nothing has to be computed to know it. In compiled
        code it does not, because each number would compile a step anew; nor in a CUDA graph, which would keep it.

        Args:
            lengths: `[B]` real tokens of the step, None: one in every row.
        """
        if not self.even or lengths is not None or torch.compiler.is_compiling():
            return False
        return not (self.seen.is_cuda and torch.cuda.is_current_stream_capturing())

    def advance(self, lengths: torch.Tensor | None, columns: int) -> None:
        """Count `columns` columns as read, `lengths` `[B]` of them real (None: all). Called last, once per forward."""
        self.seen += columns if lengths is None else lengths
        self.even = self.even and lengths is None
        if self.columns is not None:
            self.columns += columns

    # --- going back (`rollback_bmojo`) ------------------------------------------------------------------------------

    def kept(self) -> Kept:
        """Return a copy of the states that do not merely follow the text."""
        states = {name: value.clone() for name, value in self.states().items() if not self._follows(name)}
        return Kept(states, self.columns, self.even)

    def back_to(self, kept: Kept) -> None:
        """Make the states what they were; of those that follow the text the end is no longer read."""
        for name, value in self.states().items():
            if not self._follows(name):
                was = kept.states[name].to(value.device, copy=True) if name in kept.states else None
                setattr(self, name, self._unread(name, value) if was is None else was)
        self.columns, self.even = kept.columns, kept.even
        if self.pages is not None:
            self.pages.cut(self.seen.cpu())

    def _follows(self, name: str) -> bool:
        return name in self.memory.declared and self._grows_by_token(name, self.memory.declared[name])

    def _unread(self, name: str, value: torch.Tensor) -> torch.Tensor | None:
        """Return a state before the first token."""
        if name in self.memory.declared:
            return torch.full_like(value, self.memory.declared[name].fill)
        return torch.zeros_like(value) if name == "seen" else None

    # --- what transformers' Cache asks of a layer -------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise ValueError(
            "update(key_states, value_states): a B'MOJO layer also stores innovations, fading tokens and SSM states; "
            "pass the cache to a B'MOJO model as past_key_values and let its layers write it."
        )

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.seen is None else self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.states().values())

    @property
    def stored_nbytes(self) -> int:
        if self.pages is not None:
            size = {name: field.nbytes for name, field in self.pages.fields.items()}
            own = sum(size[name] for name in self.in_pages(mirrored=False).values())
            return self.pages.nbytes * own // sum(size.values())
        found = [value for name in self.in_pages(mirrored=False) if (value := getattr(self, name)) is not None]
        return sum(value.numel() * value.element_size() for value in found)

    def reset(self) -> None:
        """Forget everything; the next input may have another batch size, dtype or device."""
        for name in self.states():
            setattr(self, name, None)
        self.columns, self.even, self.is_initialized, self.pages = 0, True, False, None

    def _map(self, function) -> None:
        for name, value in {name: function(value) for name, value in self.states().items()}.items():
            setattr(self, name, value)

    def to(self, device: torch.device | str) -> "BMojoCacheLayer":
        for name, value in self.states().items():
            state = self.memory.declared.get(name)
            if state is None or not state.on_host:
                setattr(self, name, value.to(device))
        return self

    def offload(self) -> None:
        self.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.to(self.device)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)
        self._map(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))
        self._map(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices)
        self._map(lambda value: value[indices.to(value.device)])

    def _select(self, index: torch.Tensor) -> None:
        if self.pages is not None:
            index = index.nonzero().flatten() if index.dtype == torch.bool else index
            self.pages.select(index.cpu())

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0:
            return
        raise ValueError(
            f"tokens_to_remove={tokens_to_remove}: a layer alone has forgotten what it would have to restore; make the "
            "cache with a rollback_limit and call its crop, or go back to a copy.deepcopy of it."
        )
