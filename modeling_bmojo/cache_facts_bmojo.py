"""What a cache and a model must have in common: every configuration field that changes results.

The states mean something else where one of them differs. Weights are not compared: the same model with an adapter may
read on.
"""

import json
from typing import Any

from .configuration_bmojo import BMojoConfig, LayerSpec


# Fields that change no state, no logit and no token that a given model computes outside of training. A field of
# BMojoConfig that is not listed here belongs to the results: a new one is compared unless somebody decides otherwise.
NEUTRAL = (
    "initializer_range",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
    "memory_block_size",
    "kernel_backend",
    "ssm_chunk_size",
    "ssm_time_step_min",
    "ssm_time_step_max",
    "ssm_time_step_floor",
    "ssm_scalars_in_fp32",
)
# BMojoConfig's own fields: what it inherits names labels, dtypes and outputs, which a state does not depend on.
FACTS = tuple(name for name in BMojoConfig.__annotations__ if name not in NEUTRAL)


def plain(value: Any) -> Any:
    """A field's value as it comes back from JSON: a copy, of lists where it has tuples."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return {key: plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def facts_of(config: BMojoConfig) -> dict[str, Any]:
    return {name: plain(getattr(config, name)) for name in FACTS}


def check_live(facts: dict[str, Any], config: BMojoConfig) -> None:
    """Raises ValueError unless `config`, as it is now, has the facts that a cache was built with. Once per forward."""
    live = vars(config)  # asking a configuration costs a microsecond per field, its dict nearly nothing
    for name, ours in facts.items():
        theirs = live.get(name)
        if theirs != ours and plain(theirs) != ours:
            raise ValueError(
                f"{_other(name, ours, plain(theirs))}; a cache belongs to one model: build BMojoCache(model.config)."
            )


def check_written(facts: dict[str, Any], specs: list[dict], config: BMojoConfig, complete: bool) -> None:
    """Raises ValueError unless a written cache belongs to a model of `config`.

    Args:
        facts, specs: as written. complete: the writer recorded every fact that it knew, so one that is missing is of
            a field that did not exist then and was what is its default now; False: facts may be missing.
    """
    wanted = facts_of(config)
    unknown = sorted(set(facts) - set(wanted))
    if unknown:
        raise ValueError(
            f"the cache has {unknown[0]}={facts[unknown[0]]!r}, which this version does not know: a newer one wrote it"
        )
    for name, theirs in wanted.items():
        if name not in facts and not complete:
            continue
        ours = facts[name] if name in facts else plain(getattr(type(config), name, None))
        if ours != theirs:
            raise ValueError(_other(name, ours, theirs))
    if len(specs) != config.num_hidden_layers:
        raise ValueError(f"the cache has {len(specs)} layers but the model has {config.num_hidden_layers}")
    for index, spec in enumerate(specs):
        for name, theirs in config.layer_spec(index)._asdict().items():
            if spec.get(name) != theirs:
                raise ValueError(f"layer {index}: {_other(name, spec.get(name), theirs)}")


def _other(name: str, ours: Any, theirs: Any) -> str:
    return f"the cache has {name}={ours!r} but the model has {theirs!r}"


def described(facts: dict[str, Any], specs: list[LayerSpec]) -> dict[str, str]:
    """Whose cache it is, as strings."""
    return {"specs": json.dumps([spec._asdict() for spec in specs]), "facts": json.dumps(facts)}


def undescribed(description: dict[str, str]) -> tuple[dict[str, Any], list[dict]]:
    """What `described` wrote: facts, and specs as dicts.

    Raises:
        ValueError: if it is not of that form.
    """
    try:
        facts, specs = json.loads(description["facts"]), json.loads(description["specs"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its description is damaged ({error!r})") from error
    if not isinstance(facts, dict) or not isinstance(specs, list) or not all(isinstance(s, dict) for s in specs):
        raise ValueError("its description is damaged: facts must be a dict and specs a list of dicts")
    return facts, specs
