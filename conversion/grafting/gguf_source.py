"""A GGUF file as a source: config, dequantised tensors, tokenizer and what the file says about itself.

transformers reads the file; this module repairs what that reading loses (transformers 5.23):
floats of the metadata are float32 and print as 9.999999747378752e-06, so they are read back as their shortest decimal;
only one end-of-sequence id is kept, so the end-of-turn and end-of-message ids are added; vocabularies of type "smollm"
lose the rule that every digit stands alone, so it is put back; scaled RoPE is dropped silently, so it is refused.
"""

import copy
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .families import family_of


# Vocabulary types (tokenizer.ggml.pre) whose text is split at every digit before the byte-level rule applies.
DIGITS_FIRST = ("smollm",)
END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


class GGUFSource:
    """One GGUF file. Its tensors are float32, whatever the file's quantisation."""

    dtype = "float32"

    def __init__(self, path: Path, label: str):
        try:
            import gguf
        except ImportError as error:
            raise ValueError(f"source {label!r}: reading GGUF files needs `pip install gguf`.") from error
        self.path, self.label = path, label
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise ValueError(f"source {label!r}: {path.name} is not a readable GGUF file ({error}).") from error
        self._refuse_scaled_rope()
        self.config = self._read_config()
        stated = {"architectures": [family_of(self.config).architecture], "dtype": self.dtype}
        self.stated_config = {**json.loads(self.config.to_json_string()), **stated}

    def _metadata(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _refuse_scaled_rope(self) -> None:
        architecture = self._metadata("general.architecture")
        scaling = self._metadata(f"{architecture}.rope.scaling.type")
        by_tensor = any(tensor.name.startswith("rope_f") for tensor in self._reader.tensors)
        if by_tensor or scaling not in (None, "none"):
            raise ValueError(
                f"source {self.label!r} scales its RoPE ({scaling or 'by a rope_freqs tensor'}), which reading it "
                "through transformers would drop silently; use the safetensors checkpoint of the same model."
            )

    def _read_config(self) -> PreTrainedConfig:
        try:
            config = AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name)
        except (ValueError, KeyError, OSError) as error:
            raise ValueError(f"source {self.label!r}: transformers cannot read its config ({error}).") from error
        config.rms_norm_eps = _shortest(config.rms_norm_eps)
        for key, value in (config.rope_parameters or {}).items():
            if isinstance(value, float):
                config.rope_parameters[key] = _shortest(value)
        return config

    @cached_property
    def _model(self) -> torch.nn.Module:
        model, info = AutoModelForCausalLM.from_pretrained(
            self.path.parent, gguf_file=self.path.name, dtype=torch.float32, output_loading_info=True
        )
        if info["missing_keys"]:
            raise ValueError(f"source {self.label!r}: {self.path.name} lacks tensors: {sorted(info['missing_keys'])}.")
        state = model.state_dict()
        held = len(state) - ("lm_head.weight" in state and self.config.tie_word_embeddings)
        if held != len(self._reader.tensors):
            raise ValueError(
                f"source {self.label!r}: {self.path.name} holds {len(self._reader.tensors)} tensors, but the model "
                f"that transformers builds from it has a place for {held}."
            )
        return model

    @cached_property
    def _state(self) -> dict[str, torch.Tensor]:
        return self._model.state_dict()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self._state, self.dtype)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `[start, stop)` of a tensor, all of them by default; the whole model stays in memory."""
        return self._state[name][start:stop]

    def load_model(self, dtype: torch.dtype) -> torch.nn.Module:
        """Return the file's model, its weights rounded to `dtype`; computes in float32 (a GGUF model refuses to be
        cast)."""
        if dtype == torch.float32:
            return self._model
        model = copy.deepcopy(self._model)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the file's tokenizer, or None where it carries no vocabulary."""
        if self._reader.get_field("tokenizer.ggml.tokens") is None:
            return None
        tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        if self._metadata("tokenizer.ggml.pre") in DIGITS_FIRST:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, self.config.max_position_embeddings)
        for noise in ("local_files_only", "is_local"):  # how it was loaded, not what it is
            tokenizer.init_kwargs.pop(noise, None)
        return tokenizer

    def generation_settings(self) -> dict[str, Any]:
        ends = dict.fromkeys(value for key in END_KEYS if (value := self._metadata(key)) is not None)
        settings = {"bos_token_id": self.config.bos_token_id, "pad_token_id": self.config.pad_token_id}
        return settings | ({"eos_token_id": list(ends)} if ends else {})

    def facts(self) -> dict[str, Any]:
        return {
            "name": self._metadata("general.name") or self.label,
            "license": self._metadata("general.license"),
            "language": self._metadata("general.languages"),
        }


def _shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32: 9.999999747378752e-06 becomes 1e-05."""
    return float(str(np.float32(value)))
