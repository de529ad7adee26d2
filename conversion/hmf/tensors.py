"""The account of an import: which rows of which source tensors make each tensor of ours, by names and shapes alone.

    source                                              ours, in layer i
    model.layers.i.self_attn.X (pattern *), swa.X (SWA)  self_attn.X
    bmojo_f.bmojo_attn.X_proj, X_norm                    self_attn.X_proj, X_norm
    bmojo_f.bmojo_attn.X_proj_, X_norm_                  self_attn.fading_X_proj, fading_X_norm
    bmojo_f.mamba., bmojo_f.gdn., bmojo_f.gka.           fading., by the table of `mixers`
    mamba., gdn., gka.                                   the same

Norms, MLPs, embeddings and head have the same names. Whatever is missing, of another shape or without a place is
refused before a tensor is read.
"""

import math
import re
from collections.abc import Iterator, Mapping

import torch

from ..common.weights import Weights, row_blocks
from .config import BMOJO, WINDOW, Layout
from .mixers import Rows, sizes_of


Shape = tuple[int, ...]
Account = dict[str, tuple[Rows, ...]]
FLOATS = ("float64", "float32", "bfloat16", "float16")
RECOMPUTED = re.compile(r"model\.(layers\.\d+\.\w+\.)?rotary_emb\.(original_)?inv_freq")


def account_for(layout: Layout, source: Weights, target: Mapping[str, Shape], what: str) -> tuple[Account, list[str]]:
    """Return what each of our tensors is made of, and the source's tensors that are not needed.

    Args:
        target: names and shapes of ours. what: the source's name in messages.

    Raises:
        ValueError: listing the source's tensors that are missing, quantised, of another shape, or without a place.
    """
    sizes, account, used, problems = sizes_of(layout.stated), {}, set(), []
    for name, shape in target.items():
        account[name] = pieces = _pieces(layout, name)
        for piece in pieces:
            if piece.made is not None:
                continue
            used.add(piece.name)
            wanted = shape if piece.rows is None else (sizes[piece.rows], *shape[1:])
            found = source.shapes.get(piece.name)
            if found is None:
                problems.append(f"{piece.name} {list(wanted)} is missing")
            elif _flat(found) != _flat(wanted):
                problems.append(f"{piece.name} has shape {list(found)}, but config.json implies {list(wanted)}")
            elif source.dtypes[piece.name] not in FLOATS:
                problems.append(
                    f"{piece.name} is quantised ({source.dtypes[piece.name]}); give the unquantised checkpoint"
                )
    left = sorted(source.shapes.keys() - used)
    dropped = [name for name in left if _not_needed(layout, name)]
    problems += [f"{name} {list(source.shapes[name])} has no place" for name in left if name not in dropped]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"{what}: its tensors do not fit its config: {shown}. Check that the files belong together.")
    return account, dropped


def _flat(shape: Shape) -> Shape:
    """Return the shape without the axis of length 1 that a depthwise convolution's weight has in the middle."""
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape


def _not_needed(layout: Layout, name: str) -> bool:
    """Whether a tensor is left behind because loading makes it anew: inverse frequencies, a tied head."""
    tied = layout.stated["tie_word_embeddings"] and name == "lm_head.weight"
    return tied or RECOMPUTED.fullmatch(name) is not None


def _pieces(layout: Layout, name: str) -> tuple[Rows, ...]:
    """Return what our tensor `name` is made of, in the order of its rows, by full names."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(self_attn|fading)\.(.+)", name)
    if match is None:
        return (Rows(name),)
    index, part, rest = int(match[1]), match[2], match[3]
    token = layout.tokens[index]
    layer = f"model.layers.{index}."
    if part == "self_attn":
        return (Rows(layer + _attention_name(token, rest)),)
    place = ("bmojo_f." if token == BMOJO else "") + layout.mixer.place
    found = layout.mixer.tensors(layout.section)[rest]
    return tuple(Rows(f"{layer}{place}.{piece.name}", piece.rows, piece.made) for piece in found)


def _attention_name(token: str, rest: str) -> str:
    if token == WINDOW:
        return f"swa.{rest}"
    if token != BMOJO:
        return f"self_attn.{rest}"
    if rest.startswith("fading_"):
        module, _, kind = rest.removeprefix("fading_").rpartition(".")
        return f"bmojo_f.bmojo_attn.{module}_.{kind}"
    return f"bmojo_f.bmojo_attn.{rest}"


def dtype_of(pieces: tuple[Rows, ...], source: Weights, default: torch.dtype) -> torch.dtype:
    """Return the dtype that holds all pieces as they are."""
    own = [getattr(torch, source.dtypes[piece.name]) for piece in pieces if piece.made is None]
    found = own[0] if own else default
    for dtype in own[1:]:
        found = torch.promote_types(found, dtype)
    return found


def joined(
    pieces: tuple[Rows, ...], shape: Shape, dtype: torch.dtype, source: Weights, sizes: Mapping[str, int]
) -> torch.Tensor:
    """Return one of our tensors, its rows copied a few at a time.

    Raises:
        ValueError: it holds values that are not finite.
    """
    out, at = torch.empty(shape, dtype=dtype), 0
    for piece in pieces:
        if piece.made is not None:
            made = piece.made(sizes)
            out[at : at + len(made)] = made
            at += len(made)
            continue
        for block in _blocks(piece, source):
            out[at : at + len(block)] = block.reshape(len(block), *shape[1:])
            if not all(bool(end.isfinite()) for end in out[at : at + len(block)].aminmax()):
                raise ValueError(f"tensor {piece.name} of the source holds values that are not finite; fetch it again.")
            at += len(block)
    return out


def _blocks(piece: Rows, source: Weights) -> Iterator[torch.Tensor]:
    rows, *rest = source.shapes[piece.name]
    size = getattr(torch, source.dtypes[piece.name]).itemsize * math.prod(rest)
    return (source.rows(piece.name, first, last) for first, last in row_blocks(rows, size))


__all__ = ["Account", "account_for", "dtype_of", "joined"]
