"""Folders of hybrid-model-factory, read by us: logits as their definitions say, and what is refused."""

import functools
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conversion import import_hmf, restore
from conversion.grafting.report import read_report
from modeling_bmojo import BMojoForCausalLM
from modeling_bmojo.adapters import bmojo_lora_config
from tests.conversion.hmf_reference import Reference
from tests.conversion.hmf_sources import GROUPS, HEADS, VOCAB, WINDOW, make_config, make_tensors, write_source


TOKENS = 3 * WINDOW + 1  # some queries have all they may see, inputs and fading tokens
UNTIED = dict(tie_attn_weights=False)
MIXED = dict(kv_proj_rank=3, kv_learnable_residual=True)
# Pattern, and what else differs from `hmf_sources.make_config`.
LAYOUTS = {
    "attention": ("*-*", {}),
    "sliding": ("SWA-*", {}),
    "mamba2": ("M2-*", {}),
    "mamba2-bare-keys": ("M2", dict(mamba2_config=dict(use_qk_norm=False))),
    "gdn": ("GDN-*", {}),
    "gdn-extras": ("GDN", dict(gdn_config=dict(use_gate=False, conv_bias=True, conv_size=3, norm_eps=1e-3))),
    "gdn-expanded": ("GDN", dict(gdn_config=dict(kv_proj_rank=3))),
    "gdn-mixed": ("GDN", dict(gdn_config=MIXED)),
    "gka": ("GKA-*", {}),
    "gka-extras": ("GKA", dict(gka_config=dict(use_gate=False, num_iter=4, ridge_strength=0.1, norm_eps=1e-3))),
    "gka-mixed": ("GKA", dict(gka_config=MIXED)),
    "bmojo-mamba2": ("BMF-*", {}),
    "bmojo-gdn": ("BMF", dict(bmojo_config=dict(ssm_mixer="gdn", window_size=WINDOW - 1), tie_word_embeddings=True)),
    "bmojo-gka": ("BMF-GKA", dict(bmojo_config=dict(ssm_mixer="gka"))),
    "bmojo-gka-untied": ("BMF-*", dict(bmojo_config=dict(ssm_mixer="gka", **UNTIED))),
    "bmojo-mamba2-untied": ("BMF-SWA", dict(bmojo_config=dict(ssm_mixer="mamba2", **UNTIED), attention_bias=True)),
    "bmojo-gdn-untied": ("BMF-GDN", dict(bmojo_config=dict(ssm_mixer="gdn", **UNTIED))),
}


def run(source, output, *more):
    return import_hmf.main([str(source), "--out", str(output), *more])


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """From a layout's name to its config, its tensors and the folder that was written; each made once."""

    @functools.cache
    def made(name):
        pattern, changes = LAYOUTS[name]
        folder, config = tmp_path_factory.mktemp(name), make_config(pattern, **changes)
        tensors = write_source(folder / "source", config, shards=2)
        assert run(folder / "source", folder / "ours") == 0
        return config, tensors, folder / "ours"

    return made


def load(folder, dtype=torch.float64, **fields):
    return BMojoForCausalLM.from_pretrained(folder, dtype=dtype, **fields).eval()


def ids(seed=0, rows=1, length=TOKENS):
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def stepwise(model, tokens, first=1):
    """Logits [B, T, V] of `first` tokens at once, then of one after the other, from a cache."""
    out = model(tokens[:, :first], use_cache=True)
    logits, cache = [out.logits], out.past_key_values
    for t in range(first, tokens.shape[1]):
        logits.append(model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(logits, dim=1)


# Values --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_logits_are_those_of_the_definition(name, imported):
    """Prefill, decoding token by token and left padding, in float64."""
    config, tensors, folder = imported(name)
    model, rows, reference = load(folder), ids(rows=2), Reference(config, tensors)
    wanted = torch.stack([reference.logits(row) for row in rows])
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(model(rows).logits, wanted)
    close(stepwise(model, rows[:1]), wanted[:1])
    close(stepwise(model, rows[:1], 2 * WINDOW - 1), wanted[:1])
    short = TOKENS - 5
    padded = torch.cat([rows[1:, :1].expand(1, 5), rows[1:, :short]], dim=1)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :5] = 0
    found = model(torch.cat([rows[:1], padded]), attention_mask=mask).logits
    close(found[0], wanted[0])
    close(found[1, 5:], wanted[1, :short])


def test_a_folder_loads_as_an_auto_model(imported):
    config, _, folder = imported("bmojo-gdn-untied")
    found = AutoConfig.from_pretrained(folder)
    assert found.layer_types == ["bmojo", "linear_attention"] and found.ssm_type == "gated_delta"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is BMojoForCausalLM and model.dtype == torch.float32
    assert (folder / "modeling_bmojo.py").is_file() and "hybrid_qwen3" in (folder / "README.md").read_text()


