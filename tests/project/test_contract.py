"""What was published stays readable: checkpoints, configurations and cache files of earlier versions.

tests/project/contract/ holds them, written by the code that they name (see the README there).
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM


PUBLISHED = Path(__file__).parent / "contract" / "e7c6e2f.zip"
LATER_CACHES = Path(__file__).parent / "contract" / "8a842cc.zip"  # the same caches as files of format 5
CASES = ("every-layer", "paper-s6", "rope-state")


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    with zipfile.ZipFile(PUBLISHED) as archive:
        archive.extractall(folder)
    return folder


def tolerance(case: str) -> float:
    # Angles were fp32 products then and are float64 products now; without positions nothing differs.
    return 1e-5 if case == "rope-state" else 1e-12


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_our_code_reads_a_published_folder(case, published):
    folder, expected = published / case, load_file(published / case / "expected.safetensors")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert type(model) is BMojoForCausalLM and not any(report.values())
    with torch.no_grad():
        logits = model(expected["ids"], attention_mask=expected["mask"]).logits
    assert logits.dtype == torch.float64
    assert distance(logits, expected["logits"]) < tolerance(case)


@pytest.mark.parametrize("archive", [PUBLISHED, LATER_CACHES], ids=["format 4", "format 5"])
@pytest.mark.parametrize("case", CASES)
def test_our_code_continues_a_published_cache(case, archive, published, tmp_path):
    folder, expected = published / case, load_file(published / case / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    file = zipfile.ZipFile(archive).extract(f"{case}/cache.safetensors", tmp_path)
    cache = BMojoCache.load(file, model.config)
    read = cache.get_seq_length()
    with torch.no_grad():
        rest = model(expected["ids"][:, read:], attention_mask=expected["mask"], past_key_values=cache).logits
    assert read == 15 and distance(rest, expected["rest"]) < tolerance(case)


@pytest.mark.parametrize("case", CASES)
def test_a_published_folder_runs_by_its_own_code(case, published, tmp_path):
    """In a process without this package, from a copy that holds its modules. Only a forward: the caches of that code
    know one version of transformers, which is why this test is not about them."""
    folder = tmp_path / "own"
    shutil.copytree(published / case, folder)
    for file in (published / "code").iterdir():
        shutil.copy(file, folder)
    script = f"""
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype=torch.float64, trust_remote_code=True)
expected = load_file({str(folder / "expected.safetensors")!r})
with torch.no_grad():
    logits = model(expected["ids"], attention_mask=expected["mask"], use_cache=False).logits
assert type(model).__module__.startswith("transformers_modules"), type(model)
print(float((logits - expected["logits"]).abs().max()))
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert float(run.stdout.split()[-1]) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_order_of_the_weights_stay(case, published):
    model = BMojoForCausalLM.from_pretrained(published / case)
    found = [[name, list(value.shape)] for name, value in model.state_dict().items()]
    assert found == json.loads((published / case / "state_dict.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_every_key_of_a_published_configuration_is_read(case, published):
    written = json.loads((published / case / "config.json").read_text())
    config = BMojoConfig.from_pretrained(published / case)
    skipped = {"architectures", "auto_map", "dtype", "transformers_version", "model_type"}
    for name in set(written) - skipped - {"ssm_time_step_limit", "rope_parameters"}:
        assert getattr(config, name) == written[name], name
    assert config.ssm_time_step_limit == [0.0, float("inf")]
    assert config.rope_parameters == written["rope_parameters"]
