"""What the installed wheel must do where no checkout is: run in an empty folder by the Python that it is installed for.

    python installed.py

Imports every module, prints the public names of each package, grafts a tiny source by the command `bmojo` with a recipe
named as a user would name it, and writes on from the folder. tests/project/test_wheel.py runs it in the environment of
the tests, and CONTRIBUTING.md says how to run it elsewhere.
"""

import importlib
import pkgutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modeling_bmojo


SITE = Path(sysconfig.get_path("purelib")).resolve()
BMOJO = Path(sysconfig.get_path("scripts")) / "bmojo"
W = 16
OF_ANOTHER_ENVIRONMENT = "bmojo_conversion.evaluation.press_worker"  # kvpress's; it imports nothing of ours
SMALL = ("window_size=16", "eidetic_size=4", "fading_size=2", "fading_stride=2", "ssm_state_size=4")


def import_all() -> None:
    """Import every module from where the wheel put it, and print what each package calls public."""
    for package in ("modeling_bmojo", "bmojo_conversion"):
        top = importlib.import_module(package)
        found = [top]
        for module in pkgutil.walk_packages(top.__path__, f"{package}."):
            if module.name != OF_ANOTHER_ENVIRONMENT:
                found.append(importlib.import_module(module.name))
        for module in found:
            assert Path(module.__file__).resolve().is_relative_to(SITE), f"{module.__name__}: {module.__file__}"
            names = getattr(module, "__all__", [])
            assert all(hasattr(module, name) for name in names), module.__name__
            if hasattr(module, "__path__"):
                print("package", module.__name__, *names)


def save_source(folder: Path) -> LlamaForCausalLM:
    """Write a tiny Llama with a tokenizer of words."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)).eval()
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *"abcdefghij"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)
    return model


@torch.no_grad()
def write_on(folder: Path, source: LlamaForCausalLM) -> None:
    """Inside the window the graft is its source, for logits and text; beyond it the memory stays as large as it was."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, modeling_bmojo.BMojoForCausalLM)
    ids = tokenizer("a b c d e f", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-5, rtol=1e-5)
    options = dict(do_sample=False, return_dict_in_generate=True, min_new_tokens=8)
    written = [each.generate(ids, max_new_tokens=8, **options).sequences for each in (model, source)]
    assert torch.equal(*written)
    sizes = []
    for tokens in (2 * W, 4 * W):
        out = model.generate(ids, max_new_tokens=tokens, **{**options, "min_new_tokens": tokens})
        sizes.append(modeling_bmojo.cache_of(out).nbytes)
    assert sizes[0] == sizes[1], sizes


def main() -> int:
    """Run the checks in the working folder, which must be empty."""
    assert not any(Path().iterdir()), "run me in an empty folder"
    import_all()
    source = save_source(Path("source"))
    command = [str(BMOJO), "graft", "smollm2-135m.yaml", "--source", "source", "--output", "graft"]
    subprocess.run([*command, *(word for field in SMALL for word in ("--set", field))], check=True)
    write_on(Path("graft"), source)
    print("ran on", sys.version.split()[0], "torch", torch.__version__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
