"""What the tests of conversion.graft share: tiny random sources of every family, and the command line run on them.

W is the graft's window.
"""

import copy
import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from conversion.graft import main


W = 16
VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
HALF_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
# Angles for texts beyond W tokens that differ much from those for shorter ones; 4 pairs of channels.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
BIASES = {"attention_bias": True, "mlp_bias": True}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
SOURCES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_biases_tied": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3_rope": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama_narrow_heads": LlamaConfig(**SIZES, head_dim=6),
    "mistral": MistralConfig(**SIZES, sliding_window=None, rms_norm_eps=1e-5),
    "mistral_sliding": MistralConfig(**SIZES, sliding_window=W),
    "qwen2": Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2_mixed": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=W, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3_biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
    "smollm3": SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}, no_rope_layer_interval=2),
    "smollm3_tied_biases": SmolLM3Config(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "phi3": Phi3Config(**SIZES),
    "phi3_partial_tied": Phi3Config(**SIZES, tie_word_embeddings=True, rope_parameters=HALF_ROPE),
    "phi3_sliding": Phi3Config(**SIZES, sliding_window=W),
    "phi3_longrope": Phi3Config(**SIZES, rope_parameters=LONG_ROPE, original_max_position_embeddings=W),
    "phi3_wide_heads": Phi3Config(**SIZES, head_dim=16),
    "granite": GraniteConfig(**SIZES, **MULTIPLIERS),
    "granite_tied_biases": GraniteConfig(
        **SIZES, **MULTIPLIERS, **BIASES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "olmo2": Olmo2Config(**SIZES),
    "olmo2_tied_biases": Olmo2Config(**SIZES, tie_word_embeddings=True, attention_bias=True, head_dim=12),
    "olmo2_yarn": Olmo2Config(**{**SIZES, "num_key_value_heads": 4}, rope_parameters=YARN_ROPE),
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def randomised(config) -> torch.nn.Module:
    """A model of the config, every parameter random: transformers starts biases at 0 and norms at 1."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()  # saving a model writes into its config
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<end>", "user", "assistant", *"abcdefghij"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def settings_file(folder: Path, **values) -> Path:
    path = folder / "settings.yaml"
    defaults = {"source": "unset", "output": "unset", "window_size": W, "eidetic_size": 4, "fading_size": 2}
    path.write_text(yaml.safe_dump({**defaults, **values}))
    return path


def save_source(folder: Path, name: str = "llama", **options) -> torch.nn.Module:
    model = randomised(SOURCES[name])
    model.save_pretrained(folder, **options)
    return model


def graft(tmp_path: Path, *arguments: str, source: str = "source", output: str = "graft", **settings) -> int:
    """Runs the command line on `tmp_path / source`."""
    path = settings_file(tmp_path, source=str(tmp_path / source), output=str(tmp_path / output), **settings)
    return main([str(path), *arguments])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: int = W) -> torch.Tensor:
    ids = torch.randint(3, VOCAB, (2, tokens), generator=torch.Generator().manual_seed(5))
    return model.eval()(input_ids=ids).logits


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
