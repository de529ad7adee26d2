"""Every Python line of docs/peft.md runs, one block after the other, on a tiny graft and a few tiny chats."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_bmojo import BMojoCache, BMojoForCausalLM
from tests.conversion.training_setup import letters, tiny_graft


PAGE = Path(__file__).resolve().parents[3] / "docs" / "peft.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """What the page expects where it is run: a graft, and chats (here in the tiny tokenizer's words)."""
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "smollm2-135m-bmojo").symlink_to(tiny_graft())
    data = tmp_path / "configs" / "peft" / "data"
    data.mkdir(parents=True)
    with (data / "short-answers-train.jsonl").open("w") as file:
        for seed in range(6):
            question, answer = letters(4 + 9 * seed, seed), letters(8, seed + 1)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_page_runs(checkout, capsys):
    assert len(BLOCKS) == 3
    names: dict = {"__name__": "docs"}
    for block in BLOCKS[:2]:
        exec(compile(block, str(PAGE), "exec"), names)
    told = capsys.readouterr().out
    assert "before:" in told and "after: " in told
    assert isinstance(names["memory"], BMojoCache)
    ids = torch.arange(40)[None] % 90 + 3
    with torch.no_grad():
        merged = BMojoForCausalLM.from_pretrained(checkout / "my-model").eval()(ids).logits
        plain = BMojoForCausalLM.from_pretrained(tiny_graft()).eval()(ids).logits
    assert (merged - plain).abs().max() > 1e-4
    exec(compile(BLOCKS[2], str(PAGE), "exec"), names)
    for adapter in ("my-adapter", "my-sft-adapter"):
        tensors = load_file(checkout / adapter / "adapter_model.safetensors")
        learnt = [value for name, value in tensors.items() if "lora_B" in name]  # zero before training
        assert learnt and all(value.isfinite().all() for value in learnt)
        assert any(value.abs().max() > 0 for value in learnt)
