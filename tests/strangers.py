"""Programs that run in a process of their own, without the package: what a folder does by its own code."""

import os
import subprocess
import sys
from pathlib import Path


NO_PACKAGE = """
import importlib.abc, sys

class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_bmojo":
            raise ImportError("this process has no package modeling_bmojo")

sys.meta_path.insert(0, NoPackage())
try:
    import modeling_bmojo
except ImportError:
    pass
else:
    sys.exit("the package can be imported")
import torch
torch.set_num_threads(1)
"""


def strange_environment(work: Path, **environment: str) -> dict[str, str]:
    """Variables of a process that finds no package of ours. `work`: where transformers puts code that it loads."""
    variables = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HOME": str(work / "home"), **environment}
    # Another transformers may stand on the path (make test-versions), but never a folder that holds the package.
    path = [entry for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if entry]
    variables["PYTHONPATH"] = os.pathsep.join(entry for entry in path if not Path(entry, "modeling_bmojo").is_dir())
    return variables


def run_stranger(script: str, work: Path, *arguments: object, **environment: str) -> str:
    """What `script` prints. `work`: its current directory, and where transformers puts code that it loads."""
    variables = strange_environment(work, **environment)
    command = [sys.executable, "-c", NO_PACKAGE + script, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}  # nobody answers "run the code?"
    run = subprocess.run(command, cwd=work, env=variables, timeout=240, check=False, **options)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
