"""Tokenising what is trained on: plain text, chats and prompt/completion pairs, to `(ids, labels)` documents.

Which tokens of a chat are answers is read from the template's own `{% generation %}` marks where it has them. Otherwise
by prefix length: an answer's tokens are those that the chat up to and with it has beyond the chat before it with the
generation prompt. That needs a template whose text for a longer chat begins with its text for the shorter one, which is
checked for every row, not assumed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from .packing import IGNORED, Document
from .settings import DataSettings


GENERATION_MARK = "{% generation %}"
Reader = Callable[[Mapping[str, Any], object], Document | None]


def reader_for(tokenizer: PreTrainedTokenizerBase, data: DataSettings) -> tuple[Reader, list[str]]:
    """Return the function from a data row (and what `str` makes its name of, for messages) to a document, and the
    columns that it reads.

    Raises:
        ValueError: chats without a chat template.
    """
    if data.messages is not None:
        if tokenizer.chat_template is None:
            raise ValueError("data.messages: the tokenizer has no chat template; use prompt and completion columns.")
        return lambda row, name: read_chat(tokenizer, data, field(row, data.messages, list, name), name), [
            data.messages
        ]
    if data.prompt is not None:
        return lambda row, name: read_pair(tokenizer, data, row, name), [data.prompt, data.completion]
    return lambda row, name: read_text(tokenizer, data, field(row, data.text_column, str, name)), [data.text_column]


def field(row: Mapping[str, Any], column: str, kind: type | tuple[type, ...], name: object) -> Any:
    """`row[column]`, refused where it is missing, null or of another type (ValueError)."""
    value = row.get(column)
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        there = ", ".join(key for key, found in row.items() if found is not None)
        raise ValueError(
            f"{name}: its {column!r} is {'missing' if value is None else type(value).__name__}, must be "
            f"{' or '.join(item.__name__ for item in kinds)}; the row has {there or 'nothing'}. Correct or remove it."
        )
    return value


def read_text(tokenizer: PreTrainedTokenizerBase, data: DataSettings, text: str) -> Document | None:
    """Plain text, as the tokenizer starts a text, with the end-of-sequence token behind it; None for an empty one."""
    # verbose=False: no warning that the text is longer than the model; it is cut into sequences.
    ids = list(tokenizer(text, verbose=False)["input_ids"]) if text.strip() else []
    return _whole(_ended(ids, tokenizer, data.append_eos)) if ids else None


def _whole(ids: list[int]) -> Document:
    return ids, [IGNORED, *ids[1:]]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, append: bool) -> list[int]:
    end = tokenizer.eos_token_id
    return [*ids, end] if append and end is not None and ids[-1:] != [end] else ids


def read_pair(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, row: Mapping[str, Any], name: object
) -> Document | None:
    """Return a prompt and its completion: texts that are joined as they are, or lists of messages that make a chat."""
    prompt = field(row, data.prompt, (str, list), name)
    completion = field(row, data.completion, type(prompt), name)
    if isinstance(prompt, list):
        if tokenizer.chat_template is None:
            raise ValueError(f"{name}: holds messages, but the tokenizer has no chat template; give texts.")
        return read_chat(tokenizer, data, [*prompt, *completion], name, first=len(prompt))
    before = list(tokenizer(prompt)["input_ids"])
    after = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    if not after:
        return None
    ids = _ended(before + after, tokenizer, data.append_eos)
    if data.loss_on == "all":
        return _whole(ids)
    learnt = max(len(before), 1)
    return ids, [IGNORED] * learnt + ids[learnt:]


def read_chat(
    tokenizer: PreTrainedTokenizerBase, data: DataSettings, messages: list, name: object, first: int = 0
) -> Document | None:
    """Return a chat in the tokenizer's template; answers before message `first` are not trained on.

    Raises:
        ValueError: an entry that is no message, or a template that changes earlier text as a chat grows.
    """
    for message in messages:
        # Where another row's message has a field, Arrow gives it to this one too, as None.
        said = isinstance(message, Mapping) and (message.get("content") is not None or message.get("tool_calls"))
        if not said or message.get("role") is None:
            raise ValueError(f"{name}: {message!r} is no message; each needs a role and a content. Correct it.")
    if not messages:
        return None
    ids = _chat_ids(tokenizer, messages)
    if data.loss_on == "all":
        return _whole(ids)
    answers = answer_mask(tokenizer, messages, ids, name, first)
    return ids, [IGNORED] + [token if answer else IGNORED for token, answer in zip(ids[1:], answers[1:])]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list, prompt: bool = False) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)["input_ids"])


def answer_mask(
    tokenizer: PreTrainedTokenizerBase, messages: list, ids: list[int], name: object, first: int = 0
) -> list[bool]:
    """Which of the chat's tokens an assistant wrote; see the module's text."""
    if GENERATION_MARK in tokenizer.chat_template.replace("{%-", "{%").replace("-%}", "%}") and first == 0:
        marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return [bool(value) for value in marked["assistant_masks"]]
    mask = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        before = _chat_ids(tokenizer, messages[:index], prompt=True) if index else []
        after = _chat_ids(tokenizer, messages[: index + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                f"{name}: the chat template changes what it wrote before as the chat grows, so answers cannot be told "
                "apart; set data.loss_on: all, or mark answers with {% generation %} in the template."
            )
        mask[len(before) : len(after)] = [True] * (len(after) - len(before))
    return mask
