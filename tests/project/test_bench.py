"""The benchmark runs: from a shell, by its command line, and a red check prints no speed.

What it measures is judged by its own parity checks.
"""

import math
import subprocess
import sys
from pathlib import Path

from benchmarks import speed
from benchmarks.machine import describe
from benchmarks.report import OK, RED, Report
from benchmarks.row import Check, Figure, Row


ROOT = Path(__file__).resolve().parents[2]


def test_command_line_from_a_shell(tmp_path):
    """`python -m benchmarks.speed` as a user runs it, with the one row that needs no other process."""
    path = tmp_path / "speed.json"
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--threads", "1", "--rows", "innovation"]
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Report.from_json(path.read_text(encoding="utf-8"))
    assert found.results[0].status == OK and len(found.results[0].figures) == 2
    assert found.command.endswith(f"--json {path}") and describe(found.machine) in done.stdout


def test_command_line(capsys):
    assert speed.main(["--list"]) == 0
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    expected = "scan delta kalma attention innovation prefill decode cache storage lookup prefix train peers compiled"
    assert named == expected.split() + ["cuda-scan", "cuda-attention", "cuda-decode", "cuda-train"]
    for arguments, words in (
        (["--rows", "scam"], "--rows scam: no such row; choose from scan, delta, kalma, attention"),
        (["--threads", "0"], "--threads 0: must be 1 or more"),
    ):
        assert speed.main(arguments) == 2
        assert words in capsys.readouterr().err


def test_red_parity_prints_no_speed_and_exits_1(tmp_path, capsys):
    figure = Figure("thing", "other", 64, "s", 1.2345, 2.3456, 0.5263, 0.5263, 0.5263, 1)
    path = tmp_path / "speed.json"
    row = Row("red", "title", lambda context: [Check("fake check", math.nan, 1.0)], lambda context: [figure])
    assert speed.main(["--json", str(path), "--threads", "1", "--quick"], [row]) == 1
    (result,) = Report.from_json(path.read_text(encoding="utf-8")).results
    assert (result.status, result.figures) == (RED, [])
    printed = "".join(capsys.readouterr())
    assert "**parity failed**: fake check" in printed and "1.23 s" not in printed
