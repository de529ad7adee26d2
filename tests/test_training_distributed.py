"""Two processes on the CPU (gloo) give what one process gives with batches twice as large."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from training_setup import T, log_of, recipe, run_align, write_text


ROOT = Path(__file__).resolve().parents[1]


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
