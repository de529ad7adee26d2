"""Kills programs at every file event, and fills their disk: `make test-faults`, or `python -m tests.faults`.

    python -m tests.faults [--every K] [--only NAME ...] [--modes kill torn full]

Each scenario (scenarios.py) runs undisturbed once; its file events (events.py) are the points of disturbance: some of
every kind, or each K-th. There a forked process is killed, or gets no more space. Then the programs are run as a user
would run them, and

- every run ends with status 0, or with 2 and one message; a full disk is such a message too
- what they have written in the end is, bit for bit, what the undisturbed run wrote, and nothing else lies around.

torch and transformers are imported once; every run is a fork of this process. Linux only.
"""

import argparse
import gc
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import conftest  # noqa: F401  (no network, one thread)
from tests.faults.events import FILLED, TAKES_SPACE, Watch
from tests.faults.scenarios import Scenario, all_scenarios, outcome


MODES = ("kill", "torn", "full")


class Run:
    """What a forked process left: its status (negative: killed), what it printed, what it returned."""

    def __init__(self, status: int, said: str, value: Any):
        self.status, self.said, self.value = status, said, value


def forked(work: Callable[[], Any]) -> Run:
    """Runs `work` in a fork of this process; its exit status is what `work` returns first."""
    with tempfile.TemporaryDirectory() as folder:
        said, answer = Path(folder) / "said", Path(folder) / "answer"
        child = os.fork()
        if child == 0:
            with said.open("wb", buffering=0) as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            status = 70
            try:
                status, value = work()
                answer.write_bytes(pickle.dumps(value))
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        value = pickle.loads(answer.read_bytes()) if answer.is_file() else None
        return Run(os.waitstatus_to_exitcode(ended), said.read_text(errors="replace"), value)


def run_watched(scenario: Scenario, work: Path, at: int | None, mode: str) -> Run:
    """The scenario's program, disturbed at event `at`; returns the events that it met."""

    def program() -> tuple[int, list]:
        watch = Watch(work, at, mode)
        watch.start()
        status = scenario.program.main(scenario.command(work, scenario.run))
        return status, watch.events

    return forked(program)


def complaint(run: Run) -> str | None:
    """What is wrong with how a run that was not killed has ended."""
    if "Traceback" in run.said or run.status not in (0, 2):
        return f"status {run.status} and no message of ours:\n{run.said[-3000:]}"
    messages = sum(line.startswith("error: ") for line in run.said.splitlines())
    return (
        None if messages == (run.status == 2) else f"{messages} messages with status {run.status}:\n{run.said[-2000:]}"
    )


def go_on(scenario: Scenario, work: Path, expected: dict[str, Any]) -> str | None:
    """Runs the programs as a user would after the disturbance; returns what is wrong in the end."""
    refusals = []
    for arguments in scenario.afterwards:
        run = forked(lambda arguments=arguments: (scenario.program.main(scenario.command(work, arguments)), None))
        wrong = complaint(run)
        if wrong:
            return wrong
        if run.status == 0:
            break
        refusals.append(next(line for line in run.said.splitlines() if line.startswith("error: ")))
        if "already holds" in refusals[-1]:
            break
    else:
        return "no way out:\n" + "\n".join(refusals)
    return difference(outcome(work), expected)


