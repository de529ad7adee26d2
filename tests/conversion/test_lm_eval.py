"""EleutherAI's lm-evaluation-harness on grafts: what it scores is what the model computes, alone and in batches.

The harness pads log-likelihood requests on the right and passes no mask, and pads prompts to generate from on the left
with one. Everything in float64, where no two innovations tie by rounding.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.conversion.graft_sources import SIZES, VOCAB, graft, save_source
from tests.conversion.lm_eval_tasks import TASKS, write_tasks
from tests.strangers import run_stranger


POSITIONS = SIZES["max_position_embeddings"]
EXACT = {"rtol": 0, "atol": 1e-8}
ROUNDED = {"rtol": 1e-6, "atol": 1e-5}  # transformers' own classes compute norms and RoPE in float32
BY_THE_FOLDERS_CODE = """
import functools, sys
import lm_eval.evaluator, lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

lm_eval.evaluator.add_env_info = lambda storage: None
# Reading the names of the thousands of tasks that the harness brings takes ten seconds.
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
sys.argv[0] = "lm_eval"
cli_evaluate()
"""


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(4, VOCAB)}" for _ in range(count))


def tiny_rows() -> dict[str, list[dict]]:
    """Five rows of each task, of other lengths, longer than the graft's window of 16, within the source's positions."""
    draw = random.Random(3)
    rows = {name: [] for name in TASKS}
    for length in (90, 41, 33, 73, 58):
        context, others = words(draw, length), [f" {words(draw, size)}" for size in (1, 3, 2)]
        rows["local_choice"].append({"context": context, "choices": others, "answer": 1})
        rows["local_word"].append({"context": context, "answer": others[0]})
        rows["local_text"].append({"text": context})
        rows["local_answer"].append({"context": context, "answer": others[2]})
    return rows


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with `source`, its grafts `identity` (every text fits the window) and `windowed`, and `tasks`."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_source(folder / "source")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder / "source")
    assert graft(folder, output="identity", window_size=POSITIONS) == 0
    assert graft(folder, output="windowed") == 0
    write_tasks(folder / "tasks", tiny_rows())
    return folder


def scores(work: Path, model: str, batch_size: int, tasks=tuple(TASKS), folder="tasks", **model_args) -> dict:
    """By task, what the harness got back for each row and request: log-likelihoods, or the text that was written."""
    arguments = {"pretrained": str(work / model), "dtype": "float64", **model_args}
    found = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(tasks),
        task_manager=TaskManager(include_path=str(work / folder), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    return {name: responses(found["samples"][name]) for name in tasks}


def responses(samples: list[dict]) -> list:
    """Of samples in the order of the rows. A file of samples has numbers as strings."""
    first = [answers[0] for sample in sorted(samples, key=lambda s: s["doc_id"]) for answers in sample["resps"]]
    values = [answer[0] if isinstance(answer, tuple | list) else answer for answer in first]
    return [value if isinstance(value, str) and value.startswith("w") else float(value) for value in values]


def numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_same(found: dict[str, list], expected: dict[str, list], close: dict[str, float] = EXACT) -> None:
    for name, values in expected.items():
        if name == "local_answer":
            assert found[name] == values, name
        else:
            torch.testing.assert_close(
                numbers(found[name]), numbers(values), **close, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture(scope="module", autouse=True)
def no_questions_to_the_machine():
    """The harness puts what `pip list` and a dozen other commands say into its results, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        yield


@pytest.fixture(scope="module")
def source_scores(work) -> dict[str, list]:
    found = scores(work, "source", 1)
    assert [len(found[name]) for name in TASKS] == [15, 5, 5, 5]
    assert all(1 < len(text.split()) <= 8 for text in found["local_answer"])  # max_gen_toks
    return found


@pytest.fixture(scope="module")
def windowed_scores(work) -> dict[str, list]:
    return scores(work, "windowed", 1)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_identity_graft_scores_as_its_source(work, source_scores, batch_size):
    assert_same(scores(work, "identity", batch_size), source_scores, ROUNDED)


def test_a_windowed_graft_scores_alike_alone_and_in_a_batch(work, source_scores, windowed_scores):
    """And not as its source, or the texts would not reach beyond the window."""
    assert_same(scores(work, "windowed", 8), windowed_scores)
    for name in ("local_choice", "local_word", "local_text"):
        apart = numbers(windowed_scores[name]) - numbers(source_scores[name])
        assert apart.abs().min() > 1e-3, name
    assert windowed_scores["local_answer"] != source_scores["local_answer"]


def test_fields_of_the_memory_are_model_args(work, source_scores, windowed_scores):
    """They go to `from_pretrained`: another window, and a storage of everything that left it."""
    assert_same(scores(work, "windowed", 8, window_size=POSITIONS), source_scores, ROUNDED)
    stored = scores(work, "windowed", 8, ("local_text", "local_answer"), storage_size=POSITIONS)
    apart = numbers(stored["local_text"]) - numbers(windowed_scores["local_text"])
    assert apart.abs().min() > 1e-3
    assert_same(scores(work, "windowed", 1, tuple(stored), storage_size=POSITIONS), stored)


def test_a_folder_is_scored_by_its_own_code(work, windowed_scores):
    """The command of docs/lm_eval.md, in a process that cannot import the package."""
    arguments = f"pretrained={work / 'windowed'},trust_remote_code=True,dtype=float64"
    output = work / "scores"
    command = ["run", "--model", "hf", "--model_args", arguments, "--include_path", work / "tasks", "--tasks"]
    command += [",".join(TASKS), "--device", "cpu", "--batch_size", "8", "--output_path", output, "--log_samples"]
    run_stranger(BY_THE_FOLDERS_CODE, work, *command)
    found = {}
    for name in TASKS:
        (path,) = output.rglob(f"samples_{name}_*.jsonl")
        found[name] = responses([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    assert_same(found, windowed_scores)


@torch.no_grad()
def test_an_adapter_is_scored_as_the_merged_model(work, windowed_scores):
    base = AutoModelForCausalLM.from_pretrained(work / "windowed", dtype=torch.float64)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0.0, 0.2)
    adapted.save_pretrained(work / "adapter")
    found = scores(work, "windowed", 8, peft=str(work / "adapter"))
    adapted.merge_and_unload().save_pretrained(work / "merged")
    assert_same(found, scores(work, "merged", 8, tokenizer=str(work / "windowed")))
    assert (numbers(found["local_text"]) - numbers(windowed_scores["local_text"])).abs().min() > 1e-3


@torch.no_grad()
def test_max_length_reads_beyond_the_positions_of_the_source(work):
    """Left out, the harness cuts a text into windows of the source's positions; the last one reaches back."""
    more = 60
    text = words(random.Random(4), POSITIONS + more)
    write_tasks(work / "long", {name: [{"text": text}] for name in TASKS})
    model = AutoModelForCausalLM.from_pretrained(work / "windowed", dtype=torch.float64)
    ids = torch.tensor([[1, *(int(word[1:]) for word in text.split())]])

    def likelihood(ids: torch.Tensor, last: int) -> float:
        chances = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
        return float(chances.gather(-1, ids[:, 1:, None])[:, -last:].sum())

    in_one = likelihood(ids, POSITIONS + more)
    in_two = likelihood(ids[:, : POSITIONS + 1], POSITIONS) + likelihood(ids[:, more:], more)
    assert abs(in_one - in_two) > 1e-3
    for expected, model_args in ((in_one, {"max_length": 2 * POSITIONS}), (in_two, {})):
        found = scores(work, "windowed", 1, ["local_text"], folder="long", **model_args)
        assert_same(found, {"local_text": [expected]})
