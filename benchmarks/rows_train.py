"""Row "train": one training step of the graft against the source's, T=2,048, batch 1, fp32, no gradient checkpointing.

A step is forward with loss, backward and AdamW (torch's defaults) over all parameters. Peak memory is that of a process
of its own while it makes one step behind a short one, so the optimizer's moments are there before.
"""

import functools
from collections.abc import Iterator

import torch

from .memory import in_child
from .models import load, random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .rows_model import SIDES, both
from .timing import Action, Rounds


TOKENS, QUICK_TOKENS = 2048, 128
CASE = "benchmarks.rows_train:case"


@functools.lru_cache(maxsize=2)
def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """One per model, so that its moments are there from the second step on."""
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def step(model: torch.nn.Module, tokens: int) -> Action:
    """One step on random tokens; it changes the model."""
    ids = random_ids(model.config.vocab_size, tokens).to(model.device)
    optimizer = optimizer_of(model)

    def train() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()

    return train


def case(side: str, path: str, tokens: int) -> Action:
    """Return what a child process measures."""
    return step(load(side, path), tokens)


def checks(context: Context) -> list[Check]:
    """Within the window the graft is the source: the same loss, and the same gradient of the shared tensors."""
    models = both(context)
    window = models["ours"].config.window_size
    ids = random_ids(models["ours"].config.vocab_size, min(window, 128))
    found = {}
    for side, model in models.items():
        model.train()
        first, last = model.model.layers[0].self_attn.q_proj.weight, model.model.layers[-1].mlp.down_proj.weight
        shared = [model.get_input_embeddings().weight, first, last]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        found[side] = [loss.detach(), *torch.autograd.grad(loss, shared)]
        model.eval()
    pairs = list(zip(found["ours"], found["theirs"], strict=True))
    gradient = max(difference(*pair) for pair in pairs[1:])
    return [
        Check(f"loss of {ids.shape[1]} tokens, graft against source", difference(*pairs[0]), 1e-4),
        Check("gradients of embedding, first q_proj and last down_proj, graft against source", gradient, 1e-3),
    ]


def figures(context: Context) -> Iterator[Figure]:
    tokens = QUICK_TOKENS if context.quick else TOKENS
    models = both(context)
    rounds = Rounds(least=3, most=5, budget=90)
    try:
        seconds = context.alternate({side: step(models[side], tokens) for side in SIDES}, rounds)
    finally:  # the models are no longer those of the folders: other rows load theirs again
        optimizer_of.cache_clear()
        load.cache_clear()
        del models
    goal = context.goal(f"train {tokens}")
    yield figure("training step (AdamW)", "source", tokens, seconds["ours"], seconds["theirs"], goal=goal)
    found = {
        side: in_child(
            CASE, {"side": side, "path": context.models.path(side), "tokens": tokens}, {"tokens": 32}, context.threads
        )
        for side in SIDES
    }
    ours, theirs = found["ours"], found["theirs"]
    note = f"beyond model and optimizer {ours.extra / 1e6:,.0f} MB, source {theirs.extra / 1e6:,.0f} MB"
    name = "training step, peak memory of the process"
    yield figure(name, "source", tokens, [ours.peak], [theirs.peak], "B", note=note)


ROWS = [Row("train", "one training step; the models of prefill and decode", checks, figures)]
