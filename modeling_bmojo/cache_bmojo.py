"""BMojoCache: what a B'MOJO model remembers, constant in the number of tokens read (full-attention layers excepted).

A transformers `Cache` of one `BMojoCacheLayer` per layer, which can be looked at, saved to a file and loaded again.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .cache_facts_bmojo import check_now, facts_of
from .cache_file_bmojo import Contents, read_cache, write_cache
from .cache_fixed_bmojo import fix, unfix
from .cache_gather_bmojo import items_of, joined
from .cache_layer_bmojo import BMojoCacheLayer
from .cache_pads_bmojo import check_past_mask, pads_in
from .compat_bmojo import CACHE_NAME
from .configuration_bmojo import BMojoConfig
from .eidetic_bmojo import EideticMemory
from .fields_bmojo import is_int
from .parts_bmojo import LayerSpec
from .rollback_bmojo import DRAFTED, Rollback
from .store_bmojo import Directory
from .weights_bmojo import weights_fingerprint


LAYOUT = "parts"  # of a pickled cache: how its states lie in its layers


class RememberedToken(NamedTuple):
    """A token in the eidetic memory: its position among the real tokens of its row, and its innovation."""

    position: int
    innovation: float


class BMojoCache(Cache):
    """The memory of a B'MOJO model, constant in size. `generate()` builds and returns one (`cache_of(outputs)`).

    Args:
        config: the model's configuration, as it is now; its layer types and sizes say what each layer holds. Tensors
            are allocated at the first forward, when batch size, dtype and device are known. Or the items of several
            caches, joined along the rows, as `nn.DataParallel` gathers them.
        storage: a directory for the keys and values of a storage (`storage_size` > 0), new or as `sync` left it: then
            the cache goes on where that was. None: they are in memory, like everything else.
        check_weights: whether a directory that other weights wrote, or this model with another adapter, is refused.
        storage_on_host: without a directory, whether keys and values of stored tokens stay in host memory wherever the
            model is; copies and beams then share what they have in common.
        rollback_limit: how many columns `crop` can take back, None: none; what has once been further back than that is
            settled. It costs up to four copies of the states of constant size.

    Raises:
        ValueError: no configuration of this kind, nothing to store, or a directory that is refused: not a storage, of
            another model, damaged, or in use. OSError: if it cannot be read or written.

    Example:

    ```python
    >>> cache = BMojoCache(model.config)
    >>> model(document_ids, cache=cache)                             # read
    >>> cache.save("document.safetensors")                           # keep
    >>> cache = BMojoCache.load("document.safetensors", model.config)  # resume, also elsewhere
    >>> cache.remembered(layer_idx=0)[:3]
    [RememberedToken(position=0, innovation=1.0), ...]
    ```
    """

    # Of the class, so that a cache that an earlier version pickled has them too.
    directory: Directory | None = None
    check_weights, _claimed = True, False
    rollback: Rollback | None = None
    counter: torch.Tensor | None = None  # the columns read: see `cache_tree_bmojo`, `cache_fixed_bmojo`
    one_for_all = False  # its one row was read for every row that generate() makes of a prompt

    def __init__(
        self,
        config: BMojoConfig | Iterable[tuple],
        storage: str | os.PathLike | None = None,
        check_weights: bool = True,
        storage_on_host: bool = False,
        rollback_limit: int | None = None,
    ):
        if rollback_limit is not None:
            self.rollback = Rollback(rollback_limit)
        self._layout = LAYOUT
        self.check_weights = check_weights
        if isinstance(config, Iterator | list | tuple):
            self.facts, layers = joined(config)
            super().__init__(layers=layers)
            return
        if getattr(config, "model_type", None) != "bmojo":
            raise ValueError(f"config={type(config).__name__}: must be a BMojoConfig; pass model.config.")
        super().__init__(layers=[BMojoCacheLayer(config, i) for i in range(config.num_hidden_layers)])
        self.facts = facts_of(config)
        if storage_on_host:
            self._keep_on_host(storage, config)
        if storage is not None:
            self._open(storage, config)

    def _keep_on_host(self, storage, config: BMojoConfig) -> None:
        if storage is not None:
            raise ValueError(
                f"storage_on_host=True, storage={os.fspath(storage)!r}: stored tokens lie in one place; give a "
                "directory, or storage_on_host=True without one."
            )
        if not any(layer.paged_fields() for layer in self.layers):
            raise ValueError(
                f"storage_on_host=True: nothing to store, because storage_size={config.storage_size}; set "
                "storage_size > 0 (from_pretrained(..., storage_size=64)), or leave storage_on_host=False."
            )
        for layer in self.layers:
            layer.keep_on_host()

    def _open(self, path: str | os.PathLike, config: BMojoConfig) -> None:
        """Let the storage lie in a directory, and go on where that one was synced."""
        fields = [layer.paged_fields() for layer in self.layers]
        if not any(fields):
            raise ValueError(
                f"storage={os.fspath(path)!r}: nothing to store, because storage_size={config.storage_size}; set "
                "storage_size > 0 (from_pretrained(..., storage_size=64)), or leave storage=None."
            )
        self.directory = Directory.open(path, fields, facts=config.model_type)
        try:
            if self.directory.states is not None:
                contents = self._synced(config)
            for layer in self.layers:
                layer.store = self.directory
            if self.directory.states is not None:
                for layer, pages, states in zip(self.layers, self.directory.layers, contents.layers):
                    layer.pages = pages
                    layer.restore(states, contents.columns)
        except BaseException:
            self.directory.close()
            raise

    def _synced(self, config: BMojoConfig) -> Contents:
        """Return the states of the directory's last sync."""
        try:
            return read_cache(self.directory.states, config, self.layers, self._elsewhere())
        except ValueError as error:
            text = str(error).rpartition("; give a file")[0] or str(error)
            raise ValueError(
                f"storage={self.directory.path!r}: {text}; give the directory that this model wrote, or a new one."
            ) from error

    def _elsewhere(self) -> frozenset[str]:
        """Return the states that lie in the directory."""
        return frozenset(name for layer in self.layers for name in layer.in_pages(mirrored=True))

    # --- what a forward asks ----------------------------------------------------------------------------------------

    def begin(self, mask: torch.Tensor | None) -> None:
        """Mark that a forward begins to write; `finish` that it is through.

        Args:
            mask: `[B, T]` bool, which of the new columns are real tokens; None: all.

        Raises:
            ValueError: if an earlier forward stopped in between, so that some layers have read more than others.
        """
        self._require_finished()
        first = self.layers[0]
        first.unfinished = True
        if mask is not None and (first.pads is not None or first.even):
            new = pads_in(mask, self.counter if self.fixed else first.columns)
            first.pads = new if first.pads is None else first.pads + new.to(first.pads.device)

    def pass_by(self, here: list[int], hidden: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Let the layers that another stage of a pipeline has count what is read.

        Args:
            here: the others. hidden: `[B, T, E]`. lengths: `[B]` of its columns that are real, None: all.
        """
        if len(here) < len(self.layers):
            for index in set(range(len(self.layers))).difference(here):
                self.layers[index].pass_by(hidden, lengths)

    def finish(self, last_hidden: torch.Tensor, columns: int) -> None:
        """End what `begin` began.

        Args:
            last_hidden: `[B, E]`, the model's output for each row's last real token. columns: read now, pads included.
        """
        if self.fixed:
            self.counter += columns
        last = self.layers[-1]
        if last.last_hidden is None:
            last.last_hidden = torch.empty_like(last_hidden, requires_grad=False)
        last.last_hidden.copy_(last_hidden.detach())
        self.layers[0].unfinished = False

    def check(self, config: BMojoConfig, batch: int | None = None) -> None:
        """Raise ValueError unless this cache belongs to a model of `config` and, if given, to `batch` rows, and its
        layers agree."""
        self._require_finished()
        check_now(self.facts, config)
        if batch is not None and self.layers[0].is_initialized and self.batch_size != batch:
            raise ValueError(
                f"{CACHE_NAME} has batch size {self.batch_size} but the input has {batch} rows; use one cache per "
                "batch, or batch_repeat_interleave / batch_select_indices to change it."
            )

    def claim(self, model: torch.nn.Module) -> None:
        """Raise ValueError if what the cache's directory holds was written by other weights than `model`'s. Looks once
        per cache, at the first forward."""
        if self.directory is not None and not self._claimed:
            self.directory.claim(weights_fingerprint(model), self.check_weights)
            self._claimed = True

    def check_mask(self, mask: torch.Tensor) -> None:
        """Check what a mask says about the columns that were read before.

        On a GPU it waits for the device, as every look at values does. Compiled code cannot raise: there it does
        nothing. After a file of format 4 that was read with pads only the number of tokens is compared.

        Args:
            mask: `[B, P]` for the P columns that the cache has read, nonzero = real token.

        Raises:
            ValueError: unless it is the mask that they were read with.
        """
        columns, first = self.get_seq_length(), self.layers[0]
        if columns == 0 or torch.compiler.is_compiling():
            return
        waiting = None if self.rollback is None else self.rollback.waits()
        if waiting is None:
            check_past_mask(mask, columns, first.seen, first.pads, known=first.even)
            return
        real = waiting.real().to(first.seen.device)
        pads = torch.zeros_like(first.seen) if first.pads is None and first.even else first.pads
        if pads is not None:
            pads = pads + pads_in(real, first.columns)
        check_past_mask(mask, columns, first.seen + real.sum(dim=1), pads, known=first.even)

    def _require_finished(self) -> None:
        if self.layers[0].unfinished:
            raise ValueError(
                f"{CACHE_NAME}: a forward that wrote this cache, or an operation on it, stopped halfway, so its "
                "layers disagree; go back to a copy (copy.deepcopy before reading), or reset() it and read again."
            )

    def _require_all_layers(self) -> None:
        absent = [index for index, layer in enumerate(self.layers) if layer.elsewhere]
        if absent:
            raise ValueError(
                f"{CACHE_NAME}: other stages of the pipeline have the states of layers {absent}; save a cache that one "
                "process has read, or load the model with tp_size or device_map in place of pp_size."
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what changes layer after layer: an interruption in between is remembered."""
        first = self.layers[0]
        before, first.unfinished = first.unfinished, True
        yield
        first.unfinished = before

    # --- taking back ------------------------------------------------------------------------------------------------

    def allow_rollback(self, limit: int = DRAFTED) -> None:
        """Let `crop` take back up to `limit` columns of those that are read from now on, or are held already.

        Raises:
            ValueError: unless limit is an integer of 1 or more.
        """
        if self.fixed:
            raise ValueError("rollback_limit: a fixed cache cannot take back tokens; unfix() it first.")
        found = Rollback(limit)
        if self.rollback is None:
            self.rollback = found
        self.rollback.limit = limit

    def crop(self, tokens_to_remove: int) -> None:
        """Take back columns, pads included, exactly: what is read next is read as if they had not been.

        Args:
            tokens_to_remove: minus their number, as transformers has it; 0 takes back nothing. A positive number is
                how many are to be left, as until transformers 5.22.

        Raises:
            ValueError: for a cache without `rollback_limit`, more than that or than was read since, or a cache whose
                last forward stopped halfway.
        """
        columns = self.get_seq_length()
        if not is_int(tokens_to_remove):
            raise ValueError(f"tokens_to_remove={tokens_to_remove!r}: must be an integer, minus what is taken back.")
        count = -tokens_to_remove if tokens_to_remove <= 0 else columns - tokens_to_remove
        if count <= 0:
            return
        if self.rollback is None:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: this cache has forgotten what it would have to restore; make it "
                "with BMojoCache(config, rollback_limit=n), or go back to a copy.deepcopy of it."
            )
        self._require_finished()
        self.rollback.check(count)
        with self._writing():
            self.rollback.back(self.layers, count)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` takes anything back."""
        return self.rollback is not None

    def activate_past_recording(self) -> None:
        """Allow rollback: transformers calls this before it drafts tokens that it may take back."""
        if self.rollback is None:
            self.allow_rollback()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns were read and not taken back. Of a fixed cache it looks into a tensor."""
        if self.fixed:
            return int(self.counter)
        waiting = 0 if self.rollback is None else self.rollback.waiting
        return super().get_seq_length(layer_idx) + waiting

    def known_length(self) -> int | None:
        """Return `get_seq_length()` where a number says it, None for a fixed cache."""
        return None if self.fixed else self.get_seq_length()

    # --- fixed shapes -----------------------------------------------------------------------------------------------

    @property
    def fixed(self) -> bool:
        """Whether every state has the shape that it keeps, and tensors alone say how much was read."""
        return self.layers[0].columns is None

    def fix(self, model: torch.nn.Module, batch_size: int | None = None, room: int | None = None) -> "BMojoCache":
        """Bring the cache into the form in which one program of fixed shapes reads every token, the first one too:
        for torch.export, ONNX, and devices that compile a step anew for each number. Returns itself.

        Attention masks are then of the new columns alone, and `attentions` are not returned.

        Args:
            model: which will read on. Its dtype and device are those of a cache that has read nothing.
            batch_size: rows, of a cache that has read nothing (default: 1); any other has its own.
            room: tokens of a row that a layer with full attention has room for. Other layers need none, and read on
                for ever.

        Raises:
            ValueError: for a cache of another model, with a storage or with `rollback_limit`, another batch size than
                it has, RoPE types that depend on the length, or a room that is missing or too small.
        """
        fix(self, model, batch_size, room)
        return self

    def unfix(self) -> "BMojoCache":
        """Undo `fix`: numbers say again how much was read, and buffers may grow. Returns itself."""
        unfix(self)
        return self

    def settle(self) -> None:
        """Read again what waits for the next forward after a `crop`, so that the states are those of the last column.

        Raises:
            ValueError: if the model that read it is gone.
        """
        if self.rollback is None or not self.rollback.waiting:
            return
        reader = self.rollback.reader()
        if reader is None:
            raise ValueError(
                f"{CACHE_NAME}: {self.rollback.waiting} columns wait to be read again after crop, and the model that "
                "read them is gone; let a model read the next tokens first."
            )
        reader.read_waiting(self)

    # --- what it holds ----------------------------------------------------------------------------------------------

    @property
    def last_hidden(self) -> torch.Tensor | None:
        """The model's output for each row's last real token, `[B, E]`; None before the first forward."""
        self.settle()
        return self.layers[-1].last_hidden

    @property
    def specs(self) -> list[LayerSpec]:
        return [layer.spec for layer in self.layers]

    @property
    def seen(self) -> torch.Tensor | None:
        """Real tokens read per row, `[B]` int64; None before the first forward."""
        self.settle()
        return self.layers[0].seen

    @property
    def nbytes(self) -> int:
        """Return bytes of all states in memory; what lies in a directory is counted by `storage_nbytes` alone."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self.rollback is None else self.rollback.nbytes)

    @property
    def storage_nbytes(self) -> int:
        """Return bytes of the keys and values of stored tokens, in memory or in the cache's directory."""
        return sum(layer.stored_nbytes for layer in self.layers)

    def remembered(self, layer_idx: int, row: int = 0) -> list[RememberedToken]:
        """Return the tokens that a layer's eidetic memory holds for a row of the batch, by position.

        Raises:
            ValueError: if the layer or row does not exist, or the layer has no eidetic memory, or is another stage's.
        """
        if not -len(self.layers) <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx={layer_idx}: the cache has {len(self.layers)} layers; layers count from 0.")
        self.settle()
        layer = self.layers[layer_idx]
        if not layer.spec.slots:
            raise ValueError(
                f"layer_idx={layer_idx}: layer type {layer.spec.kind!r} with {layer.spec.slots} eidetic slots keeps no "
                "tokens; ask a 'bmojo' layer with eidetic_size > 0."
            )
        if not layer.is_initialized:
            return []
        if layer.elsewhere:
            raise ValueError(
                f"layer_idx={layer_idx}: another stage of the pipeline has the layer and what it keeps; ask there."
            )
        if not -layer.batch_size <= row < layer.batch_size:
            raise ValueError(f"row={row}: the cache has {layer.batch_size} rows; rows count from 0.")
        own = layer.memory.part(EideticMemory).own
        positions, innovations = layer.positions[row, own].tolist(), layer.innovations[row, own].tolist()
        beyond = int(layer.seen[row]) - layer.spec.window
        return sorted(RememberedToken(p, e) for p, e in zip(positions, innovations) if 0 <= p < beyond)

    def __repr__(self) -> str:
        return f"BMojoCache(layers={len(self.layers)}, columns={self.get_seq_length()}, nbytes={self.nbytes})"

    # --- what transformers asks of a cache --------------------------------------------------------------------------

    def reset(self) -> None:
        self.layers[0].unfinished = True
        super().reset()
        if self.rollback is not None:
            self.rollback.reset()
        self.counter = None
        self.layers[0].unfinished = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        with self._writing():
            super().reorder_cache(beam_idx)
            self._map_rollback(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        with self._writing():
            super().batch_repeat_interleave(repeats)
            self._map_rollback(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        with self._writing():
            super().batch_select_indices(indices)
            self._map_rollback(lambda value: value[indices.to(value.device)])

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Move a layer's states back to the device where they were allocated."""
        with self._writing():
            self.layers[layer_idx].prefetch()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Move a layer's states to the CPU; the next forward brings them back."""
        with self._writing():
            self.layers[layer_idx].offload()

    def to(self, device: torch.device | str | None) -> "BMojoCache":
        """Move every state, in place, and return itself. None changes nothing, as for tensors (accelerate asks)."""
        if device is None:
            return self
        with self._writing():
            for layer in self.layers:
                layer.to(device)
                layer.device = torch.device(device)
            self.counter = None if self.counter is None else self.counter.to(device)
            self._map_rollback(lambda value: value.to(device))
        return self

    def _map_rollback(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.rollback is not None:
            self.rollback.map(function)

    # --- its ways out and in ----------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write every state to one safetensors file with a checksum (beside it first, then renamed).

        Where devices have a share of the heads each, all of them must call it; each writes the states of all heads.

        Raises:
            ValueError: if nothing has been read yet, a forward stopped halfway, the states cannot be those of a cache
                (NaN, say), other stages of a pipeline have some of them, or the folder does not exist.
            OSError: if the file cannot be written, for want of space say; what stood there before is unchanged.
        """
        if not self.layers[0].is_initialized:
            raise ValueError("the cache is empty: run the model with cache=cache before saving it.")
        self._require_finished()
        self._require_all_layers()
        self.settle()
        columns = self.get_seq_length()

        def still() -> None:
            if self.layers[0].unfinished or self.get_seq_length() != columns:
                raise ValueError(f"path={os.fspath(path)!r}: the cache was written to while it was saved; save a copy.")

        whole = [layer.of_all_heads() for layer in self.layers]
        layers = [_on_host(layer, layer.states() | layer.paged_states()) for layer in whole]
        write_cache(path, Contents(columns, layers), self.facts, whole, still)

    def sync(self) -> None:
        """Make durable in the cache's directory all that was read so far: `BMojoCache(config, storage=...)` goes on
        from here, in another process too, whatever happens to this one.

        Raises:
            ValueError: if the cache has no directory or is empty, a forward stopped halfway, or the states cannot be
                those of a cache. OSError: if the disk does not take it; the last sync counts then.
        """
        if self.directory is None:
            raise ValueError("storage=None: the cache has no directory to sync; save(path) writes it to a file.")
        if not self.layers[0].is_initialized:
            raise ValueError("the cache is empty: run the model with cache=cache before syncing it.")
        self._require_finished()
        self._require_all_layers()
        self.settle()
        elsewhere = self._elsewhere()
        own = [{n: value for n, value in layer.states().items() if n not in elsewhere} for layer in self.layers]
        contents = Contents(self.get_seq_length(), [_on_host(*each) for each in zip(self.layers, own)])

        def write(path: str) -> None:
            write_cache(path, contents, self.facts, self.layers, lambda: None, elsewhere)

        self.directory.sync(write)

    def close(self) -> None:
        """Let go of the directory, so that others may open it; what was not synced is lost. Without one: nothing."""
        if self.directory is not None:
            self.directory.close()

    def __deepcopy__(self, memo: dict) -> "BMojoCache":
        """Return a copy, which shares what lies in pages; what a copy of a directory reads itself is in memory."""
        if self.directory is not None:
            memo[id(self.directory)] = None
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        config: BMojoConfig,
        device: torch.device | str | None = None,
        storage_on_host: bool = False,
    ) -> "BMojoCache":
        """Read a file written by `save`, or by one of an earlier version (formats 4 and 5).

        Args:
            path: the file. config: the configuration of the model that will continue it. device: default CPU.
            storage_on_host: as for a new cache.

        Raises:
            ValueError: if the file is missing, damaged, not a B'MOJO cache, holds what no text can leave, or is of a
                model whose results differ.
        """
        cache = cls(config)
        contents = read_cache(path, config, cache.layers)
        for layer, states in zip(cache.layers, contents.layers):
            layer.restore(states, contents.columns)
        if storage_on_host:
            cache._keep_on_host(None, config)
        return cache.to(device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state.get("_layout") != LAYOUT:
            raise ValueError(
                "this BMojoCache was pickled by a version whose states lie otherwise; save() it there and load() it."
            )
        self.__dict__.update(state)

    def __iter__(self) -> Iterator[tuple]:
        """One tuple per layer, `(keys, values, other states)`; `BMojoCache(items)` makes a cache of them, also of
        several caches' items joined along the rows (`cache_gather_bmojo`).

        Raises:
            ValueError: if a forward stopped halfway.
        """
        self.require_plain("joined")
        if self.fixed:
            raise ValueError("a fixed cache cannot be joined: its items have no number of columns; unfix() it first.")
        return items_of(self.facts, self.layers)

    def require_plain(self, wanted: str) -> None:
        """Raise ValueError, saying what was `wanted`, unless the states are all there is, and those of the last
        column."""
        self._require_finished()
        self.settle()
        if self.directory is not None:
            raise ValueError(f"storage={self.directory.path!r}: caches with a directory cannot be {wanted}; use one.")
        if any(layer.on_host for layer in self.layers):
            raise ValueError(f"storage_on_host=True: such caches cannot be {wanted}; use storage_on_host=False.")

    @classmethod
    def of_layers(
        cls, facts: dict[str, Any], layers: list[BMojoCacheLayer], counter: torch.Tensor | None = None
    ) -> "BMojoCache":
        """Return a cache that holds these layers; counter: as `cache_tree_bmojo` made it."""
        new = cls.__new__(cls)
        Cache.__init__(new, layers=layers)
        new.facts, new._layout, new.counter = facts, LAYOUT, counter
        return new


def _on_host(layer: BMojoCacheLayer, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the states that go into a file, on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in states.items() if layer.saves(name)}


class _OtherCaches:
    """transformers' caches know layers by their type: for "bmojo" they find this, and say what to build instead."""

    _layer_type = "bmojo"

    def __init__(self, *args, **kwargs):
        raise ValueError(
            "config of a B'MOJO model: DynamicCache, StaticCache and their kin keep keys and values alone, not SSM "
            "states and the eidetic memory; build BMojoCache(model.config), or pass nothing to have one built."
        )


class _NoDynamicLayer(_OtherCaches, DynamicLayer):
    pass


class _NoStaticLayer(_OtherCaches, StaticLayer):
    pass


__all__ = ["BMojoCache", "RememberedToken"]
