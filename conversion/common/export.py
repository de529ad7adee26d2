"""What a checkpoint folder holds: weights, config with auto_map, exported code, tokenizer, generation config.

The code is copied by transformers' own exporter (`custom_object_save`), so the folder loads with
`trust_remote_code=True` where the package is not installed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from modeling_bmojo import BMojoConfig

from .running import meta_model, tensor_shapes
from .weights import write_shards


PROBE = "In 1995, version 3.12.4\n\n1.  Hello  World's\ttab; été — 日本 x=100\n\n\n42"


def write_model(
    folder: Path,
    config: BMojoConfig,
    dtypes: Mapping[str, torch.dtype],
    make: Callable[[str], torch.Tensor],
    max_shard_size: str,
    dtype: torch.dtype,
) -> None:
    """Write into `folder` the exported code, config.json and the weights of a checkpoint.

    Args:
        dtypes: of every tensor but the tied ones. make: the tensor of a name, contiguous and on the CPU; called once
            for each. max_shard_size: see `write_shards`. dtype: what the config, which is
            changed by this, states.

    Raises:
        ValueError: `dtypes` names other tensors than the config has.
    """
    model = meta_model(config)
    shapes = tensor_shapes(model)
    if wrong := sorted(shapes.keys() ^ dtypes.keys()):
        raise ValueError(f"tensors {wrong[:5]} are missing or unknown: {len(wrong)} of the model's.")
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)
    write_shards(folder, shapes, dtypes, make, max_shard_size)


def generation_settings(stated: Mapping[str, Any], config: BMojoConfig) -> dict[str, Any]:
    """Return the source's generation settings as it states them, with every end-of-sequence id of its two files."""
    settings = dict(stated) or {"_from_model_config": True}
    ends: list[int] = []
    for value in (stated.get("eos_token_id"), config.eos_token_id):
        ends += [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    ends = list(dict.fromkeys(ends))
    if ends:
        settings["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for name in ("bos_token_id", "pad_token_id"):
        if settings.get(name) is None and getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    return {name: value for name, value in settings.items() if value is not None}


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Any]:
    """Save the tokenizer and check that it reads back as itself; return what the report says of it.

    Raises:
        ValueError: it has more tokens than the model, or reads back different.
    """
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the source's tokenizer has {len(tokenizer)} tokens, its model only vocab_size={vocab_size}; "
            "the ids above have no embedding. Check that the files belong together."
        )
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    aspects = {
        "vocabulary": lambda tok: tok.get_vocab(),
        "special tokens": lambda tok: tok.special_tokens_map,
        "chat template": lambda tok: tok.chat_template,
        "ids of a probe text": lambda tok: tok(PROBE)["input_ids"],
        "ids of a chat": _chat_ids,
    }
    for aspect, read in aspects.items():
        if read(tokenizer) != read(again):
            raise ValueError(f"the source's tokenizer changes when saved and loaded again: {aspect} differ.")
    return {
        "class": type(again).__name__,
        "tokens": len(again),
        "special_tokens": {name: str(token) for name, token in again.special_tokens_map.items()},
        "chat_template": again.chat_template is not None,
    }


def _chat_ids(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    if tokenizer.chat_template is None:
        return None
    chat = [{"role": "user", "content": PROBE}]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
