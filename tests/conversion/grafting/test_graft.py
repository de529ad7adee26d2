"""conversion.graft on tiny random models of transformers' own classes: every family through the real command line.

For T <= W a fresh graft has neither eidetic nor fading tokens in reach, so its logits are the source's.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.common import staging
from conversion.grafting.families import bmojo_config_for
from conversion.grafting.report import REPORT_FILE, read_report
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.conversion.graft_sources import (
    CHAT_TEMPLATE,
    SOURCES,
    VOCAB,
    W,
    graft,
    logits,
    randomised,
    save_source,
    snapshot,
    tiny_tokenizer,
)


@pytest.mark.parametrize("name", SOURCES)
def test_graft_has_the_logits_of_its_source(name, tmp_path):
    source = save_source(tmp_path / "source", name)
    assert graft(tmp_path) == 0
    ours = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    torch.testing.assert_close(logits(ours), logits(source), atol=1e-5, rtol=1e-5)
    assert ours.config.tie_word_embeddings == source.config.tie_word_embeddings
    assert set(ours.config.layer_types) == {"bmojo"}
    # Beyond the window the graft must differ from full attention, or the test above would prove nothing.
    beyond = logits(ours, 3 * W)
    assert beyond.isfinite().all() and beyond.abs().max() < 3 * logits(source).abs().max()
    if "sliding" not in name:
        assert (beyond - logits(source, 3 * W)).abs().max() > 1e-3


def test_longrope_turns_a_token_alike_however_long_the_text_is(tmp_path):
    """Read in one go or in pieces, on both sides of the length where the source would turn every token anew."""
    save_source(tmp_path / "source", "phi3_longrope")
    assert graft(tmp_path) == 0
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft").eval()
    assert model.config.rope_parameters["original_max_position_embeddings"] == W
    ids = torch.randint(3, VOCAB, (1, 3 * W), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole, first = model(input_ids=ids).logits, model(input_ids=ids[:, : W - 1], use_cache=True)
        rest = model(input_ids=ids[:, W - 1 :], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_report_accounts_for_every_tensor(name, tmp_path):
    save_source(tmp_path / "source", name)
    assert graft(tmp_path) == 0
    report = read_report(tmp_path / "graft")
    source = load_file(tmp_path / "source" / "model.safetensors")
    target = load_file(tmp_path / "graft" / "model.safetensors")
    assert report["source_tensors"].keys() == source.keys()
    assert report["target_tensors"].keys() == target.keys()
    for key, entry in report["source_tensors"].items():
        assert entry["shape"] == list(source[key].shape)
        if "dropped-because" in entry:
            assert entry["dropped-because"]
        else:
            goals = entry.get("split-into") or [entry["copied-to"]]
            assert torch.equal(source[key], torch.cat([target[goal] for goal in goals]))
            assert (len(goals) > 1) == ("qkv_proj" in key or "gate_up_proj" in key)
    for key, entry in report["target_tensors"].items():
        assert entry["shape"] == list(target[key].shape)
        assert entry["dtype"] == str(target[key].dtype).removeprefix("torch.")
        assert ("copied-from" in entry) != ("initialised-by" in entry)
        assert ("initialised-by" in entry) == (".fading." in key)
        assert entry["sha256"] == hashlib.sha256(target[key].numpy().tobytes()).hexdigest()
        if "rows" in entry:
            assert torch.equal(source[entry["copied-from"]][slice(*entry["rows"])], target[key])
    assert {"torch", "transformers", "modeling_bmojo", "python"} <= report["versions"].keys()
    assert report["settings"]["memory"]["window_size"] == W
    assert report["check"]["max_logit_difference"] < 1e-4


def test_folder_holds_everything_that_loading_needs(tmp_path):
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    stated = {"eos_token_id": [3, 2], "temperature": 0.7, "do_sample": True}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(stated))
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A model\n")
    assert graft(tmp_path) == 0
    folder = tmp_path / "graft"

    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "bmojo"
    for auto_class in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        module = config["auto_map"][auto_class].split(".")[0]
        assert (folder / f"{module}.py").is_file()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {**stated, "bos_token_id": 1, "pad_token_id": 0}
    again = AutoTokenizer.from_pretrained(folder)
    assert again.chat_template == CHAT_TEMPLATE
    chat = again.apply_chat_template([{"role": "user", "content": "a b"}], add_generation_prompt=True)["input_ids"]
    assert chat == [1, 4, 6, 7, 2, 1, 5]
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "source" in card and "AutoModelForCausalLM" in card and "LlamaForCausalLM" in card
    assert read_report(folder)["tokenizer"]["tokens"] == len(again)
    model = BMojoForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == [3, 2]
    assert not list(tmp_path.glob("*partial*"))


def test_sharded_source_and_sharded_output(tmp_path):
    source = save_source(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    assert graft(tmp_path, "--set", "max_shard_size=30KB") == 0
    assert len(list((tmp_path / "graft").glob("*.safetensors"))) > 2
    ours = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    torch.testing.assert_close(logits(ours), logits(source), atol=1e-5, rtol=1e-5)


def test_bf16_source_keeps_its_dtype_and_its_values(tmp_path):
    randomised(SOURCES["qwen3"]).bfloat16().save_pretrained(tmp_path / "source")
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    assert graft(tmp_path) == 0
    with safe_open(tmp_path / "graft" / "model.safetensors", framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {dtype for name, dtype in dtypes.items() if ".scalars." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".scalars." not in name} == {torch.bfloat16}
    ours = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(logits(ours.float()), logits(source), atol=1e-5, rtol=1e-5)


def test_dtype_setting_casts_and_says_so(tmp_path):
    save_source(tmp_path / "source")
    assert graft(tmp_path, "--set", "dtype=bfloat16") == 0
    report = read_report(tmp_path / "graft")
    assert report["dtype"] == "bfloat16"
    assert all(entry["cast-from"] == "float32" for entry in report["source_tensors"].values())
    assert BMojoForCausalLM.from_pretrained(tmp_path / "graft").dtype == torch.bfloat16


def test_lm_head_of_a_tied_source_is_dropped_with_the_reason(tmp_path):
    save_source(tmp_path / "source", "llama_biases_tied")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    assert graft(tmp_path) == 0
    assert "tied" in read_report(tmp_path / "graft")["source_tensors"]["lm_head.weight"]["dropped-because"]


def test_buffers_of_old_checkpoints_are_dropped_with_the_reason(tmp_path):
    save_source(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path), buffer: torch.ones(4)}, path, {"format": "pt"})
    assert graft(tmp_path) == 0
    assert "rope_parameters" in read_report(tmp_path / "graft")["source_tensors"][buffer]["dropped-because"]


@pytest.mark.parametrize(
    ("name", "layers", "kinds"),
    [
        ("llama", [1], ["full_attention", "bmojo"]),
        ("mistral_sliding", [0], ["bmojo", "sliding_attention"]),
        ("qwen2_mixed", [1], ["full_attention", "bmojo"]),
        ("smollm3", [0, 3], ["bmojo", "full_attention", "full_attention", "bmojo"]),
    ],
)
def test_layers_that_are_not_chosen_stay_as_they_are(name, layers, kinds, tmp_path):
    source = save_source(tmp_path / "source", name)
    assert graft(tmp_path, layers=layers) == 0
    ours = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert ours.config.layer_types == kinds
    torch.testing.assert_close(logits(ours), logits(source), atol=1e-5, rtol=1e-5)
    memories = {int(key.split(".")[2]) for key in ours.state_dict() if ".fading." in key}
    assert memories == set(layers)


def test_window_defaults_to_the_window_of_the_source():
    assert bmojo_config_for(SOURCES["mistral_sliding"], {}).window_size == W
    assert bmojo_config_for(SOURCES["mistral_sliding"], {"window_size": 5}).window_size == 5
    assert bmojo_config_for(SOURCES["llama"], {}).window_size == BMojoConfig().window_size


def test_untied_fading_projections_start_as_copies(tmp_path):
    save_source(tmp_path / "source", "qwen2")
    assert graft(tmp_path, tie_fading_projections=False) == 0
    tensors = load_file(tmp_path / "graft" / "model.safetensors")
    for part in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        attention = "model.layers.1.self_attn."
        assert torch.equal(tensors[f"{attention}fading_{part}"], tensors[f"{attention}{part}"])
    entry = read_report(tmp_path / "graft")["target_tensors"]["model.layers.1.self_attn.fading_k_proj.weight"]
    assert entry["initialised-by"] == "a copy of model.layers.1.self_attn.k_proj.weight"


def test_the_same_settings_give_the_same_file(tmp_path):
    save_source(tmp_path / "source")
    for output in ("first", "second"):
        assert graft(tmp_path, output=output) == 0
    assert graft(tmp_path, output="other", seed=7) == 0
    first, second, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second", "other"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_exported_folder_loads_where_the_package_cannot_be_imported(tmp_path):
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    assert graft(tmp_path) == 0
    shutil.rmtree(tmp_path / "source")
    expected = logits(BMojoForCausalLM.from_pretrained(tmp_path / "graft"), 3 * W)
    script = f"""
