"""transformers' own tests of the installed version, as the package `transformers_tests`.

They come out of the source distribution that `make test-conformance` unpacks into `.venvs/`.
"""

import importlib
import os
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import transformers

from tests.conformance import standins


ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venvs" / f"conformance-{transformers.__version__}"
TESTS = FOLDER / f"transformers-{transformers.__version__}" / "tests"
PACKAGE = "transformers_tests"

# Modules that the distribution leaves out -> the names in them -> ours.
ABSENT = {
    "exporters.test_export": {"ExportTesterMixin": standins.ExportTesterMixin},
    "generation.test_utils": {"GenerationTesterMixin": standins.GenerationTesterMixin},
    "utils.test_configuration_utils": {"config_common_kwargs": standins.config_common_kwargs},
    "distributed_testing_utils": {
        "_get_distributed_backend": standins.get_distributed_backend,
        "_get_distributed_device_type": standins.get_distributed_device_type,
        "_get_rank_device": standins.get_rank_device,
        "_set_rank_device": standins.set_rank_device,
        "_start_rank_processes": standins.start_rank_processes,
        "run_distributed": standins.run_distributed,
    },
}


def mount() -> types.SimpleNamespace:
    """Return transformers' mixins and testers by their names.

    Raises:
        FileNotFoundError: if the tests were not obtained.
    """
    if not TESTS.is_dir():
        raise FileNotFoundError(f"{TESTS.relative_to(ROOT)} is not there: run `make test-conformance`, which makes it.")
    if PACKAGE not in sys.modules:
        sys.path.append(str(FOLDER / "packages"))
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(TESTS)]
        sys.modules[PACKAGE] = package
        for name, contents in ABSENT.items():
            module = types.ModuleType(f"{PACKAGE}.{name}")
            vars(module).update(contents)
            sys.modules[module.__name__] = module
    configuration, fsdp, modeling, pipeline, tensor_parallel, training = _modules()
    return types.SimpleNamespace(
        ConfigTester=configuration.ConfigTester,
        FSDPTesterMixin=fsdp.FSDPTesterMixin,
        ModelTesterMixin=modeling.ModelTesterMixin,
        PipelineTesterMixin=pipeline.PipelineTesterMixin,
        TensorParallelTesterMixin=tensor_parallel.TensorParallelTesterMixin,
        TrainingTesterMixin=training.TrainingTesterMixin,
        GenerationTesterMixin=standins.GenerationTesterMixin,
        fsdp=fsdp,
        pipeline=pipeline,
        tensor_parallel=tensor_parallel,
    )


def _modules() -> list[types.ModuleType]:
    names = ("configuration_common", "fsdp_mixin", "modeling_common", "pipeline_mixin", "tensor_parallel_mixin")
    names += ("training_mixin",)
    with tempfile.TemporaryDirectory() as folder:
        # The pipelines' tests read a list of models that is not in the distribution.
        reports = Path(folder) / "reports"
        reports.mkdir()
        (reports / "tiny_model_summary.json").write_text("{}", encoding="utf-8")
        # Two of the files would import transformers a second time, from beside the tests.
        once = mock.patch("transformers.utils.direct_transformers_import", lambda *_, **__: transformers)
        with once, mock.patch.dict(os.environ, {"TRANSFORMERS_TINY_MODEL_PATH": folder}):
            return [importlib.import_module(f"{PACKAGE}.test_{name}") for name in names]
