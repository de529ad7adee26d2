"""Merged adapters where input embeddings and head are one tensor: the merged model is the adapter on its base."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from conversion.grafting.report import read_report
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import W
from tests.conversion.training_setup import run_finetune, tiny_graft


TIED = "llama_biases_tied"
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
CASES = {
    "head adapted": ({"target_modules": ["q_proj", "lm_head"]}, {HEAD}),
    "embeddings adapted": ({"target_modules": ["q_proj", "embed_tokens"]}, {EMBEDDINGS}),
    "both adapted": ({"target_modules": ["lm_head", "embed_tokens"]}, {HEAD, EMBEDDINGS}),
    "head in full": ({"modules_to_save": ["lm_head"]}, {HEAD}),
    "embeddings in full": ({"modules_to_save": ["embed_tokens"]}, {EMBEDDINGS}),
    "neither": ({}, set()),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning", "ignore:Setting `save_embedding:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_the_adapter_on_its_base(case, tmp_path):
    lora, changed = CASES[case]
    assert run_finetune(tmp_path, source=str(tiny_graft(TIED)), lora={"r": 2, "merge": True, **lora}) == 0
    out, ids = tmp_path / "out", torch.arange(3 * W)[None] % 90 + 3
    base = BMojoForCausalLM.from_pretrained(tiny_graft(TIED))
    assert base.config.tie_word_embeddings
    with torch.no_grad():
        plain = base(ids, use_cache=False).logits.clone()
        adapted = PeftModel.from_pretrained(base, out).eval()(input_ids=ids, use_cache=False).logits
        model = BMojoForCausalLM.from_pretrained(out / "merged")
        merged = model(ids, use_cache=False).logits
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=2e-5)
    tensors, before = load_file(out / "merged" / "model.safetensors"), load_file(tiny_graft(TIED) / "model.safetensors")
    assert model.config.tie_word_embeddings == (not changed) and (HEAD in tensors) == bool(changed)
    for name in {HEAD, EMBEDDINGS} & tensors.keys():
        assert torch.equal(tensors[name], before[EMBEDDINGS]) == (name not in changed)
    told = {key for key, item in read_report(out / "merged")["target_tensors"].items() if "trained-by" in item}
    assert changed == told & {HEAD, EMBEDDINGS}
