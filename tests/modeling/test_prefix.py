"""A text that was read once is gone on with: same logits, in other processes too, and never another model's."""

import copy
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_bmojo import CACHE_NAME, BMojoCache, PrefixMemory, prefix_bmojo
from modeling_bmojo.weights_bmojo import weights_fingerprint
from tests.modeling.test_rollback import EXACT, NEAR, SETTINGS, build, go_on, unread
from tests.reading import tokens as any_tokens


def tokens(*args, **kwargs):
    return any_tokens(*args, **kwargs).clamp(min=1)  # generate() takes 0 for a pad


NAMES = ["output", "key, clock", "S6", "mixed", "storage"]


def opened(tmp_path, model=None, **options):
    model = build() if model is None else model
    return model, model.prefix_memory(tmp_path / "prefixes", **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_known_beginning_is_not_read_again(name, tmp_path, monkeypatch):
    model, prefixes = opened(tmp_path, build(**SETTINGS[name]))
    ids = tokens(60, rows=1)
    assert prefixes.longest(ids) is None
    prefixes.read(ids[:, :40])
    again = model.prefix_memory(tmp_path / "prefixes")
    cache = again.longest(ids)
    assert cache.get_seq_length() == 40
    close = NEAR if name == "storage" else EXACT
    torch.testing.assert_close(go_on(model, cache, ids[:, 40:]).logits, unread(model, ids)[:, 40:], **close)

    def refuse(*_, **__):
        raise AssertionError("read again")

    monkeypatch.setattr(prefixes.reader, "forward", refuse)
    assert prefixes.read(ids[:, :40]).get_seq_length() == 40


def test_generate_reads_the_rest_alone(tmp_path):
    model, prefixes = opened(tmp_path)
    ids, read = tokens(60, rows=1), []
    prefixes.read(ids[:, :50])
    plain = model.generate(ids, max_new_tokens=10, do_sample=False)
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    for prompt in (ids, tokens(7, rows=1, seed=5)):  # the second begins otherwise
        read.clear()
        found = model.generate(prompt, max_new_tokens=10, do_sample=False, prefix_memory=prefixes)
        if prompt is ids:
            assert torch.equal(found, plain) and read == [10] + [1] * 9
        else:
            assert torch.equal(found, model.generate(prompt, max_new_tokens=10, do_sample=False))
    drafted = model.generate(
        ids, max_new_tokens=10, do_sample=False, prefix_memory=prefixes, prompt_lookup_num_tokens=3
    )
    assert torch.equal(drafted, plain)


def test_the_longest_of_several_is_taken_and_the_whole_prompt_never(tmp_path):
    model, prefixes = opened(tmp_path)
    ids = tokens(60, rows=1)
    for count in (20, 40, 50):
        prefixes.read(ids[:, :count])
    assert prefixes.lengths == [20, 40, 50]
    assert [prefixes.longest(ids[:, :n]).get_seq_length() for n in (60, 51, 50, 41, 40, 21)] == [50, 50, 40, 40, 20, 20]
    assert prefixes.longest(ids[:, :20]) is None
    other = ids.clone()
    other[0, 30] = (other[0, 30] + 1) % 61
    assert prefixes.longest(other).get_seq_length() == 20


def test_beginnings_are_kept_on_the_way(tmp_path):
    model, prefixes = opened(tmp_path)
    ids = tokens(60, rows=1)
    prefixes.read(ids[:, :50], every=16)
    assert prefixes.lengths == [16, 32, 48, 50]
    torch.testing.assert_close(
        go_on(model, prefixes.longest(ids[:, :40]), ids[:, 32:]).logits, unread(model, ids)[:, 32:], **EXACT
    )


def test_forks_answer_several_questions(tmp_path):
    model, prefixes = opened(tmp_path)
    ids = tokens(40, rows=1)
    prefixes.read(ids)
    cache = prefixes.read(ids)
    for seed in (3, 4):
        question = tokens(6, rows=1, seed=seed)
        found = go_on(model, copy.deepcopy(cache), question).logits
        torch.testing.assert_close(found, unread(model, torch.cat([ids, question], dim=1))[:, 40:], **EXACT)


def test_another_process_finds_it(tmp_path):
    model, prefixes = opened(tmp_path, build(torch.float32))
    ids = tokens(60, rows=1)
    prefixes.read(ids[:, :40])
    model.save_pretrained(tmp_path / "model")
    torch.save(ids, tmp_path / "ids.pt")
    code = (
        "import torch; from modeling_bmojo import BMojoForCausalLM\n"
        f"model = BMojoForCausalLM.from_pretrained({str(tmp_path / 'model')!r}).eval()\n"
        f"ids = torch.load({str(tmp_path / 'ids.pt')!r})\n"
        f"prefixes = model.prefix_memory({str(tmp_path / 'prefixes')!r})\n"
        "assert prefixes.longest(ids).get_seq_length() == 40\n"
        "print(model.generate(ids, max_new_tokens=8, do_sample=False, prefix_memory=prefixes)[0, 60:].tolist())\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert json.loads(found.stdout) == model.generate(ids, max_new_tokens=8, do_sample=False)[0, 60:].tolist()


# Room ----------------------------------------------------------------------------------------------------------------
def test_what_was_not_used_for_the_longest_time_goes_first(tmp_path):
    model, prefixes = opened(tmp_path)
    prefixes.read(tokens(20, rows=1))
    size = prefixes.nbytes
    prefixes = model.prefix_memory(tmp_path / "prefixes", max_bytes=3 * size + size // 2)
    for count in (21, 22):
        prefixes.read(tokens(count, rows=1))
    for count in (20, 21, 22):
        _age(prefixes, count, seconds=count)
    prefixes.longest(tokens(21, rows=1))  # uses the one of 20
    prefixes.read(tokens(30, rows=1, seed=9))
    assert prefixes.lengths == [20, 22, 30]
    assert prefixes.nbytes <= prefixes.max_bytes


def _age(prefixes, count, seconds):
    path = prefixes._path(tokens(count, rows=1)[0])
    os.utime(path, (1_000_000 + seconds, 1_000_000 + seconds))


def test_what_has_no_room_is_read_and_not_kept(tmp_path):
    model, prefixes = opened(tmp_path, max_bytes=100)
    ids = tokens(30, rows=1)
    assert prefixes.read(ids).get_seq_length() == 30
    assert prefixes.lengths == []


def test_a_file_that_goes_meanwhile_is_not_there(tmp_path, monkeypatch):
    model, prefixes = opened(tmp_path)
    ids = tokens(60, rows=1)
    for count in (20, 40):
        prefixes.read(ids[:, :count])
    load = BMojoCache.load

    def late(path, *rest):
        if "prefix-40-" in str(path):
            os.remove(path)
        return load(path, *rest)

    monkeypatch.setattr(prefix_bmojo.BMojoCache, "load", late)
    assert prefixes.longest(ids).get_seq_length() == 20


def test_threads_read_one_text_at_once(tmp_path):
    model, prefixes = opened(tmp_path)
    ids, found = tokens(40, rows=1), []

    def read():
        found.append(model.prefix_memory(tmp_path / "prefixes").read(ids).last_hidden)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and prefixes.lengths == [40]
    assert os.listdir(tmp_path / "prefixes").count("prefixes.json") == 1
    assert not [name for name in os.listdir(tmp_path / "prefixes") if "partial" in name]


def test_several_answers_begin_with_one_prefix(tmp_path):
    model, prefixes = opened(tmp_path)
    ids = tokens(40, rows=1)
    prefixes.read(ids[:, :30])
    for options in (dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)):
        found = model.generate(ids, max_new_tokens=6, do_sample=False, prefix_memory=prefixes, **options)
        assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False, **options))
    torch.manual_seed(0)
    found = model.generate(ids, max_new_tokens=3, do_sample=True, num_return_sequences=3, prefix_memory=prefixes)
    assert found.shape == (3, 43)


