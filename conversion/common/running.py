"""A model of a config: its names and shapes alone, or running on tensors that are in memory already, without a copy."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from modeling_bmojo import BMojoConfig, BMojoForCausalLM


def meta_model(config: BMojoConfig) -> BMojoForCausalLM:
    """Return the model without memory: names and shapes of what a checkpoint of this config holds."""
    with torch.device("meta"):
        return BMojoForCausalLM(config)


def tensor_shapes(model: BMojoForCausalLM) -> dict[str, tuple[int, ...]]:
    """Name what a checkpoint of the model holds, with the shapes: all but the tied tensors."""
    tied = set(model.all_tied_weights_keys)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def assembled(config: BMojoConfig, tensors: Mapping[str, torch.Tensor]) -> BMojoForCausalLM:
    """Return a model of `config` on the tensors themselves, in evaluation mode, without gradients.

    Args:
        tensors: by the names of a checkpoint, on one device; those that the model does not have are passed over.

    Raises:
        ValueError: a tensor is missing.
    """
    model = meta_model(config)
    tied = model.all_tied_weights_keys
    wanted = {name: tied.get(name, name) for name in model.state_dict()}
    missing = sorted(origin for origin in set(wanted.values()) if origin not in tensors)
    if missing:
        raise ValueError(f"tensors {missing[:5]} are missing: {len(missing)} of the model's.")
    model.load_state_dict({name: tensors[origin] for name, origin in wanted.items()}, assign=True)
    model.tie_weights()
    if model.model.rotary_emb is not None:
        # Its frequencies are in no checkpoint: on meta they would have no values.
        device = next(iter(tensors.values())).device
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.eval().requires_grad_(False)


def set_layer_kind(model: BMojoForCausalLM, index: int, kind: str) -> None:
    """Turn a layer that was built as a B'MOJO layer into another type of attention layer, or back, in place.

    Its projections stay; without a fading memory in its spec the layer does not run it.
    """
    model.config.layer_types[index] = kind
    model.model.layers[index].accept_config(model.config)
    model.model.accept_config()


@contextmanager
def layer_as(model: BMojoForCausalLM, index: int, kind: str) -> Iterator[None]:
    """`set_layer_kind` for the time of a block."""
    before = model.config.layer_types[index]
    set_layer_kind(model, index, kind)
    try:
        yield
    finally:
        set_layer_kind(model, index, before)
