"""The package `kernels`, as far as transformers and a CPU need it; a test copies this file to where it is imported.

Written from its documentation: a decorated function becomes a module of its own; `kernelize` sets another forward on
every such module that a model lists under `_kernel_funcs` and for which a repository is registered for the device, and
the class's own forward otherwise; a replacement must agree in the number and the kinds of its parameters.
"""

import inspect
from contextlib import contextmanager
from enum import Flag, auto
from types import MethodType

from torch import nn


MAPPING = {}


class Mode(Flag):
    FALLBACK = auto()
    TRAINING = auto()
    INFERENCE = auto()
    TORCH_COMPILE = auto()


class KernelizeFallback(Flag):
    DEFAULT = auto()
    ALL = auto()


class Device:
    def __init__(self, type, properties=None):
        self.type = type


class CUDAProperties:
    def __init__(self, min_capability, max_capability):
        self.capabilities = (min_capability, max_capability)


ROCMProperties = CUDAProperties


class LayerRepository:
    def __init__(self, repo_id, *, layer_name, revision=None, version=None, trust_remote_code=False):
        self.place = (repo_id, layer_name, revision or version)

    def load(self):
        raise FileNotFoundError(f"{self.place}: no network in tests")


class LocalLayerRepository(LayerRepository):
    def __init__(self, repo_path, *, layer_name):
        super().__init__(str(repo_path), layer_name=layer_name)


def get_kernel(*args, **kwargs):
    raise FileNotFoundError("no network in tests")


def use_kernel_forward_from_hub(layer_name):
    def decorator(thing):
        if inspect.isclass(thing):
            thing.kernel_layer_name = layer_name
            return thing

        class Func(nn.Module):
            kernel_layer_name = layer_name

            def forward(self, *args, **kwargs):
                return thing(*args, **kwargs)

        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.signature(thing)
        Func.forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])
        return Func()

    return decorator


def use_kernelized_func(*functions):
    def decorator(cls):
        original = cls.__init__

        def init(self, *args, **kwargs):
            original(self, *args, **kwargs)
            listed = self.__dict__.setdefault("_kernel_funcs", {})
            listed.update({function.kernel_layer_name: function for function in functions})

        cls.__init__ = init
        return cls

    return decorator


def replace_kernel_forward_from_hub(cls, layer_name):
    cls.kernel_layer_name = layer_name


def register_kernel_mapping(mapping):
    for name, devices in mapping.items():
        for device, repositories in devices.items():
            key = getattr(device, "type", device)
            MAPPING.setdefault(name, {})[key] = repositories


@contextmanager
def use_kernel_mapping(mapping, *, inherit_mapping=True):
    register_kernel_mapping(mapping)
    yield


def kernelize(model, *, mode, device=None, use_fallback=True):
    device = getattr(device, "type", device)
    for _, module in model.named_modules():
        for function in getattr(module, "_kernel_funcs", {}).values():
            fill(function, mode, device)
        if hasattr(type(module), "kernel_layer_name"):
            fill(module, mode, device)
    return model


def fill(module, mode, device):
    cls = type(module)
    repository = MAPPING.get(cls.kernel_layer_name, {}).get(device)
    if isinstance(repository, dict):
        repository = repository.get(mode)
    layer = cls
    if repository is not None:
        try:
            layer = repository.load()
        except FileNotFoundError:
            layer = cls
        kinds = [[p.kind for p in inspect.signature(c.forward).parameters.values()] for c in (cls, layer)]
        if kinds[0] != kinds[1]:
            raise TypeError(f"{cls.kernel_layer_name}: forward signatures do not match")
    module.forward = MethodType(layer.forward, module)
