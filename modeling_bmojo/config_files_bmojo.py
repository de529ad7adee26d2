"""How a configuration is written to config.json and read from it.

Tools that know no class of ours read the file with the bare `PreTrainedConfig` (AutoTokenizer, Trainer when it
resumes), which refuses layer types that it does not know, and other programs want plain JSON:

    attribute                 in the file                       also read
    layer_types               "layer_kinds"                     "layer_types"
    ssm_time_step_limit       [low, null] for no upper limit    {"__float__": "Infinity"}, Infinity

Keys that no field has are refused in the constructor, where they are typos. In a file they are somebody's notes: they
are kept and named once. What is saved can be loaded.
"""

import difflib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .register_bmojo import AUTO_MAP


logger = logging.get_logger(__name__)

# Keys that transformers itself (or an old checkpoint) may pass besides the declared fields.
KNOWN_KEYS = {
    "torch_dtype",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "attn_implementation",
    "experts_implementation",
    "model_type",
    "auto_map",
    "quantization_config",
    "tokenizer_class",
    "use_return_dict",
    "tf_legacy_loss",
    "use_bfloat16",
    "torchscript",
    "pruned_heads",
}
READ = "_read_keys"  # how `from_dict` hands keys that are no fields to the constructor
NO_LIMIT = PreTrainedConfig._encode_special_floats(math.inf)


class FileConfig(PreTrainedConfig):
    """The part of `BMojoConfig` that files see."""

    attribute_map = {"layer_kinds": "layer_types"}

    # Reading ---------------------------------------------------------------------------------------------------------
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """`PreTrainedConfig.from_dict`: what `from_pretrained` does with the contents of config.json.

        Raises:
            ValueError: for an override that looks like a typo of a field; see also `validate`.
        """
        unknown = {key: value for key, value in config_dict.items() if not cls._knows(key)}
        if unknown:
            logger.warning_once(_told(cls, unknown))
        known = {key: value for key, value in config_dict.items() if key not in unknown}
        wants_unused = kwargs.pop("return_unused_kwargs", False)
        config, unused = super().from_dict({**known, READ: unknown}, return_unused_kwargs=True, **kwargs)
        if wants_unused:
            return config, unused
        for key, value in unused.items():  # transformers would drop them without a word
            if closest_field(cls, key, strict=True):
                cls._refuse(key, value)
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike):
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def _take_file_forms(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turn what stands in a file into attributes; returns keys of others, which stay as they are.

        Raises:
            ValueError: for an unknown key that came from no file, or two names of one field that disagree.
        """
        of_others = kwargs.pop(READ, {})
        for key in kwargs:
            if not self._knows(key):
                self._refuse(key, kwargs[key])
        kinds = kwargs.pop("layer_kinds", None)
        if kinds is not None:
            if self.layer_types is not None and _plain(self.layer_types) != _plain(kinds):
                raise ValueError(
                    f"layer_kinds={kinds!r}: contradicts layer_types={self.layer_types!r}, which is the same field "
                    "under its older name; give one of them."
                )
            self.layer_types = kinds
        limit = self.ssm_time_step_limit
        if isinstance(limit, list | tuple) and len(limit) == 2 and limit[1] in (None, NO_LIMIT):
            self.ssm_time_step_limit = [limit[0], math.inf]
        return of_others

    @classmethod
    def _knows(cls, key: str) -> bool:
        known = cls.__dataclass_fields__.keys() | cls.attribute_map.keys() | KNOWN_KEYS
        return key in known or key.startswith("_") or key in GenerationConfig._get_default_generation_params()

    @classmethod
    def _refuse(cls, key: str, value: Any) -> None:
        close = closest_field(cls, key)
        hint = f"did you mean {close!r}?" if close else "remove it."
        raise ValueError(f"{key}={value!r}: {cls.__name__} has no field of this name; {hint}")

    # Writing ---------------------------------------------------------------------------------------------------------
    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the file's text; `to_dict` has the attributes as they are."""
        fields = json.loads(super().to_json_string(use_diff))
        if "layer_types" in fields:
            fields["layer_kinds"] = fields.pop("layer_types")
        limit = fields.get("ssm_time_step_limit")
        if isinstance(limit, list):
            fields["ssm_time_step_limit"] = [None if value == NO_LIMIT else value for value in limit]
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        # The text first: opening the file empties it, and a value that has no JSON would leave nothing there.
        text = self.to_json_string(use_diff=use_diff)
        Path(json_file_path).write_text(text, encoding="utf-8")

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """`PreTrainedConfig.save_pretrained`, with an auto_map that names every class whose code stands in the folder
        (a model's code is there by now, see `PreTrainedModel.save_pretrained`) and no other of ours."""
        folder = Path(save_directory)
        ours = {auto: name for auto, name in AUTO_MAP.items() if _module_file(folder, name).is_file()}
        others = {auto: name for auto, name in (getattr(self, "auto_map", None) or {}).items() if _stays(folder, name)}
        if others or ours or hasattr(self, "auto_map"):
            self.auto_map = others | ours
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def warn_of_typos(self) -> None:
        """Name attributes attributes that look like a field with a slip in it: setting one is allowed, and does
        nothing."""
        cls = type(self)
        slips = [key for key in vars(self) if not self._knows(key) and closest_field(cls, key, strict=True)]
        if slips:
            logger.warning_once(_told(cls, slips))


def closest_field(cls: type[FileConfig], key: str, strict: bool = False) -> str | None:
    """Return the field that `key` was probably meant to be; `strict`: only if it hardly differs."""
    close = difflib.get_close_matches(key, list(cls.__dataclass_fields__), n=1, cutoff=0.85 if strict else 0.6)
    return close[0] if close else None


def _told(cls: type[FileConfig], keys: Iterable[str]) -> str:
    close = {key: closest_field(cls, key, strict=True) for key in sorted(keys)}
    named = [key + (f" (did you mean {field!r}?)" if field else "") for key, field in close.items()]
    return (
        f"the configuration holds {', '.join(named)}: {cls.__name__} has no fields of these names. They are kept, and "
        "nothing of this package reads them; if a subclass of the configuration declares them, load with that: "
        "from_pretrained(folder, config=ThatConfig.from_pretrained(folder))."
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _module_file(folder: Path, reference: str) -> Path:
    """`modeling_x.ClassX` -> folder/modeling_x.py."""
    return folder / f"{reference.partition('.')[0]}.py"


def _stays(folder: Path, reference: Any) -> bool:
    """Whether an auto_map may keep an entry: code in another repository ("repo--module.Class") or in the folder."""
    references = reference if isinstance(reference, list | tuple) else [reference]
    return all(name is None or "--" in name or _module_file(folder, name).is_file() for name in references)
