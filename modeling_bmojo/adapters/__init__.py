"""Adapters of a B'MOJO: LoRA configurations, and what of a model an adapter covers.

Nothing here travels with a checkpoint.
"""

from .coverage import LayerCoverage, check_adapter, lora_coverage, print_lora_coverage
from .lora import bmojo_lora_config


__all__ = ["LayerCoverage", "bmojo_lora_config", "check_adapter", "lora_coverage", "print_lora_coverage"]
