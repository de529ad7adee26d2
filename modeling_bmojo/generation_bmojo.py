"""`generate()` for B'MOJO: transformers' own loops on a `BMojoCache`.

What is said here and nowhere else: the modes that a bounded memory cannot serve, which tokens a prompt has left to
read, and that a row that has ended reads nothing more (transformers feeds it pads as if they were text).
"""

import os
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode, StoppingCriteriaList

from .cache_bmojo import BMojoCache
from .compat_bmojo import CACHE_NAME, cache_argument
from .decoding_step_bmojo import DecodingStep
from .inputs_bmojo import check_cache, new_token_mask
from .prefix_bmojo import PrefixMemory
from .prefix_environment_bmojo import known_by_environment
from .rollback_bmojo import DRAFTED


DRAFTS = ("prompt_lookup_num_tokens", "num_assistant_tokens")  # how many tokens generate() drafts at a time


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember, during one generate(), which rows of the batch got a pad for their last token.

    padded: `[B]` bool, the rows that had ended before the last token was chosen (the token that ends a row is still
        text). None: no row; always so where nothing makes generate() put pads behind a row's end.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        super().__init__(criteria)
        self.ended: torch.Tensor | None = None
        self.padded: torch.Tensor | None = None
        self.pads_follow = any(hasattr(criterion, "eos_token_id") for criterion in criteria)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs) -> torch.BoolTensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if self.pads_follow and input_ids.shape[0] > 1:  # a batch of one stops with its row
            self.padded = self.ended
            self.ended = done if self.ended is None else self.ended | done
        return done


