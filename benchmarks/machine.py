"""On what a figure was measured: commit, machine, threads, versions."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parents[1]
# What decides how fast products are: of x86 and of ARM.
FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "sve", "bf16", "i8mm"),
)
PACKAGES = (
    *("torch", "transformers", "triton", "numpy", "torchao", "xllamacpp"),
    *("mamba-ssm", "causal-conv1d", "flash-attn"),
)


def facts(device: str = "cpu") -> dict[str, Any]:
    """Plain data, for JSON; `describe` says it in words."""
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(_git("status", "--porcelain")),
        "processor": _cpu("model name") or platform.processor() or "an unnamed processor",
        "flags": [flag for flag in FLAGS if flag in (_cpu("flags") or _cpu("Features")).split()],
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def describe(machine: dict[str, Any]) -> str:
    """One line."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = "".join(f", {flag}" for flag in machine["flags"])
    dirty = " with uncommitted changes" if machine["dirty"] else ""
    return (
        f"commit {machine['commit'][:12]}{dirty}; {machine['cores']} cores of {machine['processor']} "
        f"({machine['architecture']}{flags}, {machine['system']}), {machine['memory_bytes'] / 1e9:.0f} GB, device "
        f"{machine['device']}, {machine['threads']} threads; Python {machine['python']}, {versions}"
    )


def _git(*arguments: str) -> str:
    """Return what git says, empty outside a checkout."""
    try:
        said = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""


def _cpu(field: str) -> str:
    """Return what Linux says of the first core, empty if nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    said = [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field]
    return said[0] if said else ""


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
