"""Fine-tuning as users do it: five lines with transformers' Trainer, and TRL's SFTTrainer with and without packing."""

from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from modeling_bmojo import BMojoConfig, BMojoForCausalLM, bmojo_lora_config
from tests.oracles import randomize_
from tests.tiny import SIZES


SENTENCE = "the memory keeps what surprised it and forgets all that could be predicted"
WORDS = ["<pad>", "<eos>", *SENTENCE.split()]
QUIET = dict(report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=True, seed=0)


def build(**fields):
    config = BMojoConfig(**{**SIZES, "vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1, **fields})
    return randomize_(BMojoForCausalLM(config))


def texts(count=8):
    """Sentences of different lengths, some beyond the window."""
    words = SENTENCE.split() * 3
    return [" ".join(words[start : 3 + 2 * start]) for start in range(count)]


def word_tokenizer():
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def training_loss(trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_five_lines_with_the_trainer(tmp_path):
    tokenizer = word_tokenizer()
    rows = [tokenizer(text) for text in texts()]
    from peft import get_peft_model
    from transformers import DataCollatorForLanguageModeling

    model = get_peft_model(build(), bmojo_lora_config(r=4))
    arguments = TrainingArguments(tmp_path, max_steps=30, learning_rate=0.02, logging_steps=10, **QUIET)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = training_loss(trainer)
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    trainer.save_model(tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def sft_trainer(folder, model=None, **options):
    """TRL's trainer over the sentences, on a fresh tiny model with adapters."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    arguments = trl.SFTConfig(
        folder, **{"max_length": 32, "max_steps": 4, "logging_steps": 1, "learning_rate": 0.01, **QUIET, **options}
    )
    return trl.SFTTrainer(
        model if model is not None else build(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts()}),
        processing_class=word_tokenizer(),
        peft_config=bmojo_lora_config(r=4, lora_dropout=0.0),
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(gradient_checkpointing=True),
        dict(packing=True),
        dict(packing=True, packing_strategy="wrapped"),
        dict(padding_free=True, max_length=None),
    ],
    ids=lambda options: "-".join(options) or "padded",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sft_trainer(options, tmp_path):
    trainer = sft_trainer(tmp_path, **{"gradient_checkpointing": False, **options, "max_steps": 20})
    losses = training_loss(trainer)
    assert len(losses) == 20 and losses[-1] < losses[0]
    moved = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert moved and all(p.abs().sum() > 0 for p in moved)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_packed_rows_of_sft_trainer_do_not_see_each_other(tmp_path):
    """The loss of a packed batch is that of its sentences one by one: TRL marks them by position_ids alone."""
    trainer = sft_trainer(tmp_path, packing=True, per_device_train_batch_size=4, gradient_checkpointing=False)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "position_ids" in batch and (batch["position_ids"] == 0).sum() > 1
    model = trainer.model.eval()
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist() + [batch["input_ids"].shape[1]]
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        for start, end in pairwise(starts):
            alone = model(input_ids=batch["input_ids"][:, start:end]).logits
            torch.testing.assert_close(packed[:, start:end], alone, rtol=0, atol=1e-5)
        together = model(input_ids=batch["input_ids"]).logits
    assert (together - packed).abs().max() > 1e-2
