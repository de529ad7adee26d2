"""transformers' common tests on each model of `testers.MODELS`; run by `python -m tests.conformance`."""

import tempfile
import unittest
from pathlib import Path

from tests.conformance import pipelines
from tests.conformance.testers import MODELS, Tester
from tests.conformance.upstream import mount


common = mount()

# Lists of the models whose distributed tests transformers' own CI has time for: ours belong to them here.
common.fsdp.FSDP_DISTRIBUTED_TEST_MODEL_TYPES.add("bmojo")
common.tensor_parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES.add("bmojo")


class Common(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,
    common.PipelineTesterMixin,
    common.TrainingTesterMixin,
    common.TensorParallelTesterMixin,
    common.FSDPTesterMixin,
):
    name = None
    model_tester = None

    def setUp(self):
        config_class, fields, classes = MODELS[self.name]
        self.all_model_classes = tuple(classes.values())
        self.pipeline_model_mapping = pipelines.tasks(classes)
        self.model_tester = Tester(self, config_class, fields, classes)
        self.config_tester = common.ConfigTester(self, config_class=config_class, hidden_size=32)

        if any(f"test_pipeline_{task.replace('-', '_')}" in self._testMethodName for task in self.pipeline_model_mapping):
            folder = tempfile.TemporaryDirectory()
            self.addCleanup(folder.cleanup)
            pipelines.offer(common.pipeline, Path(folder.name), self.model_tester.get_config(), classes)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_config_and_inputs_for_retain_grad_hidden_states_attentions(self):
        """As many tokens as every window holds: beyond it a column adds up weights of several keys, and is a copy."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        window = getattr(config, "window_size", self.model_tester.seq_length)
        return config, {name: value[:, :window] for name, value in inputs.items()}


for _name in MODELS:
    globals()[f"{_name}Test"] = type(f"{_name}Test", (Common, unittest.TestCase), {"name": _name})
del Common, _name
