"""What transformers' `PipelineTesterMixin` asks for: small checkpoints with a tokenizer, and what each task must give.

The mixin loads both, makes the pipeline and feeds it; the checks of each task are not in the distribution, so they
are here.
"""

import types
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline


TOKENIZER = "PreTrainedTokenizerFast"
WORDS = 99
# task -> which of a model's classes does it
TASKS = {
    "text-generation": "causal",
    "feature-extraction": "base",
    "text-classification": "sequence",
    "zero-shot": "sequence",
    "token-classification": "token",
}


def tasks(classes: dict) -> dict:
    """Return task -> class, of those that a model has."""
    return {task: classes[kind] for task, kind in TASKS.items() if kind in classes}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return one that knows the words w3 ... w98."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, WORDS)}}
    core = Tokenizer(models.WordLevel(words, unk_token="w3"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_input_names=["input_ids", "attention_mask"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)


def offer(mixin: types.ModuleType, folder: Path, config, classes: dict) -> None:
    """Write checkpoints of `classes` where the mixin will look, and tell it of them."""
    for model_class in tasks(classes).values():
        place = folder / config.model_type / model_class.__name__
        model_class(config).save_pretrained(place)
        tokenizer().save_pretrained(place)
    facts = {"tokenizer_classes": [TOKENIZER], "processor_classes": []}
    mixin.tiny_model_summary = {each.__name__: facts for each in classes.values()}
    mixin.TRANSFORMERS_TINY_MODEL_PATH = str(folder)
    for task in TASKS:
        name = mixin.pipeline_test_mapping[task]["test"].rpartition(".")[2]
        mixin.pipeline_test_mapping[task]["test"] = f"{__name__}.{name}"


class PipelineTests:
    """One task: its pipeline, examples, and what a result is."""

    task: str  # as `pipeline` calls it
    examples = ["w5 w6 w7 w8 w9 w10", "w11 w12", "w13 w14 w15"]
    options: dict = {}

    def get_test_pipeline(self, model, tokenizer, dtype: str, **processors):
        """Return the pipeline, and texts of different lengths."""
        found = pipeline(self.task, model=model, tokenizer=tokenizer, dtype=getattr(torch, dtype), **self.options)
        return found, self.examples

    def run_pipeline_test(self, pipeline, examples) -> None:
        """Check a text alone, and all in one batch."""
        alone = [pipeline(text) for text in examples]
        for result in alone:
            self.check(result)
        for result in pipeline(list(examples), batch_size=len(examples)):
            self.check(result)

    def check(self, result) -> None:
        """Raise AssertionError for a result that is none."""
        raise NotImplementedError


class TextGenerationPipelineTests(PipelineTests):
    task = "text-generation"
    options = dict(max_new_tokens=5, do_sample=False)

    def check(self, result) -> None:
        (found,) = result
        assert found["generated_text"].split()[0].startswith("w")


class FeatureExtractionPipelineTests(PipelineTests):
    task = "feature-extraction"

    def check(self, result) -> None:
        (rows,) = result
        assert {len(row) for row in rows} == {32} and all(isinstance(value, float) for value in rows[0])


class TextClassificationPipelineTests(PipelineTests):
    task = "text-classification"

    def check(self, result) -> None:
        found = result[0] if isinstance(result, list) else result
        assert found["label"].startswith("LABEL_") and 0 <= found["score"] <= 1


class ZeroShotClassificationPipelineTests(PipelineTests):
    task = "zero-shot-classification"
    options = dict(candidate_labels=["w20", "w21 w22"], hypothesis_template="w23 {}")

    def check(self, result) -> None:
        assert sorted(result["labels"]) == ["w20", "w21 w22"] and abs(sum(result["scores"]) - 1) < 1e-2


class TokenClassificationPipelineTests(PipelineTests):
    task = "token-classification"

    def check(self, result) -> None:
        assert result and all(each["entity"].startswith("LABEL_") and 0 <= each["score"] <= 1 for each in result)
