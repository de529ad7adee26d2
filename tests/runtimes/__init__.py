"""A decoding step outside of torch's own executor, each in an environment of its own.

    exported.py     ONNX Runtime and OpenVINO: `make test-export-runtimes`
    xla.py          torch_xla on its CPU device: `make test-xla`

The names are not `test_*.py`: `make test` has none of these packages.
"""
