"""Answers prompts with a source whose cache NVIDIA's kvpress compresses; run by the Python of its own environment.

`presses.PressedSource` starts `main(FOLDER, PRESS, DTYPE, DEVICE)`: one JSON prompt per line in, one JSON answer out.
kvpress (PyPI) needs an older transformers than ours, so this file imports nothing of this project. A press removes keys
and values from the cache once the context was read; the question is read afterwards, at the positions it has in the
text, and answered greedily. What comes out of a step that goes wrong is an "error" line, and the next prompt is read.
"""

import json
import sys

import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


@torch.inference_mode()
def answer(model, tokenizer, press, ids: list[int], context: int, answers: list[str], new_tokens: int, ends: list[int]):
    """Return what is said behind the prompt `ids`, of whose first `context` tokens the press keeps a part, and the
    bytes of the cache behind it."""
    device, cache = model.device, DynamicCache()
    tokens = torch.tensor([ids], device=device)
    with press(model):
        model.model(input_ids=tokens[:, :context], past_key_values=cache)
    place, rest, written = context, tokens[:, context:], []
    while len(written) < new_tokens:
        positions = torch.arange(place, place + rest.shape[1], device=device)[None]
        out = model(input_ids=rest, past_key_values=cache, position_ids=positions, logits_to_keep=1)
        written.append(int(out.logits[0, -1].argmax()))
        said = tokenizer.decode(written, skip_special_tokens=True)
        if written[-1] in ends or all(each.lower() in said.lower() for each in answers):
            break
        place, rest = place + rest.shape[1], tokens.new_tensor([[written[-1]]])
    return said, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def main(folder: str, name: str, dtype: str, device: str) -> None:
    """Load the source, say that it is there, and answer until the input ends."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    print(json.dumps({"ready": name}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            press = getattr(kvpress, name)(compression_ratio=asked.pop("removed"))
            said, held = answer(model, tokenizer, press, **asked)
            print(json.dumps({"said": said, "bytes": held}), flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
