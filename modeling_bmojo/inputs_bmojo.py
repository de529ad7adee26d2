"""What a forward call gets, checked, and turned into mixer rows: layout, lengths, rotary positions.

Shapes: B batch, T new columns, P columns already in the cache, R rows and T' tokens of a group of mixer rows.
"""

import torch

from .cache_bmojo import BMojoCache
from .compat_bmojo import CACHE_NAME
from .configuration_bmojo import BMojoConfig
from .layout_bmojo import Rows, packed_layout, padded_layout, sequence_starts


def check_tokens(config: BMojoConfig, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
    """Raise ValueError unless exactly one non-empty input is given, with ids inside the vocabulary."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "input_ids, inputs_embeds: exactly one of them must be given; pass token ids, or their embeddings."
        )
    given = input_ids if input_ids is not None else inputs_embeds
    name, wanted = ("input_ids", 2) if input_ids is not None else ("inputs_embeds", 3)
    if given.dim() != wanted or given.shape[0] == 0 or given.shape[1] == 0:
        raise ValueError(
            f"{name} of shape {list(given.shape)}: must be [batch, tokens{', hidden' if wanted == 3 else ''}] with at "
            "least one row and one token; an empty prompt needs a start token such as bos."
        )
    if input_ids is None and given.shape[2] != config.hidden_size:
        raise ValueError(
            f"inputs_embeds of shape {list(given.shape)}: the last size must be hidden_size={config.hidden_size}; give "
            "embeddings of this model."
        )
    # Reading two scalars stalls a GPU: there, check prompts and leave single decoding steps alone.
    if (
        input_ids is None
        or torch.compiler.is_compiling()
        or (input_ids.device.type != "cpu" and input_ids.shape[1] == 1)
    ):
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"input_ids holds {wrong}: ids must lie in [0, vocab_size={config.vocab_size}); use the model's own "
            "tokenizer."
        )


def check_cache(cache: object, config: BMojoConfig, batch: int | None = None) -> None:
    """Raise ValueError unless `cache` is a BMojoCache of a model of `config` and, if given, of `batch` rows."""
    # By name, not by class: code loaded with trust_remote_code has classes of its own.
    if type(cache).__name__ != "BMojoCache":
        raise ValueError(
            f"{CACHE_NAME} is a {type(cache).__name__}: must be a BMojoCache, which also holds SSM states and the "
            "eidetic memory; pass BMojoCache(model.config), or nothing to have one built."
        )
    cache.check(config, batch)


def new_token_mask(
    attention_mask: torch.Tensor | None, batch: int, columns: int, past: int | None, cache: BMojoCache | None = None
) -> torch.Tensor | None:
    """Which of the new columns are real tokens, `[B, T]` bool, or None if all are.

    Args:
        attention_mask: None, or `[B, P + T]` or `[B, T]` with 1 for real tokens. past: P; None: no number says it, and
            the mask is `[B, T]`.
        cache: what the P columns of the past are compared with: they must say what was read.

    Raises:
        ValueError: for another kind or shape of mask, values other than 0 and 1, or another past than the cache's.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        kind = type(attention_mask).__name__
        shape = f" of shape {list(attention_mask.shape)}" if isinstance(attention_mask, torch.Tensor) else ""
        raise ValueError(
            f"attention_mask is a {kind}{shape}: must be 2-D, [batch, tokens] with 1 = real and 0 = pad; the memories "
            "define what each token sees, so a 4-D mask cannot be honoured."
        )
    if past is None and attention_mask.shape != (batch, columns):
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)}: with a fixed cache it must be [{batch}, {columns}],"
            " one entry per new token; pass the last columns, or unfix() the cache."
        )
    if past is not None and (
        attention_mask.shape[0] != batch or attention_mask.shape[1] not in (past + columns, columns)
    ):
        raise ValueError(
            f"attention_mask of shape {list(attention_mask.shape)}: must be [{batch}, {past + columns}], one entry per "
            f"token read so far ({past}) and now ({columns}); pass the tokenizer's mask."
        )
    new = attention_mask[:, -columns:]
    mask = new.to(torch.bool)
    # Values are not looked at in compiled code, which would stop there, nor on a GPU for a single column, which would
    # stall it at every decoding step: there the mask is handled as it stands.
    if torch.compiler.is_compiling() or (columns == 1 and mask.device.type != "cpu"):
        return mask
    if new.dtype != torch.bool and not bool((new == mask).all()):
        wrong = new[new != mask][0].item()
        raise ValueError(
            f"attention_mask holds {wrong}: must be 1 = real token or 0 = pad; for packed sequences pass seq_idx "
            "(their numbers) or position_ids that start anew in each."
        )
    if cache is not None and attention_mask.shape[1] > columns:
        cache.check_mask(attention_mask[:, :-columns].to(torch.bool))
    return None if bool(mask.all()) else mask


def check_columns(batch: int, columns: int, position_ids: torch.Tensor | None, seq_idx: torch.Tensor | None) -> None:
    """Raise ValueError unless each that is given has one number per column."""
    for name, value in {"position_ids": position_ids, "seq_idx": seq_idx}.items():
        if value is not None and (value.dim() != 2 or value.shape[0] not in (1, batch) or value.shape[1] != columns):
            raise ValueError(
                f"{name} of shape {list(value.shape)}: must be [{batch}, {columns}] like the input; one number per "
                "token, pads included."
            )


