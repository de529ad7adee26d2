"""RULER's tasks: every sample answered from the definition by a reader of its own, lengths, scores, and whole runs."""

import collections
import json
import re
import sys

import pytest
import torch
import yaml
from tokenizers import processors

from conversion.data.texts import pydoc_text
from conversion.evaluate import main
from conversion.evaluation import job
from conversion.evaluation.ruler import Prompts, answer, paired, wilson
from conversion.evaluation.ruler_tasks import DEPTHS, TASKS, Hay, make_sample, score
from tests.conversion.evaluation_sources import READER, character_tokenizer, save_reader
from tests.conversion.graft_sources import randomised


TEXT = pydoc_text("held_out")
NEEDLE = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")


def needles_asked_for(sample) -> list[str]:
    found = collections.defaultdict(list)
    for key, value in NEEDLE.findall(sample.context):
        found[key].append(value)
    asked = re.search(r" for (.*) mentioned", sample.question)[1].replace(", and ", ", ").split(", ")
    return [value for key in asked for value in found[key]]


def variables_of(sample) -> list[str]:
    body = sample.context.rsplit("\n\n", 1)[1]
    value, holds = re.search(r"the value (\d+)", sample.question)[1], []
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", body):
        if number == value or other in holds:
            holds.append(name)
    return holds


def most_common(sample, count: int) -> list[str]:
    if count == 3:
        listed = [word for word in sample.context.split("appears. ")[1].split() if word != "..."]
    else:
        listed = re.findall(r"\d+\. (\w+)", sample.context.rsplit("\n", 1)[1])
    ranked = [*collections.Counter(listed).most_common(count + 1), ("", 0)]
    assert ranked[count - 1][1] > ranked[count][1], "or the question has more than one answer"
    return [word for word, _ in ranked[:count]]


READERS = {"vt": variables_of, "cwe": lambda s: most_common(s, 10), "fwe": lambda s: most_common(s, 3)}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("size", "length"), [(40, 2048), (150, 4096)])
def test_a_reader_by_the_definition_answers_every_sample(task, size, length):
    for index in range(5):
        sample = make_sample(task, Hay(TEXT), size, length, seed=3, index=index)
        found = READERS.get(task, needles_asked_for)(sample)
        assert sorted(found) == sorted(sample.answers), sample
        assert score(sample.prefix + " " + ", ".join(found), sample.answers) == 1.0
        assert score(sample.question + sample.prefix, sample.answers) == 0.0, "the question gives nothing away"
        assert sample == make_sample(task, Hay(TEXT), size, length, seed=3, index=index)
        assert sample != make_sample(task, Hay(TEXT), size, length, seed=4, index=index)
    assert len(sample.answers) == {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(
        task, 1
    )


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_3"])
def test_a_needle_stands_where_its_depth_says(task):
    for index in range(40):
        sample = make_sample(task, Hay(TEXT), 60, 2048, seed=1, index=index)
        hay = sample.context.split("\n", 1)[1]
        lines = re.split(r"(?<=[.!?]) " if task == "niah_single_2" else "\n", hay)
        place = next(place for place, line in enumerate(lines) if sample.answers[0] in line)
        # A needle may join the sentence before it where the text's last one has no full stop.
        assert place == (len(lines) - 1) * sample.depths[0] // 100
    depths = [make_sample(task, Hay(TEXT), 60, 2048, 1, index).depths[0] for index in range(80)]
    assert sorted(depths[:40]) == DEPTHS == sorted(depths[40:]) and depths[:40] != DEPTHS


@pytest.mark.parametrize("task", TASKS)
def test_prompts_fill_their_length(task):
    prompts = Prompts(character_tokenizer(), TEXT, "none", seed=0)
    length = 9000  # characters
    for index in (0, 1, 11):
        prompt = prompts.make(task, length, index)
        assert 0.8 * length < len(prompt.ids) + TASKS[task].new_tokens <= length
    size = prompts._sizes[task, length]
    larger = make_sample(task, Hay(TEXT), size + 1, length, 0, 0)
    assert len(larger.context + larger.question + larger.prefix) + TASKS[task].new_tokens > length
    said = prompts.tokenizer.decode(prompt.ids[prompt.context :])
    assert said.lstrip("\n").startswith(("What", "Question")), "the context ends before the question"


def test_the_hay_need_not_hold_more_than_fits():
    words = TEXT.split()[:1000]
    wanted = make_sample("niah_single_2", Hay(" ".join(words)), 900, 0, 0, 0)
    length = len(wanted.context + wanted.question + wanted.prefix) + TASKS["niah_single_2"].new_tokens
    prompts = Prompts(character_tokenizer(), " ".join(words), "none", seed=0)
    assert length - 40 < len(prompts.make("niah_single_2", length, 0).ids) + 128 <= length
    with pytest.raises(ValueError, match="need more text"):
        Prompts(character_tokenizer(), " ".join(words), "none", seed=0).make("niah_single_2", 2 * length, 0)


def test_a_sample_that_never_fits_is_refused():
    prompts = Prompts(character_tokenizer(), TEXT, "none", seed=0)
    small = make_sample("niah_single_2", Hay(TEXT), 1, 0, 0, 0)
    least = len(small.context + small.question + small.prefix) + 128
    with pytest.raises(ValueError, match="no sample of niah_single_2 fits"):
        for index in range(40):
            prompts.make("niah_single_2", least, index)


def test_templates_bring_their_special_tokens_once():
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="~ $A", special_tokens=[("~", 95)]
    )
    tokenizer.chat_template = "~{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    for template in ("none", "chat"):
        ids = Prompts(tokenizer, TEXT, template, seed=0).make("niah_single_1", 2000, 0).ids
        assert ids[0] == 95 and ids.count(95) == 1
    text = tokenizer.decode(ids)
    assert "<user>A special magic number" in text and re.search(r"<assistant>The special magic number .* is$", text)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Prompts(tokenizer, TEXT, "chat", seed=0)


