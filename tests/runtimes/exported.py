"""The decoding step as an ONNX file, run by ONNX Runtime and by OpenVINO on a CPU: logits and text of the model itself.

One program per model is made; it reads the first token and every later one. `make test-export-runtimes` runs this.
"""

import functools

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from modeling_bmojo import BMojoCache, BMojoConfig, BMojoForCausalLM, DecodingStep, cache_of
from tests.oracles import randomize_
from tests.tiny import MIXED_LAYERS, SIZES, VOCAB


LENGTH, PROMPT, ROOM, BATCH = 40, 12, 64, 2
TOLERANCE = 1e-4  # fp32, other kernels
# All kinds of layers; and distances beyond a bound, fading tokens with a stride, a mask.
SETTINGS = {
    "mixed": MIXED_LAYERS,
    "padded": dict(num_hidden_layers=1, window_size=6, fading_stride=3, max_rope_distance=9, innovation="key"),
}


class OnnxRuntime:
    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, inputs):
        return self.session.run(None, inputs)


class OpenVINO:
    def __init__(self, path):
        precise = {"INFERENCE_PRECISION_HINT": "f32"}
        self.compiled = openvino.compile_model(openvino.convert_model(path), "CPU", precise)

    def __call__(self, inputs):
        out = self.compiled(inputs)
        return [out[port].copy() for port in self.compiled.outputs]


@functools.cache
def made(name, directory):
    """The model, its step and the file of that."""
    torch.manual_seed(0)
    model = randomize_(BMojoForCausalLM(BMojoConfig(**{**SIZES, **SETTINGS[name]}))).eval()
    cache = BMojoCache(model.config).fix(model, BATCH, room=ROOM if name == "mixed" else None)
    step, path = DecodingStep(model, cache, masked=name == "padded"), directory / f"{name}.onnx"
    with torch.no_grad():
        program = torch.export.export(step, step.example(), strict=False)
    torch.onnx.export(program, dynamo=True, input_names=step.inputs, output_names=step.outputs).save(path)
    return model, step, path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("onnx")


def tokens(length=LENGTH):
    return torch.randint(1, VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(1))


def advance(run, step, ids, states, mask=None):
    """One step in a runtime: logits `[B, V]` and the states, arrays."""
    masks = [] if mask is None else [mask.numpy()]
    logits, *states = run(dict(zip(step.inputs, [ids.numpy(), *masks, *states], strict=True)))
    return logits[:, 0], states


@pytest.mark.parametrize("runtime", [OnnxRuntime, OpenVINO])
@torch.no_grad()
def test_logits_and_text(runtime, folder):
    model, step, path = made("mixed", folder)
    run, ids, states = runtime(path), tokens(), [state.numpy() for state in step.example()[1:]]
    expected = model(ids).logits
    for at in range(LENGTH):
        logits, states = advance(run, step, ids[:, at : at + 1], states)
        np.testing.assert_allclose(logits, expected[:, at].numpy(), rtol=0, atol=TOLERANCE)

    wanted = model.generate(ids[:, :PROMPT], max_new_tokens=LENGTH - PROMPT, do_sample=False)
    by_model = cache_of(model(ids[:, :PROMPT])).fix(model, room=ROOM)
    by_model = [state.numpy() for state in DecodingStep(model, by_model).example()[1:]]
    by_step = [state.numpy() for state in step.example()[1:]]
    for at in range(PROMPT):
        logits, by_step = advance(run, step, ids[:, at : at + 1], by_step)
    new = torch.from_numpy(logits).argmax(-1, keepdim=True)
    for states in (by_model, by_step):
        text = torch.cat([ids[:, :PROMPT], new], dim=1)
        while text.shape[1] < LENGTH:
            logits, states = advance(run, step, text[:, -1:], states)
            text = torch.cat([text, torch.from_numpy(logits).argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(text, wanted)


@pytest.mark.parametrize("runtime", [OnnxRuntime, OpenVINO])
@torch.no_grad()
def test_pads_and_far_tokens(runtime, folder):
    model, step, path = made("padded", folder)
    run, ids, states = runtime(path), tokens(), [state.numpy() for state in step.example()[2:]]
    mask = (torch.arange(LENGTH) % 5 > torch.tensor([[1], [-1]])).long()
    expected = model(ids, attention_mask=mask).logits
    for at in range(LENGTH):
        part = slice(at, at + 1)
        logits, states = advance(run, step, ids[:, part], states, mask[:, part])
        np.testing.assert_allclose(logits, expected[:, at].numpy(), rtol=0, atol=TOLERANCE)
    cache = step.cache([torch.from_numpy(state) for state in states]).unfix()
    assert cache.seen.tolist() == mask.sum(dim=1).tolist()
    cache.check_mask(mask)
    with pytest.raises(ValueError, match="attention_mask"):
        cache.check_mask(torch.ones_like(mask))
