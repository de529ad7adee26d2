"""Settings of conversion.align and conversion.finetune: one YAML file with sections, checked before any work.

    source, output, train, dtype, seed, keep, max_shard_size, memory     what is trained, from what, to where
    data:      what is read (`DataSettings`)          losses:   what the alignment minimises (`LossSettings`)
    lora:      an adapter instead of the weights      trainer:  fields of transformers' TrainingArguments, as they are

`--set key=value` replaces a value, with a dot for one inside a section: `--set trainer.max_steps=20`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..common.settings import DTYPES, check_choice, make_settings, read_settings
from ..data.settings import DataSettings, check_data
from ..grafting.families import MEMORY_FIELDS


FOUR_BIT = ("nf4", "fp4")
Kind = TypeVar("Kind", bound="TrainingSettings")


@dataclass(frozen=True)
class LossSettings:
    """Weights of the alignment's losses (docs/training.md has the formulas), each 0 or more, at least one above 0.

    hidden: final hidden states. mixer: outputs of the B'MOJO layers' mixers. kl: next-token distributions. ce: next
    tokens.
    mixer_inputs: "teacher" runs each mixer on the teacher's layer input, "student" compares two whole passes.
    temperature: of both distributions in kl. logit_chunk: tokens whose logits exist at a time.
    """

    hidden: float = 0.0
    mixer: float = 0.0
    kl: float = 0.0
    ce: float = 0.0
    mixer_inputs: str = "teacher"
    temperature: float = 1.0
    logit_chunk: int = 256

    def weights(self) -> dict[str, float]:
        """Return the losses that count, with their weights."""
        found = {name: getattr(self, name) for name in ("hidden", "mixer", "kl", "ce")}
        return {name: weight for name, weight in found.items() if weight > 0}


@dataclass(frozen=True)
class LoraSettings:
    """An adapter by `bmojo_lora_config` (docs/peft.md), whose `recipe` and `ssm_scalars` these are.

    Others are fields of `peft.LoraConfig`; `alpha`, `dropout` are its `lora_alpha` (None: 2 r), `lora_dropout`.
    target_modules: None leaves them to the recipe. merge: also write the merged model, in `merged/`.
    quantize: "nf4" or "fp4" loads the frozen base in 4 bits (QLoRA; needs bitsandbytes and a CUDA GPU); None: as it is.
    """

    recipe: str = "lora"
    ssm_scalars: bool = False

    r: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    use_rslora: bool = False
    merge: bool = False
    quantize: str | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """What both programs share.

    source: folder or hub id of a B'MOJO checkpoint. output: folder to write.
    train: "new" (the tensors that the graft initialised), "all", or patterns of tensor names such as
    "model.layers.*.self_attn.?_proj.weight"; a list may hold "new" too.
    dtype: of the weights that do not train; None keeps the checkpoint's.
    seed: of everything random. keep: "last" or "best" checkpoint (by held-out loss) becomes the output.
    memory: fields of `BMojoConfig` to change for training and in the result, as long as they change no tensor.
    trainer: fields of TrainingArguments.
    """

    source: str
    output: str
    data: DataSettings = field(metadata={"example": "data: {files: texts/*.txt} or data: {builtin: pydoc}"})
    train: str | list[str] = "new"
    dtype: str | None = None
    seed: int = 0
    keep: str = "last"
    max_shard_size: str = "5GB"
    memory: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, `output` left out."""
        values = asdict(self)
        del values["output"]
        return values


