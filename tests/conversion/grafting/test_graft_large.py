"""Large checkpoints: bounded memory, dtypes kept, pickles, and runs that are killed.

The bounds are shown on a scaled-down checkpoint; `python -m benchmarks.large` shows them on one of 6 GB.
"""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conversion.common import export
from conversion.common.staging import clear_leftovers, sole_writer, staged_folder
from conversion.common.weights import BLOCK_BYTES, digest, open_weights, row_blocks
from conversion.grafting import pipeline
from conversion.grafting.check import small_memory
from conversion.grafting.pipeline import TensorBuilder, build_tensors, is_finite, prepare
from conversion.grafting.report import read_report
from conversion.grafting.settings import load_settings
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.conversion.graft_sources import SOURCES, edit_json, graft, logits, randomised, save_source, snapshot


ROOT = Path(__file__).resolve().parents[3]
MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from conversion.graft import main
from benchmarks.large import llama, write_checkpoint

for name, layers, vocabulary in (("small", 1, 512), ("large", 12, 4096)):  # the small one brings in all code
    folder = Path(sys.argv[1]) / name
    write_checkpoint(folder / "source", llama(layers, 512, vocabulary), "24MB")
    (folder / "settings").write_text(f"source: {folder}/source\\noutput: {folder}/graft\\nmax_shard_size: 24MB\\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main([str(folder / "settings")]) == 0
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


# Memory --------------------------------------------------------------------------------------------------------------
def test_peak_memory_is_below_twice_a_shard(tmp_path):
    """A checkpoint of many shards, in a process whose memory is measured; the code itself is no part of the bound."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    before, after = (int(number) * (1 if sys.platform == "darwin" else 1024) for number in done.stdout.split()[-2:])
    above = after - before
    shards = [file.stat().st_size for file in tmp_path.glob("large/*/*.safetensors")]
    assert sum(shards) > 8 * max(shards), "or the bound would say nothing"
    assert above < 2 * max(shards), f"{above / 1e6:.0f} MB more than the code itself"


def test_no_more_than_a_shard_of_tensors_is_alive_at_a_time(tmp_path, monkeypatch):
    save_source(tmp_path / "source", "phi3")
    alive, peak, make = {}, [], TensorBuilder.__call__

    def tracked(self, name):
        tensor = make(self, name)
        alive[name] = tensor.nbytes
        weakref.finalize(tensor, alive.pop, name)
        peak.append(sum(alive.values()))
        return tensor

    monkeypatch.setattr(TensorBuilder, "__call__", tracked)
    assert graft(tmp_path, max_shard_size="30KB") == 0
    files = list((tmp_path / "graft").glob("*.safetensors"))
    total = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert max(peak) <= 30_000 < total / 3 and not alive


def test_all_tensors_together_are_those_that_are_written(tmp_path):
    save_source(tmp_path / "source", "phi3")
    assert graft(tmp_path, max_shard_size="20KB") == 0
    settings = load_settings(tmp_path / "settings.yaml", {"output": str(tmp_path / "other")})
    tensors = build_tensors(prepare(settings))
    written = open_weights(tmp_path / "graft", "x")
    assert tensors.keys() == written.shapes.keys()
    assert all(torch.equal(written.rows(name), tensor) for name, tensor in tensors.items())


def test_a_tensor_larger_than_a_block_is_copied_and_checked_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("conversion.common.weights.BLOCK_BYTES", 256)  # two rows of 32 numbers
    source = save_source(tmp_path / "source", "phi3")
    assert graft(tmp_path) == 0
    ours = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    torch.testing.assert_close(logits(ours), logits(source), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        source.model.layers[1].mlp.gate_up_proj.weight[-1, -1] = float("nan")
    source.save_pretrained(tmp_path / "source")
    assert graft(tmp_path, output="other") == 2
    assert "model.layers.1.mlp.gate_up_proj.weight" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 1000])
@pytest.mark.parametrize("row_bytes", [0, 1, BLOCK_BYTES // 2, BLOCK_BYTES, 3 * BLOCK_BYTES])
def test_blocks_cover_every_row_once(rows, row_bytes):
    blocks = list(row_blocks(rows, row_bytes))
    assert [row for first, last in blocks for row in range(first, last)] == list(range(rows))
    assert all((last - first) * row_bytes <= max(BLOCK_BYTES, row_bytes) for first, last in blocks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_means_every_value(dtype):
    assert is_finite(torch.zeros(0, 3, dtype=dtype))
    for value in (0.0, -60000.0, float("nan"), float("inf"), -float("inf")):
        for place in (0, 5, 11):
            tensor = torch.ones(3, 4, dtype=dtype)
            tensor.view(-1)[place] = value
            assert is_finite(tensor) == bool(tensor.isfinite().all())


def test_the_check_needs_memories_for_its_tokens_only():
    config = BMojoConfig(window_size=4096, eidetic_size=1024)
    small = small_memory(config, 64)
    assert (small.window_size, small.eidetic_size) == (64, 64)
    assert (config.window_size, config.eidetic_size) == (4096, 1024)
    strided = BMojoConfig(window_size=4096, fading_stride=128)  # which must divide the window
    assert small_memory(strided, 64).window_size == 128
    assert small_memory(strided, 129).window_size == 256
    delayed = small_memory(BMojoConfig(window_size=4, fading_delay=3, fading_stride=3), 4)
    assert (delayed.window_size, delayed.alone) == (4, 4)
    delayed.validate()
    few = small_memory(BMojoConfig(window_size=16, eidetic_size=4), 16)
    assert (few.window_size, few.eidetic_size) == (16, 4)


@pytest.mark.parametrize(("delay", "check"), [(0, False), (4, True)])
def test_a_graft_with_a_delay_says_how_much_of_it_is_the_source(delay, check, tmp_path):
    model = save_source(tmp_path / "source")
    memory = dict(fading_delay=delay, fading_size=1, fading_stride=1, check=check)
    assert graft(tmp_path, **memory) == 0
    report, card = read_report(tmp_path / "graft"), (tmp_path / "graft" / "README.md").read_text()
    assert report["identical_up_to"] == delay and (report["check"] or {}).get("tokens") == (delay or None)
    assert ("Its logits are not those of the source, for no token" in card) == (delay == 0)
    apart = (logits(BMojoForCausalLM.from_pretrained(tmp_path / "graft")) - logits(model)).abs().amax((0, 2))
    assert (apart[:delay] < 1e-4).all() and (apart[delay:] > 1e-4).any()


def test_memories_that_are_not_finite_and_missing_tensors_are_noticed(tmp_path, monkeypatch, capsys):
    save_source(tmp_path / "source")
    layer_init, write_shards = pipeline.layer_init, export.write_shards

    def broken(plan, index):
        found = layer_init(plan, index)
        if index == 1:
            found["model.layers.1.fading.conv.bias"].fill_(torch.nan)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "layer_init", broken)
        assert graft(tmp_path) == 2
    assert "layer 1 of the graft" in capsys.readouterr().err

    def incomplete(folder, shapes, *others):
        write_shards(folder, {name: shape for name, shape in shapes.items() if name != "model.norm.weight"}, *others)

    monkeypatch.setattr(export, "write_shards", incomplete)
    monkeypatch.setattr(pipeline, "build_report", lambda *arguments: {})  # which misses the digest
    assert graft(tmp_path) == 2
    assert "model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "graft").exists()


# Dtypes --------------------------------------------------------------------------------------------------------------
def test_every_tensor_keeps_its_own_dtype(tmp_path):
    """Most tensors in bfloat16, one in float32 and one in float16, as some checkpoints are."""
    randomised(SOURCES["llama"]).bfloat16().save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].half()
    save_file(tensors, path, {"format": "pt"})
    assert graft(tmp_path) == 0
    written = load_file(tmp_path / "graft" / "model.safetensors")
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor)
    assert read_report(tmp_path / "graft")["dtype"] == "bfloat16"
    assert BMojoForCausalLM.from_pretrained(tmp_path / "graft").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["llama", "phi3", "olmo2_tied_biases"])
def test_the_check_rounds_each_tensor_as_the_graft_does(name, tmp_path):
    """Norms in float32 that bfloat16, the dtype of the others, would change by four times the check's tolerance."""
    between = 1 + 2**-8 - 2**-12  # bfloat16 has 1 and 1 + 2**-7
    model = randomised(SOURCES[name]).bfloat16()
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    norms = {key: torch.full(value.shape, between) for key, value in tensors.items() if "norm" in key}
    save_file({**tensors, **norms}, path, {"format": "pt"})
    assert graft(tmp_path) == 0
    report = read_report(tmp_path / "graft")
    assert report["dtype"] == "bfloat16" and report["target_tensors"]["model.norm.weight"]["dtype"] == "float32"
    assert report["check"]["max_logit_difference"] < 1e-5 * report["check"]["logit_scale"]
    # A dtype in the settings rounds the norms too, in the graft and in the check.
    assert graft(tmp_path, output="rounded", dtype="bfloat16") == 0
    check = read_report(tmp_path / "rounded")["check"]
    assert check["max_logit_difference"] < 1e-5 * check["logit_scale"]


def test_a_tensor_of_a_wider_dtype_is_cast_to_that_of_the_others(tmp_path):
    save_source(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].double()}, path, {"format": "pt"})
    assert graft(tmp_path) == 0
    report = read_report(tmp_path / "graft")
    assert report["source_tensors"]["model.norm.weight"]["cast-from"] == "float64"
    assert report["target_tensors"]["model.norm.weight"]["dtype"] == "float32"


