"""What programs are called, here and after `pip install`, and what to say where a package is missing."""

INSTALLED = not __name__.startswith("conversion.")  # by `pip install`, which names the package bmojo_conversion
# Module to the extra of pyproject.toml that brings it.
EXTRAS = {
    "accelerate": "convert",
    "bs4": "convert",
    "filelock": "convert",
    "gguf": "convert",
    "google": "convert",
    "lxml": "convert",
    "sentencepiece": "convert",
    "datasets": "train",
    "peft": "train",
    "tensorboard": "train",
    "matplotlib": "bench",
}


def command(program: str) -> str:
    """Say how a program is started here: from the checkout, or by the command that `pip install` makes."""
    return f"bmojo {program.replace('_', '-')}" if INSTALLED else f"python -m conversion.{program}"


def purpose(docstring: str | None) -> str:
    """Return what a program does, from the first line of its file, without the command behind the colon."""
    return (docstring or "").splitlines()[0].partition(": `")[0].removesuffix(".") + "."


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Return which package is missing and how to install it; None where the module is of no extra of ours."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return f"needs the package {module!r}, which is not installed here; pip install 'modeling-bmojo[{EXTRAS[module]}]'."


__all__ = ["EXTRAS", "INSTALLED", "command", "missing_package", "purpose"]
