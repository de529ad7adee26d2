"""explain_kernels: which implementation each operation of a model uses, and why not a faster one."""

from typing import NamedTuple

import torch

from ..attention_ops import Lazy
from ..configuration_bmojo import FADING_MEMORIES, BMojoConfig
from ..dispatch_bmojo import ENVIRONMENT, OPERATIONS, PREFERENCE, Kernels, Situation, choose, environment
from ..layer_memory_bmojo import LayerMemory


class Explanation(NamedTuple):
    """One operation of a model.

    inference, training: the implementation, or the error that a forced backend leads to. used: whether the model has
    layers with this operation. passed: backend to (why it was passed over, what would help), the fastest first; what
    holds in training only says so.
    """

    operation: str
    inference: str
    training: str
    used: bool
    passed: dict[str, tuple[str, str]]


def explain_kernels(
    model_or_config: torch.nn.Module | BMojoConfig | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[Explanation]:
    """Print a table of the implementation that each operation uses, and why not a faster one; returns its rows.

    Args:
        model_or_config: a B'MOJO model or configuration; None stands for the default configuration.
        device: of the tensors; default: the model's, or CUDA if there is one. dtype: of the activations; default: the
            model's, or the configuration's.

    Raises:
        ValueError: if `model_or_config` is something else.
    """
    config = BMojoConfig() if model_or_config is None else getattr(model_or_config, "config", model_or_config)
    if getattr(config, "model_type", None) != "bmojo":
        name = type(model_or_config).__name__
        raise ValueError(f"model_or_config={name}: must be a B'MOJO model or BMojoConfig; pass one, or nothing.")
    model = model_or_config if isinstance(model_or_config, torch.nn.Module) else None
    if device is None:
        device = model.device if model is not None else "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = getattr(config if model is None else model, "dtype", None) or torch.get_default_dtype()
    device = torch.device(device).type
    situation = Situation(device, dtype, False, config.kernel_backend, _hub_operations(model, device))
    used = _operations_of(config)
    rows = [_explain(op, op in used, config, situation) for op in OPERATIONS]
    print(_table(rows, situation))
    return rows


def _hub_operations(model: torch.nn.Module | None, device: str) -> tuple[str, ...] | None:
    for module in [] if model is None else model.modules():
        kernels = getattr(module, "kernels", None)
        if isinstance(kernels, Kernels) and kernels.hub is not None:
            return tuple(kernels.hub) if kernels.hub_device == device else ()
    return None


def _operations_of(config: BMojoConfig) -> set[str]:
    """Return the operations that the layers of `config` have."""
    used = set()
    for index in range(config.num_hidden_layers):
        memory = LayerMemory(config, index)
        if memory.fading is not None:
            used.update(memory.fading.operations)
        if memory.innovation is not None:
            used.update(memory.innovation.operations)
        if memory.spec.has_attention and memory.spec.window is not None:
            used.update(("expiry", "memory_attention"))
    return used


def _explain(op: str, used: bool, config: BMojoConfig, situation: Situation) -> Explanation:
    chosen, passed = [], {}
    for grad in (False, True):
        try:
            label, refusals = _choice(op, config, situation._replace(grad=grad))
        except ValueError as error:
            label, refusals = f"error: {error}", {}
        chosen.append(label)
        for name, (reason, remedy) in refusals.items():
            passed.setdefault(name, (f"in training, {reason}" if grad else reason, remedy))
    return Explanation(op, chosen[0], chosen[1], used, {name: passed[name] for name in PREFERENCE if name in passed})


def _choice(op: str, config: BMojoConfig, situation: Situation) -> tuple[str, dict[str, tuple[str, str]]]:
    """Return the form that the model's first call would take, and why each better backend is passed over."""
    choice = choose(op, situation)
    passed = {name: (refusal.reason, refusal.remedy) for name, refusal in choice.passed.items()}
    for form in choice.forms:
        reason = None if form.refuse is None else form.refuse(*_example(op, config, situation.grad))
        if reason is None:
            better = PREFERENCE[: PREFERENCE.index(form.backend)]
            return form.label, {name: passed[name] for name in better if name in passed}
        if choice.forced is not None:
            raise ValueError(f"{choice.forced}={form.backend!r}: {reason}.")
        passed[form.backend] = (reason, "the model's sizes decide that")
    raise ValueError(f"operation {op!r}: no implementation takes the model's sizes.")


def _example(op: str, config: BMojoConfig, training: bool) -> tuple:
    """Return a call's arguments of the model's sizes, without data, as far as forms look at them before they run."""
    with torch.device("meta"):
        if op == "memory_attention":
            query = torch.empty(1, 1, config.num_attention_heads, config.head_dim)
            dropout = config.attention_dropout if training else 0.0
            sets = [Lazy(0, list)] if config.storage_size else []
            return query, sets, 1, 1.0, dropout, config._attn_implementation or "sdpa"
        # Of an operation that the model does not have, by one of the forms that do.
        forms = [FADING_MEMORIES[config.ssm_type], *FADING_MEMORIES.values()]
        form = next(form for form in forms if op in form.operations)
        return form.example(op, config)


def _table(rows: list[Explanation], situation: Situation) -> str:
    setting = f"kernel_backend={situation.backend!r}"
    if environment() is not None:
        setting = f"{ENVIRONMENT}={environment()!r}"
    cells, errors, reasons = [("operation", "inference", "training")], {}, {}
    for row in rows:
        name = row.operation + ("" if row.used else " (not in this model)")
        shown = [label.partition(":")[0] if label.startswith("error:") else label for label in row[1:3]]
        cells.append((name, shown[0], "the same" if row.training == row.inference else shown[1]))
        errors.update(dict.fromkeys(label for label in row[1:3] if label.startswith("error:")))
        for backend, why in row.passed.items():
            reasons.setdefault((backend, *why), []).append(row.operation)
    widths = [max(len(line[column]) for line in cells) for column in (0, 1)]
    lines = [f"B'MOJO kernels for {situation.dtype} on {situation.device}, {setting}", ""]
    lines += [f"{op:<{widths[0]}}  {inference:<{widths[1]}}  {training}" for op, inference, training in cells]
    lines += ["", *errors] if errors else []
    lines += ["", "passed over"] if reasons else []
    for (backend, reason, remedy), operations in sorted(reasons.items(), key=lambda item: PREFERENCE.index(item[0][0])):
        lines.append(f"  {backend} for {', '.join(operations)}: {reason}" + (f" ({remedy})" if remedy else ""))
    return "\n".join(lines)
