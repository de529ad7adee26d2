"""Fits sketches of keys to a B'MOJO folder, so that it can be read with storage: `python -m conversion.fit_storage F`.

    python -m conversion.fit_storage outputs/smollm2-135m-bmojo [--sketch-size 16] [--text FILE ...]

Afterwards `from_pretrained(folder, storage_size=1024, storage_candidates=1024)` works; what the folder's own config
says of its storage stays, but `storage_sketch_size`. All layers' keys and queries of 2,048 tokens decide: run it again
after training. The folder, a fresh graft or a trained one, is written beside itself and renamed; all its weights are in
memory meanwhile. Not done here: folders of adapters (their base is fitted), choosing `storage_size`.
Exit status: 0 done, 2 refused or failed with a message, 130 interrupted; unless it is 0, the folder is as it was.
"""

import argparse
import copy
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeling_bmojo import BMojoConfig

from .common.commands import command, purpose
from .common.export import write_model
from .common.files import read_json, write_json, write_text
from .common.programs import run_program
from .common.running import meta_model, tensor_shapes
from .common.settings import DTYPES
from .common.staging import check_space, sole_writer, staged_folder
from .common.weights import INDEX_FILE, SKETCH, WEIGHTS_FILE, Weights, digest, open_weights, shard_files
from .grafting.card import with_sketches_told
from .grafting.report import CURRENT, dtype_name, require_report, write_report
from .grafting.sketches import RULE, FittingText, fit, read_fitting_text, sketch_names
from .grafting.sources import open_config, open_tokenizer


SKETCH_SIZE = 16
FETCHED = 32  # where the folder's config stores nothing: tokens that a query fetches while the text is read


@dataclass
class Checkpoint:
    """A folder that was checked. config: with storage and sketches. stated: the fields of its storage as they were.

    shapes, dtypes: of the tensors that it will hold.
    """

    folder: Path
    config: BMojoConfig
    stated: dict[str, Any]
    weights: Weights
    report: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the tensors that it will hold; sketches are float32."""
        own = {name: getattr(torch, dtype) for name, dtype in self.weights.dtypes.items() if SKETCH not in name}
        return own | dict.fromkeys(sketch_names(self.shapes), torch.float32)


def fit_storage(folder: Path, sketch_size: int = SKETCH_SIZE, text: list[str] | None = None) -> dict[str, Any]:
    """Fit sketches to the model in `folder` and write them there; returns what its report says of them.

    Args:
        sketch_size: r, numbers per key. text: files to fit on; None: Python's reference, its training part.

    Raises:
        ValueError: `folder` is no whole B'MOJO model with a bmojo layer, the size is none, or the text cannot be read.
    """
    check_folder(folder)
    with sole_writer(folder):
        checkpoint = open_checkpoint(folder, sketch_size)
        rows = read_fitting_text(open_tokenizer(folder, f"folder={str(folder)!r}"), checkpoint.config, text, "--text")
        check_space(folder, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        tensors, facts = fitted(checkpoint, rows)
        with staged_folder(folder) as partial:
            write_folder(partial, checkpoint, tensors, facts)
    return facts


def check_folder(folder: Path) -> None:
    """Refuse what is no folder of a B'MOJO model (ValueError); a folder that a killed run moved aside counts."""
    what = f"folder={str(folder)!r}"
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json", what).get("base_model_name_or_path")
        raise ValueError(
            f"{what}: holds an adapter, not a model, and sketches belong to the model: fit them to its base, {base!r}, "
            "or to the folder merged/ that lora.merge: true writes."
        )
    if not folder.is_dir() and any(folder.absolute().parent.glob(f"{folder.name}.replaced-*")):
        return
    if not folder.is_dir():
        raise ValueError(f"{what}: no such folder; graft one first: {command('graft')}.")
    kind = read_json(folder / "config.json", what).get("model_type")
    if kind != "bmojo":
        raise ValueError(f"{what}: holds a {kind} model, not a B'MOJO one; turn it into one with {command('graft')}.")


