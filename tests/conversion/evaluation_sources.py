"""What the tests of evaluation and layer choice share: a tiny source that reads real characters, one token each."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import LlamaConfig, PreTrainedTokenizerFast

from tests.conversion.graft_sources import randomised


CHARACTERS = ["\n", *map(chr, range(32, 127))]
READER = LlamaConfig(
    vocab_size=len(CHARACTERS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=0,
    tie_word_embeddings=False,
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="\n", unk_token=" ")


def save_reader(folder: Path, config=READER, tokenizer: bool = True) -> torch.nn.Module:
    model = randomised(config)
    model.save_pretrained(folder)
    if tokenizer:
        character_tokenizer().save_pretrained(folder)
    return model


def dense_mask(tokens: int, window: int | None, sinks: int = 0, dtype=torch.float64) -> torch.Tensor:
    """Additive mask `[1, 1, T, T]`: a query sees the last `window` tokens, itself included, and the first `sinks`."""
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    near = torch.ones(tokens, tokens, dtype=torch.bool) if window is None else query - key < window
    seen = (key <= query) & (near | (key < sinks))
    return torch.zeros(tokens, tokens, dtype=dtype).masked_fill(~seen, float("-inf"))[None, None]
