"""Losses of the alignment, as sums over counted tokens; the caller divides by their number over the whole step.

    relative error   sum_r n_r  sum_t |s_t - y_t|^2 / sum_t |y_t|^2          hidden states, mixer outputs
    kl               tau^2 sum_t KL(softmax(y_t / tau) || softmax(s_t / tau))   next-token distributions
    ce               - sum_t log softmax(s_t)[next token]

s: student, y: teacher; t runs over the counted tokens of a row r, n_r is their number. Each is a sum of terms of single
rows or tokens, so a step cut into micro-batches or over devices in any way adds up to the same loss.

Logits of T tokens and a vocabulary of V are never formed in full: a chunk of tokens at a time, and the gradient with
respect to the hidden states is taken at once, while the chunk's logits exist.

Logits and losses are float32 under autocast too: kl lives on small differences of large logits, and bfloat16 rounds
more than those away (docs/training.md). The gradients' products stay in autocast's type, where that does no harm.

Shapes: B rows, T tokens, E hidden size, N counted tokens of the batch, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


def relative_error(student: torch.Tensor, teacher: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Squared error of `[B, T, E]`, relative to the teacher's square in the same row, times the row's counted tokens.

    Args:
        counted: `[B, T]` bool. A row without a counted token adds nothing.

    Returns:
        a scalar, in float32 at least: 0 for equal tensors, the number of counted tokens for a student of zeros.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(wide)
    error = ((student - teacher).square().sum(-1) * counted).sum(1)
    scale = (teacher.square().sum(-1) * counted).sum(1)
    number = counted.sum(1)
    return (number * error / scale.clamp(min=torch.finfo(wide).tiny)).sum()


class Head(NamedTuple):
    """What turns hidden states `[N, E]` into logits: `hidden @ weight.T / divisor`, weight `[V, E]`."""

    weight: torch.Tensor
    divisor: float = 1.0


def logit_losses(
    hidden: torch.Tensor,
    head: Head,
    teacher_hidden: torch.Tensor | None,
    teacher_head: Head | None,
    targets: torch.Tensor | None,
    temperature: float = 1.0,
    chunk: int = 256,
) -> tuple[torch.Tensor, torch.Tensor]:
    """kl and ce (see the module's text), summed over the tokens, and their gradients in one pass.

    Args:
        hidden: `[N, E]`. teacher_hidden: `[N, E']`, or None: no kl. targets: `[N]` next tokens, or None: no ce.
        chunk: tokens whose logits exist at a time; changes memory and speed, never the result.

    Returns:
        two scalars in float32 at least; 0 for a loss that is not wanted.
    """
    teacher_weight, divisor = (None, 1.0) if teacher_head is None else teacher_head
    return _LogitLosses.apply(
        hidden, head.weight, head.divisor, teacher_hidden, teacher_weight, divisor, targets, temperature, chunk
    )


class _LogitLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, divisor, teacher_hidden, teacher_weight, teacher_divisor, targets, tau, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = (teacher_hidden is not None, targets is not None)
        sums = [torch.zeros((), dtype=wide, device=hidden.device) for _ in wanted]
        needs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        to_hidden = [torch.empty_like(hidden) if needs and want else None for want in wanted]
        grow = ctx.needs_input_grad[1]
        to_weight = [torch.zeros_like(weight, dtype=wide) if grow and want else None for want in wanted]
        # Once for all chunks: no copy of weights that train, which are float32; of others V E 4 bytes meanwhile.
        head, their_head = (None if value is None else value.to(wide) for value in (weight, teacher_weight))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            gradients = [None, None]
            with torch.autocast(hidden.device.type, enabled=False):
                logits = F.linear(hidden[part].to(wide), head) / divisor
                if wanted[0]:
                    theirs = F.linear(teacher_hidden[part].to(wide), their_head) / teacher_divisor
                    value, gradients[0] = _kl(logits, theirs, tau)
                    sums[0] += value
                if wanted[1]:
                    value, gradients[1] = _ce(logits, targets[part])
                    sums[1] += value
            for place, gradient in enumerate(gradients if needs else ()):
                if gradient is None:
                    continue
                gradient = (gradient / divisor).to(weight.dtype)
                to_hidden[place][part] = gradient @ weight
                if grow:
                    to_weight[place] += gradient.T @ hidden[part].to(gradient.dtype)
        ctx.save_for_backward(*to_hidden, *to_weight)
        ctx.dtype = weight.dtype
        return tuple(sums)

    @staticmethod
    def backward(ctx, *upstream):
        hidden_kl, hidden_ce, weight_kl, weight_ce = ctx.saved_tensors
        to_hidden = _scaled_sum(upstream, (hidden_kl, hidden_ce))
        to_weight = _scaled_sum(upstream, (weight_kl, weight_ce))
        return to_hidden, None if to_weight is None else to_weight.to(ctx.dtype), *[None] * 7


def _scaled_sum(upstream, gradients):
    terms = [
        scale.to(gradient.dtype) * gradient for scale, gradient in zip(upstream, gradients) if gradient is not None
    ]
    return sum(terms) if terms else None


def _kl(logits: torch.Tensor, theirs: torch.Tensor, tau: float) -> tuple[torch.Tensor, torch.Tensor]:
    """tau^2 KL(theirs || logits) of a chunk `[n, V]` as a sum, and its gradient with respect to the logits."""
    ours = F.log_softmax(logits / tau, dim=-1)
    gap = F.log_softmax(theirs / tau, dim=-1)
    share = gap.exp()
    value = torch.linalg.vecdot(share, gap.sub_(ours)).sum()
    return tau**2 * value, ours.exp_().sub_(share).mul_(tau)


def _ce(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy of a chunk `[n, V]` with the tokens `[n]` as a sum, and its gradient with respect to the
    logits."""
    ours = F.log_softmax(logits, dim=-1)
    place = targets[:, None]
    value = -ours.gather(1, place).sum()
    gradient = ours.exp_()
    return value, gradient.scatter_add_(1, place, gradient.new_full((1, 1), -1.0).expand_as(place))
