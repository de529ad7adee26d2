"""Writes the source checkpoint again from a graft: `python -m conversion.restore FOLDER --output X`.

    python -m conversion.restore outputs/smollm2-135m-bmojo --output outputs/smollm2-135m [--max-shard-size 2GB]

A graft holds its source's tensors as they were, and its graft_report.json says where each went and what its bytes were
(SHA-256). So the source comes back byte for byte: weights, config.json and generation settings; the tokenizer as the
graft has it. Tensors that were left behind are not written, because transformers makes them anew (a tied head, inverse
frequencies). Refused: a graft that was trained since, and one whose `dtype` rounded the source's values.
Exit status: 0 done, 2 refused or failed with a message, 130 interrupted.
"""

import argparse
import fnmatch
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .common.commands import command, purpose
from .common.files import write_json
from .common.programs import run_program
from .common.staging import check_output, check_space, sole_writer, staged_folder
from .common.weights import Weights, digest, open_weights, write_shards
from .grafting.report import goals_of, read_report
from .grafting.settings import check_shard_size
from .grafting.sources import HUB_SIDE_FILES


LOSSLESS = {("float16", "float32"), ("bfloat16", "float32")}  # casts that can be taken back
REWRITTEN = ("config.json", "generation_config.json", "README.md")


def restore(folder: Path, output: Path, max_shard_size: str = "2GB") -> list[str]:
    """Write the source of the graft in `folder` to `output`; returns the source tensors that are not written.

    Raises:
        ValueError: `folder` is no graft with digests, a tensor was rounded or changed, or `output` is in use.
    """
    check_shard_size(max_shard_size)
    report = read_report(folder)
    if report is None or "config" not in report.get("source", {}):
        raise ValueError(f"{str(folder)!r}: has no graft_report.json with the source's config; graft the source again.")
    with sole_writer(output):
        return _restore(folder, output, report, max_shard_size)


def _restore(folder: Path, output: Path, report: Mapping[str, Any], max_shard_size: str) -> list[str]:
    check_output(output, overwrite=False, sources=(folder,))
    tensors = {name: entry for name, entry in report["source_tensors"].items() if goals_of(entry)}
    refuse_rounded(tensors, report)
    weights = open_weights(folder, f"graft {folder.name!r}")
    shapes = {name: tuple(entry["shape"]) for name, entry in tensors.items()}
    dtypes = {name: getattr(torch, source_dtype(entry, report)) for name, entry in tensors.items()}
    check_space(output, sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in shapes.items()))

    def make(name: str) -> torch.Tensor:
        return joined(name, tensors[name], report["target_tensors"], weights).to(dtypes[name])

    with staged_folder(output) as partial:
        write_shards(partial, shapes, dtypes, make, max_shard_size)
        write_json(partial / "config.json", report["source"]["config"])
        if report["source"]["generation"]:
            write_json(partial / "generation_config.json", report["source"]["generation"])
        for file in sorted(folder.iterdir()):
            kept = any(fnmatch.fnmatch(file.name, pattern) for pattern in HUB_SIDE_FILES)
            if kept and file.name not in REWRITTEN:
                shutil.copyfile(file, partial / file.name)
    return sorted(set(report["source_tensors"]) - set(tensors))


def source_dtype(entry: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return the dtype that a source tensor had."""
    return entry.get("cast-from") or report["target_tensors"][goals_of(entry)[0]]["dtype"]


def refuse_rounded(tensors: Mapping[str, Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """Refuse tensors whose values the graft rounded (ValueError)."""
    for name, entry in tensors.items():
        was, now = source_dtype(entry, report), report["target_tensors"][goals_of(entry)[0]]["dtype"]
        if was != now and (was, now) not in LOSSLESS:
            raise ValueError(
                f"{name}: the graft rounded it from {was} to {now} (dtype={report['settings']['dtype']!r} of its "
                "settings), so the source's values are gone; graft again with dtype=null."
            )


def joined(
    name: str, entry: Mapping[str, Any], targets: Mapping[str, Mapping[str, Any]], weights: Weights
) -> torch.Tensor:
    """Return a source tensor from the graft's tensors that hold its rows, each with the bytes that the report states.

    Raises:
        ValueError: a tensor is missing, or is not what the graft wrote.
    """
    parts = []
    for goal in goals_of(entry):
        known = targets[goal]
        stated = (tuple(known["shape"]), known["dtype"])
        found = (weights.shapes.get(goal), weights.dtypes.get(goal))
        part = weights.rows(goal).contiguous() if found == stated else None
        if part is None or digest(part) != known["sha256"]:
            raise ValueError(
                f"{name}: the graft's {goal} is no longer what was copied from it (trained, cast or damaged), so the "
                "source cannot be written from this folder; use the folder that the graft wrote."
            )
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("restore"), description=purpose(__doc__))
    parser.add_argument("folder", help="a graft: a folder with graft_report.json")
    parser.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--max-shard-size", default="2GB", help="largest weights file (default: 2GB)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)

    def work() -> int:
        output = Path(arguments.output)
        left_out = restore(Path(arguments.folder), output, arguments.max_shard_size)
        note = f" Not written, because loading makes them anew: {', '.join(left_out)}." if left_out else ""
        print(f"{output}: the source's tensors, byte for byte.{note}")
        return 0

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
