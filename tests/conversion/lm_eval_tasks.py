"""Small local tasks for EleutherAI's lm-evaluation-harness: one of each kind of request, and no hub is asked.

    python -m tests.conversion.lm_eval_tasks FOLDER

writes `FOLDER/*.yaml` and their rows, made from the held-out part of Python's reference: what docs/lm_eval.md measures
with. Passages have about 500 to 1,000 SmolLM2 tokens, which is more than the window of the default graft (512).
"""

import argparse
import json
import random
from pathlib import Path

import yaml

from conversion.data.texts import pydoc_text


NEEDLE = "The telephone number of the museum is {number}."
QUESTION = "\n\nWhat is the telephone number of the museum?\n\nThe telephone number of the museum is"
# Each row has the fields that doc_to_text, doc_to_target and doc_to_choice name.
TASKS = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "local_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [r"\D"]}],
    },
}


def write_tasks(folder: Path, rows: dict[str, list[dict]]) -> None:
    """Write a YAML file and a file of rows for every task of `rows`, and where datasets may keep its copy."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]), encoding="utf-8")
        source = {"data_files": {"test": str(data.resolve())}, "cache_dir": str((folder / "cache").resolve())}
        document = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", **task}
        document |= {"target_delimiter": "", "metadata": {"version": 1}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def passages(count: int, seed: int) -> list[list[str]]:
    """Stretches of real text as paragraphs, `count` of them, of 2,000 to 4,000 characters, the same on every call."""
    draw = random.Random(seed)
    paragraphs = pydoc_text("held_out").split("\n\n")
    found = []
    for index in range(count):
        first, size, taken = index * len(paragraphs) // count, draw.randrange(2000, 4000), []
        while sum(map(len, taken)) < size:
            taken.append(paragraphs[first + len(taken)])
        found.append(taken)
    return found


def needles(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Prompts that ask for a number which stands behind the first paragraph, and numbers, of which the first is it."""
    draw = random.Random(seed)
    found = []
    for first, *others in passages(count, seed):
        numbers = [str(number) for number in draw.sample(range(10000, 99999), 3)]
        found.append(("\n\n".join([first, NEEDLE.format(number=numbers[0]), *others]) + QUESTION, numbers))
    return found


def reference_rows() -> dict[str, list[dict]]:
    """The rows of every task, from Python's reference."""
    asked = needles(6, seed=1)
    texts = ["\n\n".join(paragraphs) for paragraphs in passages(6, seed=2)]
    words = [text.rpartition(" ") for text in texts]
    return {
        "local_choice": [
            {"context": context, "choices": [f" {number}" for number in sorted(numbers)],
             "answer": sorted(numbers).index(numbers[0])}
            for context, numbers in asked
        ],
        "local_word": [{"context": before, "answer": f" {word}"} for before, _, word in words],
        "local_text": [{"text": text} for text in texts],
        "local_answer": [{"context": context, "answer": numbers[0]} for context, numbers in asked],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the tasks that docs/lm_eval.md measures with.")
    parser.add_argument("folder", type=Path)
    write_tasks(parser.parse_args().folder, reference_rows())