def test_another_writer_at_the_same_moment_is_waited_for(tmp_path):
    (tmp_path / "prefixes").mkdir()
    (tmp_path / "prefixes" / "prefixes.json.partial-12345678-99999999-00000000").write_text("{")
    model, prefixes = opened(tmp_path)
    assert prefixes.lengths == []


# Bad input -----------------------------------------------------------------------------------------------------------
def test_another_models_folder_is_refused(tmp_path):
    model, prefixes = opened(tmp_path)
    prefixes.read(tokens(20, rows=1))
    folder = tmp_path / "prefixes"
    with pytest.raises(ValueError, match=r"folder=.*window_size=5, and the model has 6"):
        PrefixMemory(build(window_size=6), folder)
    with pytest.raises(ValueError, match=r"dtype float64, and the model has float32"):
        PrefixMemory(build(torch.float32), folder)
    other = build()
    other.model.layers[0].mlp.up_proj.weight.data += 1
    with pytest.raises(ValueError, match="other weights, or another adapter"):
        PrefixMemory(other, folder)
    assert PrefixMemory(build(), folder).lengths == [20]


def test_an_adapter_reads_for_itself(tmp_path):
    model = build()
    peft = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    prefixes = PrefixMemory(peft, tmp_path / "prefixes")
    ids = tokens(30, rows=1)
    prefixes.read(ids[:, :20])
    found = go_on(peft, prefixes.longest(ids), ids[:, 20:]).logits
    torch.testing.assert_close(found, unread(peft, ids)[:, 20:], **EXACT)
    with peft.disable_adapter(), pytest.raises(ValueError, match="other weights, or another adapter, and has changed"):
        prefixes.longest(ids)
    found = peft.generate(input_ids=ids, max_new_tokens=5, do_sample=False, prefix_memory=prefixes)
    assert torch.equal(found, peft.generate(input_ids=ids, max_new_tokens=5, do_sample=False))