def test_weights_keep_their_bits_and_shards_are_written(tmp_path):
    """bfloat16 stays; the scalars of the SSM become float32, as always."""
    config = make_config("BMF-*", bmojo_config=dict(ssm_mixer="gdn"))
    tensors = make_tensors(config, torch.bfloat16)
    write_source(tmp_path / "source", config, tensors, shards=3)
    assert run(tmp_path / "source", tmp_path / "ours", "--max-shard-size", "4KB") == 0
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert len(files) > 2 and {value.dtype for value in found.values()} == {torch.bfloat16, torch.float32}
    ours, theirs = "model.layers.0.fading.", "model.layers.0.bmojo_f.gdn."
    names = [f"{theirs}{name}_proj.weight" for name in ("g", "v", "k", "q", "gk", "b")]
    assert torch.equal(found[f"{ours}in_proj.weight"], torch.cat([tensors[name] for name in names]))
    assert torch.equal(found[f"{ours}scalars.A_log"], tensors[f"{theirs}A_log"].float())
    model = load(tmp_path / "ours", None)
    assert model.dtype == torch.bfloat16
    wanted = Reference(config, tensors).logits(ids()[0])
    assert (model(ids()).logits[0].double() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_every_tensor_is_in_the_account(imported):
    for name in ("bmojo-gdn-untied", "gdn-expanded"):
        _, tensors, folder = imported(name)
        report = read_report(folder)
        assert report["source_tensors"].keys() == tensors.keys()
        joined = [each for entry in report["target_tensors"].values() for each in entry["joined-from"]]
        assert sorted(joined) == sorted(tensors)
        assert report["counts"]["copied"] == len(tensors) and report["counts"]["dropped"] == 0
    made = {name for name, entry in report["target_tensors"].items() if "initialised-by" in entry}
    assert made == {f"model.layers.0.fading.{name}_repeat" for name in ("keys", "values")}


def test_a_tied_head_is_left_behind(tmp_path):
    config = make_config("*", tie_word_embeddings=True)
    tensors = make_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_source(tmp_path / "source", config, tensors)
    assert run(tmp_path / "source", tmp_path / "ours") == 0
    report = read_report(tmp_path / "ours")
    assert report["source_tensors"]["lm_head.weight"]["dropped-because"]
    model, wanted = load(tmp_path / "ours"), Reference(config, tensors).logits(ids()[0])
    torch.testing.assert_close(model(ids()).logits[0], wanted, rtol=1e-9, atol=1e-9)


# What else works on such a folder ------------------------------------------------------------------------------------
def test_lora_finds_every_projection(imported):
    from peft import get_peft_model

    _, _, folder = imported("bmojo-gdn-untied")
    model = load(folder, torch.float32)
    wanted = {name.rpartition(".")[2] for name, each in model.named_modules() if isinstance(each, torch.nn.Linear)}
    adapted = get_peft_model(model, bmojo_lora_config(model, r=2))
    assert set(adapted.peft_config["default"].target_modules) == wanted - {"lm_head"}
    adapted.train()
    adapted(ids(), labels=ids()).loss.backward()
    grown = {
        name for name, value in adapted.named_parameters() if value.grad is not None and value.grad.abs().sum() > 0
    }
    for name in ("fading_q_proj", "fading_k_proj", "fading_v_proj", "in_proj", "out_proj"):
        assert any(f"layers.0.{place}.{name}.lora_B" in each for each in grown for place in ("self_attn", "fading"))


@pytest.mark.parametrize("name", ["bmojo-mamba2", "bmojo-gdn-untied"])
def test_storage_is_an_override(name, imported):
    """Every older token is stored and fetched: what a query sees, decoding agrees with prefill on."""
    _, _, folder = imported(name)
    plain, model = load(folder), load(folder, storage_size=TOKENS)
    with torch.no_grad():
        whole = model(ids()).logits
        torch.testing.assert_close(stepwise(model, ids(), 5), whole, rtol=1e-9, atol=1e-9)
        before = plain(ids()).logits
    torch.testing.assert_close(whole[:, :WINDOW], before[:, :WINDOW], rtol=1e-9, atol=1e-9)
    assert (whole - before)[:, WINDOW:].abs().max() > 1e-3


def test_an_import_is_no_graft_to_restore(imported, tmp_path, capsys):
    assert restore.main([str(imported("gdn")[2]), "--output", str(tmp_path / "x")]) == 2
    assert "graft the source again" in capsys.readouterr().err


# Refused -------------------------------------------------------------------------------------------------------------
BMOJO, GDN = ("BMF-*", {}), ("GDN-*", {})
LAYER = "model.layers.0."


def changed(pattern, **changes):
    return lambda config, tensors: config.update(make_config(pattern, **changes))


def entry(name, value):
    """One key of config.json, in a section by its path."""

    def change(config, tensors):
        *path, last = name.split(".")
        for key in path:
            config = config[key]
        if value is None:
            del config[last]
        else:
            config[last] = value

    return change


def without(name):
    return lambda config, tensors: tensors.pop(name)


def put(name, value):
    return lambda config, tensors: tensors.__setitem__(name, value)


BAD = {
    "another model type": (BMOJO, entry("model_type", "qwen3"), r"model_type='qwen3': must be 'hybrid_qwen3'"),
    "an unknown token": (BMOJO, entry("hybrid_override_pattern", "BMF-RWKV"), r"unknown 'RWKV' \(layer 1\)"),
    "a fused token": (BMOJO, entry("hybrid_override_pattern", "BMF*-*"), r"unknown 'BMF\*' \(layer 0\)"),
    "a short pattern": (BMOJO, entry("hybrid_override_pattern", "BMF"), r"names 1 layers, num_hidden_layers=2"),
    "other layer types": (BMOJO, entry("layer_types", ["*", "*"]), r"layer_types=\['\*', '\*'\]: is not"),
    "an unknown key": (BMOJO, entry("sink_tokens", 4), "unknown keys: sink_tokens"),
    "an unknown key of a section": (GDN, entry("gdn_config.use_rope", True), r"unknown keys: gdn_config\.use_rope"),
    "a size that is missing": (BMOJO, entry("head_dim", None), "lacks head_dim"),
    "a contradiction": (GDN, entry("gdn_config.num_k_heads", HEADS), rf"num_k_heads={HEADS}: must be {GROUPS}"),
    "a nested contradiction": (BMOJO, entry("mamba2_config.ssm_cfg.expand", 2), r"ssm_cfg\.expand=2: must be 1"),
    "an odd window": (
        BMOJO,
        entry("bmojo_config.window_size", 6),
        "window_size=6: must be a power of two, or one less",
    ),
    "an odder window": (BMOJO, entry("bmojo_config.window_size", 5), "window_size=5: must be a power of two"),
    "no window": (("SWA", {}), entry("swa_config.window_size", 0), "swa_config.window_size=0: must be a whole number"),
    "two windows": (("BMF-SWA", {}), entry("swa_config.window_size", 9), "all windowed layers"),
    "no settings of the mixer": (GDN, entry("gdn_config", None), "gdn_config=None: .* how its GDN layers are built"),
    "no settings of B'MOJO": (BMOJO, entry("bmojo_config", None), "bmojo_config=None: .* how its BMF layers are built"),
    "no settings of B'MOJO's mixer": (BMOJO, entry("mamba2_config", None), "mamba2_config=None"),
    "another mixer": (BMOJO, entry("bmojo_config.ssm_mixer", "rwkv"), "ssm_mixer='rwkv': must be one of mamba2, gdn"),
    "two mixers": (("GDN-M2", {}), lambda config, tensors: None, r"SSMs of several kinds \(M2, GDN\)"),
    "positions in the SSM": (BMOJO, entry("mamba2_config.use_pos_emb", True), "use_pos_emb=True: must be False"),
    "no convolution": (GDN, entry("gdn_config.use_short_conv", False), "use_short_conv=False: must be True"),
    "quantised": (BMOJO, entry("quantization_config", {"quant_method": "fp8"}), "holds quantised weights"),
    "quantised tensors": (
        ("*", {}),
        put(f"{LAYER}mlp.up_proj.weight", torch.zeros(20, 12, dtype=torch.int8)),
        r"mlp\.up_proj\.weight is quantised \(I8\)",
    ),
    "a missing tensor": (
        BMOJO,
        without(f"{LAYER}bmojo_f.mamba.B_norm.weight"),
        r"bmojo_f\.mamba\.B_norm\.weight \[6\] is missing",
    ),
    "an unknown tensor": (
        BMOJO,
        put(f"{LAYER}bmojo_f.bmojo_attn.q_proj_.weight", torch.zeros(24, 12)),
        r"q_proj_\.weight \[24, 12\] has no place",
    ),
    "another shape": (
        GDN,
        put(f"{LAYER}gdn.k_proj.weight", torch.zeros(24, 12)),
        r"gdn\.k_proj\.weight has shape \[24, 12\], but config\.json implies \[12, 12\]",
    ),
    "values that are not finite": (
        ("*", {}),
        put(f"{LAYER}mlp.up_proj.weight", torch.full((20, 12), torch.nan)),
        "up_proj.weight of the source holds values that are not finite",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, tmp_path, capsys):
    (pattern, changes), change, message = BAD[name]
    config = make_config(pattern, **changes)
    tensors = make_tensors(config)
    change(config, tensors)
    write_source(tmp_path / "source", config, tensors)
    assert run(tmp_path / "source", tmp_path / "ours") == 2
    told = capsys.readouterr().err
    assert re.search(rf"(^|\n)error: .*{message}", told), told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_output_is_not_replaced_without_asking(tmp_path, capsys):
    write_source(tmp_path / "source", make_config("*"))
    assert run(tmp_path / "source", tmp_path / "ours") == 0
    assert run(tmp_path / "source", tmp_path / "ours") == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert run(tmp_path / "source", tmp_path / "ours", "--overwrite") == 0
    assert run(tmp_path / "source", tmp_path / "source", "--overwrite") == 2
    assert run(tmp_path / "absent", tmp_path / "new") == 2
    assert "must be a folder with config.json and safetensors, or a hub id" in capsys.readouterr().err
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "bmojo"
