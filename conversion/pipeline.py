"""The graft itself: a source Transformer becomes a B'MOJO checkpoint folder (design.md section 6).

Order of work: everything that can be refused is checked first (settings, source, names and shapes, output, disk); then
tensors are copied and initialised one by one; the folder is written beside its final place, loaded again, compared with
the source, and renamed into place. Peak memory: the tensors once, and for the comparison both models in float32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modeling_bmojo import BMojoConfig, BMojoForCausalLM

from .card import model_card
from .export import generation_settings, meta_model, save_model, save_tokenizer
from .families import backbone_fields, bmojo_config_for, family_of, source_layer_types, source_window
from .layer_choice import MEASURED, measure_layers, write_ranking
from .report import code_fingerprint, dtype_name, plan_copy, read_report, target_account, versions, write_report
from .settings import GraftSettings
from .sources import Source, open_source, source_files
from .ssm_init import SSM_INITS
from .staging import check_output, check_space, staged_folder


SIDE_FILES_BYTES = 64 * 2**20  # room for tokenizer, code and card in the estimate of the disk space
CHECK_TOKENS = 64
CHECK_TOLERANCE = 1e-3  # of the logits' largest magnitude, float32


@dataclass
class Plan:
    """A graft that was checked and can start."""

    settings: GraftSettings
    source: Source
    config: BMojoConfig
    dtype: torch.dtype
    copies: dict[str, dict[str, Any]]
    initialised: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    ranking: dict[str, Any] | None = None  # where the layers were chosen by measuring


def graft(settings: GraftSettings, overwrite: bool = False, reuse: bool = False) -> Path:
    """Writes the checkpoint folder and returns it.

    Args:
        overwrite: replace an earlier graft in the same folder.
        reuse: keep an earlier graft where settings and code are still the same, else replace it.

    Raises:
        ValueError: anything about the settings, the source or the output that stops the conversion.
    """
    output = Path(settings.output)
    if reuse and is_current(output, settings):
        return output
    check_output(output, overwrite or reuse)
    plan = prepare(settings, overwrite or reuse)
    if settings.layers == MEASURED:
        plan = with_measured_layers(plan)
    tensors = build_tensors(plan)
    with staged_folder(output) as folder:
        write_checkpoint(folder, plan, tensors)
    return output


def is_current(output: Path, settings: GraftSettings) -> bool:
    """Whether `output` holds a finished graft of the same source files and settings by the same code."""
    report = read_report(output)
    if report is None:
        return False
    same_source = report["source"].get("files") == source_files(settings.source)
    return (
        same_source and report.get("settings") == settings.as_dict() and report.get("code_sha256") == code_fingerprint()
    )


def prepare(settings: GraftSettings, overwrite: bool = False) -> Plan:
    """Opens the source and checks everything that can be checked without reading its tensors."""
    output = Path(settings.output)
    source = open_source(settings.source)
    if Path(settings.source).exists():
        check_output(output, overwrite, sources=(Path(settings.source),))
    plan = plan_graft(settings, source)
    element = torch.empty(0, dtype=plan.dtype).element_size()
    size = sum(torch.Size(s).numel() * (4 if ".scalars." in name else element) for name, s in plan.shapes.items())
    check_space(output, size + SIDE_FILES_BYTES)
    return plan


def plan_graft(settings: GraftSettings, source: Source, layers: str | list[int] | None = None) -> Plan:
    """What becomes of the source by these settings; nothing is written, and no tensor is read.

    Args:
        layers: used instead of the settings' own. Layers that are still to be measured are planned as all of them.
    """
    layers = layers or ("all" if settings.layers == MEASURED else settings.layers)
    init = SSM_INITS[settings.ssm_init]
    memory = init.complete(backbone_fields(source.config), {**init.fields, **settings.memory})
    config = bmojo_config_for(source.config, memory, layers)
    init.check(config, tuple(settings.smoother_tau))
    dtype = getattr(torch, settings.dtype or source.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype of the source is {source.dtype}; set dtype to float32, bfloat16 or float16.")

    model = meta_model(config)
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    initialised = initialised_tensors(config, shapes, init.describe)
    copies = plan_copy(source.config, source.shapes, shapes, set(initialised))
    return Plan(settings, source, config, dtype, copies, initialised, shapes)


def with_measured_layers(plan: Plan) -> Plan:
    """The plan with the layers that measuring finds least harmful; `plan` has every layer (conversion/layer_choice.py).

    Raises:
        ValueError: the text is too short, the source has no tokenizer, or the choice contradicts the settings.
    """
    settings, source = plan.settings, plan.source
    count = source.config.num_hidden_layers
    plan_graft(settings, source, list(range(min(settings.measured_layers, count))))  # refuses before the work
    ranking = measure_layers(plan.config, source, settings, lambda: build_tensors(plan))
    chosen = plan_graft(settings, source, ranking["chosen"])
    chosen.ranking = ranking
    return chosen


def initialised_tensors(config: BMojoConfig, shapes: dict[str, tuple[int, ...]], rule: str) -> dict[str, str]:
    """Target tensors that the graft fills itself, with the rule: the fading memories, and untied fading projections."""
    found = {}
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name in shapes:
            if name.startswith(prefix + "fading."):
                found[name] = rule
            elif name.startswith(prefix + "self_attn.fading_"):
                found[name] = f"a copy of {name.replace('fading_', '')}"
    return found


def build_tensors(plan: Plan) -> dict[str, torch.Tensor]:
    """All target tensors: copied ones in the graft's dtype, then the initialised ones.

    Raises:
        ValueError: a source tensor with values that are not finite, in its own dtype or in the graft's.
    """
    tensors = {}
    for name, entry in tqdm(plan.copies.items(), desc="Copying tensors", unit="tensor"):
        value = plan.source.tensor(name)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"tensor {name} of the source holds values that are not finite; the file is damaged.")
        if "copied-to" not in entry:
            continue
        goal = entry["copied-to"]
        tensors[goal] = value.to(plan.dtype, copy=True)
        if value.dtype != plan.dtype:
            entry["cast-from"] = dtype_name(value.dtype)
            if not bool(torch.isfinite(tensors[goal]).all()):
                raise ValueError(
                    f"tensor {name} of the source leaves the range of dtype={dtype_name(plan.dtype)}; "
                    "choose float32 or bfloat16."
                )
    grafted = [index for index, kind in enumerate(plan.config.layer_types) if kind == "bmojo"]
    for index in tqdm(grafted, desc="Initialising memories"):
        tensors |= layer_init(plan, tensors, index)
    return {name: tensors[name] for name in plan.shapes}


def layer_init(plan: Plan, tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """The initialised tensors of one B'MOJO layer, by their full names; the SSM's scalars stay float32."""
    attention = f"model.layers.{index}.self_attn."
    own = {name.removeprefix(attention): value for name, value in tensors.items() if name.startswith(attention)}
    init = SSM_INITS[plan.settings.ssm_init]
    built = init.build(plan.config, own, tuple(plan.settings.smoother_tau), plan.settings.seed * 100_003 + index)
    found = {f"model.layers.{index}.fading.{name}": value for name, value in built.items()}
    for name in plan.initialised:
        if name.startswith(attention + "fading_"):
            found[name] = tensors[name.replace("fading_", "")].clone()
    for name, value in found.items():
        if plan.shapes.get(name) != tuple(value.shape):
            raise ValueError(f"{name}: initialised as {list(value.shape)}, the model has {plan.shapes.get(name)}.")
    return {name: value if ".scalars." in name else value.to(plan.dtype) for name, value in found.items()}


def write_checkpoint(folder: Path, plan: Plan, tensors: dict[str, torch.Tensor]) -> None:
    """Fills `folder`: weights, code, tokenizer, settings, card and, last, the report."""
    generation = generation_settings(plan.source.generation_settings(), plan.config)
    report = build_report(plan, tensors)
    if plan.ranking is not None:
        write_ranking(folder, plan.ranking)
    save_model(folder, plan.config, tensors, generation, plan.settings.max_shard_size)
    tensors.clear()
    tokenizer = plan.source.tokenizer()
    report["tokenizer"] = None if tokenizer is None else save_tokenizer(folder, tokenizer, plan.config.vocab_size)
    report["generation"] = generation
    report["check"] = check_against_source(folder, plan) if plan.settings.check else None
    (folder / "README.md").write_text(model_card(plan.config, plan.source.facts(), report), encoding="utf-8")
    write_report(folder, report)


def build_report(plan: Plan, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The report of `graft_report.json`; tokenizer, generation and check are added as they are done."""
    config = plan.source.config
    windows = [size for size in (plan.config.window_size, source_window(config)) if size is not None]
    dropped = sum("dropped-because" in entry for entry in plan.copies.values())
    return {
        "source": {
            "label": plan.source.label,
            "files": source_files(plan.settings.source),
            "architecture": family_of(config).architecture,
            "dtype": plan.source.dtype,
            "layer_types": source_layer_types(config),
            "window": source_window(config),
        },
        "settings": plan.settings.as_dict(),
        "dtype": dtype_name(plan.dtype),
        "ssm_init": plan.settings.ssm_init,
        "layers": [index for index, kind in enumerate(plan.config.layer_types) if kind == "bmojo"],
        "layer_ranking": plan.ranking,
        "identical_up_to": min(windows),
        "counts": {
            "copied": len(plan.copies) - dropped,
            "dropped": dropped,
            "initialised": len(plan.initialised),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "source_parameters": sum(
                torch.Size(entry["shape"]).numel() for entry in plan.copies.values() if "copied-to" in entry
            ),
        },
        "source_tensors": plan.copies,
        "target_tensors": target_account(plan.copies, plan.initialised, tensors),
        "versions": versions(),
        "code_sha256": code_fingerprint(),
    }


