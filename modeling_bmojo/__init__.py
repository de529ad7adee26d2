"""B'MOJO for Hugging Face Transformers: configuration, cache and models; importing it registers the Auto classes."""

from transformers import AutoConfig

from .adapters import LayerCoverage, bmojo_lora_config, check_adapter, lora_coverage, print_lora_coverage
from .cache_bmojo import BMojoCache, RememberedToken
from .cache_tree_bmojo import cache_axes
from .compat_bmojo import CACHE_NAME, cache_of
from .configuration_bmojo import BMojoConfig
from .decoding_step_bmojo import DecodingStep
from .inspect import (
    Attribution,
    Difference,
    InnovationTrace,
    MemoryView,
    Passage,
    PassagesView,
    attribute,
    explain_kernels,
    first_difference,
    memory_bytes,
    plot_expiry,
    plot_innovation,
    plot_memory_growth,
    show_memory,
    show_passages,
    trace_innovation,
)
from .modeling_bmojo import (
    AUTO_CLASSES,
    BMojoForCausalLM,
    BMojoForQuestionAnswering,
    BMojoForSequenceClassification,
    BMojoForTokenClassification,
    BMojoModel,
    BMojoPreTrainedModel,
)
from .prefix_bmojo import PrefixMemory


__version__ = "0.1.0"

# Here and not in a module that travels: a folder's code must not answer for other folders of this model type.
AutoConfig.register("bmojo", BMojoConfig, exist_ok=True)

__all__ = [
    "AUTO_CLASSES",
    "Attribution",
    "CACHE_NAME",
    "BMojoCache",
    "BMojoConfig",
    "BMojoForCausalLM",
    "BMojoForQuestionAnswering",
    "BMojoForSequenceClassification",
    "BMojoForTokenClassification",
    "BMojoModel",
    "BMojoPreTrainedModel",
    "DecodingStep",
    "Difference",
    "InnovationTrace",
    "LayerCoverage",
    "MemoryView",
    "Passage",
    "PassagesView",
    "PrefixMemory",
    "RememberedToken",
    "attribute",
    "bmojo_lora_config",
    "cache_axes",
    "cache_of",
    "check_adapter",
    "explain_kernels",
    "first_difference",
    "lora_coverage",
    "memory_bytes",
    "plot_expiry",
    "plot_innovation",
    "plot_memory_growth",
    "print_lora_coverage",
    "show_memory",
    "show_passages",
    "trace_innovation",
]