# Pickles -------------------------------------------------------------------------------------------------------------
def pickled_source(folder: Path, sharded: bool = False, **options) -> dict[str, torch.Tensor]:
    """The tiny Llama as transformers used to save it."""
    tensors = save_source(folder).state_dict()
    (folder / "model.safetensors").unlink()
    if not sharded:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return tensors
    names, weight_map = sorted(tensors), {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05d}-of-00003.bin"
        torch.save({name: tensors[name] for name in names[i::3]}, folder / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_pickles_are_read_where_they_are_allowed(sharded, tmp_path, capsys):
    tensors = pickled_source(tmp_path / "source", sharded)
    assert graft(tmp_path) == 2
    message = capsys.readouterr().err
    assert "pytorch_model" in message and "allow_pickle=true" in message and "save_pretrained" in message
    assert graft(tmp_path, "--set", "allow_pickle=true") == 0
    written = load_file(tmp_path / "graft" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    assert read_report(tmp_path / "graft")["check"]["max_logit_difference"] < 1e-4


def test_safetensors_go_before_pickles(tmp_path):
    save_source(tmp_path / "source")
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(b"never read")
    assert graft(tmp_path, "--set", "allow_pickle=true") == 0


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_single_file_goes_before_an_index_as_in_transformers(kind, tmp_path):
    """A folder that was saved twice has both; the index may name other tensors, or shards that are gone."""
    folder = tmp_path / "source"
    tensors = pickled_source(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    used, other = ("model.safetensors", "pytorch_model.bin")[:: 1 if kind == "safetensors" else -1]
    (folder / other).unlink()
    stale, index = f"stale.{kind}", folder / f"{used}.index.json"
    old = {name: tensor + 1 for name, tensor in tensors.items()}
    (save_file if kind == "safetensors" else torch.save)(old, folder / stale)
    for weight_map in (dict.fromkeys(old, stale), {**dict.fromkeys(old, stale), "ghost": stale}, {"ghost": "gone"}):
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        ours = open_weights(folder, "x", allow_pickle=True)
        assert set(ours.shapes) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(ours.rows(name), tensor) and torch.equal(theirs[name], tensor)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_pickle_that_runs_code_is_refused_and_does_not(tmp_path, capsys):
    pickled_source(tmp_path / "source")
    torch.save({"model.norm.weight": Malicious(tmp_path / "owned")}, tmp_path / "source" / "pytorch_model.bin")
    assert graft(tmp_path, "--set", "allow_pickle=true") == 2
    assert "pytorch_model.bin does not load as weights only" in capsys.readouterr().err
    with open(tmp_path / "source" / "pytorch_model.bin", "wb") as file:
        pickle.dump(Malicious(tmp_path / "owned"), file)
    assert graft(tmp_path, "--set", "allow_pickle=true") == 2
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "holds a list"),
        ({"model": {"a": 1}}, "'model', which is no tensor"),
        (b"", "does not load"),
        (b"PK\x03\x04 cut short", "does not load"),
    ],
    ids=["list", "nested", "empty", "truncated"],
)
def test_pickles_that_are_no_weights_are_named(content, words, tmp_path, capsys):
    pickled_source(tmp_path / "source")
    path = tmp_path / "source" / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert graft(tmp_path, "--set", "allow_pickle=true") == 2
    message = capsys.readouterr().err
    assert words in message and "pytorch_model.bin" in message