def difference(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    kinds = ["missing" if name not in found else "left over" if name not in expected else "other" for name in names]
    return "; ".join(f"{name}: {kind}" for name, kind in zip(names, kinds)) or None


def kind_of(name: str, path: str) -> tuple[str, str]:
    """Event and file, where nothing tells apart steps, shards, random names, and the files of a result or a checkpoint
    besides weights, states and accounts.
    """
    path = re.sub(r"partial-[0-9a-f-]+|[0-9a-f]{12}|\d+", "N", path)
    another = re.search(r"[.-]N/", path) and not re.search(r"safetensors|report|/files\.json|state\.", path)
    return name, "another file of a result or a checkpoint" if another and name != "torch.save" else path


def points(events: list[tuple[str, str]], modes: list[str], every: int) -> list[tuple[int, str]]:
    """Where to disturb, and how: each `every`-th event of those at which a mode can do anything.

    0: the first event of every kind, and to kill at, the last one.
    """
    kinds: dict[tuple, list[int]] = {}
    for number, (name, path) in enumerate(events):
        kinds.setdefault(kind_of(name, path), []).append(number)
    first, last = ([numbers[place] for numbers in kinds.values()] for place in (0, -1))
    found = []
    for mode in modes:
        chosen = range(0, len(events), every) if every else sorted({*first, *(last if mode == "kill" else [])})
        able = {"kill": None, "torn": FILLED, "full": TAKES_SPACE}[mode]
        found += [(number, mode) for number in chosen if able is None or events[number][0] in able]
    return found


def disturb(scenario: Scenario, folder: Path, modes: list[str], every: int) -> tuple[int, list[str]]:
    """Number of disturbances, and what went wrong."""
    before, work = folder / "before", folder / "work"
    prepared = forked(lambda: ((scenario.prepare(before) and 0) or 0, None))
    assert prepared.status == 0, prepared.said
    shutil.copytree(before, work)
    run = run_watched(scenario, work, None, "kill")
    assert run.status == 0, run.said
    expected, events, failures = outcome(work), run.value, []
    chosen = points(events, modes, every)[:: 1 if every else scenario.share]
    for number, mode in chosen:
        shutil.rmtree(work)
        shutil.copytree(before, work)
        run = run_watched(scenario, work, number, mode)
        if mode != "full":
            wrong = None if run.status == -signal.SIGKILL else f"was not killed: {run.status}\n{run.said[-2000:]}"
        else:
            wrong = complaint(run)
        wrong = wrong or go_on(scenario, work, expected)
        if wrong:
            failures.append(f"{scenario.name}: {mode} at event {number}, {' '.join(events[number])}: {wrong}")
            print(failures[-1], flush=True)
    shutil.rmtree(folder)
    return len(chosen), failures


def side_by_side(scenarios: list[Scenario], folder: Path, modes: list[str], every: int, at_once: int):
    """What `disturb` returns of each scenario, in the order in which they end; each in a process of its own."""
    waiting, running = list(enumerate(scenarios)), {}
    while waiting or running:
        while waiting and len(running) < at_once:
            number, scenario = waiting.pop(0)
            own, answer = folder / f"scenario-{number}", folder / f"answer-{number}"
            own.mkdir()
            child = os.fork()
            if child == 0:
                status = 70
                try:
                    start = time.monotonic()
                    count, wrong = disturb(scenario, own, modes, every)
                    answer.write_bytes(pickle.dumps((count, wrong)))
                    seconds = time.monotonic() - start
                    print(f"{scenario.name}: {count} disturbances, {len(wrong)} failed; {seconds:.0f} s", flush=True)
                    status = 0
                except BaseException:
                    import traceback

                    traceback.print_exc()
                finally:
                    os._exit(status)
            running[child] = (scenario, answer)
        child, _ = os.wait()
        scenario, answer = running.pop(child)
        yield (
            pickle.loads(answer.read_bytes()) if answer.exists() else (0, [f"{scenario.name}: did not come to its end"])
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=0, help="each K-th event; 1: all (default: some of every kind)")
    parser.add_argument("--only", nargs="+", help="names of scenarios")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--at-once", type=int, default=min(os.cpu_count() or 1, 4), help="scenarios side by side")
    given = parser.parse_args()
    begin, total, failures = time.monotonic(), 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [each for each in all_scenarios(folder) if not given.only or each.name in given.only]
        gc.collect()
        gc.freeze()  # the Trainer collects garbage: not once more among all that was imported, in every fork
        for count, wrong in side_by_side(chosen, folder, given.modes, given.every, given.at_once):
            total, failures = total + count, failures + wrong
    print(f"{total} disturbances, {len(failures)} failed; {time.monotonic() - begin:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