def open_checkpoint(folder: Path, sketch_size: int) -> Checkpoint:
    """Open the folder and check all that can be checked without reading its tensors (ValueError)."""
    what = f"folder={str(folder)!r}"
    config = open_config(folder, what)
    if "bmojo" not in config.layer_types:
        raise ValueError(
            f"{what}: none of its layers is a 'bmojo' layer (layer_types), and no other stores tokens; graft with "
            "other layers."
        )
    if type(sketch_size) is not int or not 1 <= sketch_size <= config.head_dim:
        raise ValueError(
            f"--sketch-size={sketch_size}: must lie in [1, head_dim={config.head_dim}]; a key has no more numbers."
        )
    stated = {name: getattr(config, name) for name in ("storage_size", "storage_candidates")}
    config.storage_size, config.storage_sketch_size = config.storage_size or FETCHED, sketch_size
    if stated["storage_size"] == 0:
        config.storage_candidates = None
    config.validate()
    weights, shapes = open_weights(folder, what), tensor_shapes(meta_model(config))
    found = {name: shape for name, shape in weights.shapes.items() if SKETCH not in name}
    expected = {name: shape for name, shape in shapes.items() if SKETCH not in name}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong or not set(weights.dtypes.values()) <= set(DTYPES):
        raise ValueError(
            f"{what}: its tensors are not those of an unquantised causal language model of its config "
            f"({', '.join(wrong[:4]) or 'dtypes'}); it is damaged, or another kind of model."
        )
    return Checkpoint(folder, config, stated, weights, require_report(folder, what), shapes)


def fitted(checkpoint: Checkpoint, text: FittingText) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the sketches' tensors and what the report says of them."""
    names = [name for name in checkpoint.weights.shapes if SKETCH not in name]
    return fit(checkpoint.config, {name: checkpoint.weights.rows(name) for name in names}, text)


def write_folder(
    partial: Path, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]
) -> None:
    """Fill `partial` with what the folder holds, and the sketches."""
    folder, report = checkpoint.folder, copy.deepcopy(checkpoint.report)
    of_weights = {INDEX_FILE, *(file.name for file in shard_files(folder, WEIGHTS_FILE, INDEX_FILE, str(folder)))}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            shutil.copytree(path, partial / path.name)
        elif path.name not in of_weights:
            shutil.copyfile(path, partial / path.name)

    def make(name: str) -> torch.Tensor:
        return (tensors[name] if SKETCH in name else checkpoint.weights.rows(name)).contiguous()

    stated, size = read_json(folder / "config.json", str(folder)), checkpoint.config.storage_sketch_size
    shard_size = report.get("settings", {}).get("max_shard_size") or "2GB"
    dtype = getattr(torch, str(stated.get("dtype") or report.get("dtype") or "float32"))
    write_model(partial, checkpoint.config, checkpoint.dtypes, make, shard_size, dtype)
    # The config as it was: the one just written stores tokens.
    write_json(partial / "config.json", {**stated, **checkpoint.stated, "storage_sketch_size": size})
    if card := (folder / "README.md").is_file() and (folder / "README.md").read_text(encoding="utf-8"):
        write_text(partial / "README.md", with_sketches_told(card, facts))
    if report:
        account(report, tensors, facts)
        report["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir()) if path.is_file()}
        report["files"].pop("graft_report.json", None)
        write_report(partial, report)


def account(report: dict[str, Any], tensors: Mapping[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Enter the sketches into a folder's report."""
    targets = report.setdefault("target_tensors", {})
    counts = report.get("counts")
    for name in sketch_names(targets):
        old = targets.pop(name)
        if counts:
            counts["initialised"] -= 1
            counts["parameters"] -= torch.Size(old["shape"]).numel()
    for name, value in tensors.items():
        known = digest(value)
        targets[name] = {"initialised-by": RULE, "shape": list(value.shape), "dtype": dtype_name(value.dtype)}
        targets[name] |= {"sha256": known} | ({CURRENT: known} if report.get("training") else {})
        if counts:
            counts["initialised"] += 1
            counts["parameters"] += value.numel()
    report["sketches"] = facts


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("fit_storage"), description=purpose(__doc__))
    parser.add_argument("folder", help="a B'MOJO model: a graft, or what training wrote; it is changed where it is")
    parser.add_argument("--sketch-size", type=int, default=SKETCH_SIZE, help=f"numbers per key ({SKETCH_SIZE})")
    parser.add_argument("--text", nargs="+", metavar="FILE", help="text to fit on (default: Python's reference)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)

    def work() -> int:
        facts = fit_storage(Path(arguments.folder), arguments.sketch_size, arguments.text)
        print(
            f"{arguments.folder}: sketches of {facts['size']} numbers in {len(facts['layers'])} layers, fitted on "
            f"{facts['tokens']:,} tokens in {facts['runtime_seconds']:.1f} s; load it with storage_size=1024, "
            "storage_candidates=1024."
        )
        return 0

    return run_program(work, "the folder is as it was")


if __name__ == "__main__":
    sys.exit(main())
