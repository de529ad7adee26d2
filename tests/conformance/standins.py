"""What transformers' common tests import and its source distribution leaves out, as far as they use it.

GenerationTesterMixin, ExportTesterMixin   the tests of generate() and of export: tests/modeling/test_generate.py,
                                           test_generate_modes.py and test_export.py cover what they check
config_common_kwargs                       fields that every configuration takes
run_distributed and its parts              processes on the CPU, connected by gloo
"""

import functools
import json
import multiprocessing
import os
import tempfile
import traceback

import torch
import torch.distributed as dist


class ExportTesterMixin:
    """Empty: there are none."""


class GenerationTesterMixin:
    """Empty: there are none."""


# Values other than the defaults, as transformers' ConfigTester sets them and reads them back.
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
}


def get_distributed_device_type() -> str:
    return "cpu"


def get_distributed_backend() -> str:
    return "gloo"


def get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def set_rank_device(rank: int) -> None:
    """None: there is one CPU."""


@functools.cache
def _context():
    """Processes that begin with everything imported: to import it takes each ten seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.conformance.preloaded"])
    return context


def start_rank_processes(function, args: tuple = (), nprocs: int = 1) -> None:
    """Run `function(rank, *args)` in as many processes.

    Raises:
        RuntimeError: for a process that does not end well.
    """
    ranks = [_context().Process(target=function, args=(rank, *args)) for rank in range(nprocs)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        raise RuntimeError(f"exit codes of the ranks: {codes}")


def run_distributed(world_size: int = 2):
    """Return what turns `function(rank, *args)` into a function of `args` that runs it in connected processes."""

    def decorate(function):
        def run(*args, **kwargs) -> None:
            with tempfile.TemporaryDirectory() as folder:
                start_rank_processes(_connected, (world_size, folder, function, args, kwargs), world_size)
                reports = [_read(os.path.join(folder, f"{rank}.json")) for rank in range(world_size)]
            errors = [error for error in reports if error]
            if errors:
                raise AssertionError("\n".join(errors))

        return run

    return decorate


def _read(path: str) -> str | None:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _connected(rank: int, world_size: int, folder: str, function, args: tuple, kwargs: dict) -> None:
    for name, value in {"WORLD_SIZE": world_size, "RANK": rank, "LOCAL_RANK": rank}.items():
        os.environ[name] = str(value)
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    error = None
    try:
        function(rank, *args, **kwargs)
    except BaseException:
        error = f"rank {rank}:\n{traceback.format_exc()}"
    with open(os.path.join(folder, f"{rank}.json"), "w", encoding="utf-8") as file:
        json.dump(error, file)
    # Not taken down: torch joins gloo's threads while it holds the GIL, which now and then never ends.
    os._exit(0)