class BMojoGenerationMixin(GenerationMixin):
    """`GenerationMixin` whose memory is a `BMojoCache`."""

    def generate(
        self,
        inputs=None,
        generation_config: GenerationConfig | None = None,
        *,
        prefix_memory: PrefixMemory | None = None,
        **kwargs,
    ):
        """`GenerationMixin.generate`, on a `BMojoCache`; with `rollback_limit` where drafts are taken back.

        Args:
            prefix_memory: what was read before: of a prompt that begins with it the rest alone is read. None: that of
                the environment variable `BMOJO_PREFIX_MEMORY`, if there is one (docs/serving.md).

        Raises:
            ValueError: for contrastive search, early exit, another cache implementation, a mask that does not fit the
                prompt, or a cache of another kind or model.
        """
        _refuse_modes([kwargs, vars(generation_config or self.generation_config)])
        cache, mask = cache_argument(kwargs), kwargs.get("attention_mask")
        if getattr(generation_config, "is_assistant", False) and mask is None and kwargs.get("input_ids") is not None:
            # What is drafted may be a pad's number; transformers would take it for one.
            mask = kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        if cache is not None:
            check_cache(cache, self.config)
            kwargs[CACHE_NAME] = cache
        prompt = next(
            (v for v in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")) if v is not None), None
        )
        if prefix_memory is not None:
            cache = _known(self, prefix_memory, prompt, mask, cache)
        elif cache is None:
            cache = known_by_environment(self, prompt, {**vars(generation_config or self.generation_config), **kwargs})
        kwargs |= {} if cache is None else {CACHE_NAME: cache}
        if mask is not None and prompt is not None and prompt.dim() > 1:
            past = 0 if cache is None else cache.get_seq_length()
            new_token_mask(mask, *prompt.shape[:2], past=past)
            _refuse_empty_rows(mask)
            if 0 < past < mask.shape[1]:
                # Here and not only in forward: transformers drops a mask of nothing but ones on the way. And before it
                # repeats the rows of the prompt, which a cache that goes on with several texts has done already.
                each = max(cache.batch_size // len(mask), 1)
                cache.check_mask(mask[:, :past].repeat_interleave(each, dim=0))
        return super().generate(inputs, generation_config, **kwargs)

    def prefix_memory(self, folder: str | os.PathLike, max_bytes: int | None = None) -> PrefixMemory:
        """Return the texts that this model has read and kept in a folder; see `PrefixMemory`."""
        return PrefixMemory(self, folder, max_bytes)

    def decoding_step(self, cache: BMojoCache, masked: bool = False) -> DecodingStep:
        """Return a step as a module of tensors alone, for export; arguments and errors as of `DecodingStep`."""
        return DecodingStep(self, cache, masked)

    def init_continuous_batching(self, *args, **kwargs):
        """Where `generate_batch` and the continuous batching of `transformers serve` begin: refused."""
        raise ValueError(
            "generate_batch, continuous batching: its paged cache keeps keys and values alone, not SSM states and the "
            "eidetic memory; use generate() on a padded batch."
        )

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, attention_mask=None, ended_rows=None, **kwargs
    ):
        """Override transformers' method. ended_rows: of this generate(); None outside of sampling and greedy search."""
        cache = cache_argument(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        if past and next_sequence_length is not None and next_sequence_length <= 0:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens and the cache has read {past}: nothing new to read; "
                "pass the whole text, or only the new tokens with an attention_mask for what was read and what is new."
            )
        if past and next_sequence_length is None and cache.rollback is not None and cache.rollback.known:
            next_sequence_length, cache.rollback.known = input_ids.shape[1] - cache.rollback.known, 0
        if past and next_sequence_length is not None and cache.rollback is not None and cache.rollback.drafting:
            _let_drafts_be_taken_back(cache, next_sequence_length)
        padded = None if ended_rows is None else ended_rows.padded
        if padded is not None and cache is not None and bool(padded.any()):
            attention_mask = _without(attention_mask, padded.to(input_ids.device))
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    def _sample(self, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        ended_rows = EndedRows(stopping_criteria)
        return super()._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=ended_rows,
            generation_config=generation_config,
            ended_rows=ended_rows,
            **kwargs,
        )

    def _assisted_decoding(self, input_ids, *args, **kwargs):
        cache, mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        asked = [kwargs.get("generation_config"), getattr(kwargs.get("assistant_model"), "generation_config", None)]
        drafted = max(getattr(config, name, None) or 0 for config in asked for name in DRAFTS)
        _let_drafts_be_taken_back(cache, 2 * drafted)  # an assistant's tokens may be more of ours
        stated = getattr(kwargs.get("generation_config"), "_mask_length", None) if mask is None else mask.shape[1]
        if cache is not None and stated == input_ids.shape[1]:
            # transformers would read a text anew whose beginning the cache has read.
            cache.rollback.known = cache.get_seq_length()
        if cache is not None:
            cache.rollback.drafting = True
        try:
            return super()._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            if cache is not None:
                cache.rollback.drafting, cache.rollback.known = False, 0

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs) -> None:
        """None: the model counts real tokens itself, and goes on rightly behind right and inner pads."""

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        if (cache := model_kwargs.get(CACHE_NAME)) is not None:
            cache._is_user_defined = True
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            if cache.one_for_all and rows > 1:
                cache.batch_repeat_interleave(rows)
            cache.one_for_all = False  # from here on it is a cache like any other
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE_NAME] = BMojoCache(self.config)
        if generation_mode == GenerationMode.ASSISTED_GENERATION or getattr(generation_config, "is_assistant", False):
            _let_drafts_be_taken_back(model_kwargs.get(CACHE_NAME), DRAFTED)

    @staticmethod
    def create_masks_for_generate(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
        """Return the 2-D mask as it is: the memories decide what a token sees."""
        return attention_mask


def _let_drafts_be_taken_back(cache: BMojoCache | None, count: int) -> None:
    """Let a cache take back so many columns, unless it can."""
    if cache is not None and (cache.rollback is None or cache.rollback.limit < count):
        cache.allow_rollback(max(count, DRAFTED))


def _without(attention_mask: torch.Tensor | None, padded: torch.Tensor) -> torch.Tensor:
    """Return the mask for one new column, a pad in the rows `padded` `[B]`: of all columns if there was a mask, else of
    it."""
    if attention_mask is None:
        return (~padded)[:, None]
    # In place: generate() made this tensor for this step, and makes the next step's from it.
    attention_mask[:, -1].masked_fill_(padded.to(attention_mask.device), 0)
    return attention_mask


def _known(model, prefixes: PrefixMemory, prompt: torch.Tensor | None, mask: torch.Tensor | None, cache):
    """Return the cache of the longest known beginning of a prompt, None if there is none."""
    if type(prefixes).__name__ != "PrefixMemory":  # by name, as in `PrefixMemory`
        raise ValueError(f"prefix_memory={prefixes!r}: must be what model.prefix_memory(folder) returns.")
    if all(module is not prefixes.reader for module in model.modules()):
        raise ValueError("prefix_memory is another model's; make one with this model's prefix_memory(folder).")
    if cache is not None:
        raise ValueError("prefix_memory and a cache: both say what was read before; pass one of them.")
    plain = isinstance(prompt, torch.Tensor) and prompt.dim() == 2 and not prompt.is_floating_point()
    if not plain or (mask is not None and not bool(mask.all())):
        raise ValueError("prefix_memory: needs input_ids [1, tokens] without pads; ask row by row.")
    cache = prefixes.longest(prompt)
    if cache is not None:
        cache.one_for_all = True
    return cache


def _refuse_empty_rows(mask: torch.Tensor) -> None:
    empty = ~mask.bool().any(dim=1)
    if bool(empty.any()):
        row = int(empty.to(torch.int8).argmax())
        raise ValueError(
            f"attention_mask[{row}] is all zeros: every row needs at least one real token to go on from; drop the "
            "empty row, or give it a start token such as bos."
        )


def _refuse_modes(places: list[dict]) -> None:
    """Raise ValueError for generation modes that a bounded memory forbids; the first of `places` to name one binds."""

    def asked(name: str):
        return next((place[name] for place in places if name in place), None)

    refused = {
        "penalty_alpha": "contrastive search goes on with several candidates; use sampling (do_sample=True)",
        "assistant_early_exit": "early exit drafts with fewer layers on one cache; give an assistant_model",
    }
    for name, reason in refused.items():
        if asked(name):
            value = asked(name) if isinstance(asked(name), int | float) else type(asked(name)).__name__
            raise ValueError(f"{name}={value}: one memory per row cannot serve it; {reason}.")
    if asked("cache_implementation") not in (None, "dynamic"):
        raise ValueError(
            f"cache_implementation={asked('cache_implementation')!r}: a B'MOJO memory is constant in size and has "
            "one form; leave it out (BMojoCache.offload and .to move it between devices)."
        )


__all__ = ["BMojoGenerationMixin"]
