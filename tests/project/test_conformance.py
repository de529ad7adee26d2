"""What `make test-conformance` makes of outcomes, and that docs/compatibility.md says what its list says.

The common tests themselves run there alone: they are transformers', and obtained first.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conformance import outcomes
from tests.conformance.outcomes import OURS, REFERENCE, Outcome, Recorder, disagreements, read_exceptions, summary


ROOT = Path(__file__).resolve().parents[2]
PASSED, SKIPPED, FAILED = Outcome("passed"), Outcome("skipped", "no accelerator"), Outcome("failed")


def results(**others):
    """Both tests pass everywhere, except for what is said of a model."""
    plain = {"test_a": PASSED, "test_b": PASSED}
    return {model: {**plain, **others.get(model, {})} for model in (REFERENCE, *OURS)}


def test_the_list_must_be_exact():
    first = OURS[0]
    skipping = results(**{first: {"test_b": SKIPPED}})
    listed = {"test_b": {"models": [first], "reason": "because"}}
    assert disagreements(results(), {}) == [] and disagreements(skipping, listed) == []
    assert (
        "test_b: skipped for" in disagreements(skipping, {})[0] and "no accelerator" in disagreements(skipping, {})[0]
    )
    assert "test_b" in disagreements(results(), listed)[0]  # one too many
    assert "test_b" in disagreements(skipping, {"test_b": {"models": list(OURS), "reason": "because"}})[0]
    assert "no reason" in disagreements(skipping, {"test_b": {"models": [first], "reason": ""}})[0]
    absent = results()
    del absent[first]["test_a"]
    assert "test_a" in disagreements(absent, {})[0]
    # What Llama does not pass is nothing that ours must.
    both = {model: {"test_b": SKIPPED} for model in (REFERENCE, *OURS)}
    assert disagreements(results(**both), {}) == []


def report(name, outcome, when="call", reason=None):
    nodeid = f"tests/conformance/common.py::{OURS[0]}Test::{name}"
    return SimpleNamespace(
        nodeid=nodeid, outcome=outcome, when=when, longrepr=reason and ("file", 1, f"Skipped: {reason}")
    )


def test_the_recorder_keeps_the_worst():
    recorder = Recorder()
    for each in (
        report("test_a", "passed", "setup"),
        report("test_a", "passed"),
        report("test_b", "skipped", "setup", "is slow"),
        report("test_c", "failed"),
        report("test_c", "passed"),
        report("test_d", "passed"),
        report("test_d", "failed", "teardown"),
    ):
        recorder.pytest_runtest_logreport(each)
    found = recorder.outcomes[OURS[0]]
    assert found == {"test_a": PASSED, "test_b": Outcome("skipped", "is slow"), "test_c": FAILED, "test_d": FAILED}
    told = summary(recorder.outcomes)
    assert f"{OURS[0]}: 1 passed, 1 skipped, 2 failed" in told and "1 is slow" in told


def test_the_documentation_lists_the_exceptions():
    """Each once, with its reason word for word."""
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(test_\w+)` \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE))
    assert rows == {name: said["reason"] for name, said in read_exceptions().items()}


def test_the_exceptions_can_be_read(tmp_path):
    assert all(set(said) == {"models", "reason"} for said in read_exceptions().values())
    path = tmp_path / "exceptions.json"
    path.write_text(json.dumps({"test_a": {"models": [], "reason": "x"}}), encoding="utf-8")
    assert read_exceptions(path)["test_a"]["reason"] == "x"


def test_tests_that_were_not_obtained_are_asked_for(monkeypatch, tmp_path):
    from tests.conformance import upstream

    monkeypatch.setattr(upstream, "ROOT", tmp_path)
    monkeypatch.setattr(upstream, "TESTS", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="make test-conformance"):
        upstream.mount()
    assert outcomes.EXCEPTIONS.is_file()


def test_what_is_said_to_work_names_tests_that_are_there():
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split("## Under")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row.split(" | ")[-1])
        assert named, f"no test: {row}"
        for file, test in named:
            content = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert f"def {test or 'test_'}" in content, f"{file} has no {test}"
