"""The model card (README.md) of a grafted checkpoint: what was grafted from what, how to load it, what it costs."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import yaml

from modeling_bmojo import BMojoConfig, memory_bytes


BEGIN, END = "<!-- sketches -->", "<!-- end of sketches -->"
MEASURED, END_MEASURED = "<!-- evaluation -->", "<!-- end of evaluation -->"


def source_bytes(config: BMojoConfig, source: Mapping[str, Any], dtype: torch.dtype, tokens: int) -> int:
    """Return bytes of the source's keys and values of one sequence after `tokens` tokens."""
    per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    kept = [tokens if kind == "full_attention" else min(tokens, source["window"]) for kind in source["layer_types"]]
    return sum(kept) * per_token


def model_card(config: BMojoConfig, facts: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return the card's text.

    Args:
        config: of the graft. facts: `name`, `license`, `language` of the source as far as known. report: of the graft.
    """
    return f"{front_matter(facts, report)}\n\n{_body(config, facts, report)}"


def front_matter(facts: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """Return what the hub reads of a card, between its lines of dashes."""
    front = {
        "license": facts.get("license"),
        "language": facts.get("language"),
        "base_model": report["source"]["label"] if "/" in report["source"]["label"] else None,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["bmojo"],
    }
    front = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---"


def _body(config: BMojoConfig, facts: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    layers = [index for index, kind in enumerate(config.layer_types) if kind == "bmojo"]
    count = config.num_hidden_layers
    which = f"all {count} layers" if len(layers) == count else f"layers {layers} of {count}"
    dtype = getattr(torch, report["dtype"])
    rows = [
        f"| {tokens:,} | {memory_bytes(config, tokens, dtype)[0] / 1e6:,.1f} MB "
        f"| {source_bytes(config, report['source'], dtype, tokens) / 1e6:,.1f} MB |"
        for tokens in (4096, 32768)
    ]
    table = "\n".join(rows)
    counts = report["counts"]
    name = facts["name"]
    stored, told = "", "The memory of a B'MOJO layer does not grow with the text."
    if config.storage_size:
        stored = f",\n- {config.storage_size} of all other tokens, chosen by each query for itself (storage)"
        told = "What a query sees does not grow with the text; the storage does, by every token that was read."
    where = "beyond the window" if config.fading_delay is None else f"made {config.fading_delay} tokens ago or earlier"
    fading = (
        f"{config.fading_size} output(s) of a state space model, one every {config.fading_stride} token(s), {where}, "
        "that\n  sum up what came before"
    )
    if config.fading_mass and config.fading_size:
        fading = f"means of blocks of {config.fading_stride} tokens and more, each with the weight of the tokens in it"
    sketches = f"\n\n{sketches_told(report['sketches'])}" if report.get("sketches") else ""
    beyond = "it sees the window and the memories only"
    if len(layers) < count:
        beyond = "its B'MOJO layers see the window and the memories only, the others what they saw in the source"
    same = report["identical_up_to"]
    exact = f"Up to {same:,} tokens its logits are those of the source;\nbeyond that {beyond}"
    if not same:
        exact = "Its logits are not those of the source, for no token: an SSM that has\nlearned nothing yet takes part"
    return f"""# {name}, grafted to B'MOJO

This is {name} ({report["source"]["architecture"]}) with {which} turned into B'MOJO layers.
Under one softmax, such a layer attends to

- the last {config.window_size} tokens (window),
- up to {config.eidetic_size} older tokens that the past could not predict (eidetic memory),
- {fading}
  (fading memory){stored}.

{told}{sketches}

It is a fresh graft: nothing was trained. {exact}. The new tensors are a starting point for training.

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
- {counts["copied"]} tensors copied, {counts["initialised"]} initialised ({report["ssm_init"]}),
  {counts["dropped"]} of the source dropped. `graft_report.json` accounts for each one.
- {counts["parameters"] / 1e6:,.1f} million parameters in {report["dtype"]};
  {counts["source_parameters"] / 1e6:,.1f} million are the source's.

Memory of one sequence, all states, in {report["dtype"]}:

| tokens read | this model | the source |
|---|---|---|
{table}
"""


def sketches_told(facts: Mapping[str, Any]) -> str:
    """Return the card's lines on the sketches of keys, between marks. facts: of the report."""
    names = ", ".join(facts["texts"][:3]) + (" and others" if len(facts["texts"]) > 3 else "")
    return (
        f"{BEGIN}\nIts weights hold a sketch of {facts['size']} numbers per key, by which stored tokens are found; it "
        f"was fitted on\n{facts['tokens']:,} tokens ({names}). Load it with `storage_size` and `storage_candidates` to "
        f"use it.\n{END}"
    )


def with_sketches_told(card: str, facts: Mapping[str, Any]) -> str:
    """Return a card that tells of the sketches, instead of earlier ones if it did."""
    return _with_section(card, "Storage", sketches_told(facts), BEGIN, END)


def with_evaluation_told(card: str, tables: str) -> str:
    """Return a card that holds the tables of an evaluation, instead of an earlier one's if it did."""
    told = f"{MEASURED}\n{tables.strip()}\n{END_MEASURED}"
    return _with_section(card, "Measured", told, MEASURED, END_MEASURED)


def _with_section(card: str, heading: str, told: str, begin: str, end: str) -> str:
    """Return a card with `told` between its marks, or in a section of its own at the end."""
    if begin in card and end in card:
        return re.sub(f"{begin}.*?{end}", lambda match: told, card, count=1, flags=re.DOTALL)
    return f"{card.rstrip()}\n\n## {heading}\n\n{told}\n".lstrip()
