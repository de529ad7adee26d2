"""The graft itself: a source Transformer becomes a B'MOJO checkpoint folder (design.md section 6).

Order of work: everything that can be refused is checked first (settings, source, names and shapes, output, disk); then
tensors are copied and initialised one shard at a time into a folder beside the final place; the result is read again,
compared with the source, and renamed into place. Peak memory: about one shard, however large the source is (a GGUF
source excepted, which transformers dequantises as a whole).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modeling_bmojo import BMojoConfig

from ..common.export import generation_settings, save_tokenizer, write_model
from ..common.files import read_json, write_json, write_text
from ..common.provenance import code_fingerprint, versions
from ..common.running import meta_model, tensor_shapes
from ..common.settings import DTYPES
from ..common.staging import REPORT_FILE, check_output, check_space, is_settled, sole_writer, staged_folder
from ..common.weights import SKETCH, LazyTensors, digest, in_float32, open_weights, row_blocks
from .card import model_card
from .check import check_against_source
from .families import backbone_fields, bmojo_config_for, family_of, source_layer_types, source_window
from .layer_choice import MEASURED, measure_layers, write_ranking
from .report import (
    SourceRows,
    dtype_name,
    pieces_of,
    plan_copy,
    read_report,
    target_account,
    write_report,
)
from .settings import GraftSettings
from .sketches import RULE, FittingText, choosing_exactly, fit, read_fitting_text, sketch_names
from .sources import Source, open_config, open_source, source_files
from .ssm_init import SSM_INITS


SIDE_FILES_BYTES = 64 * 2**20  # room for tokenizer, code and card in the estimate of the disk space


@dataclass
class Plan:
    """A graft that was checked and can start.

    copies: the account of the source's tensors (report.py). initialised: target tensors that the graft fills itself,
    with the rule. shapes, dtypes: of all target tensors. dtype: of most of them.
    """

    settings: GraftSettings
    source: Source
    config: BMojoConfig
    dtype: torch.dtype
    copies: dict[str, dict[str, Any]]
    initialised: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    ranking: dict[str, Any] | None = None  # where the layers were chosen by measuring

    @cached_property
    def pieces(self) -> dict[str, SourceRows]:
        """Where each copied target tensor comes from."""
        return pieces_of(self.copies, self.shapes)

    @property
    def source_dtypes(self) -> dict[str, torch.dtype]:
        """In which dtype each copied source tensor is written; the parts of one have the same."""
        return {piece.source: self.dtypes[name] for name, piece in self.pieces.items()}

    @cached_property
    def fitting_text(self) -> FittingText:
        """The text that sketches of keys are fitted on (ValueError: see `read_fitting_text`)."""
        return read_fitting_text(self.source.tokenizer(), self.config, self.settings.storage_text, "storage_text")

    @cached_property
    def sketches(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The sketches of keys and what the report says of them, fitted when first asked for; None: there are none."""
        if not sketch_names(self.shapes):
            return None
        return fit(self.config, build_tensors(self, sketches=False), self.fitting_text)


def graft(settings: GraftSettings, overwrite: bool = False, reuse: bool = False) -> bool:
    """Write the checkpoint folder; False where an earlier one is kept.

    Args:
        overwrite: replace an earlier graft in the same folder.
        reuse: keep an earlier graft where settings and code are still the same, else replace it.

    Raises:
        ValueError: anything about the settings, the source or the output that stops the conversion.
    """
    output = Path(settings.output)
    if reuse and is_settled(output) and why_outdated(output, settings) is None:
        return False  # without a lock, so that a graft on a read-only disk can be kept too
    with sole_writer(output):
        if reuse and output.exists():  # a killed run may have left it aside until now
            outdated = why_outdated(output, settings)
            if outdated is None:
                return False
            print(f"{output}: made again, because {outdated}.", flush=True)
        check_output(output, overwrite or reuse)
        plan = prepare(settings, overwrite or reuse)
        if settings.layers == MEASURED:
            plan = with_measured_layers(plan)
        _ = plan.sketches  # which holds the whole model: before anything is written
        with staged_folder(output) as folder:
            write_checkpoint(folder, plan)
    return True


