"""The models of the model rows: a source Transformer and its all-layers graft, as two checkpoint folders.

The source is written out once as a plain folder, so that every child process loads it in a second instead of reading
the GGUF file again. A quick run takes a random two-layer Llama of SmolLM2's head size and grafts that with the same
program.
"""

import functools
import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conversion.grafting.pipeline import graft
from conversion.grafting.settings import build_settings, load_settings
from conversion.grafting.sources import open_source, source_files
from modeling_bmojo import BMojoForCausalLM


ROOT = Path(__file__).resolve().parents[1]
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SETTINGS = ROOT / "configs" / "graft" / "smollm2-135m.yaml"
TINY = dict(
    vocab_size=512,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
TINY_MEMORY = dict(window_size=64, eidetic_size=16, fading_size=1, memory_block_size=32)


class Models:
    """Makes the two folders when a row first asks for them.

    Args:
        folder: where they are kept for the next run. source: as `conversion.graft` takes it; not used in a quick run.
        given: folder of a graft of that source, None to make one. quick: take the random Llama.
    """

    def __init__(self, folder: Path, source: str, given: Path | None = None, quick: bool = False):
        self.folder, self.name, self.given, self.quick = folder, source, given, quick

    @functools.cached_property
    def source(self) -> Path:
        """Folder of the source Transformer in fp32."""
        path = self.folder / ("tiny-source" if self.quick else "source")
        stamp = path / "made-from.json"
        made_from = json.dumps(TINY if self.quick else [self.name, source_files(self.name)])
        if not stamp.is_file() or stamp.read_text(encoding="utf-8") != made_from:
            shutil.rmtree(path, ignore_errors=True)
            _write_source(path, None if self.quick else self.name)
            stamp.write_text(made_from, encoding="utf-8")
        return path

    @functools.cached_property
    def graft(self) -> Path:
        """Folder of its all-layers graft in fp32."""
        if self.given is not None:
            return self.given
        if self.quick:
            path = self.folder / "tiny-graft"
            settings = build_settings({"source": str(self.source), "output": str(path), **TINY_MEMORY})
        else:
            changes = {"source": self.name, "output": str(self.folder / "graft"), "dtype": "float32"}
            settings = load_settings(SETTINGS, changes)
        graft(settings, reuse=True)
        return Path(settings.output)

    def path(self, side: str) -> str:
        """Return the folder of `"ours"` or `"theirs"`."""
        return str({"ours": self.graft, "theirs": self.source}[side])


def _write_source(path: Path, name: str | None) -> None:
    if name is None:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(path)
        return
    opened = open_source(name)
    state = opened.load_model(torch.float32).state_dict()
    # A model read from GGUF refuses to be saved, so its tensors go into a fresh one.
    model = AutoModelForCausalLM.from_config(opened.config, dtype=torch.float32)
    model.load_state_dict(state)
    model.save_pretrained(path)


@functools.lru_cache(maxsize=3)
def load(side: str, path: str, dtype: str = "float32", window: int | None = None) -> torch.nn.Module:
    """Return the model of a folder with SDPA, for evaluation. The last three are kept: rows share them.

    Args:
        side: `"ours"` or `"theirs"`. path: its folder. dtype: a name of `FORMATS`. window: W instead of the folder's,
            of ours.
    """
    kind = BMojoForCausalLM if side == "ours" else AutoModelForCausalLM
    fields = {} if window is None else {"window_size": window}
    return kind.from_pretrained(path, dtype=FORMATS[dtype], attn_implementation="sdpa", **fields).eval()


def random_ids(vocabulary: int, tokens: int, rows: int = 1) -> torch.Tensor:
    """Token ids `[rows, tokens]`, the same for every call."""
    return torch.randint(3, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
