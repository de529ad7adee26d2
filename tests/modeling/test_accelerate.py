"""Many machines, as far as two processes on one CPU go: the files in configs/accelerate/ through the real launcher.

DDP and FSDP2 run with gloo and must compute what one process computes; a checkpoint goes from one process to DDP, from
there to FSDP2 and back. DeepSpeed needs a GPU: its files are read by the launcher, no more.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from peft import get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from modeling_bmojo import BMojoConfig, BMojoForCausalLM, bmojo_lora_config
from tests.launched.train_tiny import batch, train
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
NAMES = ("ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2")


class Run(NamedTuple):
    """A folder with a checkpoint, the losses that led to it, and what the launched program said about itself."""

    model: Path
    losses: list[float]
    facts: dict


def launch(name: str, start: Path, folder: Path, first: int, last: int) -> Run:
    """Two processes of `train_tiny.py` under one of the configurations, on the CPU and in full precision."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(port)]
    command += [str(ROOT / "tests" / "launched" / "train_tiny.py"), str(start), str(folder), str(first), str(last)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as run:
        try:
            _, errors = run.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            run.terminate()  # the launcher ends its processes; killed, it would leave them behind
            raise
    assert run.returncode == 0, errors[-3000:]
    facts = json.loads((folder / "losses.json").read_text())
    return Run(folder / "model", facts.pop("losses"), facts)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[int, Run]:
    """One process: checkpoints after 0, 2, 4 and 6 batches, and the losses of the two batches before each."""
    folder, runs = tmp_path_factory.mktemp("alone"), {}
    model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **MIXED_LAYERS})).double()).train()
    for upto in (0, 2, 4, 6):
        model, losses = train(None, model, max(upto - 2, 0), upto)
        model.save_pretrained(folder / str(upto))
        runs[upto] = Run(folder / str(upto), losses, {})
    assert runs[0].losses == [] and len({*runs[2].losses, *runs[4].losses, *runs[6].losses}) == 6
    return runs


@pytest.fixture(scope="module")
def ddp(alone, tmp_path_factory) -> Run:
    return launch("ddp", alone[2].model, tmp_path_factory.mktemp("ddp") / "run", 2, 4)


def assert_same_weights(found: Path, expected: Path, before: Path) -> None:
    """To the rounding of the loss, which transformers computes in fp32 whatever the model is in (here: fp64)."""
    found, expected, before = (load_file(folder / "model.safetensors") for folder in (found, expected, before))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float((value - before[name]).abs().max()) for name, value in expected.items()) > 1e-3


def test_ddp_computes_what_one_process_computes(alone, ddp):
    assert ddp.facts == {"processes": 2, "layout": "DistributedDataParallel", "sharded": 0}
    assert ddp.losses == pytest.approx(alone[4].losses, abs=1e-5)
    assert_same_weights(ddp.model, alone[4].model, alone[2].model)


def test_fsdp2_continues_from_ddp_and_one_process_from_fsdp2(alone, ddp, tmp_path):
    run = launch("fsdp2", ddp.model, tmp_path / "run", 4, 6)
    tensors = load_file(alone[6].model / "model.safetensors")
    assert run.facts == {"processes": 2, "layout": "FSDPBMojoForCausalLM", "sharded": len(tensors)}
    assert run.losses == pytest.approx(alone[6].losses, abs=1e-5)
    assert_same_weights(run.model, alone[6].model, alone[4].model)
    model = BMojoForCausalLM.from_pretrained(run.model).train()
    assert train(None, model, 6, 7)[1] == pytest.approx(
        train(None, BMojoForCausalLM.from_pretrained(alone[6].model).train(), 6, 7)[1], abs=1e-5
    )


@pytest.fixture
def gloo(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "recipe", "scalars_in_fp32", "taken"),
    [
        (torch.float32, None, True, True),
        (torch.bfloat16, None, True, False),
        (torch.bfloat16, None, False, True),
        (torch.float32, "hylora", True, True),
        (torch.bfloat16, "lora", True, True),
        (torch.bfloat16, "hylora", False, False),
    ],
)
def test_what_fsdp2_takes_without_mixed_precision(dtype, recipe, scalars_in_fp32, taken, gloo, tmp_path):
    """The table of docs/peft.md: what trains in one layer must have one dtype. PEFT keeps adapters in fp32."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    config = BMojoConfig(**{**SIZES, **MIXED_LAYERS}, ssm_scalars_in_fp32=scalars_in_fp32)
    BMojoForCausalLM(config).save_pretrained(tmp_path / "model")
    model = BMojoForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    if recipe:
        model = get_peft_model(model, bmojo_lora_config(model, recipe, r=2))
    for module in [m for m in model.modules() if type(m).__name__ == "BMojoDecoderLayer"] + [model]:
        fully_shard(module, mesh=mesh)
    if taken:
        model(input_ids=batch(0), labels=batch(0)).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    else:
        with pytest.raises(AssertionError, match="expects uniform original parameter dtype"):
            model(input_ids=batch(0))


def test_every_configuration_is_known_here():
    assert tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_launcher_takes_every_configuration(name):
    """Keys that accelerate does not know are errors there; what it made of the others is looked at here."""
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert (arguments.num_processes, arguments.mixed_precision) == (2, "bf16")
    if name == "ddp":
        assert arguments.multi_gpu and not arguments.use_fsdp and not arguments.use_deepspeed
    elif name == "fsdp2":
        assert arguments.use_fsdp and arguments.fsdp_version == 2
        layer = arguments.fsdp_transformer_layer_cls_to_wrap
        assert [layer] == BMojoForCausalLM._no_split_modules
    else:
        assert config.distributed_type == DistributedType.DEEPSPEED and arguments.use_deepspeed
        assert arguments.zero_stage == int(name[-1])
    assert set(yaml.safe_load(path.read_text())) >= {"distributed_type", "num_processes", "mixed_precision"}
