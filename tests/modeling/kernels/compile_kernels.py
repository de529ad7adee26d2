"""Compiles every Triton kernel for an H100 or H200 (sm_90), without a GPU, and prints what became of each as JSON.

The public functions run on CPU tensors with `launch` replaced by the compiler: what is compiled is exactly what they
would launch, with their tile sizes and argument types. Run by `test_kernels.py`, in a process of its own because Triton
either compiles or interprets, by what the environment says when it is imported.

    python tests/modeling/kernels/compile_kernels.py
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


PACKAGE = Path(__file__).resolve().parents[3] / "modeling_bmojo"
NAMES = {torch.bool: "i1", torch.int32: "i32", torch.int64: "i64"}
NAMES |= {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def kernel_modules():
    """The kernel modules without the package's `__init__`, which imports transformers."""
    package = types.ModuleType("bmojo")
    package.__path__ = [str(PACKAGE)]
    sys.modules["bmojo"] = package
    return [importlib.import_module(f"bmojo.kernels_{name}") for name in ("attention", "memory", "ssm")]


def compile_launch(kernel, programs, *arguments, **options):
    """Stands in for `kernels_common.launch`: specialises as Triton's launcher does, and compiles."""
    choices = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    values = dict(zip((parameter.name for parameter in kernel.params), arguments)) | options
    signature, constants, hints = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        pointer = isinstance(value, torch.Tensor)
        specialised = not (pointer or parameter.do_not_specialize)
        if parameter.is_constexpr or (specialised and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = "*" + NAMES[value.dtype] if pointer else "i32"
        if pointer or (specialised and value % 16 == 0):
            hints[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=choices)
    report = {
        "kernel": kernel.__name__,
        "shared": binary.metadata.shared,
        "tensor_cores": "wgmma.mma_async" in binary.asm["ptx"],
        "cubin": len(binary.asm["cubin"]),
    }
    print(json.dumps(report), flush=True)


def zeros(*shape, dtype=torch.bfloat16):
    return torch.zeros(*shape, dtype=dtype, requires_grad=dtype.is_floating_point)


def main():
    attention, memory, ssm = modules = kernel_modules()
    for module in modules:
        module.launch = compile_launch
    spans = torch.zeros(2, 1024, dtype=torch.int64)
    index = torch.zeros(2, 4, 768, dtype=torch.int32)
    keys, values = zeros(2, 1024, 3, 64), zeros(2, 1024, 3, 64)
    attention.gathered_attention(zeros(2, 512, 9, 64), keys, values, spans, spans, index, 128, 0.125).sum().backward()
    ranked = torch.zeros(2, 1024, dtype=torch.float64)
    memory.select(ranked, ranked == 0, 512, 64, 128, 448, 64, 512)
    memory.output_innovation(zeros(2, 512, 576), zeros(2, 4, 576))
    ssm.causal_conv(zeros(2, 512, 768), zeros(768, 4), zeros(768), zeros(2, 3, 768)).sum().backward()
    single = {"dtype": torch.float32}
    x, dt, state = zeros(2, 1, 9, 64, **single), zeros(2, 1, 9, **single), zeros(2, 9, 64, 64, **single)
    keys = zeros(2, 1, 3, 64, **single)
    ssm.step_ssd(x, dt, zeros(9, **single), keys, keys, zeros(9, **single), state)


if __name__ == "__main__":
    main()
