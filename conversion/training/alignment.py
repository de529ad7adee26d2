"""Student and teacher as one module whose forward pass is the alignment's loss; what the Trainer trains.

The teacher is no submodule: it has no gradients, is in no checkpoint, and its tensors are mostly the student's own.

Mixer losses need what goes into and comes out of the layers' mixers (attention with its memories, before the residual):
`_Recorder` listens to them during a pass. With `mixer_inputs: teacher` every student mixer then runs by itself on the
teacher's layer input, so a step costs the teacher's forward pass and the student's mixers, forward and backward: no
MLP, no embedding, no logits, and no gradient that travels from layer to layer.

Shapes: B rows, T tokens, E hidden size, N counted tokens of the batch.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from modeling_bmojo import BMojoForCausalLM

from ..data.packing import IGNORED
from .losses import logit_losses, relative_error
from .settings import LossSettings
from .teacher import head_of, is_bmojo


class Alignment(nn.Module):
    """The loss of a student against its teacher.

    Args:
        student: trains where its parameters ask for a gradient. teacher: frozen; see teacher.py.
        losses: weights and options.
    """

    accepts_loss_kwargs = True  # the Trainer hands over num_items_in_batch

    def __init__(self, student: BMojoForCausalLM, teacher: PreTrainedModel, losses: LossSettings):
        super().__init__()
        self.student = student
        self.losses = losses
        self.mixers = [index for index, kind in enumerate(student.config.layer_types) if kind == "bmojo"]
        self._teacher = (teacher,)

    @property
    def config(self):
        return self.student.config

    @property
    def teacher(self) -> PreTrainedModel:
        return self._teacher[0]

    def _apply(self, fn, recurse: bool = True):
        """Let moves reach the teacher too: what it shares has moved already, what it holds alone follows.

        Not to meta, where FSDP takes what it spreads over the devices: the teacher's values would be lost.
        """
        super()._apply(fn, recurse)
        if not fn(torch.empty(0)).is_meta:
            self.teacher._apply(fn)
        return self

    def tie_weights(self) -> None:
        """Tie what the student ties; FSDP asks for it where it has taken the tensors apart."""
        self.student.tie_weights()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options) -> None:
        self.student.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs=gradient_checkpointing_kwargs, **options
        )

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **options) -> None:
        self.student.activation_checkpointing_enable(
            activation_checkpointing_kwargs=activation_checkpointing_kwargs, **options
        )

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, Any]:
        """Return the loss per counted token.

        Args:
            input_ids, labels, position_ids, attention_mask: `[B, T]`. A token counts if the label after it is not -100.
            num_items_in_batch: tokens that count in the whole step; None: in this batch.

        Returns:
            `loss` (scalar) and `parts`: each loss before its weight, without gradient.
        """
        targets = torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORED)], dim=1)
        counted = targets != IGNORED
        total = counted.sum() if num_items_in_batch is None else num_items_in_batch
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        if self.teacher.device != input_ids.device:  # FSDP has moved the student alone
            self.teacher.to(input_ids.device)
        sums = self._sums(inputs, counted, targets)
        parts = {name: value / torch.as_tensor(total, device=value.device).clamp(min=1) for name, value in sums.items()}
        loss = sum(weight * parts[name] for name, weight in self.losses.weights().items())
        return {"loss": loss.reshape(()), "parts": {name: value.detach().reshape(()) for name, value in parts.items()}}

    def _sums(self, inputs: dict, counted: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every wanted loss, summed over the counted tokens."""
        weights, sums = self.losses.weights(), {}
        apart = self.losses.mixer_inputs == "teacher"
        wanted = self.mixers if "mixer" in weights else []
        with torch.no_grad(), _Recorder(self.teacher, wanted) as theirs:
            teacher_hidden = None if set(weights) == {"ce"} else run_teacher(self.teacher, inputs)
        if wanted and apart:
            sums["mixer"] = self._mixer_error(self._mixed_apart(theirs), theirs, counted)
        if set(weights) - {"mixer"} or (wanted and not apart):
            with _Recorder(self.student, [] if apart else wanted) as ours:
                hidden = self.student.model(**inputs, use_cache=False).last_hidden_state
            if wanted and not apart:
                sums["mixer"] = self._mixer_error(ours.outputs, theirs, counted)
            if "hidden" in weights:
                sums["hidden"] = relative_error(hidden, teacher_hidden, counted)
            if weights.keys() & {"kl", "ce"}:
                sums |= self._logit_sums(hidden, teacher_hidden, counted, targets)
        return sums

    def _logit_sums(self, hidden, teacher_hidden, counted, targets) -> dict[str, torch.Tensor]:
        with_kl, with_ce = self.losses.kl > 0, self.losses.ce > 0
        kl, ce = logit_losses(
            hidden[counted],
            head_of(self.student),
            teacher_hidden[counted] if with_kl else None,
            head_of(self.teacher) if with_kl else None,
            targets[counted] if with_ce else None,
            self.losses.temperature,
            self.losses.logit_chunk,
        )
        return ({"kl": kl} if with_kl else {}) | ({"ce": ce} if with_ce else {})

    def _mixed_apart(self, theirs: "_Recorder") -> dict[int, torch.Tensor]:
        """Each student mixer's output on the teacher's layer input."""
        found = {}
        for index in self.mixers:
            layer, given = self.student.model.layers[index], (theirs.inputs[index], theirs.rows)
            save = self.training and getattr(layer, "gradient_checkpointing", False)
            mixed = checkpoint(layer.mix, *given, use_reentrant=False) if save else layer.mix(*given)
            found[index] = mixed[0]
        return found

    def _mixer_error(self, ours: dict[int, torch.Tensor], theirs: "_Recorder", counted: torch.Tensor) -> torch.Tensor:
        """Mean over the layers of the mixer outputs' relative error."""
        errors = [relative_error(ours[index], theirs.outputs[index], counted) for index in self.mixers]
        return torch.stack(errors).mean()


