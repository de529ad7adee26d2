"""KeySketch: a few bytes per key that say which stored tokens a query may want (docs/model.md, "Storage").

    z_s = clamp(round(P^T (k_s - m) / c), -127, 127)     k_s without its position; P [D, r], m [D], c [r] per head
    x_t,s = sigma (c U^T R_W q_t) . z_s                  the query turned as if the token were W away; U [D, r]

P and U are fitted together, so that x is the best estimate of the score that r numbers allow
(`conversion.fit_storage`); they are saved with the model. The sketch only chooses: what is fetched is attended to with
its exact key.

Shapes: R rows, T tokens, H query heads, G key/value heads, D head dim, r sketch size.
"""

import torch
from transformers import initialization as init
from transformers.utils import logging

from .buffers_bmojo import WideBuffers
from .configuration_bmojo import BMojoConfig
from .share_bmojo import UNCUT


logger = logging.get_logger("modeling_bmojo.sketches")

LARGEST = 127  # of an int8
FIRST_SCALE = 1 / 16  # before a fit: keys of up to 8 per channel are told apart


class KeySketch(WideBuffers):
    """P, U, m and c of one layer, buffers: nothing trains them, everything saves them. In fewer bits the choice would
    change, and a small c become zero.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: BMojoConfig):
        super().__init__()
        heads, size, dim = config.num_key_value_heads, config.storage_sketch_size, config.head_dim
        self.register_buffer("key_projection", torch.zeros(heads, dim, size))
        self.register_buffer("query_projection", torch.zeros(heads, dim, size))
        self.register_buffer("center", torch.zeros(heads, dim))
        self.register_buffer("scale", torch.full((heads, size), FIRST_SCALE))
        self.cut = UNCUT  # to the key/value heads of one device

    @torch.no_grad()
    def initialise(self, config: BMojoConfig) -> None:
        """Fill P and U with random directions, orthogonal to each other: they serve until there are keys to fit."""
        logger.warning_once(
            "storage_sketch_size: the sketches of keys are random, and name the right tokens less often than fitted "
            "ones; fit them with `python -m conversion.fit_storage FOLDER`."
        )
        made = torch.linalg.qr(torch.randn(self.key_projection.shape, dtype=torch.float32))[0]
        init.copy_(self.key_projection, made)
        init.copy_(self.query_projection, made)
        init.zeros_(self.center)
        init.constant_(self.scale, FIRST_SCALE)

    @torch.no_grad()
    def accept(self, **fitted: torch.Tensor) -> None:
        """Take fitted values in: `key_projection`, `query_projection` `[G, D, r]`, `center` `[G, D]`, `scale` `[G, r]`.

        Raises:
            ValueError: other shapes, values that are not finite, or a scale that is not positive.
        """
        for name, own in self.named_buffers():
            new = fitted[name]
            if new.shape != own.shape or not bool(new.isfinite().all()):
                raise ValueError(
                    f"{name} of shape {list(new.shape)}: must be finite numbers of shape {list(own.shape)}; fit the "
                    "sketch to keys of this model."
                )
        if not bool((fitted["scale"] > 0).all()):
            raise ValueError(f"scale={fitted['scale'].min().item()}: must be positive; fit it to keys that vary.")
        for name, own in self.named_buffers():
            own.copy_(fitted[name])

    @torch.no_grad()
    def keys(self, keys: torch.Tensor) -> torch.Tensor:
        """z int8 `[R, T, G, r]` of keys `[R, T, G, D]` without positions."""
        wide = _wide(keys)
        fitted = (self.key_projection, self.center, self.scale)
        projection, center, scale = (self.cut(value, 0).to(wide.dtype) for value in fitted)
        size = ((wide - center).transpose(1, 2) @ projection).transpose(1, 2) / scale
        return size.round_().clamp_(-LARGEST, LARGEST).to(torch.int8)

    @torch.no_grad()
    def queries(self, queries: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return what gives x with z, `[R, T, H, r]`, of queries `[R, T, H, D]` turned as if at distance W."""
        wide = _wide(queries)
        projection, scale = (self.cut(value, 0).to(wide.dtype) for value in (self.query_projection, self.scale))
        by_group = wide.unflatten(2, (projection.shape[0], -1))
        projection = projection * (scale * scaling)[:, None]
        asked = by_group.transpose(1, 2).flatten(2, 3) @ projection
        return asked.unflatten(2, by_group.shape[1:4:2]).transpose(1, 2).flatten(2, 3)

    def extra_repr(self) -> str:
        return f"heads, head_dim, size = {tuple(self.key_projection.shape)}"


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


__all__ = ["KeySketch"]
