"""Executes the notebooks of this folder in place, so that their outputs are those of the code beside them.

    python notebooks/run.py [NOTEBOOK ...]            or: make notebooks

A notebook runs from its first cell to its last in a fresh kernel of this Python, as "Restart kernel and run all cells"
does. It is written only if every cell succeeded, beside its place and then renamed, without what differs from run to
run: times of execution, versions of the kernel, frames of progress bars. Exit status: 0 done, 2 a cell failed or a file
is no notebook, 130 interrupted; a notebook that did not succeed stays as it was.

`execute` with parameters runs a notebook with other settings, as papermill does: the cell tagged "parameters" is
followed by one that assigns the new values. tests/project/test_notebooks.py makes every notebook small that way.
"""

import argparse
import ast
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode


FOLDER = Path(__file__).resolve().parent
CELL_SECONDS = 1800  # one cell may take this long: a slow machine, not a broken notebook
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    """All notebooks of this folder, in reading order."""
    return sorted(FOLDER.glob("*.ipynb"))


def read(path: Path) -> NotebookNode:
    """Return a notebook file.

    Raises:
        ValueError: there is none, or it is not one.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise ValueError(f"{path}: cannot be read as a notebook ({error}).") from error


def with_parameters(notebook: NotebookNode, values: Mapping[str, Any]) -> NotebookNode:
    """Add a cell that assigns `values`, behind the cell tagged "parameters". Changes the notebook that is given.

    Raises:
        ValueError: no cell has that tag, or it does not assign one of the names.
    """
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise ValueError(f"parameters: {len(tagged)} cells have the tag 'parameters'; give it to exactly one.")
    known = assigned_names(notebook.cells[tagged[0]].source)
    for name in values:
        if name not in known:
            raise ValueError(f"{name}: is no parameter of this notebook; its parameters are {', '.join(known)}.")
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(tagged[0] + 1, cell)
    return notebook


def assigned_names(source: str) -> list[str]:
    """Return the names that a cell assigns, in order."""
    targets = [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    names = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
    return [name.id for name in names]


def execute(path: Path, parameters: Mapping[str, Any] | None = None, folder: Path | None = None) -> NotebookNode:
    """Run a notebook in a fresh kernel and return it with its outputs; the file stays as it is.

    Args:
        parameters: values in place of those of the cell tagged "parameters"; any that Python can write and read back.
        folder: the working folder of the kernel; None: the notebook's own, as Jupyter does it.

    Raises:
        ValueError: it cannot be read, or does not have these parameters. CellExecutionError: a cell failed.
        KeyboardInterrupt: asked to stop, by Ctrl-C or SIGTERM; the kernel is gone.
    """
    notebook = read(path)
    if parameters:
        with_parameters(notebook, parameters)
    # This Python's own kernel, whatever kernel is installed under the name "python3" on this machine.
    specs = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    with tempfile.TemporaryDirectory() as private:
        # Sockets in a folder of our own where there are such: nobody else's port, and nothing that others can reach.
        transport = "ipc" if os.name == "posix" else "tcp"
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs, transport=transport)
        manager.connection_file = str(Path(private, "kernel.json"))
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": str(folder or path.parent)}},
            record_timing=False,
            coalesce_streams=True,
        )
        try:
            client.execute(cleanup_kc=True, env=kernel_environment(private))
        except AssertionError as error:
            if client.km is not None:
                raise
            # Asked to stop, nbclient ends the kernel, and stumbles when it wants to end it again.
            raise KeyboardInterrupt from error
    return tidied(notebook)


def kernel_environment(private: str) -> dict[str, str]:
    """Return the environment of the kernel: figures become outputs, bars and warnings do not, no history is kept.

    Args:
        private: a folder that goes when the kernel goes.
    """
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    # Warnings name files of this machine. Whoever runs a notebook in Jupyter sees them.
    quiet = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return environment | quiet | {"IPYTHONDIR": private}


def tidied(notebook: NotebookNode) -> NotebookNode:
    """Return the notebook without what differs from run to run though nothing has changed."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({key: value for key, value in cell.metadata.items() if key == "tags"})
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write the file beside its place and renames it."""
    nbformat.validate(notebook)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        nbformat.write(notebook, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(prog="python notebooks/run.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of this folder")
    try:
        for path in parser.parse_args(argv).notebooks or notebooks():
            started = time.monotonic()
            print(f"{path.name} ...", end=" ", flush=True)
            write(execute(path), path)
            print(f"{time.monotonic() - started:.0f} s, {path.stat().st_size / 1e3:,.0f} kB", flush=True)
    except (ValueError, CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        print(f"\nerror: {path}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the notebook that was running is as it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