def test_an_adapter_with_another_scaling_is_another(tmp_path):
    peft = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    prefixes = PrefixMemory(peft, tmp_path / "prefixes")
    prefixes.read(tokens(20, rows=1))
    for module in peft.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    with pytest.raises(ValueError, match="has changed since"):
        prefixes.longest(tokens(30, rows=1))


def test_weights_alone_make_the_fingerprint_of_a_plain_model():
    model = build()
    found = weights_fingerprint(model.model)
    assert found == weights_fingerprint(build().model) != weights_fingerprint(model.model.layers)


def test_every_number_of_every_weight_counts(tmp_path):
    """Whatever its dtype, and where a weight is no multiple of eight bytes or lies across them."""
    model, prefixes = opened(tmp_path)
    prefixes.read(tokens(20, rows=1))
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] += 1
    with pytest.raises(ValueError, match="has changed since"):
        prefixes.longest(tokens(30, rows=1))
    with pytest.raises(ValueError, match="other weights"):
        opened(tmp_path, model)
    flat = torch.randn(1000).to(torch.bfloat16)
    for weight in (flat[:777], flat[1:778], flat[:3], flat[:900].view(30, 30).T):
        part = torch.nn.Module()
        part.weight = torch.nn.Parameter(weight)
        before = weights_fingerprint(part)
        for index in (0, len(weight) - 1, len(weight) // 3):
            copied = copy.deepcopy(part)
            assert weights_fingerprint(copied) == before
            with torch.no_grad():
                copied.weight[index] += 1
            assert weights_fingerprint(copied) != before


def test_rows_that_were_made_of_a_known_beginning_are_gone_on_with(tmp_path):
    model, prefixes = opened(tmp_path)
    ids = tokens(30, rows=1)
    prefixes.read(ids[:, :20])
    options = dict(num_beams=2, num_return_sequences=2, max_new_tokens=4, return_dict_in_generate=True)
    plain, known = (model.generate(ids, **options, **more) for more in ({}, {"prefix_memory": prefixes}))
    assert torch.equal(plain.sequences, known.sequences)
    longer = torch.cat([plain.sequences, tokens(5, rows=2, seed=3)], dim=1)
    found = [
        model.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=out.past_key_values)
        for out in (plain, known)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda folder, prefixes: {"prefix_memory": str(folder)},
            r"prefix_memory='.*': must be what model.prefix_memory",
        ),
        (lambda folder, prefixes: {"prefix_memory": prefixes, "inputs": [1, 2]}, r"needs input_ids \[1, tokens\]"),
    ],
)
def test_what_is_no_prefix_memory_or_no_prompt_is_refused(given, message, tmp_path):
    model, prefixes = opened(tmp_path)
    with pytest.raises(ValueError, match=message):
        model.generate(**{"inputs": tokens(9, rows=1)} | given(tmp_path, prefixes))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        model.prefix_memory(tmp_path / "file")


