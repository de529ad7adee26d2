"""What transformers expects of a model, in the version that runs these tests: names of the cache, quiet shims.

`make test` runs them on the pinned version, `make test-versions` on the oldest and the newest (CONTRIBUTING.md).
"""

import ast
import copy
import inspect
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import modeling_bmojo
from modeling_bmojo import (
    CACHE_NAME,
    BMojoCache,
    BMojoConfig,
    BMojoForCausalLM,
    BMojoForQuestionAnswering,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
    BMojoModel,
    cache_of,
    show_memory,
    trace_innovation,
)
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


PAD = 0
NAMES = ("past_key_values", "cache")
HEADS = (
    BMojoModel,
    BMojoForCausalLM,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
    BMojoForQuestionAnswering,
)
ROOT = Path(__file__).resolve().parents[2]


def build(cls=BMojoForCausalLM, **settings):
    return randomize_(cls(BMojoConfig(**{**SIZES, "pad_token_id": PAD, **settings}))).double().eval()


def tokens(length, batch=2, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_near(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, **{f"w{i}": i for i in range(1, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="w1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="left")


# The name of the cache -----------------------------------------------------------------------------------------------
def test_the_name_is_that_of_transformers_own_models():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB)
    out = LlamaForCausalLM(LlamaConfig(**sizes))(tokens(3), use_cache=True)
    assert list(out) == ["logits", CACHE_NAME]
    assert list(build()(tokens(3), use_cache=True)) == ["logits", CACHE_NAME]
    assert cache_of(out) is not None


@pytest.mark.parametrize("given_as", NAMES)
@pytest.mark.parametrize("head", HEADS, ids=lambda cls: cls.__name__)
def test_a_forward_takes_a_cache_under_either_name(head, given_as):
    model, ids, memory = build(head), tokens(30), None
    names = set(inspect.signature(model.forward).parameters)
    assert CACHE_NAME in names
    with torch.no_grad():
        memory = BMojoCache(model.config)
        model(ids[:, :17], **{given_as: memory})
        assert memory.get_seq_length() == 17
        rest = model(ids[:, 17:], **{given_as: memory})
        whole = model(ids)
    assert memory.get_seq_length() == 30 and cache_of(rest) in (memory, None)
    if head not in (BMojoForSequenceClassification, BMojoForQuestionAnswering):
        assert_near(rest[0], whole[0][:, 17:])


@pytest.mark.parametrize("given_as", NAMES)
@pytest.mark.parametrize("layers", ["bmojo", "mixed"])
def test_generate_takes_and_returns_a_cache(layers, given_as):
    model, ids = build(**(MIXED_LAYERS if layers == "mixed" else {})), tokens(30)
    # generate() takes pads in a prompt for pads, so none may be written as text.
    options = dict(max_new_tokens=7, do_sample=False, suppress_tokens=[PAD])
    plain = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), plain)
    memory = BMojoCache(model.config)
    out = model.generate(ids, **options, return_dict_in_generate=True, **{given_as: memory})
    assert torch.equal(out.sequences, plain) and cache_of(out) is memory
    # A chat on one memory: the second turn reads only what is new.
    longer = torch.cat([plain, tokens(9, seed=1)], dim=1)
    out = model.generate(longer, **options, return_dict_in_generate=True, **{given_as: memory})
    assert torch.equal(out.sequences, model.generate(longer, **options, use_cache=False))
    assert cache_of(out).get_seq_length() == longer.shape[1] + 6


@pytest.mark.parametrize("mode", ["beams", "sampled beams", "samples", "left pads", "chunked prefill"])
def test_modes_of_generate_equal_those_without_a_cache(mode):
    model, ids = build(), tokens(30)
    options = dict(max_new_tokens=7, do_sample=False)
    if mode == "beams":
        options |= dict(num_beams=3, num_return_sequences=2)
    elif mode == "sampled beams":
        options |= dict(num_beams=3, do_sample=True)
    elif mode == "samples":
        options |= dict(num_return_sequences=3, do_sample=True)
    elif mode == "left pads":
        mask = torch.ones_like(ids)
        mask[0, :11] = 0
        options |= dict(attention_mask=mask)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        chunk = dict(prefill_chunk_size=8) if mode == "chunked prefill" and use_cache else {}
        found.append(model.generate(ids, **options, **chunk, use_cache=use_cache))
    assert torch.equal(*found)


def test_gradient_checkpointing_equals_training_without():
    ids, gradients = tokens(30), []
    for checkpointing in (False, True):
        model = build(**MIXED_LAYERS).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        out = model(ids, labels=ids, use_cache=True)
        assert (cache_of(out) is None) is checkpointing
        out.loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert_near(again, plain)
    with pytest.raises(ValueError, match=rf"{CACHE_NAME} in training with gradient checkpointing"):
        model(ids, cache=BMojoCache(model.config))


def test_a_cache_is_left_where_it_is_by_hooks_that_move_arguments():
    assert set(NAMES) <= set(BMojoForCausalLM._skip_keys_device_placement)
    assert set(NAMES) <= set(BMojoConfig.keys_to_ignore_at_inference)


def test_trainer_evaluates_without_collecting_caches(tokenizer, tmp_path):
    rows = [{"input_ids": row.tolist()} for row in tokens(12, batch=4)]
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", max_steps=2, per_device_train_batch_size=2)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = build().float()
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train()
    found = trainer.predict(rows)
    assert found.predictions.shape == (4, 12, VOCAB)


# Shims ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def warned():
    """What transformers logged as a warning during a test; every message once more, though it was given before."""
    logger = logging.getLogger("transformers")
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    once = transformers.utils.logging.warning_once
    once.cache_clear()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_nothing_of_ours_leans_on_a_name_that_is_going_away(tokenizer, warned, recwarn, tmp_path):
    model, ids = build(), tokens(30)
    model.generate(ids, max_new_tokens=5, do_sample=False)
    model.generate(ids, max_new_tokens=5, num_beams=2)
    out = model.generate(ids, max_new_tokens=5, return_dict_in_generate=True)
    memory = cache_of(out)
    model.generate(torch.cat([out.sequences, ids], 1), max_new_tokens=5, past_key_values=copy.deepcopy(memory))
    pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)(["w3 w4 w5", "w6"], max_new_tokens=5)
    for head in HEADS:
        build(head)(ids, **{CACHE_NAME: BMojoCache(model.config)})
    trace_innovation(model, ids)
    show_memory(memory, tokenizer, out.sequences)
    test_trainer_evaluates_without_collecting_caches(tokenizer, tmp_path)
    text = [str(warning.message) for warning in recwarn] + warned
    about = re.compile(r"past_key_values|cache_params|`cache`|cache_position|not supported for|is deprecated")
    ours = [line for line in text if about.search(line) and "activation_checkpointing" not in line]
    assert ours == []


def test_one_module_knows_what_differs():
    """Version numbers are asked for nowhere, and transformers is looked at for differences in compat_bmojo alone."""
    asks = re.compile(r"is_\w*_version\b|\bpackaging\b|version\.parse|__version__\s*([<>]|[=!]=)|\.__version__\.")
    for path in [*Path(modeling_bmojo.__file__).parent.glob("*.py"), *(ROOT / "conversion").glob("**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        code = "\n".join(ast.unparse(node) for node in tree.body if not isinstance(node, ast.Expr))
        assert not asks.search(code), f"{path.name} asks for a version; put the difference into compat_bmojo.py"
