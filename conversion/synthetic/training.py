"""Training of one small model on one task by transformers' Trainer, and its scores on samples it was not trained on.

The batch of a step belongs to seed and step alone, so a run that goes on from a checkpoint trains on what it would
have trained on. Every batch is drawn anew: there are no epochs, and nothing is seen twice but by chance.
"""

import json
import math
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from modeling_bmojo import BMojoConfig, BMojoForCausalLM

from .samples import IGNORED, Samples, Task, stream


SOLVED_OVER = 50  # steps whose training accuracy decides that a task is solved, from a multiple of it to the next


class Recipe(NamedTuple):
    """How every model is trained.

    solved: training accuracy at which it stops early, above 1: never. taps: see `Reader`.
    """

    steps: int
    batch: int
    learning_rate: float
    warmup: float
    weight_decay: float
    solved: float
    seed: int
    save_steps: int
    taps: int


class Reader(nn.Module):
    """A model with what is read out of its outputs at the scored places.

    taps: of a causal convolution over the embeddings, by channel, whose output is added to them; 0: none. Zoology has
    one before every model's mixers: with it even a single attention layer can bind a token to the one before, which
    Mamba's own convolution does for it, and which attention alone takes long to learn.

    Of a task that is scored as a whole, token j is read out of the last output and a vector of place j.
    """

    def __init__(self, model: BMojoForCausalLM, task: Task, taps: int = 0):
        super().__init__()
        self.model, width = model, model.config.hidden_size
        self.conv = nn.Conv1d(width, width, taps, groups=width, bias=False, padding=taps - 1) if taps else None
        if task.whole:
            self.places = nn.Parameter(torch.randn(task.length, width))
            self.mix = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.whole = task.whole

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `loss`, the mean over what is scored, and `right`, the share of it whose first choice is the label."""
        embedded = self.model.model.embed_tokens(ids)
        if self.conv is not None:
            embedded = embedded + self.conv(embedded.mT)[..., : ids.shape[1]].mT
        hidden = self.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        if self.whole:
            hidden = self.mix(hidden[:, -1:] + self.places)
        scored = labels != IGNORED
        logits, due = self.model.lm_head(hidden[scored]), labels[scored]
        return {"loss": cross_entropy(logits.float(), due), "right": (logits.argmax(dim=1) == due).float().mean()}


@dataclass
class Batches(Dataset):
    """Item i is the whole batch of step i."""

    task: Task
    recipe: Recipe

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        samples = self.task.sample(self.recipe.batch, stream(self.task, "train", self.recipe.seed, step))
        return samples._asdict()


class _Trainer(Trainer):
    """Steps in their order; the share of right answers since the last multiple of `SOLVED_OVER`, and the last loss."""

    right: list[torch.Tensor]
    loss: torch.Tensor

    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **more: Any) -> torch.Tensor:
        out = model(**inputs)
        self.right.append(out["right"].detach())
        self.loss = out["loss"].detach()
        return out["loss"]


class _StopEarly(TrainerCallback):
    """Where the task is solved, and where the loss is no number any more.

    Looked at every `SOLVED_OVER` steps over these steps alone, so that a run that goes on from a checkpoint at such a
    step decides as one that was not interrupted.
    """

    def __init__(self, trainer: _Trainer, solved: float):
        self.trainer, self.solved = trainer, solved

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step % SOLVED_OVER:
            return
        right, self.trainer.right = self.trainer.right, []
        solved = len(right) == SOLVED_OVER and torch.stack(right).mean().item() >= self.solved
        control.should_training_stop = solved or not math.isfinite(self.trainer.loss.item())


def train(config: BMojoConfig, task: Task, recipe: Recipe, device: str, work: Path) -> tuple[Reader, dict[str, Any]]:
    """Train a model of `config` from scratch and return it with what happened.

    Args:
        work: folder for the checkpoints of this run, from the last whole one of which it goes on.

    Returns:
        The model in evaluation mode, and `steps` that were done and `curve`: loss by step.
    """
    set_seed(recipe.seed)
    reader = Reader(BMojoForCausalLM(config), task, recipe.taps)
    trainer = _Trainer(
        model=reader,
        args=_arguments(recipe, device, work),
        train_dataset=Batches(task, recipe),
        data_collator=lambda items: items[0],
    )
    trainer.right = []
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    trainer.add_callback(_StopEarly(trainer, recipe.solved))
    trainer.train(resume_from_checkpoint=_last_whole(work))
    curve = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return reader.eval(), {"steps": trainer.state.global_step, "curve": curve}


def _last_whole(work: Path) -> str | None:
    """Return the newest checkpoint that was written to its end; newer ones, which a kill cut short, are removed."""
    folders = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]), reverse=True)
    for folder in folders:
        if _is_whole(folder):
            return str(folder)
        shutil.rmtree(folder)
    return None


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(folder / "model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(folder / name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))


def _arguments(recipe: Recipe, device: str, work: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(work),
        max_steps=recipe.steps,
        per_device_train_batch_size=1,  # an item is a batch
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=1.0,
        adam_beta2=0.98,
        seed=recipe.seed,
        use_cpu=device == "cpu",
        logging_steps=50,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_steps,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        average_tokens_across_devices=False,
    )


def score(reader: Reader, task: Task, count: int, seed: int, batch: int) -> dict[str, dict[str, float]]:
    """Return `accuracy`, `loss` in nats and `count` of scored tokens, of each of the task's tests.

    Args:
        count: samples of each test. batch: of them read at a time; fewer where the texts are longer than in training.
    """
    return {
        name: _scored(reader, samples, positions, max(1, batch * task.length // samples.ids.shape[1]))
        for name, samples, positions in task.test(count, seed)
    }


def choice_loss(reader: Reader, task: Task, count: int, seed: int, batch: int) -> float:
    """Return the loss by which learning rates are chosen: on samples that neither training nor tests draw; of `text` on
    other stretches of the training text."""
    samples = task.sample(count, stream(task, "choice", seed))
    return _scored(reader, samples, slice(None), batch)["loss"]


@torch.no_grad()
def _scored(reader: Reader, samples: Samples, positions: slice, at_once: int) -> dict[str, float]:
    right, loss, seen, device = 0.0, 0.0, 0, reader.model.device
    for ids, labels in zip(samples.ids.split(at_once), samples.labels.split(at_once)):
        counted = torch.full_like(labels, IGNORED)
        counted[:, positions] = labels[:, positions]
        scored = int((counted != IGNORED).sum())
        if not scored:
            continue
        out = reader(ids.to(device), counted.to(device))
        right += out["right"].item() * scored
        loss += out["loss"].item() * scored
        seen += scored
    return {"accuracy": right / seen, "loss": loss / seen, "count": seen}
