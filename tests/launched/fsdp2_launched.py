"""One of two processes that load models under transformers' FSDP2 and write what each computes into its folder.

torchrun --nproc-per-node 2 tests/launched/fsdp2_launched.py DTYPE MODEL ...
"""

import os
import sys
from pathlib import Path

import torch
from transformers.distributed import DistributedConfig

from modeling_bmojo import BMojoForCausalLM


def compute(model, ids: torch.Tensor) -> dict:
    """Logits, greedy continuation, loss and gradients; `ids` `[B, T]`."""
    model.eval()
    with torch.no_grad():
        found = {"logits": model(ids).logits}
    found["generated"] = model.generate(ids, max_new_tokens=6, do_sample=False)
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    whole = {
        name: getattr(value.grad, "full_tensor", lambda value=value: value.grad)()
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    return {**found, "loss": loss.detach(), "gradients": whole}


def prompt() -> torch.Tensor:
    return torch.arange(1, 41)[None] % 50 + 1


def main(dtype: str, *folders: str) -> None:
    torch.distributed.init_process_group("gloo")
    for folder in folders:
        print(f"model: {folder}", file=sys.stderr, flush=True)  # which one an error that follows is about
        config = DistributedConfig(fsdp_size=2)
        model = BMojoForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), distributed_config=config)
        sharded = [name for name, value in model.named_parameters() if type(value).__name__ == "DTensor"]
        found = compute(model, prompt()) | {"sharded": sharded}
        if torch.distributed.get_rank() == 0:
            torch.save(found, Path(folder) / "found.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
    torch.distributed.barrier()
    # Nothing is taken down: torch joins gloo's threads while it holds the GIL, which now and then never ends.
    os._exit(0)
