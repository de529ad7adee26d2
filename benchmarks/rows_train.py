"""Row "train": one training step of the graft against the source's, T=2,048, batch 1, no gradient checkpointing.

A step is forward with loss, backward and AdamW (torch's defaults) over all parameters, which are fp32. In bf16 the
forward pass runs under autocast, as trainers do it. Peak memory is that of a process
of its own while it makes one step behind a short one, so the optimizer's moments are there before.
"""

import functools
from collections.abc import Iterator

import torch

from .actions import SIDES, models
from .memory import in_child
from .models import FORMATS, load, random_ids
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds


TOKENS, QUICK_TOKENS = 2048, 128
ROUNDS = Rounds(least=3, most=5, budget=60)
CASE = "benchmarks.rows_train:case"
# Largest differences of loss and gradients as shares of the largest; measured in bf16: 1e-5 and 0.021.
NEAR = {"float32": (1e-4, 1e-3), "bfloat16": (1e-3, 6e-2)}


@functools.lru_cache(maxsize=2)
def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """One per model, so that its moments are there from the second step on."""
    return torch.optim.AdamW(model.parameters(), lr=1e-6)


def mixed(model: torch.nn.Module, dtype: str) -> torch.autocast:
    """Return what the forward pass runs in: autocast to the format, if it is not that of the weights."""
    return torch.autocast(model.device.type, FORMATS[dtype], enabled=FORMATS[dtype] != model.dtype)


def step(model: torch.nn.Module, tokens: int, dtype: str) -> Action:
    """One step on random tokens in a format; it changes the model."""
    ids = random_ids(model.config.vocab_size, tokens).to(model.device)
    optimizer = optimizer_of(model)

    def train() -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        with mixed(model, dtype):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()

    return train


def case(side: str, path: str, tokens: int, dtype: str) -> Action:
    """Return what a child process measures."""
    return step(load(side, path), tokens, dtype)


def loss_and_gradients(model: torch.nn.Module, ids: torch.Tensor, dtype: str) -> list[torch.Tensor]:
    """Return the loss and the gradients of three tensors that both sides have."""
    model.train()
    first, last = model.model.layers[0].self_attn.q_proj.weight, model.model.layers[-1].mlp.down_proj.weight
    with mixed(model, dtype):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    found = [loss.detach(), *torch.autograd.grad(loss, [model.get_input_embeddings().weight, first, last])]
    model.eval()
    return found


def checks(context: Context) -> list[Check]:
    """Within the window the graft is the source: the same loss, and the same gradient of the shared tensors."""
    pair, found = models(context), []
    config = pair["ours"].config
    ids = random_ids(config.vocab_size, min(config.window_size, 128))
    for dtype in context.dtypes:
        ours, theirs = (loss_and_gradients(pair[side], ids, dtype) for side in SIDES)
        loss, *gradients = [difference(*both) for both in zip(ours, theirs, strict=True)]
        near, nearly = NEAR[dtype]
        found.append(Check(f"{dtype}, loss of {ids.shape[1]} tokens, graft against source", loss, near))
        what = f"{dtype}, gradients of embedding, first q_proj and last down_proj, graft against source"
        found.append(Check(what, max(gradients), nearly))
    return found


def figures(context: Context) -> Iterator[Figure]:
    tokens = QUICK_TOKENS if context.quick else TOKENS
    pair = models(context)
    try:
        for dtype in context.dtypes:
            seconds = context.alternate({side: step(pair[side], tokens, dtype) for side in SIDES}, ROUNDS)
            goal = context.goal(f"train {tokens}", dtype)
            ours, theirs = seconds["ours"], seconds["theirs"]
            yield figure("training step (AdamW)", "source", tokens, ours, theirs, goal=goal, dtype=dtype)
    finally:  # the models are no longer those of the folders: other rows load theirs again
        optimizer_of.cache_clear()
        load.cache_clear()
        del pair
    for dtype in context.dtypes:
        yield memory_figure(context, tokens, dtype)


def memory_figure(context: Context, tokens: int, dtype: str) -> Figure:
    def one(side: str):
        arguments = {"side": side, "path": context.models.path(side), "tokens": tokens, "dtype": dtype}
        return in_child(CASE, arguments, {"tokens": 32}, context.threads)

    ours, theirs = (one(side) for side in SIDES)
    note = f"beyond model and optimizer {ours.extra / 1e6:,.0f} MB, source {theirs.extra / 1e6:,.0f} MB"
    name = "training step, peak memory of the process"
    return figure(name, "source", tokens, [ours.peak], [theirs.peak], "B", note=note, dtype=dtype)


TITLE = "one training step, weights in fp32, bf16 by autocast; the models of prefill and decode"
ROWS = [Row("train", TITLE, checks, figures)]
