"""BMojoCache: what a B'MOJO model remembers, constant in the number of tokens read (full-attention layers excepted).

A transformers `Cache` of one `BMojoCacheLayer` per layer, which can be looked at, saved to a file and loaded again.
"""

import json
import os
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache

from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import BMojoConfig, LayerSpec


FORMAT = "bmojo-cache-4"
# What else a model must have in common with the one that wrote a cache: the states mean something else otherwise.
FACTS = (
    "rope_parameters",
    "no_rope_layers",
    "qk_norm",
    "norm_position",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "num_attention_heads",
    "vocab_size",
    "intermediate_size",
    "rms_norm_eps",
    "eidetic_decay",
    "innovation",
    "tie_fading_projections",
    "ssm_type",
    "ssm_time_step_rank",
    "ssm_num_groups",
    "ssm_conv_act",
    "ssm_projected",
    "ssm_gated",
    "ssm_norm",
    "ssm_time_step_limit",
)


class RememberedToken(NamedTuple):
    """A token in the eidetic memory: its position among the real tokens of its row, and its innovation."""

    position: int
    innovation: float


class BMojoCache(Cache):
    """The memory of a B'MOJO model, constant in size. `generate()` builds and returns one as `past_key_values`.

    Args:
        config: the model's configuration; its layer types and sizes say what each layer holds. Tensors are allocated at
            the first forward, when batch size, dtype and device are known.

    Example:

    ```python
    >>> cache = BMojoCache(model.config)
    >>> model(document_ids, past_key_values=cache)                   # read
    >>> cache.save("document.safetensors")                           # keep
    >>> cache = BMojoCache.load("document.safetensors", model.config)  # resume, also elsewhere
    >>> cache.remembered(layer_idx=0)[:3]
    [RememberedToken(position=0, innovation=1.0), ...]
    ```
    """

    def __init__(self, config: BMojoConfig):
        if getattr(config, "model_type", None) != "bmojo":
            raise ValueError(f"config={type(config).__name__}: must be a BMojoConfig; pass model.config.")
        super().__init__(layers=[BMojoCacheLayer(config.layer_spec(i)) for i in range(config.num_hidden_layers)])
        self.facts = {name: getattr(config, name) for name in FACTS}
        self._config = config  # of the model that was found to fit last
        self._reading = False

    def begin(self) -> None:
        """Marks that a forward begins to write; `finish` that it is through.

        Raises:
            ValueError: if an earlier forward stopped in between, so that some layers have read more than others.
        """
        if self._reading:
            raise ValueError(
                "past_key_values: a forward that wrote this cache failed halfway, so its layers disagree; go back to "
                "a copy (copy.deepcopy before reading), or reset() it and read again."
            )
        self._reading = True

    def finish(self, last_hidden: torch.Tensor) -> None:
        """Ends what `begin` began. last_hidden: `[B, E]`, the model's output for each row's last real token."""
        last = self.layers[-1]
        if last.last_hidden is None:
            last.last_hidden = torch.empty_like(last_hidden, requires_grad=False)
        last.last_hidden.copy_(last_hidden.detach())
        self._reading = False

    @property
    def last_hidden(self) -> torch.Tensor | None:
        """The model's output for each row's last real token, `[B, E]`; None before the first forward."""
        return self.layers[-1].last_hidden

    def reset(self) -> None:
        super().reset()
        self._reading = False

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves a layer's states back to the device where they were allocated."""
        self.layers[layer_idx].prefetch()

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Moves a layer's states to the CPU; the next forward brings them back."""
        self.layers[layer_idx].offload()

    @property
    def specs(self) -> list[LayerSpec]:
        return [layer.spec for layer in self.layers]

    def check(self, config: BMojoConfig, batch: int | None = None) -> None:
        """Raises ValueError unless this cache belongs to a model of `config` and, if given, to `batch` rows."""
        if config is not self._config:
            _compare(self, BMojoCache(config))
            self._config = config
        if batch is not None and self.get_seq_length() > 0 and self.batch_size != batch:
            raise ValueError(
                f"past_key_values has batch size {self.batch_size} but the input has {batch} rows; use one cache per "
                "batch, or batch_repeat_interleave / batch_select_indices to change it."
            )

    def check_mask(self, mask: torch.Tensor) -> None:
        counts = mask.sum(dim=1)
        if bool((counts != self.seen.to(mask.device)).any()):
            raise ValueError("attention_mask: past")

    @property
    def seen(self) -> torch.Tensor | None:
        """Real tokens read per row, `[B]` int64; None before the first forward."""
        return self.layers[0].seen

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.nbytes for layer in self.layers)

    def to(self, device: torch.device | str | None) -> "BMojoCache":
        """Moves every state, in place, and returns itself. None changes nothing, as for tensors (accelerate asks)."""
        if device is None:
            return self
        for layer in self.layers:
            layer.to(device)
            layer.device = torch.device(device)
        return self

    def remembered(self, layer_idx: int, row: int = 0) -> list[RememberedToken]:
        """The tokens that a layer's eidetic memory holds for a row of the batch, by position.

        Raises:
            ValueError: if the layer or row does not exist, or the layer has no eidetic memory.
        """
        if not -len(self.layers) <= layer_idx < len(self.layers):
            raise ValueError(f"layer_idx={layer_idx}: the cache has {len(self.layers)} layers; layers count from 0.")
        layer = self.layers[layer_idx]
        if layer.spec.slots == 0:
            raise ValueError(
                f"layer_idx={layer_idx}: a {layer.spec.kind!r} layer with {layer.spec.slots} eidetic slots keeps no "
                "tokens; ask a 'bmojo' layer with eidetic_size > 0."
            )
        if not layer.is_initialized:
            return []
        if not -layer.batch_size <= row < layer.batch_size:
            raise ValueError(f"row={row}: the cache has {layer.batch_size} rows; rows count from 0.")
        positions = layer.positions[row, layer.spec.fading :].tolist()
        innovations = layer.innovations[row, layer.spec.fading :].tolist()
        beyond = int(layer.seen[row]) - layer.spec.window
        return sorted(RememberedToken(p, e) for p, e in zip(positions, innovations) if 0 <= p < beyond)

    def save(self, path: str | os.PathLike) -> None:
        """Writes every state to one safetensors file (beside it first, then renamed, so no half file is left).

        Raises:
            ValueError: if nothing has been read yet, or the folder does not exist.
        """
        folder = os.path.dirname(os.fspath(path)) or "."
        if not os.path.isdir(folder):
            raise ValueError(f"path={os.fspath(path)!r}: there is no folder {folder!r}; make it first.")
        if not self.layers[0].is_initialized:
            raise ValueError("the cache is empty: run the model with past_key_values=cache before saving it.")
        tensors = {
            f"{index}.{name}": value.detach().cpu().contiguous()
            for index, layer in enumerate(self.layers)
            for name, value in layer.states().items()
        }
        metadata = {
            "format": FORMAT,
            "columns": str(self.layers[0].columns),
            "specs": json.dumps([spec._asdict() for spec in self.specs]),
            "facts": json.dumps(self.facts),
        }
        partial = f"{os.fspath(path)}.partial-{os.getpid()}"
        try:
            with open(partial, "wb") as file:
                mode = os.fstat(file.fileno()).st_mode  # as the user's umask has it; safetensors makes a private file
            save_file(tensors, partial, metadata=metadata)
            os.chmod(partial, mode & 0o777)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.remove(partial)

    @classmethod
    def load(
        cls, path: str | os.PathLike, config: BMojoConfig, device: torch.device | str | None = None
    ) -> "BMojoCache":
        """Reads a file written by `save`.

        Args:
            path: the file. config: the configuration of the model that will continue it. device: default CPU.

        Raises:
            ValueError: if the file is missing, damaged, not a B'MOJO cache, or of a model with other layers.
        """
        if not os.path.isfile(path):
            raise ValueError(f"path={os.fspath(path)!r}: there is no such file; give one that BMojoCache.save wrote.")
        try:
            with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"path={os.fspath(path)!r}: damaged or truncated ({error}); save it again.") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"path={os.fspath(path)!r}: format {metadata.get('format')!r} is not {FORMAT!r}; give a file that "
                "BMojoCache.save wrote."
            )
        cache, written = cls(config), cls(config)
        try:
            columns, written.facts = int(metadata["columns"]), json.loads(metadata["facts"])
            written.layers = [BMojoCacheLayer(LayerSpec(**spec)) for spec in json.loads(metadata["specs"])]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"path={os.fspath(path)!r}: its description is damaged ({error}); save it again."
            ) from error
        _compare(written, cache)
        for index, layer in enumerate(cache.layers):
            prefix = f"{index}."
            states = {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
            try:
                layer.restore(states, columns)
            except ValueError as error:
                raise ValueError(f"path={os.fspath(path)!r}, layer {index}: {error}; save it again.") from error
        return cache

    def __repr__(self) -> str:
        return f"BMojoCache(layers={len(self.layers)}, columns={self.get_seq_length()}, nbytes={self.nbytes})"


def _compare(found: BMojoCache, wanted: BMojoCache) -> None:
    """Raises ValueError unless both caches belong to models of the same sizes and the same computation."""
    remedy = "a cache belongs to one model: build BMojoCache(model.config)."
    if len(found.specs) != len(wanted.specs):
        raise ValueError(f"the cache has {len(found.specs)} layers but the model has {len(wanted.specs)}; {remedy}")
    pairs = [(f"layer {i}: ", a._asdict(), b._asdict()) for i, (a, b) in enumerate(zip(found.specs, wanted.specs))]
    for where, ours, theirs in [*pairs, ("", found.facts, wanted.facts)]:
        for name, value in theirs.items():
            if ours.get(name) != value:
                raise ValueError(
                    f"{where}the cache has {name}={ours.get(name)!r} but the model has {value!r}; {remedy}"
                )


__all__ = ["BMojoCache", "RememberedToken"]
