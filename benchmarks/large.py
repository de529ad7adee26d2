"""Peak memory of a graft of a large checkpoint: `python -m benchmarks.large --folder DIR`.

    python -m benchmarks.large --folder DIR [--layers 48] [--shard 1GB] [--keep]

Writes a random Llama in bfloat16 (48 layers: 6.3 GB) in shards of at most `--shard` into DIR, grafts it in a fresh
process with output shards of the same size, restores the source from the graft in another, and prints the peak of each
process's resident memory, which counts the pages of mapped files too, beside the largest shard. DIR needs 2.1 times the
checkpoint's size; what was written goes at the end unless `--keep`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from conversion.common.files import write_json
from conversion.common.weights import write_shards


ROOT = Path(__file__).resolve().parents[1]


def llama(layers: int, hidden: int = 2048, vocabulary: int = 32000) -> LlamaConfig:
    """Return a Llama of 61 million parameters per layer at the default width (untied embeddings: 131 million more)."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 256),
        max_position_embeddings=4096,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_checkpoint(folder: Path, config: LlamaConfig, shard: str) -> None:
    """Write a random checkpoint of the config in bfloat16, made one shard at a time."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in LlamaForCausalLM(config).state_dict().items()}

    def make(name: str) -> torch.Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=torch.bfloat16)
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0.0, 0.02)

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.to_dict())
    write_shards(folder, shapes, dict.fromkeys(shapes, torch.bfloat16), make, shard)


def peak_of(command: list[str]) -> tuple[int, float]:
    """Peak resident bytes and seconds of a process of its own.

    Raises:
        RuntimeError: it did not succeed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), time.perf_counter() - start


def largest_shard(folder: Path) -> int:
    """Return bytes of the largest weights file."""
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write; must not exist")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--shard", default="1GB", help="largest weights file of source and graft")
    parser.add_argument("--keep", action="store_true", help="leave source, graft and copy where they are")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    source, output, copy = (folder / name for name in ("source", "graft", "copy"))
    write_checkpoint(source, llama(arguments.layers), arguments.shard)
    total = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"source   {total / 1e9:6.2f} GB, largest shard {largest_shard(source) / 1e9:.2f} GB", flush=True)

    settings = folder / "settings.yaml"
    settings.write_text(f"source: {source}\noutput: {output}\nmax_shard_size: {arguments.shard}\nwindow_size: 512\n")
    graft = [sys.executable, "-m", "conversion.graft", str(settings)]
    peak, seconds = peak_of(graft)
    limit = 2 * max(largest_shard(source), largest_shard(output))
    print(
        f"graft    peak {peak / 1e9:6.2f} GB in {seconds:.0f} s; twice the largest shard is {limit / 1e9:.2f} GB",
        flush=True,
    )
    if not arguments.keep:
        shutil.rmtree(source)
    restore = [sys.executable, "-m", "conversion.restore", str(output), "--output", str(copy)]
    peak, seconds = peak_of([*restore, "--max-shard-size", arguments.shard])
    print(f"restore  peak {peak / 1e9:6.2f} GB, {seconds:.0f} s")
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
