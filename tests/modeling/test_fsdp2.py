"""transformers' FSDP2 (`distributed_config`) in two processes on the CPU computes what one process computes.

FSDP2 frees the parameters of a module when its forward is over, so that no module may hand out one of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM
from modeling_bmojo.compat_bmojo import SHARDS_BY_DTYPE
from tests.launched.fsdp2_launched import compute, prompt
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, UNPROJECTED


ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"plain": {}, "s6": {"ssm_type": "mamba"}, "mixed": MIXED_LAYERS, "unprojected": UNPROJECTED}


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    """Folders of the models, by setting and `ssm_scalars_in_fp32`; the two processes start once and go through all."""
    folder = tmp_path_factory.mktemp("fsdp2")
    models = {(name, kept): folder / f"{name}-{kept}" for name in SETTINGS for kept in (True, False)}
    for (name, kept), model in models.items():
        torch.manual_seed(0)
        config = BMojoConfig(**{**SIZES, **SETTINGS[name]}, ssm_scalars_in_fp32=kept)
        randomize_(BMojoForCausalLM(config).float()).save_pretrained(model)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "launched" / "fsdp2_launched.py"), "bfloat16", *map(str, models.values())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return models


@pytest.mark.parametrize("in_fp32", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_compute_what_one_does(name, in_fp32, computed):
    """In bfloat16, where the SSM's scalars stay fp32 and are a shard of their own, if transformers makes them."""
    folder = computed[name, in_fp32]
    found = torch.load(folder / "found.pt")
    kept = {"ssm_scalars_in_fp32": in_fp32 and SHARDS_BY_DTYPE}
    model = BMojoForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **kept)
    expected = compute(model, prompt())
    assert sorted(found["sharded"]) == sorted(name for name, _ in model.named_parameters())
    assert torch.equal(found["generated"], expected["generated"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for key, wanted in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][key], wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", SETTINGS)
def test_no_module_hands_out_a_parameter(name):
    """Nor a view of one: whatever a submodule returns has memory of its own, or its input's."""
    model = BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]})).float()
    memory = {value.untyped_storage().data_ptr(): key for key, value in model.named_parameters()}
    handed = []

    def listen(key):
        def look(module, arguments, output):
            for value in output if isinstance(output, tuple) else (output,):
                if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in memory:
                    handed.append((key, memory[value.untyped_storage().data_ptr()]))

        return look

    for key, module in model.named_modules():
        module.register_forward_hook(listen(key))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            cache = BMojoCache(model.config)
            model(prompt(), past_key_values=cache)
            model(prompt()[:, :1], past_key_values=cache)
    assert handed == []
