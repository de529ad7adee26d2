"""How every program ends: 0 done, 2 refused or failed with one message, 130 interrupted.

This is the one place that turns errors into messages. What users can cause (settings, files, disks) is told in one
line; anything else is a defect of ours and keeps its traceback.
"""

import pickle
import re
import sys
import zipfile
from collections.abc import Callable

import yaml
from safetensors import SafetensorError

from .commands import missing_package
from .files import WriteError, disk_error


DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, yaml.YAMLError)
TORCH_READER = re.compile(r"PytorchStreamReader|invalid header or archive is corrupted")


def run_program(work: Callable[[], int], interrupted: str = "nothing was written") -> int:
    """Run the work of a program and return the exit status.

    Args:
        work: returns a status. interrupted: what to say after Ctrl-C, unless the interrupt says something itself.
    """
    try:
        return work()
    except KeyboardInterrupt as interrupt:
        print(f"interrupted; {str(interrupt) or interrupted}", file=sys.stderr)
        return 130
    except Exception as error:
        told = message(error)
        if told is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2


def message(error: Exception) -> str | None:
    """Return what to tell a user of an error, None where it is not theirs to mend."""
    if isinstance(error, WriteError):
        return str(error)
    said = disk_error(error)
    if said is not None:
        return f"{error}: {said}; free some space, or write elsewhere, and run it again."
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    if isinstance(error, DAMAGED) or (isinstance(error, RuntimeError) and TORCH_READER.search(str(error))):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"a file is damaged or cut short ({reason}); fetch or write it again."
    return None
