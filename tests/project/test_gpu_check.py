"""`make gpu-check` on a CPU: every step runs in tiny sizes, a wrong result is red, and without a GPU it says so."""

import json
import math

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.row import Check


TINY = ["--device", "cpu", "--tiny"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path / "out")]) == 2
    assert "error: --device cuda: torch finds no CUDA device here; run it where there is one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert gpu_check.main([*TINY, "--minutes", "0"]) == 2
    assert "--minutes 0.0: must be above 0" in capsys.readouterr().err


def test_every_step_runs_on_a_cpu(tmp_path, monkeypatch, capsys):
    """The programs that two steps start are tested by their own tests; here they are what is started in their place."""
    started = []

    def run_command(job, step, command):
        started.append(command)
        step.checks.append(Check("exit status", 0.0, 0.5))

    monkeypatch.setattr(gpu_check, "run_command", run_command)
    assert gpu_check.main([*TINY, "--output", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "report.md").read_text(encoding="utf-8") in table
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    steps = {step["name"]: step for step in report["steps"]}
    assert list(steps) == list(gpu_check.STEPS) and {step["status"] for step in steps.values()} == {"ok"}
    assert [len(steps[name]["checks"]) for name in ("parity", "batch", "storage")] == [12, 16, 3]
    assert any(note.startswith("memory_attention: torch") for note in steps["explain"]["notes"])
    assert [command[1] for command in started] == ["pytest", "benchmarks.speed"]
    assert report["tiny"] and report["device"] == "cpu" and report["machine"]["commit"]


def test_wrong_results_are_red_and_do_not_end_the_check(tmp_path, monkeypatch):
    real = gpu_check.Job.model

    def model(job, dtype=torch.float64, device=None, **fields):
        made = real(job, dtype, device, **fields)
        if device == "cpu":  # the oracle of parity and storage is another model than what it judges
            with torch.no_grad():
                made.model.norm.weight[0] += 0.1
        return made

    monkeypatch.setattr(gpu_check.Job, "model", model)
    monkeypatch.setitem(gpu_check.STEPS, "explain", lambda job, step: 1 / 0)
    assert gpu_check.main([*TINY, "--output", str(tmp_path), "--steps", "explain", "parity", "storage"]) == 1
    steps = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["steps"]
    assert [step["status"] for step in steps] == ["failed"] * 3
    assert steps[0]["notes"] == ["ZeroDivisionError: division by zero"]


def test_programs_are_started_ended_in_time_and_believed(tmp_path):
    broken = "print('FAILED a'); raise SystemExit(3)"
    for code, passed, notes in (("print('said')", True, []), (broken, False, ["FAILED a"])):
        step = gpu_check.Step("kernels")
        gpu_check.run_command(gpu_check.Job("cpu", True, gpu_check.time.monotonic() + 60, tmp_path), step, ["-c", code])
        assert [check.passed for check in step.checks] == [passed] and step.notes == notes
    step = gpu_check.Step("kernels")
    late = gpu_check.Job("cpu", True, gpu_check.time.monotonic() - 1, tmp_path)
    gpu_check.run_command(late, step, ["-c", "import time; time.sleep(60)"])
    assert not step.checks[0].passed and step.notes == ["stopped after 1 s"]


@pytest.mark.parametrize("device, rows", [("cuda", gpu_check.SPEED_ROWS), ("cpu", ("innovation",))])
def test_what_is_started_is_there(tmp_path, monkeypatch, device, rows):
    from benchmarks.speed import ROWS

    commands = []
    monkeypatch.setattr(gpu_check, "run_command", lambda job, step, command: commands.append(command))
    for name, tiny in (("speed", False), ("kernels", False), ("kernels", True)):
        gpu_check.STEPS[name](gpu_check.Job(device, tiny, math.inf, tmp_path), gpu_check.Step(name))
    known = {row.name: row.device for row in ROWS}
    assert commands[0][-len(rows) :] == list(rows) and {known[name] for name in rows} == {device}
    for place in (word for command in commands[1:] for word in command if word.startswith("tests/")):
        file, _, test = place.partition("::")
        text = (gpu_check.ROOT / file).read_text(encoding="utf-8")
        assert f"def {test or 'test_'}" in text


def test_time_that_is_over_is_reported(tmp_path, capsys):
    assert gpu_check.main([*TINY, "--minutes", "1e-9", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("| no time |") == len(gpu_check.STEPS)
