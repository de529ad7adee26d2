"""Plain `transformers.Trainer` on our models: which loss, which columns, which weights decay, what accumulation does.

Trainer decides these by class names, signatures and module classes; tests/modeling/test_travel.py asks the same of a
folder without the package.
"""

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)
from transformers.trainer_pt_utils import LabelSmoother

import modeling_bmojo
from modeling_bmojo import (
    BMojoConfig,
    BMojoForCausalLM,
    BMojoForQuestionAnswering,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
)
from tests.conversion.graft_sources import tiny_tokenizer
from tests.oracles import randomize_
from tests.tiny import SIZES


BASE = {**SIZES, "pad_token_id": 0}
PACKING = ("seq_idx", "cu_seq_lens_q", "position_ids")


def build(cls=BMojoForCausalLM, **fields):
    return randomize_(cls(BMojoConfig(**{**BASE, **fields})))


def ids(length=20, batch=4):
    return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(1))


def trainer(model, folder, rows=None, **options):
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to="none", disable_tqdm=True, **options)
    return Trainer(model, arguments, train_dataset=rows or [0], data_collator=default_data_collator)


def with_adapter(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


# The loss ------------------------------------------------------------------------------------------------------------
def smoothed(model, y, epsilon=0.1):
    """Szegedy et al. 2016, on the next token: (1 - epsilon) of the label, epsilon spread over the vocabulary."""
    logs = model(input_ids=y).logits[:, :-1].log_softmax(-1)
    label = logs.gather(-1, y[:, 1:, None]).mean()
    return -((1 - epsilon) * label + epsilon * logs.mean())


@pytest.mark.parametrize("wrap", [lambda model: model, with_adapter], ids=["plain", "peft"])
@pytest.mark.parametrize("fields", [{}, {"ssm_type": "mamba"}])
def test_label_smoothing_shifts(fields, wrap, tmp_path):
    model, y = wrap(build(**fields)).eval(), ids()
    loss = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(
        model, {"input_ids": y, "labels": y.clone()}
    )
    assert loss.item() == pytest.approx(smoothed(model, y).item(), rel=1e-5)


def test_label_smoothing_of_token_labels_does_not_shift(tmp_path):
    model, y = build(BMojoForTokenClassification, num_labels=5).eval(), ids()
    labels = y % 5
    loss = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(
        model, {"input_ids": y, "labels": labels.clone()}
    )
    assert loss.item() == pytest.approx(LabelSmoother(0.1)(model(input_ids=y), labels).item(), rel=1e-6)


def test_the_tables_of_names_break_nothing():
    """Our names stand where tools look names up; the lazy tables of classes still find ours and everyone else's."""
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert names["bmojo"] == "BMojoForCausalLM" and names["llama"] == "LlamaForCausalLM"
    table = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    assert table[BMojoConfig] is BMojoForCausalLM and table[LlamaConfig] is LlamaForCausalLM
    assert BMojoConfig in list(table.keys()) and BMojoForCausalLM in table.values()
    assert len(list(table.items())) == len(table.keys())
    for auto, cls in modeling_bmojo.AUTO_CLASSES.items():
        assert type(auto.from_config(BMojoConfig(**BASE))) is cls
    tiny = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert type(AutoModelForCausalLM.from_config(LlamaConfig(**tiny))) is LlamaForCausalLM


PIPELINES = {
    "text-generation": BMojoForCausalLM,
    "text-classification": BMojoForSequenceClassification,
    "token-classification": BMojoForTokenClassification,
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_know_the_heads(task, tmp_path, caplog):
    build(PIPELINES[task]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        options = {"max_new_tokens": 2} if task == "text-generation" else {}
        assert pipeline(task, model=str(tmp_path), device="cpu")("a b c", **options)
    assert "not supported" not in caplog.text


# Columns -------------------------------------------------------------------------------------------------------------
HEADS = [BMojoForSequenceClassification, BMojoForTokenClassification, BMojoForQuestionAnswering]


@pytest.mark.parametrize("wrap", [lambda model: model, with_adapter], ids=["plain", "peft"])
@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_packing_columns_reach_the_model(cls, wrap, tmp_path):
    run = trainer(wrap(build(cls)), tmp_path)
    run._set_signature_columns_if_needed()
    assert set(PACKING) <= set(run._signature_columns)


def test_a_packed_column_trains_as_if_passed_by_hand(tmp_path):
    """Token classification of two packed sequences, from a `datasets` column to the loss."""
    model, y = build(BMojoForTokenClassification, num_labels=5).eval(), ids(20, 1)
    parts = [y[:, :8], y[:, 8:]]
    seq_idx = torch.tensor([[0] * 8 + [1] * 12])
    table = Dataset.from_dict({"input_ids": y.tolist(), "labels": (y % 5).tolist(), "seq_idx": seq_idx.tolist()})
    run = trainer(model, tmp_path, table)
    batch = next(iter(run.get_train_dataloader()))
    assert "seq_idx" in batch
    with torch.no_grad():
        loss = run.compute_loss(model, batch)
        logits = torch.cat([model(input_ids=part).logits for part in parts], 1)
        assert torch.allclose(model(input_ids=y, seq_idx=seq_idx).logits, logits, atol=1e-6)
        assert loss.item() == pytest.approx(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), (y % 5).flatten()).item(), rel=1e-5
        )
        for packing in (
            {"cu_seq_lens_q": torch.tensor([0, 8, 20])},
            {"position_ids": torch.cat([torch.arange(8), torch.arange(12)])[None]},
        ):
            assert torch.allclose(model(input_ids=y, **packing).logits, logits, atol=1e-6)


@pytest.mark.parametrize("cls", [BMojoForSequenceClassification, BMojoForQuestionAnswering])
def test_a_head_with_one_answer_per_row_refuses_packed_rows(cls):
    model, y = build(cls).eval(), ids(20, 1)
    for packing in (
        {"seq_idx": torch.tensor([[0] * 8 + [1] * 12])},
        {"cu_seq_lens_q": torch.tensor([0, 8, 20])},
        {"position_ids": torch.cat([torch.arange(8), torch.arange(12)])[None]},
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(packing))}.*one answer per row.*row of its own"):
            model(input_ids=y, **packing)
    whole = {"seq_idx": torch.zeros(1, 20).long(), "position_ids": torch.arange(20)[None]}
    with torch.no_grad():
        assert torch.equal(model(input_ids=y, **whole)[0], model(input_ids=y)[0])
        padded = torch.cat([torch.zeros(1, 3).long(), y], 1)
        mask = (padded != 0).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        assert torch.isfinite(model(input_ids=padded, attention_mask=mask, position_ids=positions)[0]).all()


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_head_continues_a_cache_under_both_names(cls, name):
    model, y = build(cls).eval(), ids(20, 2)
    whole = model(input_ids=y)
    cache = model.model(input_ids=y[:, :12], use_cache=True)
    cache = getattr(cache, "past_key_values", None) or cache.cache
    part = model(input_ids=y[:, 12:], **{name: cache})
    assert torch.allclose(
        part[0], whole[0] if whole[0].dim() < 3 and "Seq" in cls.__name__ else whole[0][:, 12:], atol=1e-5
    )
    assert isinstance(model(input_ids=y, return_dict=False), tuple)


