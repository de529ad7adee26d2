"""What the first minutes on a GPU must show: `make gpu-check`, or `python -m benchmarks.gpu_check`.

    python -m benchmarks.gpu_check [--device cuda|cpu] [--tiny] [--steps NAME ...] [--minutes 9.5] [--output FOLDER]

explain  which implementation of every operation runs on this device, and why not a faster one
parity   whole models on the device against the same on the CPU in float64: logits, gradients, steps behind a prefill
batch    8 rows of several lengths, padded left: each as alone, and the text that generate() writes
storage  every token stored, on the device, in host memory and in a directory, against the CPU in float64
kernels  the tests of the Triton kernels and of the installed packages, compiled and on the device
speed    the rows of benchmarks.speed for a GPU, in small sizes

FOLDER gets report.json and report.md, anew after each step; what does not fit into the time is reported as not run.
`--device cpu --tiny` runs all of it on a CPU, to see that the check itself works.
Exit status: 0 every step passed, 1 one did not, or had no time, 2 refused with a message.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from modeling_bmojo import CACHE_NAME, BMojoCache, BMojoConfig, BMojoForCausalLM, cache_of, explain_kernels

from .machine import ROOT, describe, facts
from .report import beside
from .row import Check, difference


OK, FAILED, NO_TIME = "ok", "failed", "no time"
EXACT, SINGLE = 1e-9, 1e-3  # largest difference as a share of the largest logit: float64, float32
KERNEL_TESTS = ("tests/modeling/kernels/test_kernels.py", "tests/modeling/kernels/test_dispatch_parity.py")
INTERPRETED = f"{KERNEL_TESTS[0]}::test_the_kernels_interpreted_on_the_cpu"
SPEED_ROWS = ("cuda-scan", "cuda-attention", "cuda-decode", "cuda-train")
# In the models: what decides which token is kept. In float32 near ties would be decided differently, so there the first
# tokens are kept ("constant").
DECIDING = {"key": {"innovation": "key"}, "output": {"innovation": "output"}, "mamba": {"ssm_type": "mamba"}}
STORED = dict(innovation="constant", eidetic_size=0, storage_size=8, fading_mass=True, fading_stride=4)


@dataclass
class Step:
    """One line of the report. seconds: it took. checks: differences and what they may be. notes: what else was seen."""

    name: str
    status: str = NO_TIME
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        """Return what the table says of it: the check that failed, or the one nearest to its limit, and the notes."""
        worst = max(self.checks, key=lambda check: check.difference / check.tolerance, default=None)
        said = [f"{worst.what}: {worst.difference:.1e}, at most {worst.tolerance:.0e}"] if worst else []
        return "; ".join([*(f"{len(self.checks)} checks" for _ in said), *said, *self.notes])


@dataclass(frozen=True)
class Job:
    """device, tiny: of the command line. end: when all must be over, of `time.monotonic`. folder: of the report."""

    device: str
    tiny: bool
    end: float
    folder: Path

    def model(self, dtype: torch.dtype = torch.float64, device: str | None = None, **fields) -> BMojoForCausalLM:
        """Return the model of a seed, the same on every device: small, with all three memories."""
        size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, window_size=8, eidetic_size=3)
        if not self.tiny:
            size = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, window_size=64, eidetic_size=16)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, fading_size=2, ssm_state_size=16)
        torch.manual_seed(0)
        config = BMojoConfig(vocab_size=97, **{**size, **heads, **fields}, pad_token_id=0)
        return BMojoForCausalLM(config).to(device or self.device, dtype).eval()

    def ids(self, rows: int = 1) -> torch.Tensor:
        """Return `[rows, T]` tokens, four windows and some of them, on the CPU."""
        tokens = 37 if self.tiny else 301
        return torch.randint(1, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


def explain(job: Job, step: Step) -> None:
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    for row in explain_kernels(BMojoConfig(), job.device, dtype):
        step.notes.append(f"{row.operation}: {row.inference}")


def parity(job: Job, step: Step) -> None:
    ids = job.ids()
    for name, fields in DECIDING.items():
        compare(job, step, f"{name}, float64", ids, torch.float64, EXACT, fields)
    compare(job, step, "float32", ids, torch.float32, SINGLE, {"innovation": "constant"})


def compare(job: Job, step: Step, name: str, ids: torch.Tensor, dtype: torch.dtype, most: float, fields: dict) -> None:
    """Check logits, the gradient of the embedding, and steps behind a prefill."""
    ours, oracle, here = job.model(dtype, **fields), job.model(device="cpu", **fields), ids.to(job.device)
    outs = [model(given, labels=given, use_cache=False) for model, given in ((ours, here), (oracle, ids))]
    for out in outs:
        out.loss.backward()
    grads = [model.model.embed_tokens.weight.grad.double().cpu() for model in (ours, oracle)]
    wanted = outs[1].logits.detach()
    step.checks.append(Check(f"logits, {name}", difference(outs[0].logits.detach().double().cpu(), wanted), most))
    step.checks.append(Check(f"gradient, {name}", difference(*grads), 10 * most))
    cache = BMojoCache(ours.config)
    with torch.no_grad():
        ours(here[:, :-8], **{CACHE_NAME: cache})
        steps = [ours(here[:, t : t + 1], **{CACHE_NAME: cache}).logits for t in range(ids.shape[1] - 8, ids.shape[1])]
    step.checks.append(Check(f"steps, {name}", difference(torch.cat(steps, 1).double().cpu(), wanted[:, -8:]), most))


@torch.no_grad()
def batch(job: Job, step: Step) -> None:
    model, ids = job.model(), job.ids(8)
    total = ids.shape[1]
    mask = torch.ones_like(ids)
    for row in range(8):
        mask[row, : row * total // 12] = 0
    ids = (ids * mask).to(job.device)
    mask = mask.to(job.device)
    together = model(ids, attention_mask=mask, use_cache=False).logits
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    texts = model.generate(ids, attention_mask=mask, **options)[:, total:]
    for row in range(8):
        alone = ids[row : row + 1, row * total // 12 :]
        wanted = model(alone, use_cache=False).logits
        step.checks.append(
            Check(f"row {row} as alone", difference(together[row : row + 1, -alone.shape[1] :], wanted), EXACT)
        )
        text = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0, alone.shape[1] :]
        step.checks.append(Check(f"text of row {row}, tokens that differ", float((texts[row] != text).sum()), 0.5))


@torch.no_grad()
def storage(job: Job, step: Step) -> None:
    ids = job.ids()
    here = ids.to(job.device)
    ours, plain = job.model(**STORED), job.model(**{**STORED, "storage_size": 0, "fading_mass": False})
    wanted = job.model(device="cpu", **STORED)(ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        places = {
            "on the device": {},
            "in host memory": {"storage_on_host": True},
            "in a directory": {"storage": folder},
        }
        for name, place in places.items():
            cache, parts = BMojoCache(ours.config, **place), []
            for begin in (0, ids.shape[1] // 2, *range(ids.shape[1] - 4, ids.shape[1])):
                end = (
                    begin + 1 if begin >= ids.shape[1] - 4 else (ids.shape[1] // 2 if begin == 0 else ids.shape[1] - 4)
                )
                parts.append(ours(here[:, begin:end], **{CACHE_NAME: cache}).logits)
            step.checks.append(Check(f"stored {name}", difference(torch.cat(parts, 1).cpu(), wanted), EXACT))
            if cache.directory is not None:
                cache.directory.close()
    seconds = {}
    for name, model in (("stored", ours), ("plain", plain)):
        cache = cache_of(model(here, use_cache=True))
        begin = time.perf_counter()
        for _ in range(8):
            out = model(here[:, :1], **{CACHE_NAME: cache})
        out.logits.sum().item()  # waits for the device
        seconds[name] = (time.perf_counter() - begin) / 8
    step.notes.append(f"a token {seconds['stored'] * 1e3:.1f} ms stored, {seconds['plain'] * 1e3:.1f} ms without")


def kernels(job: Job, step: Step) -> None:
    # On a CPU they are interpreted, which takes minutes; that is what `make test` is for.
    chosen = [f"{KERNEL_TESTS[0]}::test_no_queries"] if job.tiny else [*KERNEL_TESTS, "--deselect", INTERPRETED]
    run_command(job, step, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen])


def speed(job: Job, step: Step) -> None:
    rows = SPEED_ROWS if job.device == "cuda" else ("innovation",)
    path = job.folder / "speed.json"
    command = ["-m", "benchmarks.speed", "--quick", "--threads", "1", "--device", job.device, "--json", str(path)]
    run_command(job, step, [*command, "--rows", *rows])
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"results": []}
    step.notes += [f"{each['name']}: {each['status']} {each['reason']}".strip() for each in found["results"]]


def run_command(job: Job, step: Step, command: Sequence[str]) -> None:
    """Run a program of this checkout until it or the time is over; its last line, or what went wrong, is a note."""
    left = job.end - time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=max(left, 1), check=False
        )
    except subprocess.TimeoutExpired:
        step.notes.append(f"stopped after {max(left, 1):.0f} s")
        step.checks.append(Check("exit status", float("inf"), 0.5))
        return
    said = (done.stdout.strip() or done.stderr.strip()).splitlines() or [""]
    if done.returncode:
        step.notes += [line for line in said if line.startswith(("FAILED", "ERROR", "E  "))][:5]
    if command[1] == "pytest":
        step.notes.append(said[-1].strip("= "))
    step.checks.append(Check("exit status", float(done.returncode), 0.5))


STEPS: dict[str, Callable[[Job, Step], None]] = {
    "explain": explain,
    "parity": parity,
    "batch": batch,
    "storage": storage,
    "kernels": kernels,
    "speed": speed,
}


def run_step(job: Job, step: Step) -> None:
    """Run one step; an error of any kind ends it and not the others."""
    begin = time.monotonic()
    try:
        STEPS[step.name](job, step)
        step.status = OK if all(check.passed for check in step.checks) else FAILED
        step.notes += [f"{c.what}: {c.difference:.1e}" for c in step.checks if not c.passed][:5]
    except Exception as error:  # reported, and exits 1; the other steps tell where it comes from
        step.status = FAILED
        step.notes.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
    step.seconds = time.monotonic() - begin


def table(steps: Sequence[Step], machine: dict) -> str:
    """Return the report for people."""
    rows = "\n".join(f"| {s.name} | {s.status} | {s.seconds:.0f} s | {s.told.replace('|', '/')} |" for s in steps)
    return f"# GPU check\n\n{describe(machine)}\n\n| step | state | time | seen |\n|---|---|---|---|\n{rows}\n"


def save(job: Job, steps: Sequence[Step], machine: dict) -> str:
    """Write both files, each whole, and return the table."""
    text = table(steps, machine)
    values = {"machine": machine, "device": job.device, "tiny": job.tiny, "steps": [asdict(step) for step in steps]}
    plain = json.dumps(values, indent=1).replace(": Infinity", ": null").replace(": NaN", ": null")
    for name, content in (("report.json", plain), ("report.md", text)):
        with beside(job.folder / name) as partial:
            partial.write_text(content, encoding="utf-8")
    return text


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line.

    Raises:
        ValueError: a device that is not there, or no time.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that the check itself works")
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=tuple(STEPS), help="only these")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (default: 9.5)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu-check", help="folder of the report")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        raise ValueError(f"--minutes {arguments.minutes}: must be above 0.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch finds no CUDA device here; run it where there is one (a CUDA build of torch, "
            "a driver), or see on a CPU that the check itself works: make gpu-check ARGS='--device cpu --tiny'."
        )
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check and return its exit status."""
    try:
        arguments = parse_arguments(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    budget = arguments.minutes * 60
    job = Job(arguments.device, arguments.tiny, time.monotonic() + budget, arguments.output.absolute())
    machine, steps = facts(job.device), [Step(name) for name in STEPS if name in arguments.steps]

    def give_up() -> None:  # a call that the GPU never answers cannot be ended otherwise
        print(
            save(job, steps, machine) + "\nerror: the time is over and a step does not end", file=sys.stderr, flush=True
        )
        os._exit(1)

    watch = threading.Timer(budget + 20, give_up)
    watch.daemon = True
    watch.start()
    for step in steps:
        if time.monotonic() < job.end:
            print(f"{step.name} ...", file=sys.stderr, flush=True)
            run_step(job, step)
        text = save(job, steps, machine)
    watch.cancel()
    print(text + f"\nWritten to {job.folder}")
    return int(any(step.status != OK for step in steps))


if __name__ == "__main__":
    sys.exit(main())
