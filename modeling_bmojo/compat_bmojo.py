"""What differs between the versions of transformers that this package runs on, and nothing else.

Tested: 5.20.2, 5.23.0, 5.24.0. Every other module is written for all of them; whoever needs to know a difference asks
here, and what is asked is what transformers has, never its version number.

    5.24 calls a cache `cache`, in arguments and in outputs; until 5.23 it is `past_key_values`
    5.20 puts all parameters of a layer into one FSDP2 shard, whatever their dtypes; 5.23 makes a shard for each dtype
"""

import dataclasses
import importlib.util
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast


# Every name under which a cache of ours is taken, and the one that this transformers gives and expects.
CACHE_NAMES = ("past_key_values", "cache")
CACHE_NAME = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if field.name in CACHE_NAMES)

# Whether FSDP2 by `distributed_config` takes a model of several dtypes; torch refuses them in one shard.
SHARDS_BY_DTYPE = importlib.util.find_spec("transformers.distributed.parallel_utils") is not None


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache that was given under either name; None if neither.

    Raises:
        ValueError: for two different ones.
    """
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("past_key_values, cache: two names of one argument, and both are given; pass one of them.")
    return cache if past_key_values is None else past_key_values


def cache_argument(arguments: dict[str, Any]) -> Any:
    """As `one_cache`, from keyword arguments, which lose it."""
    return one_cache(*(arguments.pop(name, None) for name in CACHE_NAMES))


def cache_of(outputs: Any) -> Any:
    """Return the cache in what a model or generate() returned, under its name in this transformers; None if there is
    none."""
    return getattr(outputs, CACHE_NAME, None)
