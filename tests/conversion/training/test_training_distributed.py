"""Two processes on the CPU (gloo) give what one process gives with batches twice as large, under DDP and FSDP2."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dist_cp
import yaml
from safetensors.torch import load_file

from conversion.training.checkpoints import checkpoints, work_folder
from conversion.training.trainer import load_trained
from tests.conversion.training_setup import T, log_of, recipe, run_align, run_finetune, tiny_graft, write_text


ROOT = Path(__file__).resolve().parents[3]


def launch(settings: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "-m", "conversion.align", str(settings)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_processes_compute_what_one_does(tmp_path):
    losses = {"kl": 1.0, "hidden": 1.0, "mixer": 1.0}
    trainer = {"use_cpu": True, "max_steps": 3}
    # Three rows held out: one of the processes gets a row a second time, which must not count.
    data = {"eval_files": write_text(tmp_path / "held-out", 1, 3 * T), "append_eos": False, "held_out": 0}
    options = {"losses": losses, "data": data, "trainer": {**trainer, "per_device_train_batch_size": 2}}
    assert run_align(tmp_path, **options) == 0
    options |= {"trainer": {**trainer, "ddp_backend": "gloo"}, "output": str(tmp_path / "two")}
    settings = tmp_path / "two.yaml"
    settings.write_text(yaml.safe_dump(recipe(tmp_path, **options)))
    done = launch(settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step 3 of 3") == 1
    for key in ("loss", "kl", "hidden", "mixer", "grad_norm", "eval_loss", "eval_kl"):
        assert log_of(tmp_path / "two", key) == pytest.approx(log_of(tmp_path / "out", key), rel=1e-5), key


def launch_test(layout: str, program: str, tmp_path: Path, *options: str, environment: dict | None = None, **values):
    """Two processes of `train_launched.py` under one of configs/accelerate, in full precision."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = tmp_path / "two.yaml"
    settings.write_text(yaml.safe_dump(recipe(tmp_path, **values)))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{layout}.yaml"), "--mixed_precision", "no"]
    command += [*options, str(ROOT / "tests" / "launched" / "train_launched.py"), program, str(settings)]
    given = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **given}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            told, errors = run.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            run.terminate()  # the launcher ends its processes; killed, it would leave them behind
            raise
    return subprocess.CompletedProcess(command, run.returncode, told, errors)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(tmp_path):
    """In a micro-batch after which no gradients are exchanged: nothing else would tell the others."""
    trainer = {"use_cpu": True, "gradient_accumulation_steps": 2, "max_steps": 3, "save_steps": 1}
    done = launch_test("ddp", "align", tmp_path, environment={"TEST_POISON": "1"}, trainer=trainer)
    assert done.returncode != 0
    # Both say it, but the launcher may end the second before it has, and their lines may run together.
    told = re.findall(r"error: step 2: the loss is nan, on rows \[\d+\] of.*?checkpoint-1' \(step 1\)", done.stderr)
    assert told and len(set(told)) == 1, done.stderr[-3000:]


# FSDP2 ---------------------------------------------------------------------------------------------------------------
STEADY = {"use_cpu": True, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}


def same_tensors(found: Path, expected: Path, before: Path) -> None:
    """Equal to what the sums' order changes, and far from what they were before."""
    found, expected, before = (load_file(path) for path in (found, expected, before))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert max((value - before[name]).abs().max() for name, value in expected.items() if name in before) > 1e-3


def test_alignment_under_fsdp_is_finished_by_one_process(tmp_path):
    """From a checkpoint in parts, which is how FSDP saves unless it is told otherwise."""
    graft = tiny_graft("llama_biases_tied")  # embeddings and head are one tensor, which trains
    options = {"source": str(graft), "losses": {"kl": 1.0, "hidden": 1.0}, "teacher": str(graft.parent / "source")}
    options |= {"data": {"held_out": 0}, "train": ["model.layers.*.self_attn.?_proj.weight", "*.embed_tokens.weight"]}
    alone = {"trainer": STEADY | {"max_steps": 2, "per_device_train_batch_size": 2}, "output": str(tmp_path / "alone")}
    assert run_align(tmp_path, **options, **alone) == 0
    options |= {"trainer": STEADY | {"max_steps": 4}}
    done = launch_test(
        "fsdp2", "align", tmp_path, "--fsdp_state_dict_type", "SHARDED_STATE_DICT",
        environment={"TEST_FAIL": "3"}, **options,
    )  # fmt: skip
    assert "error: the disk is gone" in done.stderr, done.stderr[-3000:]
    (checkpoint,) = checkpoints(work_folder(tmp_path / "out"))
    assert not (checkpoint / "trained.safetensors").exists()
    assert run_align(tmp_path, "--finish", "last", **options) == 0
    files = [folder / "model.safetensors" for folder in (tmp_path / "out", tmp_path / "alone", graft)]
    same_tensors(*files)


def test_parts_that_cannot_be_put_together(tmp_path):
    """As FSDP saves adapters, under names of their own; and as DeepSpeed saves, in files of its own."""
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"has no trained\.safetensors: several processes .* --resume under the same"):
        load_trained(model, ["weight"], tmp_path)
    writer = dist_cp.FileSystemWriter(tmp_path / "pytorch_model_fsdp_0")
    dist_cp.save({"model": {"another": torch.ones(2)}}, storage_writer=writer)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match=r"cannot be put together here \(.*weight.*\); --resume under the same"):
        load_trained(model, ["weight"], tmp_path)
    assert torch.equal(model.weight, before)


def test_lora_under_fsdp_writes_what_one_process_does(tmp_path):
    options = {"lora": {"r": 2, "merge": True, "modules_to_save": ["scalars"]}, "data": {"held_out": 0}}
    alone = {"trainer": STEADY | {"max_steps": 3, "per_device_train_batch_size": 2}, "output": str(tmp_path / "alone")}
    assert run_finetune(tmp_path, **options, **alone) == 0
    done = launch_test("fsdp2", "finetune", tmp_path, **options, trainer=STEADY | {"max_steps": 3})
    assert done.returncode == 0, done.stderr[-3000:]
    assert log_of(tmp_path / "out") == pytest.approx(log_of(tmp_path / "alone"), rel=1e-4)
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "alone"))
    assert found.keys() == expected.keys() and sum(".scalars." in name for name in found) == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5)
    same_tensors(
        *(tmp_path / name / "merged" / "model.safetensors" for name in ("out", "alone")),
        tiny_graft() / "model.safetensors",
    )
