"""The recipes of configs/, found by their names from any folder, in a checkout and after `pip install`.

The wheel holds conversion/ as `bmojo_conversion` and configs/ inside it.
"""

from pathlib import Path


_HERE = Path(__file__).resolve().parents[1]
CONFIGS = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
FOLDERS = {"finetune": ("finetune", "peft")}  # of a program; the others have one of their own name


def recipe_names(program: str | None = None) -> list[str]:
    """Name the recipes of a program, of all by default, as `graft/smollm2-135m.yaml`."""
    folders = ("*",) if program is None else FOLDERS.get(program, (program,))
    return sorted(path.relative_to(CONFIGS).as_posix() for each in folders for path in CONFIGS.glob(f"{each}/*.yaml"))


def find_recipe(given: str, program: str | None = None) -> Path:
    """Return the settings file that is meant: a path, or a recipe's name, with or without its folder and `.yaml`.

    Args:
        given: a file that exists is always taken. program: where a name without a folder is looked up.

    Raises:
        ValueError: there is neither such a file nor such a recipe; the recipes are listed.
    """
    if Path(given).is_file():
        return Path(given)
    names = recipe_names(program)
    wanted = Path(given).as_posix().removeprefix("./").removeprefix("configs/").removesuffix(".yaml") + ".yaml"
    found = [name for name in names if name == wanted] or [name for name in names if Path(name).name == wanted]
    if not found:
        raise ValueError(
            f"settings file {given!r}: no such file in {str(Path.cwd())!r}, and no recipe of that name; give the path "
            f"of a YAML file, or one of: {', '.join(names)}."
        )
    return CONFIGS / found[0]


def own_data(pattern: str) -> str:
    """Return a pattern of files as it is, but for data of a recipe (`configs/...`) that does not lie here."""
    if pattern.startswith("configs/") and not Path("configs").is_dir():
        return str(CONFIGS / pattern.removeprefix("configs/"))
    return pattern


__all__ = ["CONFIGS", "find_recipe", "own_data", "recipe_names"]