import importlib.abc, sys
sys.path += {sorted({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]})!r}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "modeling_bmojo":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
try:
    import modeling_bmojo
except ModuleNotFoundError:
    pass
else:
    sys.exit("the package could be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("graft", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("graft", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
ids = torch.randint(3, {VOCAB}, (2, {3 * W}), generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, "logits.pt")
out = model.generate(ids, max_new_tokens=3, do_sample=False)
assert out.shape == (2, {3 * W + 3}), out.shape
assert tokenizer.chat_template
"""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
        "PATH": "",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-6, rtol=1e-6)


def test_second_run_refuses_overwrites_or_reuses(tmp_path, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path) == 0
    before = snapshot(tmp_path / "graft")
    stamp = (tmp_path / "graft" / REPORT_FILE).stat().st_mtime_ns

    assert graft(tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert snapshot(tmp_path / "graft") == before

    assert graft(tmp_path, "--reuse") == 0
    assert "kept" in capsys.readouterr().out
    assert (tmp_path / "graft" / REPORT_FILE).stat().st_mtime_ns == stamp

    assert graft(tmp_path, "--reuse", "--set", "eidetic_size=2") == 0
    assert BMojoConfig.from_pretrained(tmp_path / "graft").eidetic_size == 2

    save_source(tmp_path / "source")  # written again: no longer the files that were read
    assert graft(tmp_path, "--reuse", "--set", "eidetic_size=2") == 0
    assert "copied" in capsys.readouterr().out

    assert graft(tmp_path, "--overwrite") == 0
    after = snapshot(tmp_path / "graft")
    assert {name for name in before if before[name] != after.get(name)} <= {REPORT_FILE}  # the source's time stamps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]


def test_files_have_the_mode_that_the_user_wants(tmp_path):
    """safetensors writes private files, which a colleague or a server could not read."""
    save_source(tmp_path / "source")
    old = os.umask(0o027)
    try:
        assert graft(tmp_path) == 0
    finally:
        os.umask(old)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "graft").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {"0o640"}, modes


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left on device"), ValueError("broken")])
@pytest.mark.parametrize(
    "step", ["open_source", "write_model", "copied_tensor", "layer_init", "check_against_source", "write_report"]
)
def test_failure_leaves_no_partial_folder_and_the_old_output(step, error, tmp_path, monkeypatch, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path) == 0
    before = snapshot(tmp_path / "graft")
    partial = []

    def fail(*arguments, **named):
        partial.extend(path.name for path in tmp_path.glob("graft.partial-*"))
        raise error

    monkeypatch.setattr(f"conversion.grafting.pipeline.{step}", fail)
    assert graft(tmp_path, "--overwrite", "--set", "eidetic_size=2") == (130 if error is KeyboardInterrupt else 2)
    assert bool(partial) == (step != "open_source"), "the work is done in a folder of its own"
    assert snapshot(tmp_path / "graft") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]
    assert capsys.readouterr().err


def test_failing_rename_puts_the_old_output_back(tmp_path, monkeypatch):
    save_source(tmp_path / "source")
    assert graft(tmp_path) == 0
    before = snapshot(tmp_path / "graft")
    rename = staging.rename

    def fail_for_partial(path, target):
        if ".partial-" in path.name:
            raise OSError("device busy")
        return rename(path, target)

    monkeypatch.setattr(staging, "rename", fail_for_partial)
    assert graft(tmp_path, "--overwrite") == 2
    assert snapshot(tmp_path / "graft") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graft", "settings.yaml", "source"]


def test_a_partial_graft_s_card_says_what_the_other_layers_see(tmp_path):
    save_source(tmp_path / "source")
    assert graft(tmp_path, "--set", "layers=[0]") == 0
    assert "the others what they saw in the source" in (tmp_path / "graft" / "README.md").read_text()


def test_facts_of_the_source_cannot_be_set(tmp_path, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path, "--set", "hidden_size=3") == 2
    assert "fact of the source" in capsys.readouterr().err