class _Recorder(AbstractContextManager):
    """Inputs and outputs `[B, T, E]` of the mixers of some layers during one pass.

    rows: how the batch was cut into mixer rows. Nothing is recorded outside the `with` block, so a recomputation in the
    backward pass leaves the record alone.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]):
        self.rows = None
        self.inputs: dict[int, torch.Tensor] = {}
        self.outputs: dict[int, torch.Tensor] = {}
        self._model, self._layers, self._handles = model, layers, []

    def __enter__(self) -> "_Recorder":
        for index in self._layers:
            layer = self._model.model.layers[index]
            self._handles.append(layer.register_forward_pre_hook(self._take_rows, with_kwargs=True))
            self._handles.append(layer.self_attn.register_forward_hook(self._listener(index)))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _take_rows(self, module, arguments, options) -> None:
        self.rows = options["rows"]

    def _listener(self, index: int):
        def listen(module, arguments, output) -> None:
            self.inputs[index], self.outputs[index] = arguments[0], output[0]

        return listen


def run_teacher(teacher: PreTrainedModel, inputs: dict[str, torch.Tensor | None]) -> torch.Tensor:
    """Return final hidden states `[B, T, E]`; other models than ours read packed documents as rows of padded
    batches."""
    base = getattr(teacher, teacher.base_model_prefix)
    if is_bmojo(teacher):
        return base(**inputs, use_cache=False).last_hidden_state
    ids = inputs["input_ids"].flatten()
    found = None
    for index in document_groups(inputs["position_ids"], inputs["attention_mask"]):
        real = index >= 0
        given = {"input_ids": ids[index.clamp(min=0)], "attention_mask": real.to(torch.int64)}
        hidden = base(**given, use_cache=False).last_hidden_state
        found = hidden.new_zeros(len(ids), hidden.shape[-1]) if found is None else found
        found[index[real]] = hidden[real]
    return found.unflatten(0, inputs["input_ids"].shape)


def document_groups(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Where each document's tokens stand in the flattened batch: `[documents, longest]`, -1 where there is none.

    Lengths within a factor of two share a group, so that less than half of its places are empty: in a single one, a
    long document would pad every short one to its length.

    Args:
        position_ids: `[B, T]`, 0 at every document's first token. attention_mask: `[B, T]`, 0 at pads, or None.
    """
    real = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    place = real.flatten().nonzero()[:, 0]
    position = position_ids.flatten()[place]
    document = (position == 0).cumsum(0) - 1
    sizes, groups = document.bincount(), []
    for power in range(int(sizes.max()).bit_length()):
        members = sizes >> power == 1
        if not bool(members.any()):
            continue
        number, ours = members.cumsum(0) - 1, members[document]
        index = place.new_full((int(members.sum()), int(sizes[members].max())), -1)
        index[number[document[ours]], position[ours]] = place[ours]
        groups.append(index)
    return groups
