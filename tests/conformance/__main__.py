"""Run transformers' common tests on our classes and on Llama, and compare: python -m tests.conformance

Fails for a test that fails, and unless `exceptions.json` names exactly the tests that Llama passes and one of ours
skips, each with its reason. `-k` and other arguments go to pytest (then nothing is compared); `--with FalconH1` runs
another model of `testers.MODELS`, too.
"""

import argparse
import sys
import time
from pathlib import Path

import pytest

from tests.conformance.outcomes import EXCEPTIONS, OURS, REFERENCE, Recorder, disagreements, read_exceptions, summary


HERE = Path(__file__).resolve().parent
# Not those of our own tests: their warnings are errors, and their markers are all there is.
OPTIONS = ["--override-ini=addopts=", "--override-ini=filterwarnings=", "-p", "no:cacheprovider"]
OPTIONS += ["--disable-warnings", "--tb=short", "-q"]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="python -m tests.conformance")
    parser.add_argument("--with", dest="more", action="append", default=[], help="another model")
    options, rest = parser.parse_known_args(arguments)
    recorder, begun = Recorder(), time.monotonic()
    chosen = [f"{HERE / 'common.py'}::{name}Test" for name in (REFERENCE, *OURS, *options.more)]
    code = pytest.main([*OPTIONS, *rest, *chosen], plugins=[recorder])
    print(summary(recorder.outcomes), f"\n{time.monotonic() - begun:.0f} s", sep="")
    if code != pytest.ExitCode.OK:
        return int(code)
    wrong = [] if rest else disagreements(recorder.outcomes, read_exceptions())
    for line in wrong:
        print(f"{EXCEPTIONS.name}: {line}", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
