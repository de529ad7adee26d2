"""Sketches of keys, fitted to a model: which r numbers of a key say most about its scores (docs/model.md, "Storage").

    x = (U^T q)^T P^T (k - m)        the estimate of q^T (k - m);  q turned to distance W, k without its position
    m = E[k],  Ck = E[(k - m)(k - m)^T],  Cq = E[q q^T]  over the query heads of a key/value head
    E[(q^T (k - m) - x)^2] = |Cq^1/2 (1 - U P^T) Ck^1/2|_F^2    if queries and keys are drawn independently

By Eckart and Young the least is reached where Cq^1/2 U P^T Ck^1/2 is the truncated SVD of Cq^1/2 Ck^1/2 = A s B^T:
P = Ck^-1/2 B_r s_r^1/2 and U = Cq^-1/2 A_r s_r^1/2. What was never seen (fewer tokens than channels) has no variance;
its eigenvalue is taken as a billionth of the largest, so that the roots have inverses. All of it is float64.

Nothing is trained, and no text is read here: rows of ids come from the caller.

Shapes: B rows, T tokens, H query heads, G key/value heads, n = H / G, D head dim, r sketch size.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from modeling_bmojo import BMojoForCausalLM


LEAST = 1e-9  # of the largest eigenvalue
ROOM = 1.1  # keys of other texts may be larger than those that were seen
LARGEST = 127  # of an int8


class LayerMoments:
    """What the attention of one layer has seen: every key, and the moments of the queries.

    Args:
        attention: the layer's module. turn: cos and sin `[R]` of position W, the first half of sin negated; None: the
            layer has no positions.
    """

    def __init__(self, attention: nn.Module, turn: tuple[torch.Tensor, torch.Tensor] | None):
        self._attention, self._turn = attention, turn
        self._keys: list[torch.Tensor] = []
        self._squares: torch.Tensor | float = 0.0
        self._queries = 0

    def hook(self, module: nn.Module, arguments: tuple, options: dict) -> None:
        """See what goes into the attention: a pre-hook, because tied projections run on SSM outputs, too."""
        own = self._attention
        hidden = arguments[0] if arguments else options["hidden_states"]
        keys = _heads(own, own.k_proj(hidden), own.k_norm).flatten(0, 1)
        query = _turned(_heads(own, own.q_proj(hidden), own.q_norm).double(), self._turn)
        by_group = query.flatten(0, 1).unflatten(1, (keys.shape[1], -1))
        self._keys.append(keys)
        self._squares = self._squares + torch.einsum("tgnd,tgne->gde", by_group, by_group)
        self._queries += by_group.shape[0] * by_group.shape[2]

    def fitted(self, size: int) -> dict[str, torch.Tensor]:
        """Return the sketch of `size` numbers, by the names of `KeySketch`'s buffers, float32.

        Raises:
            ValueError: keys or queries that are not finite.
        """
        keys = torch.cat(self._keys).double()
        center = keys.mean(0)
        offset = keys - center
        spread = torch.einsum("tgd,tge->gde", offset, offset) / len(keys)
        return fit_pair(offset, spread, self._squares / self._queries, size) | {"center": center.float()}


def fit_pair(offset: torch.Tensor, spread: torch.Tensor, squares: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Return P, U and c of keys less their mean `[T, G, D]`, of whose moments Ck and Cq `[G, D, D]`.

    Raises:
        ValueError: moments that are not finite.
    """
    if not bool(spread.isfinite().all() and squares.isfinite().all()):
        raise ValueError(
            "the sketches cannot be fitted: keys or queries are not finite on this text; the weights are damaged, or "
            "leave the range of their dtype (choose float32 or bfloat16)."
        )
    (key_root, key_inverse), (query_root, query_inverse) = _roots(spread), _roots(squares)
    left, values, right = torch.linalg.svd(query_root @ key_root)
    weights = values[:, None, :size].sqrt()
    key_projection = key_inverse @ right.mT[..., :size] * weights
    query_projection = query_inverse @ left[..., :size] * weights
    largest = torch.einsum("tgd,gdr->tgr", offset, key_projection).abs().amax(0)
    # A channel that every key leaves at 0 has no scale of its own: any serves.
    scale = torch.where(largest > 0, largest * (ROOM / LARGEST), 1.0)
    found = {"key_projection": key_projection, "query_projection": query_projection, "scale": scale}
    return {name: value.float() for name, value in found.items()}


@torch.no_grad()
def fit_sketches(
    model: BMojoForCausalLM, rows: Sequence[torch.Tensor], sketch_size: int
) -> dict[int, dict[str, torch.Tensor]]:
    """Return the sketches of every layer that stores tokens: `key_projection` and `query_projection` `[G, D, r]`,
    `center` `[G, D]` and `scale` `[G, r]`, float32 on the CPU.

    Args:
        model: in evaluation mode; how it chooses stored tokens decides what the layers above see. rows: ids `[B, T]`
            without pads, on any device. sketch_size: r, at most D.

    Raises:
        ValueError: no layer stores tokens, no rows, a size that is none, or values that are not finite.
    """
    config, device = model.config, model.model.embed_tokens.weight.device
    layers = [index for index in range(config.num_hidden_layers) if config.layer_spec(index).stored > 0]
    if not layers:
        raise ValueError(
            f"storage_size={config.storage_size}: no layer stores tokens, so there is nothing to sketch; set "
            "storage_size > 0 and make some layers 'bmojo'."
        )
    if not 1 <= sketch_size <= config.head_dim:
        raise ValueError(
            f"storage_sketch_size={sketch_size}: must lie in [1, head_dim={config.head_dim}]; a key has no "
            "more numbers."
        )
    if not sum(row.numel() for row in rows):
        raise ValueError("rows: hold no tokens; give ids to fit the sketches to.")
    seen = {}
    with ExitStack() as stack:
        for index in layers:
            attention = model.model.layers[index].self_attn
            seen[index] = LayerMoments(attention, _turn_of(model, attention.use_rope, device))
            stack.callback(attention.register_forward_pre_hook(seen[index].hook, with_kwargs=True).remove)
        for row in rows:
            model.model(input_ids=row.to(device), use_cache=False)
    return {
        index: {name: value.cpu().contiguous() for name, value in moments.fitted(sketch_size).items()}
        for index, moments in seen.items()
    }


def _turn_of(
    model: BMojoForCausalLM, positions: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return RoPE at distance W, as `KeySketch` is asked with."""
    rotary = model.model.rotary_emb
    if rotary is None or not positions:
        return None
    cos, sin = rotary.turn(torch.tensor(model.config.window_size, device=device), rotary.attention_scaling)
    return cos.double(), sin.double()


def _turned(x: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """RoPE on `[..., D]`; channels beyond R stay as they are."""
    if turn is None:
        return x
    cos, sin = turn
    part, rest = x[..., : len(cos)], x[..., len(cos) :]
    return torch.cat([part * cos + part.roll(len(cos) // 2, dims=-1) * sin, rest], dim=-1)


def _heads(attention: nn.Module, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """`[B, T, H D]` to normed heads `[B, T, H, D]`, as the attention forms them."""
    split = (-1, attention.head_dim)
    return norm(x).unflatten(-1, split) if attention.norm_joins_heads else norm(x.unflatten(-1, split))


def _roots(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric square root of each `[D, D]` and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    largest = values[..., -1:]
    floor = torch.where(largest > 0, LEAST * largest, 1.0)
    roots = values.maximum(floor).sqrt()[..., None, :]
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT
