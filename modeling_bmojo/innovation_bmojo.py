"""The innovation test: how much a token was not expected, one class per test (B'MOJO, Algorithm 1, line 3).

    e_t = |v_t - v_hat_t|^2 / (|v_t|^2 + |v_hat_t|^2 + eps)      v_t what is predicted, v_hat_t what was expected

The eidetic memory keeps the tokens with the largest e (`eidetic_bmojo`). A test says which signal of its layer it
judges by, what it has to remember of the past, and the score. It is entered in `configuration_bmojo.INNOVATIONS` and
nothing else has to know it: choices, cache, kernels and the table in docs/model.md follow from the class.

Shapes: R mixer rows, T tokens, E hidden size, G key/value heads, D head dim, I inner width of the SSM, k taps.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig

from .dispatch_bmojo import Kernels
from .fields_bmojo import require_int
from .memory_ops import key_innovation, output_innovation, prediction_error, widest
from .share_bmojo import Share
from .states_bmojo import State, shift


# What a test may judge by (`Innovation.signal`), and what `score` is given then.
SIGNALS = {
    "key": "keys without positions",
    "output": "the fading memory's outputs",
    "prediction": "the SSM's inputs, and what its state said of them",
    None: "nothing",
}


class Innovation:
    """One test. Without parameters and without tensors of its own: what it remembers are states of the cache.

    name: its value of `config.innovation`. signal: what it judges by, see `score`; None: by nothing.
    operations: those of `dispatch_bmojo` that it runs. has_ssm: a layer without fading tokens has an SSM all the same.
    about: its row in the documentation. adds_up: where devices have a share of the heads each, and so of the signals
    "key" and "prediction", `score` adds up over `share` what they find, so that all of them find the same. learns: its
    scores have a gradient where one is recorded, for `config.innovation_gradient`.
    """

    name: str
    signal: str | None = None
    operations: tuple[str, ...] = ()
    has_ssm = True
    adds_up = False
    learns = False
    share: Share | None = None
    about: str

    def __init__(self, config: PreTrainedConfig):
        """Take from the configuration what the test needs."""

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Raise ValueError for a value of this test's own fields that breaks a rule."""

    def states(self, config: PreTrainedConfig) -> dict[str, State]:
        """Return what it remembers of the past."""
        return {}

    def score(
        self,
        signal: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        lengths: torch.Tensor | None,
        layer: Any,
        kernels: Kernels,
    ) -> torch.Tensor:
        """Innovation `[R, T]` of new tokens, in [0, 2]. Runs under no_grad unless the configuration wants a gradient.

        Args:
            signal: as `signal` names it: "key" `[R, T, G, D]` keys without positions; "output" `[R, T, E]` the fading
                memory's outputs; "prediction": the SSM's inputs and what its state said of them, `[R, T, I]` each;
                None: the keys, of which the shape alone is meant.
            lengths: `[R]` real tokens, which come first; None: all. layer: the cache's states, which it moves on (its
                own by name, `seen` `[R]` tokens read before, zeros before the first token); None starts from nothing.
        """
        raise NotImplementedError


class OutputInnovation(Innovation):
    """v_t is the fading memory's output, expected to be the mean of the k outputs before it (Algorithm 1)."""

    name, signal, operations, learns = "output", "output", ("innovation",), True
    about = "the fading memory's output, by the mean of the last `innovation_taps` outputs (the paper's test)"

    @classmethod
    def check(cls, config):
        require_int(config, "innovation_taps", 1, "the predictor needs at least one past output")

    def __init__(self, config):
        self.taps = config.innovation_taps

    def states(self, config):
        return {"outputs": State((self.taps, config.hidden_size))}

    def score(self, signal, lengths, layer, kernels):
        history = signal.new_zeros(signal.shape[0], self.taps, signal.shape[2]) if layer is None else layer.outputs
        with torch.no_grad():
            surprise = kernels.run("innovation", signal, history)
        if torch.is_grad_enabled():  # only this form has one; what is chosen is the same with it and without
            learnt = output_innovation(signal, history.clone())  # the history moves on before the backward
            surprise = surprise + (learnt - learnt.detach())
        if layer is not None:
            shift(layer.outputs, signal, lengths)
        return surprise


class StateInnovation(Innovation):
    """v_t is the SSM's input, expected to be what its state says when it is read with the token's own write key (the
    paper's figure)."""

    name, signal, adds_up = "state", "prediction", True
    about = "the SSM's input, by reading the state with the token's own write key (the paper's figure)"

    def score(self, signal, lengths, layer, kernels):
        return prediction_error(*signal, None if self.share is None else self.share.sum)


class KeyInnovation(Innovation):
    """v_t is the token's attention key without its position, expected to be the mean of all keys before it."""

    name, signal, adds_up, learns = "key", "key", True, True
    about = "the token's attention key, by the mean of all keys before it (best on grafts, docs/log.md)"

    def states(self, config):
        return {"key_sum": State((config.num_key_value_heads, config.head_dim), "widest")}

    def score(self, signal, lengths, layer, kernels):
        keys = signal
        if layer is None:
            nothing = torch.zeros(keys.shape[0], *keys.shape[2:], dtype=widest(keys.device), device=keys.device)
            count = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
            return key_innovation(keys, nothing, count, self._average())
        before = layer.key_sum.clone() if torch.is_grad_enabled() else layer.key_sum  # moves on before the backward
        surprise = key_innovation(keys, before, layer.seen, self._average())
        with torch.no_grad():
            if lengths is not None:
                pads = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
                keys = keys.masked_fill(pads[..., None, None], 0.0)
            layer.key_sum += keys.sum(dim=1, dtype=layer.key_sum.dtype)
        return surprise

    def _average(self):
        share = self.share
        return None if share is None else lambda error: share.sum(error) / share.size


class ConstantInnovation(Innovation):
    """Every token surprises alike. Of equals the older stays, so the first M tokens do: attention sinks, a baseline."""

    name, has_ssm = "constant", False
    about = "nothing: all tokens are equal, and of equals the older stays, so the first M do (attention sinks)"

    def score(self, signal, lengths, layer, kernels):
        return torch.ones(signal.shape[:2], dtype=torch.float32, device=signal.device)


__all__ = ["ConstantInnovation", "Innovation", "KeyInnovation", "OutputInnovation", "StateInnovation"]
