"""The benchmark as a program: its statistics, what it prints and keeps, and that a red check prints no speed.

What it measures is judged by its own parity checks; here only that it would notice.
"""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench import adapters, memory, report, rows_attention, rows_memory, rows_model, rows_scan, speed
from tests.bench.machine import describe, facts
from tests.bench.models import Models, load
from tests.bench.report import FAILED, NOT_RUN, OK, RED, Report, Result
from tests.bench.row import GOALS, Check, Context, Figure, Row, difference, figure
from tests.bench.timing import SHORTEST, Plan, alternate, compare


ROOT = Path(__file__).resolve().parents[1]


class Clock:
    """Time that moves only when an action says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def action(self, name: str, seconds: float, diary: list[str]):
        def act() -> None:
            diary.append(name)
            self.now += seconds

        return act


# Timing --------------------------------------------------------------------------------------------------------------
def test_alternate_turns_the_order_round():
    clock, diary = Clock(), []
    actions = {name: clock.action(name, seconds, diary) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    seconds = alternate(actions, Plan(least=3, most=3, budget=0), clock=clock)
    assert "".join(diary) == "abc" + "abc" + "cba" + "abc"  # warm-up, then three rounds
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3, "c": [4.0] * 3}


@pytest.mark.parametrize(
    "plan, rounds",
    [(Plan(2, 9, 0), 2), (Plan(1, 4, 20), 4), (Plan(1, 9, 20), 5), (Plan(1, 9, 20, warm=False), 6)],
    ids=["least", "most", "budget, the warm-up in it", "budget, no warm-up"],
)
def test_alternate_keeps_to_its_plan(plan, rounds):
    """Three seconds a round, as many for the warm-up; a round that would end beyond the budget is not begun."""
    clock = Clock()
    actions = {"a": clock.action("a", 1.0, []), "b": clock.action("b", 2.0, [])}
    assert len(alternate(actions, plan, clock=clock)["a"]) == rounds


def test_alternate_repeats_what_is_short():
    clock, diary = Clock(), []
    actions = {"short": clock.action("s", SHORTEST / 10, diary), "long": clock.action("l", 1.0, diary)}
    seconds = alternate(actions, Plan(least=1, most=1), clock=clock)
    assert seconds["short"] == pytest.approx([SHORTEST / 10])
    assert diary.count("s") == 2 + 10 and diary.count("l") == 2


def test_alternate_waits_for_the_device_around_every_timing():
    clock, diary = Clock(), []
    actions = {name: clock.action(name, 1.0, diary) for name in "ab"}
    alternate(actions, Plan(least=1, most=1, warm=False), wait=lambda: diary.append("."), clock=clock)
    assert "".join(diary) == ".a..b."


def test_compare_takes_the_median_of_the_rounds_ratios():
    """A slow round slows both and leaves its ratio alone: the ratio is not that of the medians."""
    found = compare([1.0, 10.0, 2.0], [2.0, 20.0, 8.0])
    assert found == (2.0, 8.0, 0.5, 0.25, 0.5, 3)
    with pytest.raises(ValueError, match=r"ours has 2 rounds, theirs 1"):
        compare([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        compare([], [])


def test_difference_is_relative_and_never_passes_on_nan():
    assert difference(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 10.0])) == pytest.approx(0.1)
    assert difference(torch.zeros(2), torch.zeros(3)) == math.inf
    assert not Check("x", difference(torch.tensor([math.nan]), torch.ones(1)), 1e9).passed
    assert Check("x", 0.0, 0.0).passed


# Memory in a child ---------------------------------------------------------------------------------------------------
def megabytes_case(size: int, held: bool = True, fail: bool = False):
    """Takes `size` MB, and gives them back before it ends unless `held`."""
    if fail:
        raise ValueError("this case fails")

    def take() -> object:
        block = torch.ones(size * 250_000)
        return block if held else None

    return take


@pytest.fixture(scope="module", autouse=True)
def one_server():
    """The tests share one server of child processes, ended behind them."""
    yield
    memory.close()


@pytest.fixture
def child():
    """`in_child` for a case of this file."""
    return lambda **arguments: memory.in_child("tests.test_bench:megabytes_case", arguments, {"size": 1}, 1)


@pytest.mark.parametrize("held", [True, False])
def test_child_measures_the_peak_beyond_what_was_there(child, held):
    found = child(size=300, held=held)
    assert found.method in ("VmHWM", "ru_maxrss")
    assert found.extra == pytest.approx(300e6, rel=0.03)
    assert child(size=100, held=held).extra == pytest.approx(100e6, rel=0.05)  # nothing is left of the bigger one
    assert found.seconds > 0


def test_child_that_fails_says_why(child):
    with pytest.raises(RuntimeError, match="megabytes_case in a child process: ValueError: this case fails"):
        child(size=1, fail=True)
    assert child(size=50).extra > 0  # the server lives on


def telling_case():
    """Takes 100 MB where every block is mapped afresh, 20 MB in a process like any other."""
    return megabytes_case(100 if "MALLOC_MMAP_THRESHOLD_" in os.environ else 20)


@pytest.mark.parametrize("as_users, expected", [(True, 20e6), (False, 100e6)])
def test_whole_models_run_in_a_process_like_any_other(as_users, expected):
    """Mapping every block afresh is exact in bytes but slow: seconds taken so would mean nothing."""
    found = memory.in_child("tests.test_bench:telling_case", {}, {}, 1, as_users=as_users)
    assert found.extra == pytest.approx(expected, rel=0.2)


# Report --------------------------------------------------------------------------------------------------------------
def fabricated() -> Report:
    figures = [
        figure("prefill", "source", tokens, [ours], [1.0], goal=goal, panel="prefill")
        for tokens, ours, goal in ((512, 0.5, 0.6), (2048, 0.7, 0.6), (8192, 0.9, None))
    ]
    figures.append(figure("cache", "source", 512, [55.4e6], [23.6e6], "B", note="a note"))
    machine = {**facts(), "commit": "0123456789abcdef", "dirty": True}
    return Report(
        machine,
        "2026-01-02T03:04:05+00:00",
        "python -m tests.bench.speed",
        False,
        65.0,
        True,
        [
            Result("prefill", "reading", OK, checks=[Check("logits", 1e-6, 1e-3)], figures=figures, remarks=["hm"]),
            Result("scan", "the scan", RED, "output: 1e-1, at most 1e-4", [Check("output", math.inf, 1e-4)]),
            Result("cuda-scan", "on a GPU", NOT_RUN, "no CUDA device"),
        ],
    )


def test_json_round_trip():
    written = fabricated()
    text = written.to_json()
    read = Report.from_json(text)
    assert math.isnan(read.results[1].checks[0].difference)  # JSON has no infinity
    read.results[1].checks[0].difference = math.inf
    assert read == written
    stored = json.loads(text, parse_constant=pytest.fail)
    assert stored["schema"] == report.SCHEMA
    assert [entry["met"] for entry in stored["results"][0]["figures"]] == [True, False, None, None]
    with pytest.raises(ValueError, match="schema='other'"):
        Report.from_json(text.replace(report.SCHEMA, "other"))


def test_json_schema_is_stable():
    """Whoever reads these files reads these names: a change needs another `SCHEMA`."""
    stored = json.loads(fabricated().to_json())
    assert list(stored) == ["schema", "machine", "started", "command", "quick", "seconds", "finished", "results"]
    result = stored["results"][0]
    assert list(result) == ["row", "title", "status", "reason", "checks", "figures", "remarks"]
    assert list(result["checks"][0]) == ["what", "difference", "tolerance"]
    expected = "name against context unit ours theirs ratio low high rounds goal panel note met"
    assert list(result["figures"][0]) == expected.split()
    for name in ("commit", "dirty", "processor", "cores", "threads", "device", "python", "versions"):
        assert name in stored["machine"]
    assert {"torch", "transformers"} <= set(stored["machine"]["versions"])


def test_markdown_shows_goal_verdict_and_machine():
    text = report.markdown(fabricated())
    assert "| prefill | 512 | source | 500 ms | 1 s | **0.5** |  | 1 | 0.6 | met |" in text
    assert "| **0.7** |  | 1 | 0.6 | missed |" in text
    assert "| cache | 512 | source | 55.4 MB | 23.6 MB | **2.35** |" in text
    assert "commit 0123456789ab with uncommitted changes" in text and "threads" in text
    assert "**parity failed**: output: 1e-1, at most 1e-4" in text
    assert "**not run**: no CUDA device" in text
    assert "- cache, 512: a note" in text and "- hm" in text and "- checked: logits: 1.0e-06, at most 1e-03" in text
    assert "Not finished" not in text and "quick run" not in text
    assert "\n\n\n" not in text


@pytest.mark.parametrize(
    "value, unit, text",
    [(3.14159, "s", "3.14 s"), (0.0412, "s", "41.2 ms"), (3e-7, "s", "0.3 us"), (1234.0, "s", "1,234 s")]
    + [(1.51e9, "B", "1.51 GB"), (55.4e6, "B", "55.4 MB"), (999.0, "B", "999 B"), (0.0, "B", "0 B")],
)
def test_amount(value, unit, text):
    assert report.amount(value, unit) == text


def test_diagrams_show_contexts(tmp_path):
    found = fabricated()
    assert list(report.panels(found)) == ["prefill"]
    assert report.draw(found, tmp_path / "speed.png") is None
    data = (tmp_path / "speed.png").read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    found.results[0].figures = found.results[0].figures[:1]
    assert "more than one context" in report.draw(found, tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["speed.png"]  # no half files


def test_missing_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install -e '.[bench]'" in report.draw(fabricated(), tmp_path / "speed.png")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "speed.json"
    report.save(fabricated(), path)
    before = path.read_bytes()
    broken = fabricated()
    broken.machine["threads"] = math.nan
    with pytest.raises(ValueError):
        report.save(broken, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["speed.json"]


# The program ---------------------------------------------------------------------------------------------------------
def fake(name: str, found=(), check: float = 0.0, error: BaseException | None = None, **options) -> Row:
    """A row with given figures; `check` is the difference of its check (at most 1); `error` ends it at last."""

    def figures(context: Context):
        yield from found
        if error is not None:
            raise error

    return Row(name, f"title of {name}", lambda context: [Check("fake check", check, 1.0)], figures, **options)


FIGURE = Figure("thing", "other", 64, "s", 1.2345, 2.3456, 0.5263, 0.5263, 0.5263, 1)


def run(tmp_path, rows, *arguments: str) -> tuple[int, Report]:
    path = tmp_path / "speed.json"
    status = speed.main(["--json", str(path), "--threads", "1", "--quick", *arguments], rows)
    return status, Report.from_json(path.read_text(encoding="utf-8"))


def test_red_parity_prints_no_speed_and_exits_1(tmp_path, capsys):
    for value in (2.0, math.nan):
        status, found = run(tmp_path, [fake("red", [FIGURE], check=value), fake("green", [FIGURE])])
        assert status == 1 and found.finished
        red, green = found.results
        assert (red.status, red.figures) == (RED, []) and "fake check" in red.reason
        assert (green.status, green.figures) == (OK, [FIGURE])
        printed = capsys.readouterr()
        assert "**parity failed**: fake check" in printed.out
        for text in (printed.out, printed.err):  # nothing of the red row, once of the green one
            section = text.partition("green")[0]
            assert "1.23 s" not in section and "0.526" not in section
        assert "1.23 s" in printed.out and "0.526" in printed.err


def test_a_row_without_a_check_is_red(tmp_path):
    row = fake("bare", [FIGURE])._replace(checks=lambda context: [])
    status, found = run(tmp_path, [row])
    assert status == 1 and found.results[0].reason == "nothing was checked" and not found.results[0].figures


def test_a_broken_row_costs_only_its_own_rest(tmp_path):
    status, found = run(
        tmp_path, [fake("broken", [FIGURE], error=OSError("out of disk\nmore")), fake("next", [FIGURE])]
    )
    assert status == 1 and found.finished
    assert [(r.status, r.reason, len(r.figures)) for r in found.results] == [
        (FAILED, "OSError: out of disk", 1),
        (OK, "", 1),
    ]


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, capsys):
    rows = [fake("first", [FIGURE]), fake("second", [FIGURE, "a remark"], error=KeyboardInterrupt()), fake("third")]
    status, found = run(tmp_path, rows)
    assert status == 130 and not found.finished
    assert [(r.row, r.status, len(r.figures), r.remarks) for r in found.results] == [
        ("first", OK, 1, []),
        ("second", report.CUT, 1, ["a remark"]),
    ]
    assert "Not finished" in capsys.readouterr().out
    assert (tmp_path / "speed.md").is_file()


def test_figures_are_kept_as_they_come(tmp_path):
    """A killed process keeps what it has: the file is there before the row has ended."""
    path = tmp_path / "speed.json"

    def figures(context: Context):
        yield FIGURE
        assert Report.from_json(path.read_text(encoding="utf-8")).results[0].figures == [FIGURE]
        yield FIGURE

    status, found = run(tmp_path, [fake("row")._replace(figures=figures)])
    assert status == 0 and len(found.results[0].figures) == 2


def test_rows_of_other_devices_and_optional_rows_say_why_they_do_not_run(tmp_path):
    rows = [fake("gpu", [FIGURE], device="cuda"), fake("long", [FIGURE], optional=True)]
    status, found = run(tmp_path, rows)
    assert status == 0
    reasons = [(r.status, r.reason) for r in found.results]
    if not torch.cuda.is_available():
        assert reasons[0] == (NOT_RUN, "no CUDA device")
    assert reasons[1] == (NOT_RUN, "takes long; ask for it with --rows long")
    row = fake("cpu")
    assert speed.reason_not_to_run(row, "cuda", None) == "a row of --device cpu"
    assert speed.reason_not_to_run(rows[1], "cpu", ["long"]) is None


def test_command_line_refusals(capsys):
    for arguments, words in (
        (["--rows", "scam"], "--rows scam: no such row; choose from scan, attention"),
        (["--threads", "0"], "--threads 0: must be 1 or more"),
    ):
        assert speed.main(arguments) == 2
        assert words in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert speed.main(["--device", "cuda"]) == 2
        assert "--device cuda" in capsys.readouterr().err


def test_every_row_of_the_plan_is_there(capsys):
    """The rows by name, and no goal without a row that can meet it."""
    assert speed.main(["--list"]) == 0
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    expected = "scan attention innovation prefill decode cache train peers compiled"
    assert named == expected.split() + ["cuda-scan", "cuda-attention", "cuda-decode", "cuda-train"]
    sizes = {"prefill": [*rows_model.PREFILL, *rows_model.LONG], "decode": rows_model.DECODE, "cache": rows_model.CACHE}
    sizes["innovation"] = rows_memory.TOKENS
    for goal in GOALS:
        name, _, size = goal.partition(" ")
        if name in sizes and size.isdigit():
            assert int(size) in sizes[name], goal
    assert rows_scan.TOKENS == (2048, 8192) and rows_scan.SHAPES == ((9, 3), (24, 1))
    assert 4096 in rows_attention.CAUSAL_TOKENS and rows_attention.WINDOW == 256


# The rows themselves, at tiny sizes ----------------------------------------------------------------------------------
@pytest.fixture
def tiny_rows(monkeypatch):
    monkeypatch.setattr(rows_scan, "SHAPES", ((2, 1),))
    monkeypatch.setattr(rows_scan, "QUICK_TOKENS", (96,))
    monkeypatch.setattr(rows_scan, "CHUNKS", (16, 64))
    monkeypatch.setattr(rows_attention, "QUICK_TOKENS", (320, 384))

    def no_compiler(given):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(rows_attention, "flex", no_compiler)


def test_operation_rows_end_to_end(tmp_path, tiny_rows, capsys):
    status, found = run(tmp_path, None, "--rows", "scan", "attention")
    assert status == 0 and found.finished and found.quick
    scan, attention = found.results
    assert all(check.passed for result in found.results for check in result.checks)
    names = [(f.name, f.against) for f in scan.figures]
    assert names[2] == ("2 heads, 1 groups, forward, peak memory", "transformers, chunk 256") and len(names) == 6
    assert {f.unit for f in scan.figures} == {"s", "B"}
    assert attention.remarks == ["FlexAttention was not timed: RuntimeError: no compiler"]
    assert [f.against for f in attention.figures if f.unit == "s"] == ["SDPA, full causal"] * 2 + ["SDPA, dense mask"]
    for found_figure in scan.figures + attention.figures:
        assert 0 <= found_figure.low <= found_figure.ratio <= found_figure.high < 1e4
        assert (
            (found_figure.ours > 0 or found_figure.unit == "B")
            and found_figure.theirs > 0
            and found_figure.goal is None
        )
    assert "memory attention" in capsys.readouterr().out
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row, function", [("scan", "scan"), ("attention", "memory_attention")])
def test_a_wrong_operation_is_not_timed(tmp_path, tiny_rows, monkeypatch, row, function):
    right = getattr(adapters, function)

    def wrong(*arguments):
        found = right(*arguments)
        return (found[0] * 1.01, *found[1:]) if isinstance(found, tuple) else found * 1.01

    monkeypatch.setattr(adapters, function, wrong)
    status, found = run(tmp_path, None, "--rows", row)
    assert status == 1
    assert found.results[0].status == RED and not found.results[0].figures
    assert any(not check.passed for check in found.results[0].checks)


def test_a_wrong_selection_is_not_timed(tmp_path, monkeypatch):
    right = adapters.choose
    monkeypatch.setattr(adapters, "choose", lambda keys, window, slots: right(keys, window, max(1, slots - 1)))
    status, found = run(tmp_path, None, "--rows", "innovation")
    assert status == 1 and found.results[0].status == RED and not found.results[0].figures


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory) -> Context:
    yield Context(True, 1, "cpu", Models(tmp_path_factory.mktemp("models"), "unused", quick=True))
    load.cache_clear()


def test_model_rows_check_and_count(tiny_models):
    for checks in (rows_model.model_checks, rows_model.cache_checks):
        found = checks(tiny_models)
        assert len(found) == 2 and all(check.passed for check in found), found
    cache = [figure for figure in rows_model.cache_figures(tiny_models) if figure.against == "source"]
    assert len({figure.ours for figure in cache}) == 1  # ours stays, the source's grows with the text
    assert [figure.theirs / figure.context for figure in cache] == [cache[0].theirs / cache[0].context] * len(cache)


def test_model_checks_notice_a_changed_graft(tiny_models):
    ours = load("ours", tiny_models.models.path("ours"))
    weight = ours.model.layers[0].self_attn.o_proj.weight
    kept = copy.deepcopy(weight.data)
    weight.data.mul_(1.1)
    try:
        assert not all(check.passed for check in rows_model.model_checks(tiny_models))
    finally:
        weight.data.copy_(kept)


def test_decode_row_measures_behind_the_whole_text(tiny_models, monkeypatch):
    """Both caches stand at the context that the figure names, also after the steps at the one before."""
    lengths, right = [], rows_model.steps

    def watched(model, cache):
        lengths.append(cache.get_seq_length())
        return right(model, cache)

    monkeypatch.setattr(rows_model, "steps", watched)
    tokens = [figure.context for figure in rows_model.decode_figures(tiny_models)]
    assert tokens == list(rows_model.QUICK_DECODE)
    assert lengths == [context for context in tokens for _ in rows_model.SIDES]


def test_command_line_from_a_shell(tmp_path):
    """`python -m tests.bench.speed` as a user runs it, with the one row that needs no other process."""
    path = tmp_path / "speed.json"
    command = [sys.executable, "-m", "tests.bench.speed", "--quick", "--threads", "1", "--rows", "innovation"]
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = Report.from_json(path.read_text(encoding="utf-8"))
    assert found.results[0].status == OK and len(found.results[0].figures) == 2
    assert found.command.endswith(f"--json {path}") and describe(found.machine) in done.stdout
