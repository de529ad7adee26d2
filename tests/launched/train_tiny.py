"""A training program that `accelerate launch` can start: a tiny model, a few steps, losses and a checkpoint.

    accelerate launch --config_file configs/accelerate/ddp.yaml tests/launched/train_tiny.py START RESULT FIRST LAST

Reads the model from START, trains on batches FIRST ... LAST - 1 and writes RESULT/model (an ordinary checkpoint) and
RESULT/losses.json. Plain SGD, so that nothing but the weights has to be carried from run to run.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from modeling_bmojo import BMojoForCausalLM
from tests.tiny import VOCAB, WINDOW


ROWS = 4  # of the whole batch, over all processes
RATE = 0.2


def batch(index: int) -> torch.Tensor:
    """Batch `index`, `[ROWS, T]`: some shorter than the window, where nothing reads the SSM."""
    count = (3 * WINDOW, WINDOW - 1, 2 * WINDOW, 4 * WINDOW)[index % 4]
    return torch.randint(0, VOCAB, (ROWS, count), generator=torch.Generator().manual_seed(index))


def start_accelerator() -> Accelerator:
    """accelerate offers FSDP on GPUs only, although FSDP2 itself runs on the CPU: its list of devices is passed by."""
    PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    return Accelerator(cpu=True)


def train(accelerator: Accelerator | None, model, first: int, last: int) -> tuple[torch.nn.Module, list[float]]:
    """The model after batches `first` ... `last - 1`, and the loss of each over all rows. None: without accelerate."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    rank, parts = 0, 1
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        rank, parts = accelerator.process_index, accelerator.num_processes
    losses = []
    for index in range(first, last):
        ids = batch(index).tensor_split(parts)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        losses.append(float(loss if accelerator is None else accelerator.reduce(loss, "mean")))
    return model, losses


def main(start: str, result: str, first: str, last: str) -> None:
    accelerator = start_accelerator()
    model = BMojoForCausalLM.from_pretrained(start)
    model, losses = train(accelerator, model, int(first), int(last))
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(Path(result) / "model", state_dict=state)
        facts = {
            "losses": losses,
            "processes": accelerator.num_processes,
            "layout": type(model).__name__,
            "sharded": sum(type(p).__name__ == "DTensor" for p in model.parameters()),
        }
        (Path(result) / "losses.json").write_text(json.dumps(facts))
    accelerator.wait_for_everyone()
    # Nothing is taken down: torch joins gloo's threads while it holds the GIL, and that never ends if one of them waits
    # for the GIL to drop its last tensor (seen twice in some twenty runs).
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
