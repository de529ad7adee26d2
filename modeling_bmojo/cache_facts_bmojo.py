"""What a cache and a model must have in common: every configuration field that changes results.

The states mean something else where one of them differs. Weights are not compared: the same model with an adapter may
read on.
"""

import json
from typing import Any

from .configuration_bmojo import BMojoConfig
from .fields_bmojo import fields_with, plain


def facts_of(config: BMojoConfig) -> dict[str, Any]:
    """Return the fields that change results, with their values now."""
    return {name: plain(getattr(config, name)) for name in fields_with(type(config), results=True)}


def check_now(facts: dict[str, Any], config: BMojoConfig) -> None:
    """Raise ValueError unless `config`, as it is now, has the facts that a cache was built with. Once per forward."""
    now = vars(config)  # asking a configuration costs a microsecond per field, its dict nearly nothing
    for name, ours in facts.items():
        theirs = now.get(name)
        if theirs != ours and plain(theirs) != ours:
            raise ValueError(
                f"{_other(name, ours, plain(theirs))}; a cache belongs to one model: build BMojoCache(model.config)."
            )


def check_written(facts: dict[str, Any], config: BMojoConfig, complete: bool) -> None:
    """Raise ValueError unless a written cache belongs to a model of `config`.

    Args:
        facts: as written. complete: the writer recorded every fact that it knew, so one that is missing is of a field
            that did not exist then and was what is its default now; False: facts may be missing.
    """
    wanted = facts_of(config)
    unknown = sorted(set(facts) - set(wanted))
    if unknown:
        raise ValueError(
            f"the cache has {unknown[0]}={facts[unknown[0]]!r}, which this configuration does not know: a newer "
            "version or a subclass of it wrote it"
        )
    for name, theirs in wanted.items():
        if name not in facts and not complete:
            continue
        ours = facts[name] if name in facts else plain(getattr(type(config), name, None))
        if ours != theirs:
            raise ValueError(_other(name, ours, theirs))


def _other(name: str, ours: Any, theirs: Any) -> str:
    return f"the cache has {name}={ours!r} but the model has {theirs!r}"


def described(facts: dict[str, Any]) -> str:
    """Whose cache it is, as text."""
    return json.dumps(facts)


def undescribed(text: str | None) -> dict[str, Any]:
    """Return what `described` wrote.

    Raises:
        ValueError: if it is not of that form.
    """
    try:
        facts = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its description is damaged ({error!r})") from error
    if not isinstance(facts, dict):
        raise ValueError("its description is damaged: facts must be a dict")
    return facts
