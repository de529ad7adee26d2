"""transformers' common tests on each model of `testers.MODELS`; run by `python -m tests.conformance`."""

import unittest

from tests.conformance.testers import MODELS, Tester
from tests.conformance.upstream import mount


common = mount()


class Common(
    common.ModelTesterMixin,
    common.GenerationTesterMixin,
    common.TrainingTesterMixin,
    common.TensorParallelTesterMixin,
    common.FSDPTesterMixin,
):
    name = None
    model_tester = None

    def setUp(self):
        config_class, fields, classes = MODELS[self.name]
        self.all_model_classes = tuple(classes.values())
        self.model_tester = Tester(self, config_class, fields, classes)
        self.config_tester = common.ConfigTester(self, config_class=config_class, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()


for _name in MODELS:
    globals()[f"{_name}ModelTest"] = type(f"{_name}ModelTest", (Common, unittest.TestCase), {"name": _name})
del Common, _name
