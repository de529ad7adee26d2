"""The benchmark runs: from a shell, by its command line, and a red check prints no speed.

What it measures is judged by its own parity checks.
"""

import importlib.util
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import limits, machines, speed
from benchmarks.machine import describe, facts
from benchmarks.report import NOT_RUN, OK, RED, Report, Result, markdown
from benchmarks.row import Check, Figure, Limits, Row
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.tiny import SIZES


ROOT = Path(__file__).resolve().parents[2]
FIGURE = Figure("thing", "other", 64, "s", 1.2345, 2.3456, 0.5263, 0.5263, 0.5263, 1)


def measured(*figures: Figure, row: str = "decode", **machine) -> Report:
    """Return a report of one row."""
    found = {**facts(), "processor": "AMD EPYC (R) 7", "cores": 2, "threads": 2, "commit": "0" * 40, "dirty": False}
    result = Result(row, "title", OK, figures=list(figures))
    return Report({**found, **machine}, "now", "python -m benchmarks.speed --json here", False, results=[result])


def test_command_line_from_a_shell(tmp_path):
    """`python -m benchmarks.speed` as a user runs it, with the rows that need no other process."""
    path, rows = tmp_path / "speed.json", ["innovation", "decode", "int8", "llama"]
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--threads", "1", "--rows", *rows]
    command += ["--dtype", "bfloat16", "--models", str(tmp_path / "models"), "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Report.from_json(path.read_text(encoding="utf-8"))
    by_row = {result.row: result for result in found.results}
    assert by_row["innovation"].status == OK and len(by_row["innovation"].figures) == 2
    steps = by_row["decode"].figures
    expected = [f"one decoding step, W={w}" for w in (64, 32, 64, 32)]
    assert [step.name for step in steps] == expected and {step.dtype for step in steps} == {"bfloat16"}
    for step in steps:
        for side in step.limits.values():
            assert 2 * side.per_layer < side.operations < 2 * side.per_layer + 60 and 0 < side.floor < 1
    for row, package in (("int8", "torchao"), ("llama", "xllamacpp")):
        if importlib.util.find_spec(package) is None:
            assert by_row[row].status == NOT_RUN and f"needs the package {package}" in by_row[row].reason
    assert found.command.endswith(f"--json {path}") and describe(found.machine) in done.stdout


def test_command_line(capsys):
    assert speed.main(["--list"]) == 0
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    expected = "scan delta kalma attention innovation prefill prefill-32k decode int8 cache storage lookup prefix train"
    assert named == f"{expected} peers llama compiled cuda-scan cuda-attention cuda-decode cuda-train".split()
    for arguments, words in (
        (["--rows", "scam"], "--rows scam: no such row; choose from scan, delta, kalma, attention"),
        (["--threads", "0"], "--threads 0: must be 1 or more"),
        (["--keep", "--quick"], "--keep with --quick: figures of small sizes say nothing; leave one of them out"),
        (["--keep", "--graft", "x"], "--keep with --source or --graft: kept figures are of the default models"),
        (["--keep", "../x"], "--keep ../x: must be lower-case letters and digits"),
    ):
        assert speed.main(arguments) == 2
        assert words in capsys.readouterr().err


def test_figures_of_a_gpu_are_not_kept():
    with pytest.raises(ValueError, match="--keep with --device cuda: kept figures are of CPUs; leave one of them out"):
        machines.check_kept("", False, "cuda", True)


def test_red_parity_prints_no_speed_and_exits_1(tmp_path, capsys):
    path = tmp_path / "speed.json"
    row = Row("red", "title", lambda context: [Check("fake check", math.nan, 1.0)], lambda context: [FIGURE])
    assert speed.main(["--json", str(path), "--threads", "1", "--quick"], [row]) == 1
    (result,) = Report.from_json(path.read_text(encoding="utf-8")).results
    assert (result.status, result.figures) == (RED, [])
    printed = "".join(capsys.readouterr())
    assert "**parity failed**: fake check" in printed and "1.23 s" not in printed


def test_optional_rows_and_rows_that_need_a_package_are_not_run(tmp_path):
    rows = [
        Row("long", "title", lambda context: [], lambda context: [], optional=True),
        Row("other", "title", lambda context: [], lambda context: [], needs="no_such_package"),
    ]
    path = tmp_path / "speed.json"
    assert speed.main(["--json", str(path), "--threads", "1"], rows) == 0
    found = Report.from_json(path.read_text(encoding="utf-8")).results
    assert [result.status for result in found] == [NOT_RUN, NOT_RUN]
    expected = ["takes long; ask for it with --rows long", "needs the package no_such_package, which is not installed"]
    assert all(words in result.reason for words, result in zip(expected, found, strict=True))


def test_limits_are_stored_and_shown():
    bounds = {"ours": Limits(10**9, "B", 1e10, 100, 30), "theirs": Limits(10**12, "FLOP", 5e11)}
    report = measured(replace(FIGURE, dtype="bfloat16", limits=bounds))
    text = report.to_json()
    assert '"floor": 0.1,' in text.replace("\n", ",") and Report.from_json(text) == report
    shown = markdown(report)
    assert "| thing | 64 | bfloat16 | ours | 100 | 30 | 100 ms | 12.3 times that | 1 GB at 10 GB/s |" in shown
    assert "| thing | 64 | bfloat16 | other |  |  | 2 s | 1.17 times that | 1e+03 GFLOP at 500 GFLOP/s |" in shown


# What bounds a figure ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("delay", [None, 4, 0])
@pytest.mark.parametrize("tokens", [3, 40])
def test_keys_seen_are_those_of_the_definition(tokens, delay):
    memory = dict(window_size=8, eidetic_size=3, fading_size=2, fading_stride=4, fading_delay=delay)
    config, waits, seen = BMojoConfig(**{**SIZES, **memory}), 8 if delay is None else delay, 0
    for query in range(tokens):
        gone = [key for key in range(query + 1) if key <= query - 8]
        made = [key for key in range(query + 1) if (key + 1) % 4 == 0 and key + waits <= query]
        seen += query + 1 - len(gone) + min(3, len(gone)) + len(made[-2:])
    assert limits.keys_seen(config, tokens) == seen
    assert limits.keys_seen(LlamaConfig(), tokens) == tokens * (tokens + 1) // 2


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_a_step_reads_them(tied):
    sizes = {**SIZES, "tie_word_embeddings": tied}
    model = BMojoForCausalLM(BMojoConfig(**sizes))
    skipped = 0 if tied else model.get_input_embeddings().weight.nbytes
    assert limits.weight_bytes(model) == sum(weight.nbytes for weight in model.parameters()) - skipped
    assert limits.weight_bytes(model.bfloat16()) * 2 == limits.weight_bytes(model.float())


def test_operations_are_those_of_the_top_level():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=3, num_attention_heads=4))
    layer = model.model.layers[1]
    layer.forward = lambda hidden, **_: torch.nn.functional.linear(hidden, hidden[0, :2]).sum(-1, keepdim=True) + hidden
    with torch.inference_mode():
        _, inside = limits.operations(model, lambda: model(torch.tensor([[1, 2, 3]]), use_cache=False))
    assert inside == 5  # select, slice, linear, sum, add: not what they call themselves
    assert not layer._forward_hooks and not layer._forward_pre_hooks


