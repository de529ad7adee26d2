"""Every generator against an oracle that reads a sample token by token, by the task's definition, in plain Python.

The oracle must be right everywhere that something is scored, and know nothing elsewhere to be scored. The answers must
not be visible otherwise: what depends on the text alone is as likely as chance.
"""

import math
from collections import Counter

import pytest
import torch

from conversion.synthetic.samples import IGNORED, distinct, stream, weighted
from conversion.synthetic.tasks import TASKS, tasks_of
from conversion.synthetic.text import corpus


SMALL = [
    {"task": "mqar", "length": 64, "pairs": 8, "vocabulary": 96},
    {"task": "mqar", "name": "even", "length": 64, "pairs": 8, "vocabulary": 96, "power": 1.0},
    {"task": "mqar", "name": "full", "length": 32, "pairs": 8, "vocabulary": 20},
    {"task": "forgetting_mqar", "length": 64, "pairs": 6, "vocabulary": 64},
    {"task": "recall", "length": 64},
    {"task": "noisy_recall", "length": 64, "noise": 0.6},
    {"task": "fuzzy_recall", "length": 96, "vocabulary": 8},
    {"task": "selective_copying", "length": 48, "copied": 6},
    {"task": "induction", "length": 24},
    {"task": "compression", "length": 9},
]
NAMES = [entry.get("name", entry["task"]) for entry in SMALL]


def sampled(entry, count=200, seed=0):
    (task,) = tasks_of([entry])
    return task, task.sample(count, stream("test", seed))


def mqar_oracle(task, ids):
    """The last value that stood behind each key among the pairs in front; every key is asked once behind them."""
    said, answers = {}, {}
    for position in range(0, task.context, 2):
        said[ids[position]] = ids[position + 1]
    for position in range(task.context, task.length):
        if ids[position] in said:
            answers[position] = said[ids[position]]
    return answers, None


def recall_oracle(task, ids):
    said, answers = {}, {}
    for position in range(0, task.length, 2):
        key, value = ids[position], ids[position + 1]
        if key >= task.real:  # noise
            assert value >= task.real
            continue
        if key in said:
            answers[position] = said[key]
        said[key] = value
    return answers, None


def fuzzy_oracle(task, ids):
    """Key tokens are below the half: a run of them and the run of value tokens behind it are a pair. The last pair may
    be cut off, so that nobody knows what it is."""
    half, said, answers, position = task.vocabulary // 2, {}, {}, 0
    while True:
        end = next((i for i in range(position, task.length) if ids[i] >= half), task.length)
        stop = next((i for i in range(end, task.length) if ids[i] < half), task.length)
        if stop == task.length:
            return answers, position
        key, value = tuple(ids[position:end]), ids[end:stop]
        if key in said:
            answers |= {end - 1 + index: token for index, token in enumerate(said[key])}
            assert said[key] == value
        said[key], position = value, stop


def copying_oracle(task, ids):
    blank, marker = task.vocabulary - 2, task.vocabulary - 1
    at = ids.index(marker)
    seen = [token for token in ids[:at] if token != blank]
    assert len(seen) == task.copied and set(ids[at + 1 :]) <= {blank}
    return {at + index: token for index, token in enumerate(seen)}, None


def induction_oracle(task, ids):
    special = task.vocabulary - 1
    first = ids.index(special)
    assert ids.count(special) == 2 and ids[-1] == special and first < task.length - 1
    return {task.length - 1: ids[first + 1]}, None


def compression_oracle(task, ids):
    assert ids[-1] == task.vocabulary - 1
    return dict(enumerate(ids[:-1])), None


ORACLES = {
    "MQAR": mqar_oracle,
    "ForgettingMQAR": mqar_oracle,
    "Recall": recall_oracle,
    "NoisyRecall": recall_oracle,
    "FuzzyRecall": fuzzy_oracle,
    "SelectiveCopying": copying_oracle,
    "Induction": induction_oracle,
    "Compression": compression_oracle,
}


@pytest.mark.parametrize("entry", SMALL, ids=NAMES)
def test_an_oracle_answers_everything(entry):
    task, samples = sampled(entry)
    assert samples.ids.shape == samples.labels.shape == (200, task.length)
    assert samples.ids.min() >= 0 and samples.ids.max() < task.vocabulary
    for ids, labels in zip(samples.ids.tolist(), samples.labels.tolist()):
        answers, known = ORACLES[type(task).__name__](task, ids)
        due = {position: label for position, label in enumerate(labels[:known]) if label != IGNORED}
        assert due == answers, (ids, due, answers)
        assert due, "something is scored"