def test_pickles_that_cannot_be_mapped_say_what_to_do(tmp_path, capsys):
    pickled_source(tmp_path / "source", _use_new_zipfile_serialization=False)
    assert graft(tmp_path, "--set", "allow_pickle=true") == 2
    assert "mapped into memory" in capsys.readouterr().err


def test_missing_pickled_shards_are_named(tmp_path, capsys):
    pickled_source(tmp_path / "source", sharded=True)
    index = tmp_path / "source" / "pytorch_model.bin.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**names, "model.ghost.weight": "pytorch_model-00001-of-00003.bin"})
    assert graft(tmp_path, allow_pickle=True) == 2
    assert "model.ghost.weight" in capsys.readouterr().err
    (tmp_path / "source" / "pytorch_model-00002-of-00003.bin").unlink()
    assert graft(tmp_path, allow_pickle=True) == 2
    assert "pytorch_model-00002-of-00003.bin is missing" in capsys.readouterr().err


def test_rows_of_every_kind_of_file_are_the_same(tmp_path):
    tensors = pickled_source(tmp_path / "pickled")
    save_source(tmp_path / "safe")
    for folder in ("pickled", "safe"):
        weights = open_weights(tmp_path / folder, "x", allow_pickle=True)
        for name, tensor in tensors.items():
            assert weights.shapes[name] == tuple(tensor.shape) and weights.dtypes[name] == "float32"
            for start, stop in ((0, None), (0, 1), (1, 3), (2, 32), (0, 32)):
                assert torch.equal(weights.rows(name, start, stop), tensor[start:stop])
            assert digest(weights.rows(name)) == digest(tensor)


