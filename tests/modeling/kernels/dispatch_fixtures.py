"""Fixtures of the tests of the dispatch: nothing remembered, a GPU and packages that are stood in for, messages."""

import pytest

from modeling_bmojo import dispatch_bmojo
from modeling_bmojo.dispatch_bmojo import (
    ENVIRONMENT,
)
from tests.modeling.kernels.kernel_stubs import CALLS, install


PACKAGES = ("causal_conv1d", "mamba_ssm")


@pytest.fixture
def nothing_remembered(monkeypatch):
    """Every test chooses afresh, whatever the environment of the test run says."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    CALLS.clear()
    dispatch_bmojo.forget()
    yield
    dispatch_bmojo.forget()


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors count as CUDA tensors, and TF32 is allowed."""
    monkeypatch.setattr(dispatch_bmojo, "device_type", lambda tensor: "cuda")
    monkeypatch.setattr(dispatch_bmojo, "tf32_allowed", lambda: True)


@pytest.fixture
def installed(monkeypatch):
    """causal-conv1d and mamba-ssm, stood in for."""
    install(monkeypatch, *PACKAGES)


@pytest.fixture
def said(monkeypatch):
    messages = []
    monkeypatch.setattr(dispatch_bmojo.logger, "warning_once", messages.append)
    return messages
