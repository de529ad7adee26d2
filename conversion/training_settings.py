"""Settings of conversion.align and conversion.finetune: one YAML file with sections, checked before any work.

    source, output, train, dtype, seed, keep, max_shard_size, memory     what is trained, from what, to where
    data:      what is read (`DataSettings`)          losses:   what the alignment minimises (`LossSettings`)
    lora:      an adapter instead of the weights      trainer:  fields of transformers' TrainingArguments, as they are

`--set key=value` replaces a value, with a dot for one inside a section: `--set trainer.max_steps=20`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from .families import MEMORY_FIELDS
from .settings import DTYPES, read_yaml, unknown_key


PACKINGS = ("documents", "concatenate", "none")
BUILTIN = ("pydoc",)
FOUR_BIT = ("nf4", "fp4")
Section = TypeVar("Section")


@dataclass(frozen=True)
class DataSettings:
    """What is read, and how it becomes sequences. Exactly one of `files`, `hub` and `builtin` is given.

    files: globs of .txt, .md, .jsonl, .json, .parquet and .csv; a text file is one document. hub: a data set's id, with
    `config` and `split`; `streaming` reads it as it comes and needs `trainer.max_steps`. builtin: "pydoc", English text
    that every CPython carries.
    text_column: the column of plain text. messages: a column of chats. prompt, completion: a pair of columns. Chats and
    pairs replace the text column.
    sequence_length: T, tokens per row. packing: "documents" fills rows with whole documents that do not see each other;
    "concatenate" cuts one stream of all documents; "none" makes every document a row, cut at T.
    loss_on: "completion" trains on the answers of chats and pairs only, "all" on everything.
    append_eos: end documents with the end-of-sequence token.
    held_out: share of the documents kept for evaluation (streaming: number of first documents). The built-in text has a
    split of its own. eval_files: globs to evaluate on instead. eval_sequences: rows to evaluate on, at most.
    shuffle_buffer: rows to shuffle among while streaming.
    """

    files: str | list[str] | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    builtin: str | None = None
    text_column: str = "text"
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    sequence_length: int = 1024
    packing: str = "documents"
    loss_on: str = "completion"
    append_eos: bool = True
    held_out: float = 0.05
    eval_files: str | list[str] | None = None
    eval_sequences: int = 16
    shuffle_buffer: int = 1000


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
        """The losses that count, with their weights."""
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
    data: DataSettings
    train: str | list[str] = "new"
    dtype: str | None = None
    seed: int = 0
    keep: str = "last"
    max_shard_size: str = "5GB"
    memory: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain data, `output` left out."""
        values = asdict(self)
        del values["output"]
        return values


@dataclass(frozen=True)
class AlignSettings(TrainingSettings):
    """Settings of conversion.align.

    teacher: None is the source Transformer itself, rebuilt on the student's own tensors; else a folder, hub id or
    `pypi:NAME` with the same vocabulary. loss_from: first position of a document that counts; None: the window size,
    because a graft is exact before it.
    """

    teacher: str | None = None
    losses: LossSettings = field(default_factory=lambda: LossSettings(kl=1.0))
    loss_from: int | None = None


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Settings of conversion.finetune. lora: train an adapter; `train` is then left out."""

    train: str | list[str] = "all"
    lora: LoraSettings | None = None


SECTIONS = {"data": DataSettings, "losses": LossSettings, "lora": LoraSettings}


def load_training_settings(kind: type[Section], path: str | Path, overrides: Mapping[str, Any]) -> Section:
    """Settings of a YAML file with `overrides` (dots reach into sections) on top, checked.

    Raises:
        ValueError: unknown keys (with the known ones), wrong types, missing values or contradictions.
    """
    values = read_yaml(path)
    for key, value in overrides.items():
        place, *inside = key.split(".")
        if not inside:
            values[place] = value
            continue
        if len(inside) > 1 or place not in (*SECTIONS, "trainer", "memory"):
            raise ValueError(f"--set {key}: only {', '.join((*SECTIONS, 'trainer', 'memory'))} have values inside.")
        values[place] = {**_mapping(values.get(place) or {}, place), inside[0]: value}
    return build_training_settings(kind, values)


def build_training_settings(kind: type[Section], values: Mapping[str, Any]) -> Section:
    """Settings from plain data; see `load_training_settings`."""
    known = [item.name for item in fields(kind)]
    _refuse_unknown(values, known, "")
    for key in ("source", "output"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise ValueError(f"{key}={values.get(key)!r}: must be given, in the YAML file or as --{key}.")
    given = dict(values)
    for name, section in SECTIONS.items():
        if name in known and given.get(name) is not None:
            inside = _mapping(given[name], name)
            _refuse_unknown(inside, [item.name for item in fields(section)], f"{name}.")
            given[name] = section(**{key: _typed(section, key, value, name) for key, value in inside.items()})
    if given.get("losses", "") is None:
        del given["losses"]
    if given.get("data") is None:
        raise ValueError("data: must be given; e.g. data: {files: texts/*.txt} or data: {builtin: pydoc}.")
    for name in ("memory", "trainer"):
        given[name] = dict(_mapping(given.get(name) or {}, name))
    settings = kind(**{key: _typed(kind, key, value, "") for key, value in given.items()})
    check_settings(settings)
    return settings


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: must be a section of `key: value` lines.")
    return value


def _refuse_unknown(values: Mapping[str, Any], known: list[str], prefix: str) -> None:
    for key in values:
        if key not in known:
            raise unknown_key(key, known, prefix)


def _typed(kind: type, key: str, value: Any, section: str) -> Any:
    """`value` if it has the type that the field states; YAML reads 1e-4 as text, which becomes the number meant."""
    stated = {item.name: item.type for item in fields(kind)}[key]
    options = get_args(stated) if isinstance(stated, UnionType) else (stated,)
    if float in options and str not in options:
        value = as_number(value)
    if not any(_is_a(value, option) for option in options):
        names = " or ".join("null" if option is NoneType else _name(option) for option in options)
        raise ValueError(f"{section + '.' if section else ''}{key}={value!r}: must be of type {names}.")
    return value


def _name(option: type) -> str:
    return str(option) if get_origin(option) else option.__name__


def _is_a(value: Any, option: type) -> bool:
    base = get_origin(option) or option
    if base in (int, float):
        return isinstance(value, (int, float) if base is float else int) and not isinstance(value, bool)
    return isinstance(value, base) and (base is not list or all(isinstance(item, str) for item in value))


def as_number(value: Any) -> Any:
    """A float where `value` is the text of one, else `value` itself."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def check_settings(settings: TrainingSettings) -> None:
    """Refuses contradictions that can be seen without reading anything (ValueError)."""
    _check_choice("dtype", settings.dtype, (None, *DTYPES))
    _check_choice("keep", settings.keep, ("last", "best"))
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


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {list(choices)}.")