def test_scores_and_intervals():
    assert score("it is ABC, and def.", ["abc", "DEF", "ghi"]) == pytest.approx(2 / 3)
    assert wilson(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.16113), abs=1e-4) and wilson(1.0, 20)[1] == 1.0
    mean, low, high = paired([1, 1, 0, 1], [1, 0, 0, 1])
    assert mean == 0.25
    # Agresti and Min: of 4 + 2 pairs 1.5 are for us, 0.5 for them.
    middle, spread = 1 / 6, 1.96 * ((2 / 6 - 1 / 36) / 6) ** 0.5
    assert (low, high) == pytest.approx((middle - spread, middle + spread))
    assert paired([1] * 9, [1] * 9)[0] == 0 and paired([1] * 9, [1] * 9)[1] < -0.1


def test_an_answer_is_what_generate_writes_until_all_of_it_is_there():
    model, tokenizer = randomised(READER), character_tokenizer()
    prompt = Prompts(tokenizer, TEXT, "none", seed=0).make("niah_single_1", 700, 0)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    wanted = model.generate(torch.tensor([prompt.ids]), max_new_tokens=12, do_sample=False)[0, len(prompt.ids) :]
    said, cache = answer(model, tokenizer, prompt, chunk=50, new_tokens=12)
    assert said == tokenizer.decode(wanted) and cache.get_seq_length() == len(prompt.ids) + 11
    early = prompt._replace(answers=(tokenizer.decode(wanted[2:5]).upper(),))
    assert answer(model, tokenizer, early, chunk=50, new_tokens=12)[0] == tokenizer.decode(wanted[:5])
    model.generation_config.eos_token_id = [int(wanted[3]), 7]
    first = wanted.tolist().index(int(wanted[3]))
    assert answer(model, tokenizer, prompt, chunk=50, new_tokens=12)[0] == tokenizer.decode(wanted[: first + 1])


