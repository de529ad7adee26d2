"""transformers' common tests on each model of `testers.MODELS`; run by `python -m tests.conformance`."""

import functools
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from transformers import dynamic_module_utils

from tests.conformance import pipelines
from tests.conformance.testers import MODELS, Tester
from tests.conformance.upstream import mount


common = mount()
# save_pretrained writes our code beside the weights, and looks at each time which files it needs.
dynamic_module_utils.get_relative_import_files = functools.cache(dynamic_module_utils.get_relative_import_files)

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
        self.config_tester = common.ConfigTester(self, config_class=config_class, hidden_size=64)

        if self._testMethodName == "test_attention_outputs":
            # It counts them: layers without attention have none, as in transformers' own hybrids.
            kinds = getattr(self.model_tester.get_config(), "layer_types", None) or []
            self.model_tester.num_hidden_layers -= kinds.count("linear_attention")
        if "eager_matches_sdpa" in self._testMethodName:
            # 25 tests that save every class: what is saved beside the weights takes most of their time, and other
            # tests look at it.
            for model_class in (config_class, *self.all_model_classes):
                without = mock.patch.object(model_class, "_auto_class", None)
                without.start()
                self.addCleanup(without.stop)
        names = [f"test_pipeline_{task.replace('-', '_')}" for task in self.pipeline_model_mapping]
        if self._testMethodName.removesuffix("_fp16") in names:
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
    # Models are spared a test by the year that stands in their files; ours name none, and need not be spared.
    _says = {"name": _name, "test_can_init_all_missing_weights_before_2023": _name.startswith("BMojo")}
    globals()[f"{_name}Test"] = type(f"{_name}Test", (Common, unittest.TestCase), _says)
del Common, _name, _says
