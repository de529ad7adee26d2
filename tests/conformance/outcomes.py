"""What came out of the tests, by model: recorded, summed up, and compared with `exceptions.json`.

outcomes     {model: {test: Outcome}}
exceptions   {test: {"models": [names], "reason": why a test that Llama passes is skipped for these}}
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple


REFERENCE = "Llama"
OURS = ("BMojo", "BMojoMixed")
EXCEPTIONS = Path(__file__).resolve().parent / "exceptions.json"
WORSE = ("", "passed", "skipped", "failed")


class Outcome(NamedTuple):
    """state: "passed", "skipped" or "failed"; reason: of a skip, as the test gives it."""

    state: str
    reason: str = ""


class Recorder:
    """A pytest plugin that keeps every outcome."""

    def __init__(self):
        self.outcomes: dict[str, dict[str, Outcome]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        """Keep the worst of a test's phases and subtests: skipped for one class of a model is skipped."""
        _, owner, name = report.nodeid.split("::")
        found = self.outcomes.setdefault(owner.removesuffix("Test"), {})
        state = report.outcome
        if state == "passed" and report.when != "call":
            return
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if WORSE.index(state) >= WORSE.index(found.get(name, Outcome("")).state):
            found[name] = Outcome(state, reason)


def read_exceptions(path: Path = EXCEPTIONS) -> dict[str, dict[str, Any]]:
    """Return the tests that Llama passes and ours skip, with models and reasons."""
    return json.loads(path.read_text(encoding="utf-8"))


def disagreements(outcomes: dict[str, dict[str, Outcome]], exceptions: dict[str, dict[str, Any]]) -> list[str]:
    """Return what is wrong with the exceptions: a test that is missing, one too many, other models, no reason."""
    passed = {name for name, outcome in outcomes[REFERENCE].items() if outcome.state == "passed"}
    found: dict[str, list[str]] = {}
    for model in OURS:
        for name in passed:
            if outcomes[model].get(name, Outcome("")).state != "passed":
                found.setdefault(name, []).append(model)
    wrong = []
    for name in sorted(found.keys() | exceptions.keys()):
        said = exceptions.get(name, {})
        if found.get(name, []) != said.get("models", []):
            reasons = {outcomes[model].get(name, Outcome("")).reason for model in found.get(name, [])}
            wrong.append(f"{name}: skipped for {found.get(name, [])} {reasons}, listed for {said.get('models', [])}")
        elif not said.get("reason"):
            wrong.append(f"{name}: has no reason")
    return wrong


def summary(outcomes: dict[str, dict[str, Outcome]]) -> str:
    """Return counts by model, and every reason for skips with the number of tests that it holds for."""
    lines = []
    for model, tests in outcomes.items():
        counts = Counter(outcome.state for outcome in tests.values())
        lines.append(f"{model}: " + ", ".join(f"{counts[state]} {state}" for state in WORSE[1:]))
    for model, tests in outcomes.items():
        reasons = Counter(outcome.reason for outcome in tests.values() if outcome.state == "skipped")
        lines += ["", f"skipped for {model}"]
        lines += [f"  {count:3} {reason}" for reason, count in sorted(reasons.items())]
    return "\n".join(lines)