@pytest.mark.parametrize("entry", SMALL, ids=NAMES)
def test_answers_are_not_visible_otherwise(entry):
    """The likeliest answer given the query token, its place, or nothing, learned from 1,500 samples, is no good.

    Of recall the token before is not asked: it is the value of the pair before, which may have the same key.
    """
    task, seen = sampled(entry, 1500, seed=1)
    _, new = sampled(entry, 500, seed=2)
    cues = {
        "nothing": lambda ids, row, place: 0,
        "place": lambda ids, row, place: place,
        "query": lambda ids, row, place: int(ids[row, place]),
        "before": lambda ids, row, place: int(ids[row, place - 1]) if place else -1,
    }
    if task.whole:  # the labels are the tokens: only the marker's output is read
        cues = {name: cues[name] for name in ("nothing", "place")}
    if isinstance(task, TASKS["recall"]):
        del cues["before"]
    for name, cue in cues.items():
        counts: dict = {}
        for row, place in (seen.labels != IGNORED).nonzero().tolist():
            counts.setdefault(cue(seen.ids, row, place), Counter())[int(seen.labels[row, place])] += 1
        right = [
            counts.get(cue(new.ids, row, place), Counter({-1: 1})).most_common(1)[0][0] == new.labels[row, place]
            for row, place in (new.labels != IGNORED).nonzero().tolist()
        ]
        values = len(set(new.labels[new.labels != IGNORED].tolist()))
        share = sum(map(bool, right)) / len(right)
        # Of a fuzzy value, the token before excludes itself: one of the other tokens of the half.
        chance = 1 / (values - 1) if isinstance(task, TASKS["fuzzy_recall"]) else 1 / values
        assert share < chance + 5 * math.sqrt(chance / len(right)) + 0.03, (name, share, chance)


@pytest.mark.parametrize("entry", SMALL, ids=NAMES)
def test_a_stream_belongs_to_its_names_alone(entry):
    task, samples = sampled(entry)
    assert torch.equal(sampled(entry)[1].ids, samples.ids)
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(task.sample(200, stream("test", 0)).labels, samples.labels)
    assert not torch.equal(sampled(entry, seed=1)[1].ids, samples.ids)


def test_training_and_tests_share_no_sample():
    task, _ = sampled({"task": "mqar", "length": 64, "pairs": 4, "vocabulary": 8192})
    trained = {tuple(row) for step in range(50) for row in task.sample(32, stream(task, "train", 3, step)).ids.tolist()}
    tested = {tuple(row) for _, samples, _ in task.test(512, 3) for row in samples.ids.tolist()}
    assert len(trained) == 1600 and len(tested) == 512 and not trained & tested


def test_forgetting_changes_half_of_the_keys_to_another_value():
    task, samples = sampled({"task": "forgetting_mqar", "length": 64, "pairs": 6, "vocabulary": 64})
    for ids in samples.ids.tolist():
        first = dict(zip(ids[0:12:2], ids[1:12:2]))
        later = dict(zip(ids[12:18:2], ids[13:18:2]))
        assert len(first) == 6 and len(later) == 3 and set(later) <= set(first)
        assert all(first[key] != value for key, value in later.items())


def test_even_gaps_are_even_and_the_published_ones_near():
    """Chi-square of the queries' places against the weights, by the first query drawn, and how many stand in front."""
    places = {}
    for power in (1.0, 0.01):
        task, samples = sampled({"task": "mqar", "length": 264, "pairs": 4, "vocabulary": 600, "power": power}, 2000)
        found = (samples.labels != IGNORED).nonzero()[:, 1]
        assert ((found - task.context) % 2 == 0).all()
        places[power] = (found - task.context) // 2
    counts = places[1.0].bincount(minlength=128).double()
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 128 + 4 * math.sqrt(2 * 128)
    assert (places[0.01] < 16).double().mean() > 0.55 > 0.2 > (places[1.0] < 16).double().mean()


def test_weighted_draws_without_replacement_by_the_weights():
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0])
    drawn = weighted(40000, weights, 2, stream("w"))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    first = drawn[:, 0].bincount(minlength=4).double() / len(drawn)
    assert torch.allclose(first, weights.double() / 8, atol=0.01)
    second = drawn[drawn[:, 0] == 0, 1].bincount(minlength=4).double()
    assert torch.allclose(second[1:] / second.sum(), torch.tensor([0.5, 0.25, 0.25]).double(), atol=0.015)


