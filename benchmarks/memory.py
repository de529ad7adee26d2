"""Peak memory of one thing: measured in a fresh process, which runs nothing else.

    in_child("benchmarks.rows_scan:case", arguments, small, threads)

A case is a function that builds the inputs and returns what is to be measured as a call without arguments. The process
builds and runs it once with the arguments in `small` in place (libraries load, thread pools start), builds it as asked,
and notes the resident memory; then it runs it once. Extra memory = peak while it ran - resident memory before.

The processes are forked, one per case, from a server that has imported the libraries and done nothing else
(`python -m benchmarks.memory`: orders on stdin, findings on stdout, one line of JSON each): importing takes seconds.

The peak is VmHWM, reset just before (Linux). Not `ru_maxrss`: in a child that keeps the peak of the parent it was
forked from. Elsewhere there is only `ru_maxrss`, taken before and after: what building the inputs took at its peak is
then counted as there before. Large blocks go back to the system as soon as they are freed, for either side, unless a
whole model is measured as its users run it.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .timing import Action


ROOT = Path(__file__).resolve().parents[1]
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SERVERS: list[subprocess.Popen] = []
# glibc: blocks from 64 KiB on are mapped one by one, so freed ones do not hide in the heap and new ones are seen.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
# OpenBLAS (numpy's) starts threads when it is imported, and a process with threads must not fork.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


class Measured(NamedTuple):
    """What a child found: seconds of its one run; resident bytes before and at the peak; how they were read."""

    seconds: float
    before: int
    peak: int
    method: str

    @property
    def extra(self) -> int:
        return self.peak - self.before


def in_child(
    case: str, arguments: dict[str, Any], small: dict[str, Any], threads: int, as_users: bool = False
) -> Measured:
    """Measure a case (`"package.module:function"`) in a process of its own.

    Args:
        as_users: memory is handled as in any process. Else freed blocks go back to the system at once: exact in bytes,
            but then every block is mapped afresh, so that the seconds mean nothing.

    Raises:
        RuntimeError: the process did not end well; with its last words.
    """
    order = {"case": case, "arguments": arguments, "small": small, "threads": threads}
    found = json.loads(_ask(json.dumps(order), as_users) or '{"error": "the server of child processes has ended"}')
    if "error" in found:
        raise RuntimeError(f"{case} in a child process: {found['error']}")
    return Measured(**found)


def _ask(order: str, as_users: bool) -> str:
    """Return the server's line in answer to a line; empty if it has ended."""
    server, line = _server(as_users), ""
    try:
        server.stdin.write(order + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        if not line:  # it has ended, or we are interrupted: a late answer must not be taken for that to the next order
            close()
    return line


@functools.cache
def _server(as_users: bool) -> subprocess.Popen:
    own = {} if as_users else EXACT
    command, environment = [sys.executable, "-m", "benchmarks.memory"], {**os.environ, **ENVIRONMENT, **own}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # A session of its own, so that `close` ends the child that is at work, too.
    server = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    atexit.register(_end, server)
    SERVERS.append(server)
    return server


def close() -> None:
    """End the servers and whatever they measure; the next `in_child` starts another."""
    while SERVERS:
        _end(SERVERS.pop())
    _server.cache_clear()


def _end(server: subprocess.Popen) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def measure(case: str, arguments: dict[str, Any], small: dict[str, Any]) -> Measured:
    """Return what a child does."""
    module, _, name = case.partition(":")
    build = getattr(importlib.import_module(module), name)
    build(**{**arguments, **small})()
    action: Action = build(**arguments)
    gc.collect()
    method = reset_peak()
    before = _status("VmRSS") if method == "VmHWM" else peak_resident(method)
    start = time.perf_counter()
    result = action()  # held until the peak is read: what is returned is part of it
    seconds = time.perf_counter() - start
    peak = peak_resident(method)
    del result
    return Measured(seconds, before, peak, method)


def reset_peak() -> str:
    """Lower VmHWM to what is resident now. The method that the other readings follow: `"VmHWM"` or `"ru_maxrss"`."""
    try:
        RESET.write_text("5")
    except OSError:
        return "ru_maxrss"
    return "VmHWM"


def peak_resident(method: str) -> int:
    """Most bytes resident since `reset_peak`, or since the process began."""
    if method == "VmHWM":
        return _status("VmHWM")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(name: str) -> int:
    """Return bytes of a field of /proc/self/status."""
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{STATUS} has no {name}.")


def answer(order: dict[str, Any]) -> dict[str, Any]:
    """Return what a child says: its findings, or why there are none."""
    try:
        torch.set_num_threads(order["threads"])
        return measure(order["case"], order["arguments"], order["small"])._asdict()
    except Exception as error:  # the parent raises it again, whatever it is
        return {"error": f"{type(error).__name__}: {error}"}


def serve() -> None:
    """Fork a child per order. Only imports happen here: no tensor, no thread."""
    for line in sys.stdin:
        order = json.loads(line)
        importlib.import_module(order["case"].partition(":")[0])
        child = os.fork()
        if child == 0:
            print(json.dumps(answer(order)), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            words = f"killed by signal {os.WTERMSIG(status)} (9: most likely out of memory)"
            print(json.dumps({"error": words}), flush=True)


if __name__ == "__main__":
    serve()