@torch.no_grad()
def check_against_source(folder: Path, plan: Plan) -> dict[str, float]:
    """Loads the written folder and compares its logits with the source's inside the window, in float32.

    Raises:
        ValueError: the memories hold values that are not finite, tensors are missing from the folder, or the logits
            differ by more than CHECK_TOLERANCE allows.
    """
    tokens = min(CHECK_TOKENS, plan.config.window_size, source_window(plan.source.config) or CHECK_TOKENS)
    generator = torch.Generator().manual_seed(plan.settings.seed)
    ids = torch.randint(plan.config.vocab_size, (1, tokens), generator=generator)
    written, info = BMojoForCausalLM.from_pretrained(folder, dtype=plan.dtype, output_loading_info=True)
    problems = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if problems or info["mismatched_keys"]:
        raise ValueError(f"the written checkpoint does not load completely: {problems or info['mismatched_keys']}.")
    # With a cache, so that the fading memories run too, although no token is beyond the window yet.
    out = written.float().eval()(input_ids=ids, use_cache=True)
    ours = out.logits
    for index, layer in enumerate(out.past_key_values.layers):
        wrong = [name for name, state in layer.states().items() if not state.isfinite().all()]
        if wrong:
            raise ValueError(f"layer {index} of the graft: after {tokens} tokens its states {wrong} are not finite.")
    del written, out
    theirs = plan.source.load_model(plan.dtype).eval()(input_ids=ids, use_cache=False).logits
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= CHECK_TOLERANCE * scale:
        raise ValueError(
            f"the graft does not reproduce its source: on {tokens} tokens the logits differ by {difference:.3g} at a "
            f"scale of {scale:.3g}. The source computes something that its row in conversion/families.py leaves out."
        )
    return {"tokens": tokens, "max_logit_difference": difference, "logit_scale": scale}