def _check_counted(given: list, lengths: list, cache: BMojoCache | None) -> None:
    """Check that the positions of real tokens count them: distances beyond `max_rope_distance` are counted in tokens.

    Args:
        given: per group of mixer rows `[R, T]` positions or None. lengths: per group `[R]` real tokens, or None.
    """
    for ids, real in zip(given, lengths):
        if ids is None:
            continue
        seen = 0 if cache is None or cache.seen is None else cache.seen.to(ids.device)[:, None]
        column = torch.arange(ids.shape[1], device=ids.device)
        wrong = ids != seen + column
        wrong = wrong if real is None else wrong & (column < real[:, None])
        if bool(wrong.any()):
            row, place = (int(value) for value in wrong.nonzero()[0])
            raise ValueError(
                f"position_ids: token {place} of row {row} stands at {int(ids[row, place])}; beyond max_rope_distance "
                "distances are counted in tokens, so positions must count each sequence from 0. Leave position_ids out."
            )


def _check_continues(cache: BMojoCache, mask: torch.Tensor | None, position_ids: torch.Tensor) -> None:
    """Check that a row that has read n tokens goes on at position n or later: one further back would be another
    sequence."""
    first = position_ids[:, 0] if mask is None else position_ids.gather(1, mask.to(torch.int8).argmax(1)[:, None])[:, 0]
    seen = cache.seen.to(first.device)
    goes_back = first < seen
    if mask is not None:
        goes_back = goes_back & mask.any(dim=1)
    if bool(goes_back.any()):
        row = int(goes_back.to(torch.int8).argmax())
        raise ValueError(
            f"position_ids[{row}] starts at {int(first[row])} but the cache has read {int(seen[row])} tokens of that "
            "row; leave position_ids out to continue it, or read another sequence with a cache of its own."
        )


def carry_last(
    hidden_states: torch.Tensor, mask: torch.Tensor | None, last_hidden: torch.Tensor | None
) -> torch.Tensor:
    """Give pads the output of the last real token before them: generate() reads its logits in the last column.

    Args:
        hidden_states: `[B, T, E]` outputs. mask: `[B, T]` bool or None if there are no pads.
        last_hidden: `[B, E]`, the output for the last real token that a cache has read; zeros where there is none.
    """
    if mask is None:
        return hidden_states
    # With a device_map, outputs, mask and cache may be on three devices.
    mask = mask.to(hidden_states.device)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1)
    if mask.shape[1] > 1:  # of one column it is that column, and ONNX has no such operation
        last = last.cummax(dim=1).values
    carried = hidden_states.take_along_dim(last.clamp(min=0)[..., None], dim=1)
    before = hidden_states.new_zeros(()) if last_hidden is None else last_hidden[:, None].to(hidden_states)
    return torch.where((last >= 0)[..., None], carried, before)


def build_rows(
    inputs_embeds: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    packing: dict[str, torch.Tensor | None],
    cache: BMojoCache | None,
    rotary_emb,
    output_attentions: bool,
) -> tuple[Rows, bool]:
    """Cut the input into mixer rows.

    Args:
        inputs_embeds: `[B, T, E]`. mask: `[B, T]` bool or None. position_ids: `[B, T]`, `[1, T]` or None: real tokens
            are counted, from what the cache has seen. packing: `seq_idx`, `cu_seq_lens` or None each.
        rotary_emb: module from (x, position ids) to cos and sin, or None.

    Returns:
        the rows, and whether the input is packed.

    Raises:
        ValueError: for position_ids or seq_idx of another shape, positions that restart although the cache goes on, or
            packed sequences together with a cache or with attention weights.
    """
    batch, columns = inputs_embeds.shape[:2]
    device = inputs_embeds.device
    past = 0 if cache is None else cache.known_length()
    check_columns(batch, columns, position_ids, packing["seq_idx"])
    # As for masks: values are not looked at where that would stop compiled code or stall a GPU at every step.
    looks = not torch.compiler.is_compiling() and (columns > 1 or device.type == "cpu")
    if past != 0 and looks and position_ids is not None:
        _check_continues(cache, mask, position_ids.expand(batch, -1))
    starts = sequence_starts(batch, columns, mask, position_ids, packing["seq_idx"], packing["cu_seq_lens"])
    if starts is not None:
        if cache is not None or output_attentions:
            other = "a cache" if cache is not None else "output_attentions"
            raise ValueError(
                f"packed sequences and {other} cannot be combined; pass each sequence as a row of a padded batch."
            )
        real = torch.ones(batch, columns, dtype=torch.bool, device=device) if mask is None else mask
        layout = packed_layout(starts, real)
        lengths = [group.lengths for group in layout.groups]
    elif mask is not None and columns > 1:
        layout = padded_layout(mask)
        lengths = [layout.groups[0].lengths]
    else:
        layout = None
        lengths = [None if mask is None else mask[:, 0].to(torch.int64)]

    if position_ids is not None:
        position_ids = position_ids.to(device).expand(batch, -1)
    groups = [None] if layout is None else layout.groups
    given = [position_ids] * len(groups)
    if layout is not None and position_ids is not None:
        given = layout.split(position_ids)
    rotary = []
    for group, ids in zip(groups, given):
        if ids is None:
            ids = torch.arange(columns if group is None else group.index.shape[1], device=device)[None]
            if cache is not None and cache.seen is not None:
                ids = ids + cache.seen.to(device)[:, None]
        rotary.append(None if rotary_emb is None else rotary_emb(inputs_embeds, ids))
    longest = None if past is None else past + columns
    if output_attentions and longest is None:
        raise ValueError(
            "output_attentions=True: weights have one column per token read, and a fixed cache has no number of them; "
            "unfix() it first."
        )
    turns = None if rotary_emb is None else rotary_emb.turns(inputs_embeds, longest)
    if turns is not None and turns.at_limit is not None and looks:
        _check_counted(given, lengths, cache)
    return Rows(layout, lengths, rotary, longest if output_attentions else None, turns), starts is not None
