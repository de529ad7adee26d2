"""One table of an evaluation: figures per model from the measurements, as Markdown and as plain data.

Means are over texts, +- is the standard error over texts. Texts differ more among each other than models do, so the
difference to the source is also given pair by pair, text against the same text. The gap that is closed is

    (NLL of window + sinks  -  NLL of the model) / (NLL of window + sinks  -  NLL of the source)      beyond W
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..common.nll import mean_and_error
from .baselines import Row
from .passkey import by_distance
from .ruler_report import ruler_table


Figures = dict[str, Any]
TABLED = ("nll", "agreement", "passkey", "cost")  # the sections of the first table
BUCKETS = ("inside W", "W to 4W", "4W to 16W", "beyond 16W", "beyond W")


def summarise(
    rows: Sequence[Row], measurements: Mapping[str, Mapping[str, Any]], window: int, sections: Mapping[str, bool]
) -> list[Figures]:
    """Return the figures of every row, in the order of the rows, as plain data.

    Args:
        sections: which of `settings.SECTIONS` are on, by name.
    """
    known = {row.kind: measurements[row.name] for row in rows}
    nll = {kind: measured["reading"]["nll"] for kind, measured in known.items() if "reading" in measured}
    found = []
    for row in rows:
        measured = measurements[row.name]
        figures: Figures = {"model": row.name, "kind": row.kind, "window": row.window, "slots": row.slots}
        found.append(figures)
        if row.kind == "press":  # for RULER's tasks only
            continue
        if sections["nll"]:
            figures |= _nll_figures(measured["reading"]["nll"], nll.get("source"), nll.get("sinks"))
        if sections["agreement"]:
            figures |= _agreement_figures(measured["reading"])
        if sections["passkey"]:
            figures["passkey"] = by_distance(measured["passkey"]["prompts"], window)
        if sections["cost"]:
            figures |= {name: measured["cost"][name] for name in ("prefill", "decode", "cache_bytes", "tokens")}
    return found


def _nll_figures(own: list[dict[str, float]], source: Any, sinks: Any) -> Figures:
    figures: Figures = {"nll": {name: mean_and_error([text[name] for text in own]) for name in own[0]}}
    if "beyond W" not in own[0]:
        return figures
    if source is not None:
        pairs = [ours["beyond W"] - theirs["beyond W"] for ours, theirs in zip(own, source)]
        figures["above_source"] = mean_and_error(pairs)
        if sinks is not None:
            worst, best, mine = (sum(text["beyond W"] for text in texts) for texts in (sinks, source, own))
            figures["gap_closed"] = (worst - mine) / (worst - best) if worst > best else None
    return figures


def _agreement_figures(reading: Mapping[str, Any]) -> Figures:
    if "equal" not in reading:  # the source with itself
        return {"equal": None, "prefix": None}
    equal = reading["equal"]
    shares = {name: mean_and_error([text[name] for text in equal]) for name in equal[0]}
    return {"equal": shares, "prefix": mean_and_error(reading["prefix"])}


def _with_error(value: tuple[float, float | None] | None, digits: int = 3, sign: str = "") -> str:
    if value is None:
        return ""
    mean, error = value
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" \u00b1 {error:.{digits}f}")


def _columns(figures: Sequence[Figures], steps: int) -> list[tuple[str, Callable[[Figures], str]]]:
    """Heading and cell of every column that some row has a figure for."""
    columns: list[tuple[str, Callable[[Figures], str]]] = [("model", lambda row: row["model"])]
    columns += [("W", lambda row: "" if row["window"] is None else f"{row['window']:,}")]
    columns += [("M", lambda row: str(row["slots"] or ""))]
    buckets = {name for row in figures for name in row.get("nll", ())}
    for name in BUCKETS:
        if name in buckets:
            columns.append((f"NLL {name}", lambda row, name=name: _with_error(row["nll"].get(name))))
    if any("above_source" in row for row in figures):
        columns.append(("above the source", lambda row: _with_error(row.get("above_source"), sign="+")))
    if any(row.get("gap_closed") is not None for row in figures):
        columns.append(("gap closed", lambda row: _percent(row.get("gap_closed"))))
    classes = {name for row in figures for name in row.get("passkey", ())}
    for name in ("inside W", "W to 4W", "beyond 4W"):
        if name in classes:
            columns.append((f"passkey {name}: found, NLL", lambda row, name=name: _passkey(row["passkey"].get(name))))
    if any("equal" in row for row in figures):
        columns.append(("same next token, beyond W", lambda row: _equal(row["equal"])))
        columns.append((f"same text, of {steps}", lambda row: _with_error(row["prefix"], 1)))
    if any("prefill" in row for row in figures):
        columns.append(("reading, tokens/s", lambda row: f"{row['prefill']:,.0f}"))
        columns.append(("writing, tokens/s", lambda row: f"{row['decode']:,.1f}"))
        columns.append(("memory, MB", lambda row: f"{row['cache_bytes'] / 1e6:,.1f}"))
    return columns


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _passkey(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    hits = round(found["accuracy"] * found["prompts"])
    return f"{hits} of {found['prompts']}, {found['nll']:.2f}"


def _equal(shares: Mapping[str, Any] | None) -> str:
    if shares is None:
        return ""
    return _with_error(shares.get("beyond W", shares["inside W"]))


def markdown(figures: Sequence[Figures], settings: Mapping[str, Any], window: int, header: Mapping[str, Any]) -> str:
    """Return the tables of all sections that are on, each with lines on how to read it, and where they come from."""
    tabled = [row for row in figures if row["kind"] != "press"]
    parts = [*_table(tabled, settings, window)] if any(settings[name] for name in TABLED) else []
    if any("ruler" in row for row in figures):
        parts.append(ruler_table({row["model"]: row["ruler"] for row in figures}, settings))
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    origin = (
        f"{settings['source']}, {settings['dtype']}; `{header['command']}`; commit {machine['commit'] or 'unknown'}; "
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads; {versions}"
    )
    return "\n\n".join([*parts, origin]) + "\n"


def _table(figures: Sequence[Figures], settings: Mapping[str, Any], window: int) -> tuple[str, str]:
    columns = _columns(figures, settings["greedy_tokens"])
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in figures]
    count = len(settings["topics"]) if settings["topics"] else settings["texts"]
    text = ", ".join(settings["topics"] or settings["files"] or [f"{settings['builtin']}, held out"])
    note = (
        f"{count} texts of {settings['tokens']:,} tokens ({text}). NLL in nats per token by the length of what was "
        f"read before it, W = {window}; \u00b1 is the standard error over texts. Above the source: beyond W, text by "
        "text. Gap closed: of the way from window + sinks to the source, beyond W. Passkeys and agreement likewise by "
        "what was read before."
    )
    if any("passkey" in row for row in figures):
        lengths = ", ".join(f"{length:,}" for length in settings["passkey_lengths"])
        note += f" Passkeys of {settings['passkey_digits']} digits in {lengths} tokens, by distance."
    return "\n".join(lines), note