# Accumulation --------------------------------------------------------------------------------------------------------
def labels_of(cls, y):
    if cls is BMojoForQuestionAnswering:
        return {"start_positions": y[:, 0] % 20, "end_positions": y[:, 1] % 20}
    if cls is BMojoForSequenceClassification:
        return {"labels": y[:, 0] % 5}
    labels = y % 5
    labels[::2, 3:] = -100  # rows count by their labels
    return {"labels": labels}


@pytest.mark.parametrize("wrap", [lambda model: model, with_adapter], ids=["plain", "peft"])
@pytest.mark.parametrize("cls", [*HEADS, BMojoForCausalLM], ids=lambda cls: cls.__name__)
def test_accumulated_batches_are_the_batch(cls, wrap, tmp_path):
    y = ids(20, 8)
    columns = {"input_ids": y, **labels_of(cls, y)}
    rows = [{name: value[i].tolist() for name, value in columns.items()} for i in range(8)]
    found = []
    for size, steps in ((8, 1), (2, 4)):
        fields = {} if cls in (BMojoForQuestionAnswering, BMojoForCausalLM) else {"num_labels": 5}
        torch.manual_seed(0)  # the adapter's start
        model = wrap(build(cls, **fields))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1)
        run = trainer(
            model, tmp_path, rows, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, logging_steps=1,
            lr_scheduler_type="constant", save_strategy="no", seed=3, **options
        )  # fmt: skip
        run.train()
        moved = {name: start[name] - value for name, value in model.named_parameters() if value.requires_grad}
        found.append((run.state.log_history[0]["loss"], moved))
    (loss, moved), (other_loss, other_moved) = found
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert any(value.abs().max() > 1e-4 for value in moved.values())
    for name, value in moved.items():
        assert torch.allclose(value, other_moved[name], atol=1e-5, rtol=1e-3), name


# Decay ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", [BMojoForCausalLM, BMojoForSequenceClassification])
@pytest.mark.parametrize("fields", [{}, {"ssm_type": "mamba"}])
def test_scalars_do_not_decay(fields, cls, tmp_path):
    """As Mamba: A_log, D and dt_bias, beside norms and biases; the convolution and every projection do."""
    model = build(cls, **fields)
    decayed = set(trainer(model, tmp_path).get_decay_parameter_names(model))
    spared = {name for name, _ in model.named_parameters()} - decayed
    assert {f"model.layers.{i}.fading.scalars.{name}" for i in (0, 1) for name in ("A_log", "dt_bias", "D")} <= spared
    assert all("scalars" in name or "norm" in name or "bias" in name for name in spared)
    assert "scalars" not in str(decayed)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["scalars"]))
    kept = set(trainer(adapted, tmp_path).get_decay_parameter_names(adapted))
    assert not any("scalars" in name for name in kept)
    assert "SSMScalars()" in str(model) or "S6Scalars()" in str(model)
