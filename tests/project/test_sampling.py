"""`--sample-own-settings`, with which `make test-versions` runs: what stays, and that it is always the same."""

from typing import NamedTuple

from tests.conftest import sampled


class Case(NamedTuple):
    """Of a collected test, what the choice looks at."""

    nodeid: str
    marked: bool

    def get_closest_marker(self, name: str) -> bool:
        assert name == "own_settings"
        return self.marked


def grid(test: str, marked: bool = True) -> list[Case]:
    """Cases of four settings by two ways to read, in pytest's order."""
    return [Case(f"tests/test_a.py::{test}[{setting}-{way}]", marked) for way in "xy" for setting in "abcd"]


def test_a_quarter_of_what_is_marked_stays_and_all_that_is_not():
    marked, others = grid("test_one") + grid("test_two"), [*grid("test_three", False), Case("a.py::test_plain", False)]
    single = [Case("a.py::test_single", True)]
    kept = sampled([*marked, *others, *single])
    assert kept >= {*others, *single}
    for test in ("test_one", "test_two"):
        assert sum(test in case.nodeid for case in kept) == 2
    assert kept == sampled([*single, *others, *marked[::-1]]), "the choice depends on the order"


def test_together_the_tests_run_every_setting_and_way():
    kept = sampled([case for number in range(20) for case in grid(f"test_{number}")])
    for value in ("[a-", "[b-", "[c-", "[d-", "-x]", "-y]"):
        assert any(value in case.nodeid for case in kept)
