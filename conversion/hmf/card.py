"""The model card (README.md) of an imported checkpoint."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from modeling_bmojo import memory_bytes

from ..grafting.card import front_matter
from .config import BMOJO, Layout


def imported_card(layout: Layout, facts: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return the card's text.

    Args:
        facts: `name`, `license`, `language` of the source as far as known. report: of the import.
    """
    return f"{front_matter(facts, report)}\n\n{_body(layout, facts, report)}"


def _body(layout: Layout, facts: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    config, counts, name = layout.config, report["counts"], facts["name"]
    dtype = getattr(torch, report["dtype"])
    layers = ", ".join(f"{count} x `{token}`" for token, count in Counter(layout.tokens).items())
    mixer = f" Its SSM: `{config.ssm_type}`." if layout.mixer is not None else ""
    fading = ""
    if BMOJO in layout.tokens:
        size = config.window_size
        fading = (
            f"\nA `BMF` layer attends to the last {size:,} tokens and, as fading tokens, to the SSM's outputs at the "
            f"{size:,} positions\nbefore them, under one softmax.\n"
        )
    rows = "\n".join(
        f"| {tokens:,} | {memory_bytes(config, tokens, dtype)[0] / 1e6:,.1f} MB |" for tokens in (4096, 32768, 131072)
    )
    return f"""# {name}, read by modeling_bmojo

The weights of {name} (hybrid-model-factory, `hybrid_qwen3`) under the names of a B'MOJO model. Layers: {layers}.{mixer}
{fading}
## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```

The folder carries its own code (`modeling_bmojo.py` and the files beside it), so no package besides transformers and
torch is needed. With the package `modeling_bmojo` installed and imported, `trust_remote_code` is not needed.

## What it is made of

- Source: {report["source"]["label"]}; licence of the source: {facts.get("license") or "not stated by the source"}.
- {counts["copied"]} tensors of the source, none changed, some joined by rows; {counts["dropped"]} are made anew by
  loading. `graft_report.json` accounts for each one.
- {counts["parameters"] / 1e6:,.1f} million parameters in {report["dtype"]}.

Memory of one sequence, all states, in {report["dtype"]}:

| tokens read | bytes |
|---|---|
{rows}
"""


__all__ = ["imported_card"]
