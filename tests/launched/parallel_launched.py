"""One of two processes that share models by their plans and write what each computes into the models' folders.

torchrun --nproc-per-node 2 tests/launched/parallel_launched.py MODEL ...
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from modeling_bmojo import BMojoForCausalLM, cache_of
from modeling_bmojo.weights_bmojo import weights_fingerprint


def prompt() -> torch.Tensor:
    return torch.arange(1, 61).reshape(2, 30) * 7 % 50 + 1


def mask() -> torch.Tensor:
    """The second row is shorter."""
    found = torch.ones_like(prompt())
    found[1, :4] = 0
    return found


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Next-token loss in the model's own dtype: transformers' is float32."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def whole(value: torch.Tensor) -> torch.Tensor:
    return getattr(value, "full_tensor", lambda: value)().detach()


def read(model) -> dict:
    """Return logits of a prompt and of chunks that go on from a cache, what the cache keeps, and greedy text."""
    with torch.no_grad():
        ids, cache = prompt(), None
        found = {"logits": model(ids, attention_mask=mask()).logits, "chunks": []}
        for first, last in ((0, 11), (11, 29), (29, 30)):
            out = model(ids[:, first:last], past_key_values=cache, use_cache=True)
            cache = cache_of(out)
            found["chunks"].append(out.logits)
        found["states"] = [layer.states() for layer in cache.layers]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found["generated"] = model.generate(ids, attention_mask=mask(), **options)
    found["beams"] = model.generate(ids, attention_mask=mask(), num_beams=3, **options)
    return found


def train(model) -> dict:
    """Return loss and gradients of two batches, the gradients added up."""
    model.train()
    for ids in (prompt(), prompt().flip(1)):
        loss = loss_of(model(ids).logits, ids)
        loss.backward()
    named = model.named_parameters()
    return {"loss": loss.detach(), "gradients": {name: whole(v.grad) for name, v in named if v.grad is not None}}


def tensor_parallel(folder: Path) -> None:
    """Write `tensor-RANK.pt`, and the model anew under `saved`."""
    model = BMojoForCausalLM.from_pretrained(folder, dtype=torch.float64, tp_plan="auto").eval()
    shared = {name: list(v.to_local().shape) for name, v in model.named_parameters() if type(v).__name__ == "DTensor"}
    found = {"shared": shared, "fingerprint": weights_fingerprint(model)} | read(model)
    model.save_pretrained(folder / "saved")
    torch.save(found | train(model), folder / f"tensor-{dist.get_rank()}.pt")


def main(*folders: str) -> None:
    dist.init_process_group("gloo")
    for folder in map(Path, folders):
        print(f"model: {folder}", file=sys.stderr, flush=True)  # which one an error that follows is about
        tensor_parallel(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.barrier()
    # Nothing is taken down: torch joins gloo's threads while it holds the GIL, which now and then never ends.
    os._exit(0)
