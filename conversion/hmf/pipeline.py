"""The import: a folder of hybrid-model-factory becomes a B'MOJO folder, with the same weights.

Order of work: everything that can be refused is checked first (config, names and shapes, output, disk); then tensors
are put together one shard at a time in a folder beside the final place, which is renamed at the end. Peak memory: about
one shard, and the rows of one block.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.export import generation_settings, save_tokenizer, write_model
from ..common.files import read_json, write_json, write_text
from ..common.provenance import versions
from ..common.running import meta_model, tensor_shapes
from ..common.staging import check_output, check_space, sole_writer, staged_folder
from ..common.weights import INDEX_FILE, Weights, digest, in_float32, most_common_dtype, open_weights
from ..grafting.report import dtype_name, write_report
from ..grafting.settings import check_shard_size
from ..grafting.sources import HUB_ID, HUB_SIDE_FILES, HUB_WEIGHTS, open_tokenizer, stated_facts
from .card import imported_card
from .config import Layout, read_layout
from .mixers import sizes_of
from .tensors import Account, account_for, dtype_of, joined


SIDE_FILES_BYTES = 64 * 2**20  # room for tokenizer, code and card in the estimate of the disk space
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass
class Plan:
    """An import that was checked and can start. label: the source's name. dropped: source tensors that are not needed.

    dtype: of most tensors. dtypes: of ours.
    """

    path: Path
    label: str
    layout: Layout
    weights: Weights
    account: Account
    dropped: list[str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    dtype: torch.dtype


def import_checkpoint(
    source: str, output: Path, max_shard_size: str = "2GB", overwrite: bool = False
) -> dict[str, Any]:
    """Write the B'MOJO folder; returns its report.

    Args:
        source: a local folder, or a hub id `owner/name`. overwrite: replace an earlier output of ours.

    Raises:
        ValueError: anything about the source or the output that stops the import; nothing is written then.
    """
    check_shard_size(max_shard_size)
    with sole_writer(output):
        check_output(output, overwrite)
        path, label = locate(source)
        check_output(output, overwrite, sources=(path,))
        plan = prepare(path, label)
        size = sum(torch.Size(shape).numel() * plan.dtypes[name].itemsize for name, shape in plan.shapes.items())
        check_space(output, size + SIDE_FILES_BYTES)
        with staged_folder(output) as folder:
            return write_checkpoint(folder, plan, max_shard_size)


def locate(source: str) -> tuple[Path, str]:
    """Return the folder of a source and its name; a hub id is fetched, its config first."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path, path.resolve().name
    if path.exists() or not HUB_ID.fullmatch(source):
        raise ValueError(
            f"source={source!r}: must be a folder with config.json and safetensors, or a hub id (owner/name)."
        )
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        stated = json.loads(Path(hf_hub_download(source, "config.json")).read_text(encoding="utf-8"))
        read_layout(stated, f"source {source!r}")
        return Path(snapshot_download(source, allow_patterns=HUB_WEIGHTS + HUB_SIDE_FILES)), source
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"source={source!r}: could not be downloaded ({type(error).__name__}: {str(error).splitlines()[0]}); check "
            "the id, your access and the network, or give a local folder."
        ) from error


def prepare(path: Path, label: str) -> Plan:
    """Check everything that can be checked without reading a tensor."""
    what = f"source {label!r}"
    if not (path / "config.json").is_file():
        raise ValueError(f"{what}: has no config.json; give the folder of a checkpoint.")
    layout = read_layout(read_json(path / "config.json", what), what)
    weights = open_weights(path, what)
    shapes = tensor_shapes(meta_model(layout.config))
    account, dropped = account_for(layout, weights, shapes, what)
    dtype = getattr(torch, most_common_dtype(weights.dtypes))
    dtypes = {name: dtype_of(pieces, weights, dtype) for name, pieces in account.items()}
    dtypes |= {name: torch.float32 for name in dtypes if in_float32(name) and dtypes[name].itemsize < 4}
    return Plan(path, label, layout, weights, account, dropped, shapes, dtypes, dtype)


def write_checkpoint(folder: Path, plan: Plan, max_shard_size: str) -> dict[str, Any]:
    """Fill `folder`: weights, code, tokenizer, settings, card and, last, the report."""
    config, digests, sizes = plan.layout.config, {}, sizes_of(plan.layout.stated)

    def make(name: str) -> torch.Tensor:
        tensor = joined(plan.account[name], plan.shapes[name], plan.dtypes[name], plan.weights, sizes)
        digests[name] = digest(tensor)
        return tensor

    stated = plan.path / "generation_config.json"
    generation = read_json(stated, f"source {plan.label!r}") if stated.is_file() else {}
    generation = generation_settings(generation, config)
    write_json(folder / "generation_config.json", generation)
    write_model(folder, config, plan.dtypes, make, max_shard_size, plan.dtype)
    report = build_report(plan, digests, max_shard_size)
    report["generation"] = generation
    if any((plan.path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = open_tokenizer(plan.path, f"source {plan.label!r}")
        report["tokenizer"] = save_tokenizer(folder, tokenizer, config.vocab_size)
    facts = stated_facts(plan.path / "README.md", plan.label)
    write_text(folder / "README.md", imported_card(plan.layout, facts, report))
    report["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    write_report(folder, report)
    return report


def build_report(plan: Plan, digests: dict[str, str], max_shard_size: str) -> dict[str, Any]:
    """Return the account of all tensors; tokenizer and generation settings are added as they are done."""
    targets, sources = {}, {}
    for name, pieces in plan.account.items():
        targets[name] = {"joined-from": [piece.name for piece in pieces if piece.made is None]}
        targets[name] |= {"shape": list(plan.shapes[name]), "dtype": dtype_name(plan.dtypes[name])}
        targets[name]["sha256"] = digests[name]
        if not targets[name]["joined-from"]:
            targets[name] = {"initialised-by": "every head has what its group has", **targets[name]}
        sources |= {
            piece.name: {"joined-into": name, "shape": list(plan.weights.shapes[piece.name])}
            for piece in pieces
            if piece.made is None
        }
    for name in plan.dropped:
        sources[name] = {"dropped-because": "loading makes it anew", "shape": list(plan.weights.shapes[name])}
    files = sorted(path for path in plan.path.iterdir() if path.suffix == ".safetensors" or path.name == INDEX_FILE)
    return {
        "imported": "hybrid-model-factory",
        "source": {
            "label": plan.label,
            "files": [[path.name, path.stat().st_size] for path in files],
            "architecture": "HybridQwen3ForCausalLM",
            "dtype": dtype_name(plan.dtype),
            "pattern": plan.layout.stated["hybrid_override_pattern"],
        },
        "settings": {"max_shard_size": max_shard_size},
        "dtype": dtype_name(plan.dtype),
        "counts": {
            "copied": len(sources) - len(plan.dropped),
            "dropped": len(plan.dropped),
            "initialised": sum("initialised-by" in entry for entry in targets.values()),
            "parameters": sum(torch.Size(shape).numel() for shape in plan.shapes.values()),
        },
        "source_tensors": sources,
        "target_tensors": targets,
        "versions": versions(),
        "tokenizer": None,
    }


__all__ = ["import_checkpoint"]