def test_distinct_tokens():
    drawn = distinct(5000, 3, 9, 3, stream("d"))
    assert drawn.min() == 3 and drawn.max() == 8
    assert all(len(set(row)) == 3 for row in drawn.tolist())
    assert torch.allclose(drawn.flatten().bincount()[3:].double() / 15000, torch.full((6,), 1 / 6).double(), atol=0.01)


def test_noise_has_the_wanted_share():
    task, samples = sampled({"task": "noisy_recall", "length": 128, "noise": 0.8}, 500)
    assert (samples.ids[:, ::2] >= task.real).double().mean() == pytest.approx(0.8 * 62 / 64, abs=0.01)


def test_stretched_tests_are_longer_samples():
    (task,) = tasks_of([{"task": "induction", "length": 16, "stretch": [1, 4]}])
    found = task.test(8, 0)
    assert [(name, tuple(samples.ids.shape)) for name, samples, _ in found] == [
        ("16 tokens", (8, 16)),
        ("64 tokens", (8, 64)),
    ]


def test_text_is_trained_on_one_part_and_tested_on_the_other():
    (task,) = tasks_of([{"task": "text", "length": 64, "stretch": [4]}])
    train, test = (bytes(corpus(part, None).tolist()) for part in ("train", "test"))
    ids, labels = task.sample(5, stream("t"))
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    assert all(bytes(row) in train and bytes(row) not in test for row in ids.tolist())
    found = task.test(3, 0)
    assert [(name, positions) for name, _, positions in found] == [
        ("0 to 64", slice(0, 64)),
        ("64 to 128", slice(64, 128)),
        ("128 to 256", slice(128, 256)),
    ]
    assert all(bytes(row) in test and bytes(row) not in train for row in found[0][1].ids.tolist())


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["mqra"], "'mqra' is no task; known are mqar, "),
        ([], "tasks=[]: must be a list"),
        (["mqar", "mqar"], "must be distinct"),
        ([{"task": "mqar", "pair": 4}], "did you mean 'tasks: mqar.pairs'"),
        ([{"task": "mqar", "pairs": 4.5}], "tasks: mqar.pairs=4.5: must be of type int"),
        ([{"task": "mqar", "length": 31, "pairs": 8}], "length=31: must be even and hold 16 tokens of pairs"),
        ([{"task": "mqar", "length": 30, "pairs": 8}], "32 at least; give more, or fewer pairs"),
        ([{"task": "mqar", "vocabulary": 16}], "vocabulary=16: half of it must hold 8 distinct keys"),
        ([{"task": "mqar", "power": 0}], "power=0: must be above 0"),
        ([{"task": "forgetting_mqar", "pairs": 1}], "pairs=1: must be at least 2"),
        ([{"task": "forgetting_mqar", "length": 38, "pairs": 8}], "hold 24 tokens of pairs and 8 queries"),
        ([{"task": "noisy_recall", "noise": 1.0}], "noise=1.0: must be a share"),
        ([{"task": "recall", "noise": 0.5}], "noise_vocabulary=0: must be at least 1"),
        ([{"task": "recall", "length": 2}], "length=2: must be even and at least 4"),
        ([{"task": "fuzzy_recall", "key_tokens": 9}], "key_tokens=9: must be 1 to 8"),
        ([{"task": "fuzzy_recall", "vocabulary": 64}], "vocabulary=64: 32 ** 3 keys are more than 4,096"),
        ([{"task": "fuzzy_recall", "length": 20}], "length=20: must hold four keys with their values: 24 at least"),
        ([{"task": "selective_copying", "length": 31}], "length=31: must hold 16 tokens twice: 32 at least"),
        ([{"task": "induction", "length": 2}], "length=2: must be at least 3"),
        ([{"task": "compression", "stretch": [2]}], "stretch=(2,): must be [1]"),
        ([{"task": "mqar", "stretch": [0]}], "stretch=(0,): must be a list of multiples"),
        ([{"task": "text", "length": 10**6}], "a train sample is 1,000,001 bytes, and the text has"),
        ([{"task": "text", "length": 40000}], "a test sample is 320,001 bytes, and the text has"),
        ([{"task": "text", "train_files": ["a.txt"]}], "must be given together with train_files"),
        ([{"task": "text", "train_files": ["ghost/*.txt"], "test_files": ["ghost/*.txt"]}], "matches no file"),
    ],
)
def test_refusals(entries, said):
    with pytest.raises(ValueError) as error:
        tasks_of(entries)
    assert said in str(error.value)
