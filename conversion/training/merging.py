"""An adapter's weights added to those of the model that it was trained on.

Both are read from their files, so that the model which trained may lie in parts on several devices. Input embeddings
and head that were one tensor are two while an adapter is merged, because it may hold something for one of them alone;
they stay two where the result differs.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import torch

from ..common.running import assembled
from ..common.weights import in_float32, open_weights
from .adapters import merged_names
from .student import Student


class Merged(NamedTuple):
    """A merged model. student: as it was, with the merged model's config. changed: the tensors that the adapter has
    changed or may have changed."""

    student: Student
    tensors: dict[str, torch.Tensor]
    changed: list[str]


def merge_adapter(student: Student, folder: Path) -> Merged:
    """Return the student's checkpoint with the adapter in `folder` merged into it, on the CPU.

    Raises:
        ValueError: weights of the checkpoint that are missing or damaged.
    """
    from peft import PeftModel

    config = copy.deepcopy(student.config)
    weights = open_weights(student.folder, f"source={str(student.folder)!r}")
    model = assembled(
        config,
        {name: weights.rows(name).to(torch.float32 if in_float32(name) else student.dtype) for name in weights.shapes},
    )
    if model.all_tied_weights_keys:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    adapted = PeftModel.from_pretrained(model, folder)
    changed = merged_names(adapted)
    tensors = adapted.merge_and_unload().state_dict()
    embeddings = tensors["model.embed_tokens.weight"]
    config.tie_word_embeddings = student.config.tie_word_embeddings and torch.equal(
        tensors["lm_head.weight"], embeddings
    )
    return Merged(student._replace(config=config), tensors, changed)