# Machines beside each other ------------------------------------------------------------------------------------------
def test_kept_files_make_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "KEPT", tmp_path)
    first = machines.keep(measured(replace(FIGURE, rounds=3, low=0.4, high=0.6)), "", ["bfloat16"], ["decode"])
    assert first.name == "amd-epyc-r-7-2-cores-2-threads-bf16.json"
    stored = Report.from_json(first.read_text(encoding="utf-8"))
    assert stored.command == "python -m benchmarks.speed --threads 2 --dtype bfloat16 --rows decode"
    other = measured(replace(FIGURE, name="else"), processor="Xeon", flags=["amx_bf16"], dirty=True)
    other.results.append(Result("scan", "title", OK, figures=[replace(FIGURE, name="not a row of a whole model")]))
    machines.keep(other, "b", ["float32"], None)
    torch_version = stored.machine["versions"]["torch"]
    assert machines.machines_table(tmp_path).splitlines() == [
        "|  | `amd-epyc-r-7-2-cores-2-threads-bf16` | `b` |",
        "| --- | --- | --- |",
        "| processor | AMD EPYC (R) 7 | Xeon |",
        f"| what it can do | {' '.join(stored.machine['flags'])} | amx_bf16 |",
        "| cores, threads | 2, 2 | 2, 2 |",
        "| commit | 0000000 | 0000000 and changes |",
        f"| torch | {torch_version} | {torch_version} |",
        "| thing, 64 tokens, fp32, against other | **0.526** [0.4, 0.6], 1.23 s |  |",
        "| else, 64 tokens, fp32, against other |  | **0.526**, 1.23 s |",
    ]
    document = tmp_path / "doc.md"
    document.write_text("a\n<!-- machines_table -->\nold\n<!-- /machines_table -->\nb\n", encoding="utf-8")
    machines.write(document, tmp_path)
    table = machines.machines_table(tmp_path)
    wanted = f"a\n<!-- machines_table -->\n{table}\n<!-- /machines_table -->\nb\n"
    assert document.read_text(encoding="utf-8") == wanted
    document.write_text("no marks\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"doc\.md: must have <!-- machines_table --> and <!-- /machines_table -->"):
        machines.write(document, tmp_path)


def test_the_option_keeps_a_run_that_passed_and_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "KEPT", tmp_path / "kept")
    for name, worst in (("fine", 0.0), ("broken", 2.0)):
        row = Row("decode", "title", lambda context, worst=worst: [Check("c", worst, 1.0)], lambda context: [FIGURE])
        arguments = ["--json", str(tmp_path / "a.json"), "--threads", "1", "--keep", name]
        assert speed.main(arguments, [row]) == int(worst > 1)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["fine.json"]


def test_the_documentation_shows_the_kept_machines():
    text = machines.DOCUMENT.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- machines_table -->\n(.*?)\n<!-- /machines_table -->", text, re.DOTALL)
    assert shown == machines.machines_table(), "run `python -m benchmarks.machines`"
