"""The source with a cache that a method we did not write compresses to the bytes of our memory: NVIDIA's kvpress.

It needs an older transformers, so it runs in an environment of its own (`make .venvs/kvpress/.have`), where
`press_worker.py` answers prompts that come by a pipe. Only RULER's tasks are measured so: a press compresses a context
that was read in one piece, once, before the question.
"""

import copy
import hashlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .ruler import Prompts, end_tokens, sample_of
from .ruler_tasks import TASKS


WORKER = Path(__file__).with_name("press_worker.py")
START = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](*sys.argv[2:])"
LEAST = 64  # tokens of a context that every press can work with (SnapKV looks at the last 64)


CHECK = """
import importlib.metadata, json, sys, kvpress
def fails(name):
    try:
        getattr(kvpress, name)(compression_ratio=0.5)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
known = [name for name in dir(kvpress) if name.endswith("Press")]
versions = {}
for name in ("kvpress", "transformers", "torch"):
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = "unknown"
print(json.dumps([known, {name: fails(name) for name in sys.argv[1:] if name in known}, versions]))
"""


def check_presses(python: str, names: list[str]) -> dict[str, Any]:
    """Refuse before the work what would fail behind it; return what decides the answers beside press and prompt.

    Raises:
        ValueError: `python` cannot import kvpress, has no such press, or one that wants more than a ratio.
    """
    command = [python, "-c", CHECK, *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    except OSError as error:
        raise ValueError(f"press_python={python!r}: cannot be run ({error}); make .venvs/kvpress/.have.") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"press_python={python!r}: cannot import kvpress ({last}); make .venvs/kvpress/.have.")
    known, failed, versions = json.loads(done.stdout.splitlines()[-1])
    wrong = sorted(set(names) - set(known))
    if wrong:
        raise ValueError(f"presses: {wrong} are not in kvpress; known are {known}.")
    for name, error in failed.items():
        if error:
            raise ValueError(f"presses: {name} cannot be made from a compression ratio alone ({error}); leave it out.")
    return {"versions": versions, "worker": hashlib.sha256(WORKER.read_bytes()).hexdigest()}


def _environment() -> dict[str, str]:
    """Return this process's environment without what would lead the other Python to our packages."""
    kept = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


class PressedSource(nn.Module):
    """A worker that holds the source and answers prompts; a module only in name, so that rows are handled alike.

    Args:
        python: of the environment with kvpress. press: name of the class. model: the source, which may be forgotten.

    Raises:
        ValueError: the worker does not start.
    """

    def __init__(self, python: str, press: str, model: nn.Module, tokenizer: Any, dtype: torch.dtype):
        super().__init__()
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.per_token = 2 * config.num_key_value_heads * head_dim * config.num_hidden_layers * dtype.itemsize
        self.press, self.ends = press, sorted(end_tokens(model))
        self.folder = tempfile.TemporaryDirectory(prefix="pressed-")
        _save_plain(model, self.folder.name)
        tokenizer.save_pretrained(self.folder.name)
        device = next(model.parameters()).device
        command = [
            python,
            "-c",
            START,
            str(WORKER),
            self.folder.name,
            press,
            str(dtype).removeprefix("torch."),
            str(device),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.worker = subprocess.Popen(command, text=True, env=_environment(), **pipes)
        self._read()

    def solve(self, prompts: Prompts, task: str, length: int, index: int, held: int) -> dict[str, Any]:
        """Answer one sample as `ruler.solve` does, with a cache of `held` bytes behind the question.

        Raises:
            ValueError: the press fails, or so few bytes hold no context.
        """
        prompt = prompts.make(task, length, index)
        behind = len(prompt.ids) - prompt.context
        kept = held // self.per_token - behind
        if kept < LEAST:
            raise ValueError(
                f"presses: {held:,} bytes hold {held // self.per_token} tokens, of which the question takes "
                f"{behind}; compare with a larger memory."
            )
        asked = {"ids": prompt.ids, "context": prompt.context, "answers": prompt.answers, "ends": self.ends}
        asked |= {"new_tokens": TASKS[task].new_tokens, "removed": max(0.0, 1 - kept / prompt.context)}
        self.worker.stdin.write(json.dumps(asked) + "\n")
        self.worker.stdin.flush()
        found = self._read()
        if "error" in found:
            raise ValueError(f"presses: {self.press} failed: {found['error']}.")
        most = held + (TASKS[task].new_tokens + 1) * self.per_token
        if found["bytes"] > most and asked["removed"]:
            raise ValueError(
                f"presses: {self.press} left a cache of {found['bytes']:,} bytes where {most:,} were allowed: it masks "
                "what it does not keep, or keeps more; leave it out."
            )
        return sample_of(prompt, found["said"], found["bytes"])

    def _read(self) -> dict[str, Any]:
        for line in self.worker.stdout:  # what a library prints is not ours
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(f"presses: the worker of {self.press} ended with status {self.worker.wait()}; see its output.")

    def __del__(self):
        worker = getattr(self, "worker", None)
        if worker is not None:
            worker.kill()
            worker.wait()


def _save_plain(model: nn.Module, folder: str) -> None:
    """Write a model as an ordinary checkpoint, whatever it was loaded from (one from a GGUF file refuses)."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
