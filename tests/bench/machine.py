"""One line that says on what a figure was measured."""

import os
import platform
import subprocess

import torch
import transformers


def describe() -> str:
    """Commit, cores and threads, versions."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"commit {commit.stdout.strip() or 'unknown'}, {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