def _check_patterns(train: Any) -> None:
    if train not in ("new", "all") and (isinstance(train, str) or not train):
        raise ValueError(f"train={train!r}: must be 'new', 'all', or a list of patterns of tensor names.")


def check_losses(losses: LossSettings) -> None:
    """Refuses weights and options that no alignment can honour (ValueError)."""
    for name in ("hidden", "mixer", "kl", "ce"):
        if not 0 <= getattr(losses, name) < float("inf"):
            raise ValueError(f"losses.{name}={getattr(losses, name)!r}: must be a finite weight >= 0.")
    if not losses.weights():
        raise ValueError("losses: all weights are 0; give at least one of hidden, mixer, kl, ce a weight above 0.")
    _check_choice("losses.mixer_inputs", losses.mixer_inputs, ("teacher", "student"))
    if not 0 < losses.temperature < float("inf"):
        raise ValueError(f"losses.temperature={losses.temperature!r}: must be a finite number above 0.")
    if losses.logit_chunk < 1:
        raise ValueError(f"losses.logit_chunk={losses.logit_chunk!r}: must be a number of tokens >= 1.")


def check_lora(lora: LoraSettings) -> None:
    """Refuses adapters that peft would refuse later, or build without effect (ValueError)."""
    if lora.r < 1:
        raise ValueError(f"lora.r={lora.r!r}: must be a rank >= 1; e.g. 16.")
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout={lora.dropout!r}: must lie in [0, 1).")
    _check_choice("lora.quantize", lora.quantize, (None, *FOUR_BIT))
    if lora.quantize is not None and lora.merge:
        raise ValueError(
            f"lora.merge=True: with lora.quantize={lora.quantize!r} the merged model would keep the rounding of a "
            "4-bit base; remove lora.merge, load the base in full width, put the adapter on it and merge there."
        )


def check_data(data: DataSettings) -> None:
    """Refuses contradictory data settings (ValueError)."""
    given = [name for name in ("files", "hub", "builtin") if getattr(data, name) is not None]
    if len(given) != 1:
        raise ValueError(f"data: give exactly one of files, hub, builtin; found {given or 'none'}.")
    _check_choice("data.builtin", data.builtin, (None, *BUILTIN))
    _check_choice("data.packing", data.packing, PACKINGS)
    _check_choice("data.loss_on", data.loss_on, ("completion", "all"))
    if (data.prompt is None) != (data.completion is None):
        raise ValueError("data: prompt and completion are a pair of columns; give both or neither.")
    if data.messages is not None and data.prompt is not None:
        raise ValueError("data: messages and prompt/completion are two forms of chats; give one of them.")
    if data.streaming and data.hub is None:
        raise ValueError(
            "data.streaming=True: is for a data set of the hub; remove it, local files are read as a whole."
        )
    if data.sequence_length < 2:
        raise ValueError(f"data.sequence_length={data.sequence_length!r}: must be a number of tokens >= 2.")
    if data.eval_sequences < 1:
        raise ValueError(f"data.eval_sequences={data.eval_sequences!r}: must be >= 1; held_out: 0 evaluates nothing.")
    check_held_out(data)


def check_held_out(data: DataSettings) -> None:
    """`held_out` is a share, or a number of documents while streaming (ValueError)."""
    if data.streaming and (data.held_out < 0 or data.held_out != int(data.held_out)):
        raise ValueError(
            f"data.held_out={data.held_out!r}: a stream has no known length; give the number of first documents to "
            "hold out, e.g. 16, or 0."
        )
    if not data.streaming and not 0 <= data.held_out < 1:
        raise ValueError(f"data.held_out={data.held_out!r}: must be a share of the documents in [0, 1).")