def test_dropout_is_not_kept(tmp_path):
    model, prefixes = opened(tmp_path)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        prefixes.read(tokens(20, rows=1))
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = prefixes.read(tokens(20, rows=1))
    torch.testing.assert_close(cache.last_hidden, prefixes.read(tokens(20, rows=1)).last_hidden)
    fresh = BMojoCache(model.config)
    go_on(model, fresh, tokens(20, rows=1))
    torch.testing.assert_close(cache.last_hidden, fresh.last_hidden, **EXACT)


def test_another_model_of_the_same_configuration_does_not_ask(tmp_path):
    model, prefixes = opened(tmp_path)
    with pytest.raises(ValueError, match="another model's"):
        build().generate(tokens(9, rows=1), prefix_memory=prefixes)


def test_a_model_that_was_trained_since_is_refused(tmp_path):
    model, prefixes = opened(tmp_path)
    prefixes.read(tokens(20, rows=1))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight += 0.1
    for ask in (prefixes.longest, prefixes.read):
        with pytest.raises(ValueError, match="has changed since"):
            ask(tokens(30, rows=1))


def test_a_damaged_file_is_named(tmp_path):
    model, prefixes = opened(tmp_path)
    ids = tokens(30, rows=1)
    prefixes.read(ids[:, :20])
    path = Path(prefixes._path(ids[0, :20]))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"folder=.*remove {path.name} to have that text read again"):
        prefixes.longest(ids)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "bmojo-prefixes-2"}'])
def test_a_damaged_manifest_is_named(content, tmp_path):
    opened(tmp_path)
    (tmp_path / "prefixes" / "prefixes.json").write_text(content)
    with pytest.raises(ValueError, match=r"prefixes.json is damaged"):
        opened(tmp_path)


def test_folders_of_something_else_are_refused(tmp_path):
    (tmp_path / "prefixes").mkdir()
    (tmp_path / "prefixes" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match=r"is not empty and has no prefixes\.json"):
        opened(tmp_path)
    assert os.listdir(tmp_path / "prefixes") == ["thesis.txt"]


@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_numbers_that_are_none_are_refused(value, tmp_path):
    with pytest.raises(ValueError, match="max_bytes="):
        opened(tmp_path, max_bytes=value)
    with pytest.raises(ValueError, match="every="):
        opened(tmp_path)[1].read(tokens(9, rows=1), every=value)


def test_other_models_and_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model is a Linear"):
        PrefixMemory(torch.nn.Linear(2, 2), tmp_path)
    model, prefixes = opened(tmp_path)
    for wrong in (tokens(5, rows=2), tokens(5, rows=1)[0], [1, 2], torch.zeros(1, 0, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"must be \[1, tokens\]"):
            prefixes.read(wrong)
    ids = tokens(9, rows=1)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="without pads"):
        model.generate(ids, attention_mask=mask, prefix_memory=prefixes)
    with pytest.raises(ValueError, match="pass one of them"):
        model.generate(ids, prefix_memory=prefixes, **{CACHE_NAME: BMojoCache(model.config)})