@dataclass(frozen=True)
class AlignSettings(TrainingSettings):
    """Settings of conversion.align.

    teacher: None is the source Transformer itself, rebuilt on the student's own tensors; else a folder, hub id or
    `pypi:NAME` with the same vocabulary. loss_from: first position of a document that counts; None: the window size,
    because a graft is exact before it (with a `fading_delay` the first position that sees a fading token).
    """

    program: ClassVar[str] = "align"
    teacher: str | None = None
    losses: LossSettings = field(default_factory=lambda: LossSettings(kl=1.0))
    loss_from: int | None = None


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Settings of conversion.finetune. lora: train an adapter; `train` is then left out."""

    program: ClassVar[str] = "finetune"
    train: str | list[str] = "all"
    lora: LoraSettings | None = None


SECTIONS = ("data", "losses", "lora", "trainer", "memory")


def load_training_settings(kind: type[Kind], path: str | Path, overrides: Mapping[str, Any]) -> Kind:
    """Read the settings of a YAML file with `overrides` (dots reach into sections) on top, checked.

    Raises:
        ValueError: unknown keys (with the known ones), wrong types, missing values or contradictions.
    """
    return build_training_settings(kind, read_settings(path, overrides, SECTIONS))


def build_training_settings(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """Make settings from plain data; see `load_training_settings`."""
    settings = make_settings(kind, values)
    check_settings(settings)
    return settings


def check_settings(settings: TrainingSettings) -> None:
    """Refuse contradictions that can be seen without reading anything (ValueError)."""
    check_choice("dtype", settings.dtype, (None, *DTYPES))
    check_choice("keep", settings.keep, ("last", "best"))
    _check_patterns(settings.train)
    for name in settings.memory:
        if name not in MEMORY_FIELDS:
            raise ValueError(f"memory.{name}: not a field that training may change; known: {', '.join(MEMORY_FIELDS)}.")
    check_data(settings.data)
    if isinstance(settings, AlignSettings):
        check_losses(settings.losses)
        if settings.loss_from is not None and settings.loss_from < 0:
            raise ValueError(f"loss_from={settings.loss_from!r}: must be a number of tokens >= 0, or null.")
    if isinstance(settings, FinetuneSettings) and settings.lora is not None:
        check_lora(settings.lora)
        if settings.train != "all":
            raise ValueError(f"train={settings.train!r}: with a lora section the adapter trains; remove `train`.")
        if settings.memory and not settings.lora.merge:
            raise ValueError(
                f"memory={settings.memory!r}: an adapter is loaded onto its source, whose config would not have these "
                "values; set lora.merge: true, whose result has them, or remove `memory`."
            )


def _check_patterns(train: Any) -> None:
    if train not in ("new", "all") and (isinstance(train, str) or not train):
        raise ValueError(f"train={train!r}: must be 'new', 'all', or a list of patterns of tensor names.")


def check_losses(losses: LossSettings) -> None:
    """Refuse weights and options that no alignment can honour (ValueError)."""
    for name in ("hidden", "mixer", "kl", "ce"):
        if not 0 <= getattr(losses, name) < float("inf"):
            raise ValueError(f"losses.{name}={getattr(losses, name)!r}: must be a finite weight >= 0.")
    if not losses.weights():
        raise ValueError("losses: all weights are 0; give at least one of hidden, mixer, kl, ce a weight above 0.")
    check_choice("losses.mixer_inputs", losses.mixer_inputs, ("teacher", "student"))
    if not 0 < losses.temperature < float("inf"):
        raise ValueError(f"losses.temperature={losses.temperature!r}: must be a finite number above 0.")
    if losses.logit_chunk < 1:
        raise ValueError(f"losses.logit_chunk={losses.logit_chunk!r}: must be a number of tokens >= 1.")


def check_lora(lora: LoraSettings) -> None:
    """Refuse adapters that peft would refuse later, or build without effect (ValueError)."""
    if lora.r < 1:
        raise ValueError(f"lora.r={lora.r!r}: must be a rank >= 1; e.g. 16.")
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout={lora.dropout!r}: must lie in [0, 1).")
    check_choice("lora.quantize", lora.quantize, (None, *FOUR_BIT))
    if lora.quantize is not None and lora.merge:
        raise ValueError(
            f"lora.merge=True: with lora.quantize={lora.quantize!r} the merged model would keep the rounding of a "
            "4-bit base; remove lora.merge, load the base in full width, put the adapter on it and merge there."
        )
