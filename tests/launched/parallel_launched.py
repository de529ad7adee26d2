"""One of two processes that share models by their plans and write what each computes into the models' folders.

torchrun --nproc-per-node 2 tests/launched/parallel_launched.py TO,SAVE WITH,WHOLE,HEADS IN,PIPELINES MODEL ...
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed import DistributedConfig

from modeling_bmojo import BMojoCache, BMojoForCausalLM, cache_of
from modeling_bmojo.weights_bmojo import weights_fingerprint


DTYPE = {"dtype": torch.float64}


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
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found["generated"] = model.generate(ids, attention_mask=mask(), **options)
    found["beams"] = model.generate(ids, attention_mask=mask(), num_beams=2, **options)
    return found


def take_back(model) -> torch.Tensor:
    """Return the logits that follow when a cache has taken back the last columns that it read; what it has stored lies
    on the host."""
    stores = model.config.storage_size > 0
    ids, cache = prompt(), BMojoCache(model.config, rollback_limit=4, storage_on_host=stores)
    with torch.no_grad():
        for first, last in ((0, 25), (25, 28)):
            model(ids[:, first:last], past_key_values=cache)
        cache.crop(-2)
        return model(ids[:, 26:], past_key_values=cache).logits


class Told(TorchDispatchMode):
    """What devices tell each other: `said` has a pair for each time, the operation and the bytes of one device."""

    def __init__(self):
        super().__init__()
        self.said: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        kind = next((kind for kind in ("reduce", "gather") if kind in name), None)
        if name.startswith(("c10d::", "_c10d_functional::")) and kind:
            value = args[1] if name == "c10d::allgather_" else args[0]
            value = value[0] if isinstance(value, list | tuple) else value
            self.said.append((kind, value.numel() * value.element_size()))
        return func(*args, **(kwargs or {}))


def told(model) -> list[tuple[str, int]]:
    """Return what is told for the last token of a prompt."""
    ids = prompt()
    with torch.no_grad():
        cache = cache_of(model(ids[:, :-1], use_cache=True))
        with Told() as found:
            model(ids[:, -1:], past_key_values=cache)
    return found.said


def train(model, batches: list[torch.Tensor] | None = None) -> dict:
    """Return the last loss and the gradients of several batches, added up."""
    model.train()
    for ids in [prompt(), prompt().flip(1)] if batches is None else batches:
        loss = loss_of(model(ids).logits, ids)
        loss.backward()
    return {"loss": loss.detach(), "gradients": gradients(model)}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}


def tensor_parallel(folder: Path, saves: bool) -> None:
    """Write `tensor-RANK.pt`, the cache of a prompt `cache-RANK.pt`, and if `saves` the model anew under `saved`."""
    model = BMojoForCausalLM.from_pretrained(folder, **DTYPE, distributed_config=DistributedConfig(tp_size=2)).eval()
    shared = {name: list(v.to_local().shape) for name, v in model.named_parameters() if type(v).__name__ == "DTensor"}
    found = {"shared": shared, "fingerprint": weights_fingerprint(model)} | read(model)
    found |= {"taken_back": take_back(model), "told": told(model)}
    with torch.no_grad():
        cache_of(model(prompt(), use_cache=True)).save(folder / f"cache-{dist.get_rank()}.pt")
    if saves:
        model.save_pretrained(folder / "saved")
    torch.save(found | train(model), folder / f"tensor-{dist.get_rank()}.pt")


def whole_heads(folder: Path) -> None:
    """Write `whole-RANK.pt`, what a plan computes that leaves every device all heads."""
    plan = BMojoForCausalLM.whole_heads_plan(BMojoForCausalLM.config_class.from_pretrained(folder))
    distributed = DistributedConfig(tp_size=2, tp_plan=plan)
    model = BMojoForCausalLM.from_pretrained(folder, **DTYPE, distributed_config=distributed).eval()
    torch.save(read(model) | {"told": told(model)} | train(model), folder / f"whole-{dist.get_rank()}.pt")


class Stage(nn.Module):
    """A model of which transformers left some layers here: tokens or hidden states to hidden states or logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.is_first, self.is_last = model, dist.get_rank() == 0, dist.get_rank() == 1

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if self.is_last:
            return type(self.model).forward(self.model, inputs_embeds=given).logits  # transformers' sends no gradients
        return self.model.model(given).last_hidden_state


def pipeline(folder: Path) -> None:
    """Write `pipeline-RANK.pt`: what transformers' pipeline reads, and what torch's trains, a row after the other."""
    model = BMojoForCausalLM.from_pretrained(folder, **DTYPE, distributed_config=DistributedConfig(pp_size=2)).eval()
    found = read(model)
    schedule = ScheduleGPipe(PipelineStage(Stage(model.train()), dist.get_rank(), 2, torch.device("cpu")), 2, loss_of)
    losses = []
    schedule.step(prompt()) if dist.get_rank() == 0 else schedule.step(target=prompt(), losses=losses)
    found |= {"losses": [loss.detach() for loss in losses], "gradients": gradients(model)}
    torch.save(found, folder / f"pipeline-{dist.get_rank()}.pt")


def main(saved: str, whole: str, piped: str, *folders: str) -> None:
    dist.init_process_group("gloo")
    for folder in map(Path, folders):
        print(f"model: {folder}", file=sys.stderr, flush=True)  # which one an error that follows is about
        tensor_parallel(folder, folder.name in saved.split(","))
        if folder.name in whole.split(","):
            whole_heads(folder)
        if folder.name in piped.split(","):
            pipeline(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.barrier()
    # Nothing is taken down: torch joins gloo's threads while it holds the GIL, which now and then never ends.
    os._exit(0)
