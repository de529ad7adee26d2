"""transformers' Trainer with what these programs add to it: loss parts in the log, checkpoints of the trained tensors
alone, a stop at a loss that is not finite, and one at the end of a step when asked to stop.

Everything else (mixed precision, accumulation, schedules, devices, progress bars, TensorBoard) is the Trainer's own.
"""

import math
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dist_cp
from accelerate.utils import gather_object
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from ..common.files import writing
from ..data.packing import IGNORED
from .checkpoints import FILES_FILE, TENSORS_FILE, check_files, checkpoints, rotate, seal


class LossNotFiniteError(ValueError):
    """Training stopped at a step whose loss or gradient is not finite; the weights are those before it."""


class BMojoTrainer(Trainer):
    """See the module's text.

    Args (besides the Trainer's):
        trained: names of the model's parameters that train. recipe: of the run, which its checkpoints record.
    """

    def __init__(self, *arguments: Any, trained: list[str], recipe: Mapping[str, Any], **options: Any):
        super().__init__(*arguments, **options)
        self.trained, self.recipe = trained, recipe
        self._parts: dict[str, torch.Tensor] = {}
        self._held_out: dict[str, float] = {}
        self._counted_rows: set[int] = set()
        self._parts_from = None
        self._reached = False
        self._rows: deque[torch.Tensor] = deque(maxlen=self.args.gradient_accumulation_steps)

    # Loss ------------------------------------------------------------------------------------------------------------
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name != "row"}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # Divided by the tokens of all processes, a part is that process's share, as the Trainer knows of the loss.
        share = self.accelerator.num_processes if num_items_in_batch is not None else 1
        for name, value in outputs.get("parts", {}).items():
            self._parts[name] = self._parts.get(name, 0.0) + value * share
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._rows.append(inputs["row"])
        if self._parts_from is None:
            self._parts_from = self.state.global_step
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_finite("loss", loss, [inputs["row"]])
        if not self._reached and not self._is_sharded:
            self._check_reached(model)
        return loss

    def _check_reached(self, model: nn.Module) -> None:
        """Refuse, at the first step, tensors that the losses do not depend on (ValueError)."""
        self._reached = True
        missed = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
        if missed:
            raise ValueError(
                f"train: the losses do not depend on {len(missed)} of the tensors that should train, such as "
                f"{missed[0]!r}; train fewer, or add a loss that reaches them (mixer alone reaches mixers only)."
            )

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # In float16 the scaler skips steps whose gradients overflow, and tries again with a smaller scale.
        if not self.args.fp16:
            self._check_finite("gradient norm", norm, list(self._rows))
        return norm

    def _check_finite(self, what: str, value: Any, rows: list[torch.Tensor]) -> None:
        """Stop the run, in every process at once, if the value is not finite in one of them.

        One that stopped alone would leave the others waiting for its gradients.
        """
        value = float(value.full_tensor() if isinstance(value, DTensor) else value)
        failed = not math.isfinite(value)
        if self.args.world_size > 1:
            flag = torch.tensor(float(failed), device=self.args.device)
            torch.distributed.all_reduce(flag)
            failed = bool(flag.item())
        if failed:
            found = gather_object([(value, torch.cat([row.flatten() for row in rows]).tolist())])
            raise LossNotFiniteError(self._told(what, [item for item in found if not math.isfinite(item[0])]))

    def _told(self, what: str, found: list[tuple[float, list[int]]]) -> str:
        """Return the message about values that are not finite, each with the rows that it comes from."""
        values = " and ".join(dict.fromkeys(str(value) for value, _ in found))
        rows = sorted({row for _, numbers in found for row in numbers})
        return (
            f"step {self.state.global_step + 1}: the {what} is {values}, on rows {rows} of the training data. "
            "No weight was changed in this step, and the checkpoints before it are kept: look at these rows, or lower "
            "trainer.learning_rate and start anew."
        )

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Add the loss parts to the Trainer's numbers: means over the steps that they are of."""
        if "loss" in logs and self._parts_from is not None:
            steps = max(self.state.global_step - self._parts_from, 1)
            logs = {**logs, **self._drain(steps)}
            self._parts_from = self.state.global_step
        super().log(logs, *arguments, **options)

    def _drain(self, count: int) -> dict[str, float]:
        parts = {name: self.accelerator.reduce(value, "mean").item() / count for name, value in self._parts.items()}
        self._parts.clear()
        return parts

    # Held-out loss ---------------------------------------------------------------------------------------------------
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Return the Trainer's own, with means over all counted tokens as loss and parts.

        The Trainer's is a mean of batch means: it depends on the batch size, and on which rows share a batch.
        """
        self._held_out, self._counted_rows = {"tokens": 0.0}, set()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = torch.tensor(list(self._held_out.values()), device=self.args.device)
        tokens, *sums = self.accelerator.reduce(sums, "sum").tolist()
        names = list(self._held_out)[1:]
        means = {f"{metric_key_prefix}_{name}": value / max(tokens, 1) for name, value in zip(names, sums)}
        output.metrics.update(means)
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add a batch's losses, as sums over its counted tokens, and their number to those of this evaluation."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"].masked_fill(~self._not_counted_yet(inputs.pop("row"))[:, None], IGNORED)
        with torch.no_grad(), self.compute_loss_context_manager():
            # Divided by one token, a mean over the tokens is their sum.
            outputs = model(**{**inputs, "labels": labels, "num_items_in_batch": 1})
        found = {"tokens": labels[:, 1:].ne(IGNORED).sum(), "loss": outputs["loss"], **outputs.get("parts", {})}
        for name, value in found.items():
            self._held_out[name] = self._held_out.get(name, 0.0) + float(value)
        return outputs["loss"].detach(), None, None

    def _not_counted_yet(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of the rows `[B]` no process has counted: the last batches are filled up with rows from the start."""
        everyone = self.accelerator.gather(rows).tolist()
        start = self.accelerator.process_index * len(rows)
        fresh = [
            row not in self._counted_rows and everyone.index(row) == start + place
            for place, row in enumerate(rows.tolist())
        ]
        self._counted_rows.update(everyone)
        return torch.tensor(fresh, device=rows.device)

    # Steps -----------------------------------------------------------------------------------------------------------
    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Do the Trainer's own; nothing where a resumed run has no step left, which the Trainer sees only after a
        step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)

    # Checkpoints -----------------------------------------------------------------------------------------------------
    @property
    def _is_sharded(self) -> bool:
        """Parameters lie in parts on several devices: saving and loading them is the Trainer's own business."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_checkpoint(self, model, trial) -> None:
        """Do the Trainer's own; older checkpoints go only when this one is complete (`checkpoints.seal`)."""
        work, limit = Path(self.args.output_dir), self.args.save_total_limit
        folder = work / f"checkpoint-{self.state.global_step}"
        try:
            with writing(folder):
                if self.args.should_save:
                    (folder / FILES_FILE).unlink(missing_ok=True)
                self.args.save_total_limit = None
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()  # the other processes' files are part of it
                if self.args.should_save:
                    seal(folder, self.recipe)
        except BaseException:
            if folder not in checkpoints(work):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate(work, limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # DeepSpeed that gathers no weights gives none; its own files are the checkpoint then.
        if not self.args.should_save or state_dict == {}:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._trained_state(state_dict), folder / TENSORS_FILE, metadata={"format": "pt"})

    def _trained_state(self, state: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        if state is None:
            state = dict(self.accelerator.unwrap_model(self.model).named_parameters())
        return {name: state[name].detach().contiguous() for name in self.trained}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.accelerator.unwrap_model(self.model), self.trained, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self._is_sharded:
            super()._load_best_model()
        else:
            best = Path(self.state.best_model_checkpoint)
            if self.args.should_save:
                check_files(best, "keep='best'")
            load_trained(self.accelerator.unwrap_model(self.model), self.trained, best)

    def full_state(self) -> dict[str, torch.Tensor]:
        """Every tensor of the model, whole; every process must ask, the main one gets them."""
        if self._is_sharded:
            return self.accelerator.get_state_dict(self.model_wrapped)
        return self.accelerator.unwrap_model(self.model).state_dict()


def load_trained(model: nn.Module, trained: list[str], checkpoint: Path) -> None:
    """Put a checkpoint's tensors into the model's parameters; those that FSDP has saved in parts are put together.

    Raises:
        ValueError: the file is missing, damaged, or holds other tensors than those that train.
    """
    path = checkpoint / TENSORS_FILE
    parameters = dict(model.named_parameters())
    if not path.exists():
        tensors = _load_parts(checkpoint, {name: torch.empty_like(parameters[name]) for name in trained})
    else:
        try:
            tensors = load_file(path)
        except Exception as error:  # safetensors and the system raise types of their own
            raise ValueError(
                f"checkpoint {str(path)!r} cannot be read ({error}); start anew with --overwrite."
            ) from error
    wrong = sorted(set(tensors) ^ set(trained))
    wrong = wrong or [name for name in trained if tensors[name].shape != parameters[name].shape]
    if wrong:
        raise ValueError(f"checkpoint {str(path)!r} does not fit what trains: {', '.join(wrong[:4])}.")
    with torch.no_grad():
        for name in trained:
            parameters[name].copy_(tensors[name])


def _load_parts(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors, filled from the parts that FSDP's processes have saved (ValueError: there are none, or
    others)."""
    folder = checkpoint / f"{FSDP_MODEL_NAME}_0"
    if not folder.is_dir():
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} has no {TENSORS_FILE}: several processes have saved it in parts (FSDP or "
            "DeepSpeed) that one process cannot put together. --resume under the same `accelerate launch` command "
            "goes on from it and writes the result; checkpoints that anything can finish need fsdp_state_dict_type: "
            "FULL_STATE_DICT or zero3_save_16bit_model: true in accelerate's settings."
        )
    try:
        reader = dist_cp.FileSystemReader(folder)
        missing = [name for name in tensors if f"model.{name}" not in reader.read_metadata().state_dict_metadata]
        if missing:
            raise ValueError(f"no {missing[0]!r} in it: adapters are saved under names of their own")
        dist_cp.load({"model": tensors}, storage_reader=reader)
    except (Exception, dist_cp.api.CheckpointException) as error:  # torch raises types of its own
        reason = (str(error) or type(error).__name__).splitlines()[-1]
        raise ValueError(
            f"checkpoint {str(folder)!r}: FSDP has saved it in parts that cannot be put together here ({reason}); "
            "--resume under the same `accelerate launch` command goes on from it and writes the result."
        ) from error
    return tensors


class StopAfterStep(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once a signal has asked for it."""

    def __init__(self):
        self.asked = False

    def on_step_end(self, args, state, control, **kwargs) -> None:
        asked = self.asked
        if args.world_size > 1:  # every process must stop at the same step
            flag = torch.tensor(float(asked), device=args.device)
            torch.distributed.all_reduce(flag)
            self.asked = asked = bool(flag.item())
        if asked:
            control.should_save = True
            control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Until the block ends, the first Ctrl-C or SIGTERM asks to stop; the second one interrupts at once."""

        def ask(number, frame) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            print("\nstopping after this step, with a checkpoint; once more to stop at once", flush=True)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