def why_outdated(output: Path, settings: GraftSettings) -> str | None:
    """Why `output` holds no finished graft of the same source files and settings by the same code; None: it does.

    Looks at every file that the graft wrote, at the weights' headers only: their values are not read.
    """
    report = read_report(output)
    if report is None:
        return f"it has no {REPORT_FILE} that can be read"
    if report.get("source", {}).get("files") != source_files(settings.source):
        return "the source's files are others, or were changed"
    if report.get("settings") != settings.as_dict():
        return "the settings are others"
    if report.get("code_sha256") != code_fingerprint():
        return "the code that made it was another"
    try:
        return damage(output, report)
    except ValueError as error:
        return f"it is damaged ({error})"


def damage(output: Path, report: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the files of a finished graft, None where nothing is seen (ValueError: the same).

    A user may have edited the card, or a JSON file: these must be there, and the latter must be JSON.
    """
    for name, size in report.get("files", {}).items():
        path = output / name
        if not path.is_file():
            return f"{name} is missing"
        if path.suffix == ".json":
            read_json(path, output.name)
        elif path.suffix == ".py" and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    open_config(output, output.name)
    weights = open_weights(output, output.name)
    expected = {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in report["target_tensors"].items()}
    found = {name: (shape, weights.dtypes[name]) for name, shape in weights.shapes.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return f"its weights are not those of its report, such as {wrong[0]}" if wrong else None


def prepare(settings: GraftSettings, overwrite: bool = False) -> Plan:
    """Open the source and check everything that can be checked without reading its tensors."""
    output = Path(settings.output)
    source = open_source(settings.source, settings.allow_pickle)
    if Path(settings.source).exists():
        check_output(output, overwrite, sources=(Path(settings.source),))
    plan = plan_graft(settings, source)
    if sketch_names(plan.shapes):
        _ = plan.fitting_text  # refuses before the work
    size = sum(torch.Size(shape).numel() * plan.dtypes[name].itemsize for name, shape in plan.shapes.items())
    check_space(output, size + SIDE_FILES_BYTES)
    return plan


def plan_graft(settings: GraftSettings, source: Source, layers: str | list[int] | None = None) -> Plan:
    """Return what becomes of the source by these settings; nothing is written, and no tensor is read.

    Args:
        layers: used instead of the settings' own. Layers that are still to be measured are planned as all of them.
    """
    layers = layers or ("all" if settings.layers == MEASURED else settings.layers)
    init = SSM_INITS[settings.ssm_init]
    memory = init.complete(backbone_fields(source.config), {**init.fields, **settings.memory})
    config = bmojo_config_for(source.config, memory, layers)
    init.check(config, tuple(settings.smoother_tau))
    if settings.check and not config.alone:
        raise ValueError(
            f"fading_delay={config.fading_delay!r}: shows even the first query what an SSM says that has learned "
            "nothing yet, so that no token is answered as by the source; leave it out, or set check: false and train."
        )
    dtype = getattr(torch, settings.dtype or source.dtype, None)
    if dtype_name(dtype) not in DTYPES:
        raise ValueError(f"dtype of the source is {source.dtype}; set dtype to float32, bfloat16 or float16.")

    shapes = tensor_shapes(meta_model(config))
    initialised = initialised_tensors(config, shapes, init.describe)
    copies = plan_copy(source.config, source.shapes, shapes, set(initialised))
    dtypes = target_dtypes(settings, source, dtype, copies, shapes)
    return Plan(settings, source, config, dtype, copies, initialised, shapes, dtypes)


def with_measured_layers(plan: Plan) -> Plan:
    """Return the plan with the layers that measuring finds least harmful; `plan` has every layer (layer_choice.py).

    Raises:
        ValueError: the text is too short, the source has no tokenizer, or the choice contradicts the settings.
    """
    settings, source = plan.settings, plan.source
    count = source.config.num_hidden_layers
    plan_graft(settings, source, list(range(min(settings.measured_layers, count))))  # refuses before the work
    config = choosing_exactly(plan.config)  # sketches would be fitted to layers that may not stay
    ranking = measure_layers(config, source, settings, lambda: build_tensors(plan, sketches=False))
    chosen = plan_graft(settings, source, ranking["chosen"])
    chosen.ranking = ranking
    return chosen


def initialised_tensors(config: BMojoConfig, shapes: dict[str, tuple[int, ...]], rule: str) -> dict[str, str]:
    """Target tensors that the graft fills itself, with the rule: the fading memories, untied fading projections, and
    sketches of keys."""
    found = {}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name in shapes:
            if name.startswith(prefix + "fading."):
                found[name] = rule
            elif name.startswith(prefix + "self_attn.fading_"):
                found[name] = f"a copy of {name.replace('fading_', '')}"
    return found | dict.fromkeys(sketch_names(shapes), RULE)


def target_dtypes(
    settings: GraftSettings,
    source: Source,
    dtype: torch.dtype,
    copies: dict[str, dict[str, Any]],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, torch.dtype]:
    """Return the dtype of every target tensor: a copy keeps its own unless the settings name one; SSM scalars and
    sketches are float32.

    Notes in `copies` which source tensors are cast.
    """
    dtypes = {name: torch.float32 if in_float32(name) else dtype for name in shapes}
    for name, piece in pieces_of(copies, shapes).items():
        own = source.dtypes[piece.source]
        if settings.dtype is None and own in DTYPES:
            dtypes[name] = getattr(torch, own)
        if own != dtype_name(dtypes[name]):
            copies[piece.source]["cast-from"] = own
    return dtypes


class TensorBuilder:
    """Makes the target tensors of a plan by name, and notes the digest of each; holds the memories of one layer."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.digests: dict[str, str] = {}
        self._layer, self._built = -1, {}

    def __call__(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`.

        Raises:
            ValueError: it is copied, and holds values that are not finite, in the source's dtype or in the graft's.
        """
        tensor = self._initialised(name) if name in self.plan.initialised else copied_tensor(self.plan, name)
        self.digests[name] = digest(tensor)
        return tensor

    def _initialised(self, name: str) -> torch.Tensor:
        if SKETCH in name:
            return self.plan.sketches[0][name]
        index = int(name.split(".")[2])
        if index != self._layer:
            self._layer, self._built = index, layer_init(self.plan, index)
        return self._built.pop(name)


def build_tensors(plan: Plan, sketches: bool = True) -> dict[str, torch.Tensor]:
    """All target tensors in memory: for models that run without being written. sketches: those of keys, too."""
    make = TensorBuilder(plan)
    names = [name for name in plan.shapes if SKETCH not in name]
    found = {name: make(name) for name in tqdm(names, desc="Reading the source", unit="tensor")}
    if sketches and len(names) < len(plan.shapes):
        found |= fit(plan.config, found, plan.fitting_text)[0]
    return found


def copied_tensor(plan: Plan, name: str) -> torch.Tensor:
    """Return a target tensor that comes from the source, in the dtype of the target; see `TensorBuilder`."""
    piece, out = plan.pieces[name], torch.empty(plan.shapes[name], dtype=plan.dtypes[name])
    for first, last in row_blocks(len(out), out[:1].nbytes):
        block = plan.source.rows(piece.source, piece.start + first, piece.start + last)
        out[first:last] = block
        if not is_finite(out[first:last]):
            if not is_finite(block):
                raise ValueError(
                    f"tensor {piece.source} of the source holds values that are not finite; the file is damaged."
                )
            raise ValueError(
                f"tensor {piece.source} of the source leaves the range of dtype={dtype_name(out.dtype)}; "
                "choose float32 or bfloat16."
            )
    return out


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite, without a mask as large as the tensor."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def layer_init(plan: Plan, index: int) -> dict[str, torch.Tensor]:
    """Return the initialised tensors of one B'MOJO layer, by their full names; the SSM's scalars stay float32."""
    attention = f"model.layers.{index}.self_attn."
    names = [name.removeprefix(attention) for name in plan.pieces if name.startswith(attention)]
    own = LazyTensors(names, lambda name: copied_tensor(plan, attention + name))
    init = SSM_INITS[plan.settings.ssm_init]
    built = init.build(plan.config, own, tuple(plan.settings.smoother_tau), plan.settings.seed * 100_003 + index)
    found = {f"model.layers.{index}.fading.{name}": value for name, value in built.items()}
    for name in plan.initialised:
        if name.startswith(attention + "fading_"):
            found[name] = copied_tensor(plan, name.replace("fading_", ""))
    for name, value in found.items():
        if plan.shapes.get(name) != tuple(value.shape):
            raise ValueError(f"{name}: initialised as {list(value.shape)}, the model has {plan.shapes.get(name)}.")
    return {name: value.to(plan.dtypes[name]).contiguous() for name, value in found.items()}


def write_checkpoint(folder: Path, plan: Plan) -> None:
    """Fill `folder`: weights, code, tokenizer, settings, card and, last, the report."""
    generation = generation_settings(plan.source.generation_settings(), plan.config)
    write_json(folder / "generation_config.json", generation)
    if plan.ranking is not None:
        write_ranking(folder, plan.ranking)
    build = TensorBuilder(plan)
    write_model(folder, plan.config, plan.dtypes, build, plan.settings.max_shard_size, plan.dtype)
    report = build_report(plan, build.digests)
    tokenizer = plan.source.tokenizer()
    report["tokenizer"] = None if tokenizer is None else save_tokenizer(folder, tokenizer, plan.config.vocab_size)
    report["generation"] = generation
    report["check"] = None
    if plan.settings.check:
        report["check"] = check_against_source(folder, plan.source, plan.source_dtypes, plan.settings.seed)
    write_text(folder / "README.md", model_card(plan.config, plan.source.facts(), report))
    report["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    write_report(folder, report)


def build_report(plan: Plan, digests: dict[str, str]) -> dict[str, Any]:
    """Return the report of `graft_report.json`; tokenizer, generation and check are added as they are done."""
    config = plan.source.config
    windows = [size for size in (plan.config.alone, source_window(config)) if size is not None]
    dropped = sum("dropped-because" in entry for entry in plan.copies.values())
    sizes = {name: torch.Size(shape).numel() for name, shape in plan.shapes.items()}
    return {
        "source": {
            "label": plan.source.label,
            "files": source_files(plan.settings.source),
            "architecture": family_of(config).architecture,
            "dtype": plan.source.dtype,
            "layer_types": source_layer_types(config),
            "window": source_window(config),
            "config": plan.source.stated_config,
            "generation": plan.source.generation_settings(),
        },
        "settings": plan.settings.as_dict(),
        "dtype": dtype_name(plan.dtype),
        "ssm_init": plan.settings.ssm_init,
        "layers": [index for index, kind in enumerate(plan.config.layer_types) if kind == "bmojo"],
        "layer_ranking": plan.ranking,
        "sketches": None if plan.sketches is None else plan.sketches[1],
        "identical_up_to": min(windows),
        "counts": {
            "copied": len(plan.copies) - dropped,
            "dropped": dropped,
            "initialised": len(plan.initialised),
            "parameters": sum(sizes.values()),
            "source_parameters": sum(sizes[name] for name in plan.pieces),
        },
        "source_tensors": plan.copies,
        "target_tensors": target_account(plan.pieces, plan.initialised, plan.shapes, plan.dtypes, digests),
        "versions": versions(),
        "code_sha256": code_fingerprint(),
    }