NUMBER = "0123456789ab"  # of a temporary folder


# Killed runs ---------------------------------------------------------------------------------------------------------
def killed_graft(tmp_path: Path, target: str, *arguments: str) -> None:
    """A graft in a process of its own that is killed (kill -9) when it calls `target`; it cannot clear up."""

    def run():
        name, attribute = target.rsplit(".", 1)
        module = sys.modules[name]
        original = getattr(module, attribute)

        def kill(*given, **named):
            if "rename" not in attribute or ".partial-" in given[0].name:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **named)

        setattr(module, attribute, kill)
        graft(tmp_path, *arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("step", ["copied_tensor", "check_against_source", "write_report"])
def test_a_killed_run_leaves_no_output_and_the_next_one_clears_up(step, tmp_path):
    save_source(tmp_path / "source")
    killed_graft(tmp_path, f"conversion.grafting.pipeline.{step}")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert "graft" not in left and any(".partial-" in name for name in left)
    assert graft(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]
    assert read_report(tmp_path / "graft")["check"]


def test_a_run_killed_while_it_changes_places_loses_nothing(tmp_path, capsys):
    """Killed when the old output was moved aside and the new one not yet in its place."""
    save_source(tmp_path / "source")
    assert graft(tmp_path) == 0
    before = snapshot(tmp_path / "graft")
    killed_graft(tmp_path, "conversion.common.staging.rename", "--overwrite", "--set", "eidetic_size=2")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert "graft" not in left and any(".replaced-" in name for name in left)
    assert graft(tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert snapshot(tmp_path / "graft") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]


def test_a_run_killed_at_the_very_end_leaves_the_new_output(tmp_path):
    """The new output in its place, the old one not yet removed."""
    output = tmp_path / "graft"
    with staged_folder(output) as partial:
        (partial / "new").touch()
    old = tmp_path / f"graft.replaced-{NUMBER}"
    old.mkdir()
    (tmp_path / f"graft.partial-{NUMBER}.lock").touch()  # as earlier versions left it
    clear_leftovers(output)
    assert [path.name for path in tmp_path.iterdir()] == ["graft"] and (output / "new").is_file()


def test_a_run_at_work_is_left_alone(tmp_path, capsys):
    save_source(tmp_path / "source")
    with sole_writer(tmp_path / "graft"), staged_folder(tmp_path / "graft") as partial:
        (partial / "one").touch()
        assert graft(tmp_path) == 2
        told = capsys.readouterr().err
        assert "another process is writing it" in told and str(tmp_path / "graft") in told
        assert (partial / "one").is_file()
    assert [path.name for path in (tmp_path / "graft").iterdir()] == ["one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]


def test_every_writer_clears_up_and_touches_nothing_else(tmp_path):
    (tmp_path / f"graft.partial-{NUMBER}.lock").touch()
    (tmp_path / f"graft.partial-{NUMBER}").mkdir()
    (tmp_path / f"graft.partial-{NUMBER}" / "model.safetensors").touch()
    (tmp_path / "graft.lock").touch()  # of a killed process: it locks nothing
    for name in ("graft.partial-results", "graft.replaced-by-me", "another.partial-0123456789ab"):
        (tmp_path / name).mkdir()
    with sole_writer(tmp_path / "graft"), staged_folder(tmp_path / "graft") as partial:
        own = {"another.partial-0123456789ab", "graft.partial-results", "graft.replaced-by-me"}
        assert {path.name for path in tmp_path.iterdir()} == own | {partial.name, "graft.lock"}
    assert {path.name for path in tmp_path.iterdir()} == own | {"graft"}


def test_a_refusal_leaves_no_folders_above_the_output(tmp_path):
    with pytest.raises(ValueError), sole_writer(tmp_path / "a" / "b" / "c"):
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())


def test_names_like_patterns_are_only_names(tmp_path):
    """A leftover of `graft` is none of `g*t`."""
    (tmp_path / f"graft.partial-{NUMBER}.lock").touch()
    (tmp_path / f"graft.partial-{NUMBER}").mkdir()
    clear_leftovers(tmp_path / "g*t")
    assert (tmp_path / f"graft.partial-{NUMBER}").is_dir()
    clear_leftovers(tmp_path / "graft")
    assert not list(tmp_path.iterdir())