SETTINGS = {
    **dict.fromkeys(("nll", "agreement", "passkey", "cost"), False),
    "ruler": True,
    "ruler_tasks": ["niah_single_1", "vt"],
    "ruler_lengths": [1800],
    "ruler_samples": 2,
    "rows": ["source", "window", "fresh"],
    "window_size": 200,
    "eidetic_size": 4,
    "tokens": 160,
    "chunk": 300,
    "plot": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruler") / "source"
    save_reader(folder)
    return folder


def evaluate(tmp_path, source, *arguments, **settings) -> int:
    values = {"source": str(source), "output": str(tmp_path / "out"), **SETTINGS, **settings}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    return main([str(tmp_path / "settings.yaml"), *arguments])


def stored(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def test_a_run_goes_on_sample_by_sample_and_draws(tmp_path, source, capsys, monkeypatch):
    real, calls = job.solve, []

    def until_the_fourth(*arguments):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(arguments[2:5])
        return real(*arguments)

    monkeypatch.setattr(job, "solve", until_the_fourth)
    assert evaluate(tmp_path, source) == 130
    measured = stored(tmp_path)["measurements"]
    assert len(measured["source"]["ruler vt 1800"]["samples"]) == 2 and set(measured) == {"source"}
    monkeypatch.setattr(job, "solve", lambda *arguments: calls.append(arguments[2:5]) or real(*arguments))
    assert evaluate(tmp_path, source, "--reuse", "--set", "ruler_samples=3", "--set", "plot=true") == 0
    assert calls[4:6] == [("niah_single_1", 1800, 2), ("vt", 1800, 2)] and len(calls) == 18
    shown, found = capsys.readouterr().out, stored(tmp_path)
    assert "| model | tokens | niah_single_1 | vt | all tasks | memory, MB |" in shown and "NLL" not in shown
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    entry = found["summary"][2]["ruler"][0]
    assert (
        entry["samples"] == 3 and entry["task"] == "niah_single_1" and entry["low"] <= entry["score"] <= entry["high"]
    )
    samples = {row: found["measurements"][row]["ruler vt 1800"]["samples"] for row in found["measurements"]}
    bytes_of = {row: {sample["bytes"] for sample in its} for row, its in samples.items()}
    assert min(bytes_of["source"]) > 4 * max(bytes_of["sliding window of 200"])
    assert evaluate(tmp_path, source, "--reuse") == 0 and len(calls) == 18, "fewer samples: the first of what is there"
    assert stored(tmp_path)["summary"][0]["ruler"][0]["samples"] == 2
    assert evaluate(tmp_path, source, "--reuse", "--set", "seed=1", "--set", "rows=[source]") == 0 and len(calls) == 22


FAKE = '''
import contextlib


class LastPress:
    """Keeps the last of what was read."""

    def __init__(self, compression_ratio):
        self.removed = compression_ratio

    @contextlib.contextmanager
    def __call__(self, model):
        cut, forward = self.removed, model.model.forward

        def reading(*args, past_key_values, **options):
            out = forward(*args, past_key_values=past_key_values, **options)
            for layer in past_key_values.layers:
                first = layer.keys.shape[2] - int(layer.keys.shape[2] * (1 - cut))
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]
            return out

        model.model.forward = reading
        yield
        del model.model.forward


class BrokenPress(LastPress):
    def __call__(self, model):
        raise RuntimeError("no such memory")


class MaskingPress(LastPress):
    @contextlib.contextmanager
    def __call__(self, model):
        yield


class WrappingPress:
    def __init__(self, press):
        self.press = press
'''


def test_presses_answer_in_a_process_of_their_own(tmp_path, source, capsys, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "kvpress.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    options = {"press_python": sys.executable, "rows": ["source"], "ruler_tasks": ["niah_single_1"], "ruler_samples": 1}
    # At the bytes of the source nothing is removed: the other process says what ours says.
    assert evaluate(tmp_path, source, presses=["LastPress"], presses_like="source", **options) == 0
    theirs, ours = (
        stored(tmp_path)["measurements"][row]["ruler niah_single_1 1800"]["samples"][0]
        for row in ("LastPress, bytes of source", "source")
    )
    assert theirs == ours
    options["rows"], options["window_size"] = ["source", "fresh"], 300
    assert evaluate(tmp_path, source, "--overwrite", presses=["LastPress", "BrokenPress"], **options) == 2
    assert "BrokenPress failed: RuntimeError: no such memory" in capsys.readouterr().err
    message = "cannot be made from a compression ratio alone"
    assert evaluate(tmp_path, source, "--reuse", presses=["WrappingPress"], **options) == 2
    assert message in capsys.readouterr().err
    found = stored(tmp_path)["measurements"]
    less, like = (found[row]["ruler niah_single_1 1800"]["samples"][0]["bytes"] for row in list(found)[::-1][:2])
    per_token = 2 * 2 * 8 * 3 * 4
    assert list(found)[-1] == "LastPress, bytes of fresh graft" and less < ours["bytes"]
    assert abs(less - like) < 140 * per_token, "the bytes of the other row, and an answer"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ruler_tasks": ["niah_single_4"]}, ["ruler_tasks", "niah_single_4", "niah_single_3"]),
        ({"ruler_tasks": []}, ["ruler_tasks=[]"]),
        ({"ruler_lengths": [300]}, ["ruler_lengths", "no sample of niah_single_1 fits into 300"]),
        ({"ruler_lengths": [1800, 1800]}, ["ruler_lengths", "different"]),
        ({"ruler_lengths": [10**6], "ruler_tasks": ["niah_single_2"]}, ["need more text"]),
        ({"ruler_lengths": [10**6], "ruler_tasks": ["niah_multikey_2"]}, ["fewer than", "keys"]),
        ({"ruler_lengths": [10**6], "ruler_tasks": ["cwe"]}, ["different words"]),
        ({"ruler_samples": 0}, ["ruler_samples=0"]),
        ({"ruler_template": "chatty"}, ["ruler_template='chatty'"]),
        ({"ruler_template": "chat"}, ["no chat template"]),
        ({"presses": ["SnapKVPress"], "press_python": "absent"}, ["press_python='absent'", "make"]),
        ({"presses": ["SnapKVPress"], "press_python": sys.executable}, ["cannot import kvpress", "make"]),
        ({"presses": ["SnapKVPress"], "presses_like": "mine"}, ["presses_like='mine'", "fresh graft"]),
        ({"presses": ["SnapKVPress"], "ruler": False, "nll": True, "rows": ["source"]}, ["ruler: true"]),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(settings, words, tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr(job, "run", None)
    assert evaluate(tmp_path, source, **settings) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_keys_differ():
    sample = make_sample("niah_multikey_2", Hay(TEXT), 1500, 2048, seed=0, index=0)
    keys = [key for key, _ in NEEDLE.findall(sample.context)]
    assert len(keys) == 1501 == len(set(keys))
