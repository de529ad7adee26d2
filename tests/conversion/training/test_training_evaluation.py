"""The held-out loss of a run: the mean over all counted tokens of the held-out rows, whatever the batches."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import W
from tests.conversion.training_setup import letters, log_of, run_align, run_finetune, write_rows


TEXTS = [letters(count, seed=20 + count) for count in (W + 3, 45, W + 9, 30, 40)]  # five: no multiple of two
LOSSES = {"kl": 1.0, "hidden": 1.0, "mixer": 1.0}


def held_out(tmp_path):
    files = write_rows(tmp_path / "held-out.jsonl", [{"text": text} for text in TEXTS])
    return {"eval_files": files, "packing": "none", "held_out": 0, "append_eos": False}


def test_it_is_the_mean_over_all_counted_tokens(tmp_path):
    assert run_finetune(tmp_path, data=held_out(tmp_path), trainer={"per_device_eval_batch_size": 2}) == 0
    out = tmp_path / "out"
    tokenizer, model = AutoTokenizer.from_pretrained(out), BMojoForCausalLM.from_pretrained(out).eval()
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor(tokenizer(text)["input_ids"][: 3 * W])[None]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        total += F.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    assert log_of(out, "eval_loss")[-1] == pytest.approx(total / count, rel=1e-5)


def test_it_does_not_depend_on_the_batches_and_is_the_sum_of_its_parts(tmp_path):
    logs = {}
    for size in (1, 2, 5):
        output, trainer = str(tmp_path / str(size)), {"per_device_eval_batch_size": size}
        assert run_align(tmp_path, output=output, losses=LOSSES, data=held_out(tmp_path), trainer=trainer) == 0
        logs[size] = {key: log_of(tmp_path / str(size), f"eval_{key}") for key in ("loss", *LOSSES)}
        total = [sum(values) for values in zip(*(logs[size][key] for key in LOSSES))]
        assert len(total) == 2 and total == pytest.approx(logs[size]["loss"], rel=1e-5)
    for size in (2, 5):
        for key, values in logs[1].items():
            assert logs[size][key] == pytest.approx(values, rel=1e-5), (size, key)
