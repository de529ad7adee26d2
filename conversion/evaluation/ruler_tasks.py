"""RULER's synthetic tasks (Hsieh et al., 2024, section 3), made offline from any text: one sample from one seed.

    niah_*     needles "One of the special magic numbers for KEY is: VALUE." in noise, in text, or among needles
    vt         a chain of assignments in noise: which variables hold its value?
    cwe, fwe   lists of words: which are the most common?

What is hidden, how much of it, what is asked, and how many tokens an answer may take are the benchmark's. Its essays
and word lists are downloads, so text and words come from the text at hand, and the sentences around them are our own:
figures compare the models of one run, not with those that others publish.

A task makes a sample of a size (words or lines of hay), and `ruler.fitted` finds the size that fits.
"""

import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

from .ruler_words import ADJECTIVES, NOUNS


DEPTHS = [round(100 * index / 39) for index in range(40)]  # percent of the hay, as in the benchmark
_ADJECTIVES, _NOUNS = ADJECTIVES.split(), NOUNS.split()
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."


class Sample(NamedTuple):
    """A prompt in parts, `context + question + prefix`, what its answer must hold, and where in the hay that stands.

    prefix: the beginning of the answer, which the model goes on from. depths: in percent of the hay, none for words.
    """

    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    depths: tuple[int, ...] = ()


class Hay:
    """The text at hand: its words in order, and the different ones."""

    def __init__(self, text: str):
        self.words = text.split()

    @cached_property
    def vocabulary(self) -> list[str]:
        return sorted({word for word in self.words if re.fullmatch(r"[a-z]{4,9}", word)})

    def sentences(self, count: int, where: float) -> list[str]:
        """Return `count` words in a row, as sentences. where: in [0, 1], from the text's beginning to its end."""
        first = int(where * (len(self.words) - count + 1))
        return re.split(r"(?<=[.!?]) ", " ".join(self.words[first : first + count]))


class Order(NamedTuple):
    """What a sample is made by. length: tokens it shall fill. depth: percent, where a single needle goes."""

    chance: random.Random
    hay: Hay
    size: int
    length: int
    depth: int


@dataclass(frozen=True)
class Task:
    """make: a sample by an `Order`; raises ValueError if the hay is too small.

    new_tokens: how many an answer may take, which count in the length. least: the smallest size that makes sense.
    """

    make: Callable[[Order], Sample]
    new_tokens: int
    least: int


def _word_key(chance: random.Random) -> str:
    return f"{chance.choice(_ADJECTIVES)}-{chance.choice(_NOUNS)}"


def _uuid(chance: random.Random) -> str:
    return str(uuid.UUID(int=chance.getrandbits(128), version=4))


def _number(chance: random.Random) -> str:
    return str(chance.randint(10**6, 10**7 - 1))


MAKERS = {"words": _word_key, "numbers": _number, "uuids": _uuid}


def _distinct(make: Callable[[random.Random], str], count: int, chance: random.Random) -> list[str]:
    """Return `count` different ones: a key that stands for two values would have two right answers."""
    found: dict[str, None] = {}
    for _ in range(20 * count):
        found.setdefault(make(chance))
        if len(found) == count:
            return list(found)
    raise ValueError(f"ruler: there are fewer than {count:,} keys of words; give shorter ruler_lengths or other tasks.")


def _needles(order: Order, hay: str, keys: str, values: str, hidden: int = 1, each: int = 1, asked: int = 1) -> Sample:
    """`hidden` keys of `each` values stand in the hay, `asked` of the keys are asked for."""
    chance, straw = order.chance, order.size if hay == "needles" else 0
    names = _distinct(MAKERS[keys], hidden + straw, chance)
    held = [_distinct(MAKERS[values], each, chance) for _ in range(hidden)]
    lines = [(key, NEEDLE.format(kind=values, key=key, value=value)) for key, its in zip(names, held) for value in its]
    chance.shuffle(lines)
    depths = [order.depth] if len(lines) == 1 else sorted(chance.sample(DEPTHS, len(lines)))
    if hay == "text":
        straws, joint = _sentences(order), " "
    else:
        fillers = [NEEDLE.format(kind=values, key=key, value=MAKERS[values](chance)) for key in names[hidden:]]
        straws, joint = fillers or [NOISE] * order.size, "\n"
    for depth, (_, line) in reversed(list(zip(depths, lines))):
        straws.insert(len(straws) * depth // 100, line)
    wanted = sorted(chance.sample(range(hidden), asked))
    sought = [names[index] for index in wanted]
    answers = tuple(value for index in wanted for value in held[index])
    where = tuple(depth for depth, (key, _) in zip(depths, lines) if key in sought)
    one, kind = len(answers) == 1, values[:-1] if len(answers) == 1 else values
    asked_for = sought[0] if len(sought) == 1 else f"{', '.join(sought[:-1])}, and {sought[-1]}"
    opening = (
        f"{'A' if one else 'Some'} special magic {kind} {'is' if one else 'are'} hidden in the text below. Memorize "
        f"{'it' if one else 'them'}: you will be asked about {'it' if one else 'them'} afterwards.\n"
    )
    what = f"special magic {kind} for {asked_for} mentioned in the text above"
    question = f"\nWhat {'is' if one else 'are all'} the {what}?"
    prefix = f" The {what} {'is' if one else 'are'}"
    return Sample(opening + joint.join(straws), question, prefix, answers, where)


def _sentences(order: Order) -> list[str]:
    """Return `size` words of the text from a random place on, as sentences."""
    if order.size > len(order.hay.words):
        raise ValueError(f"ruler: {order.length:,} tokens need more text than is given; name more files or topics.")
    return order.hay.sentences(order.size, order.chance.random())


HOPS = 4


def _chain(chance: random.Random, letters: int, lines: int) -> tuple[str, str, list[str]]:
    """Return a value, noise with the chain that hands it on, and the variables that hold it."""
    names = _distinct(lambda c: "".join(c.choices(string.ascii_uppercase, k=letters)), HOPS + 1, chance)
    value = str(chance.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"] + [f"VAR {now} = VAR {before}" for before, now in pairwise(names)]
    straws = [NOISE] * lines
    for place, line in reversed(list(zip(sorted(chance.sample(range(lines), len(chain))), chain))):
        straws.insert(place, line)
    return value, "\n".join(straws), names


def _track(order: Order) -> Sample:
    """Make a chain of four hops, behind an example of the same kind."""
    opening = "Memorize and follow the assignments of variables that are hidden in the text below.\n\n"

    def ask(value: str) -> tuple[str, str]:
        question = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        return question, f" Answer: In the text above, {HOPS + 1} variables are assigned the value {value}, they are:"

    value, text, names = _chain(order.chance, 3, 5)
    example = opening + text + "".join(ask(value)) + " " + " ".join(names) + "\n\n"
    value, text, names = _chain(order.chance, 5, order.size)
    return Sample(example + opening + text, *ask(value), tuple(names))


COMMON = 10


def _word_list(order: Order, count: int, often: int, seldom: int, besides: str) -> tuple[str, list[str]]:
    """Return a numbered list in which ten words stand `often` and `count` - 10 others `seldom` times; and the ten.

    Args:
        besides: what is said around the list: its words are in none, or they would be no evidence of reading.
    """
    known = [word for word in order.hay.vocabulary if word not in besides]
    if count > len(known):
        raise ValueError(
            f"ruler: cwe of {order.length:,} tokens needs {count} different words, the text has {len(known)}; name "
            "more files or topics."
        )
    words = order.chance.sample(known, count)
    listed = words[:COMMON] * often + words[COMMON:] * seldom
    order.chance.shuffle(listed)
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), words[:COMMON]


def _common_words(order: Order) -> Sample:
    """Ten words ten times as often as the others (six times in short lists), behind an example."""
    short = order.length < 4096
    opening = "Below is a numbered list of words, some of which appear more often than others. Memorize those.\n"
    question = f"\nQuestion: What are the {COMMON} most common words in the list above?"
    prefix = f" Answer: The {COMMON} words that appear most often in the list are:"
    listed, common = _word_list(order, *((20, 3, 1) if short else (40, 10, 3)), question + prefix)
    said = " ".join(f"{place}. {word}" for place, word in enumerate(common, 1))
    example = f"{opening}{listed}{question}{prefix} {said}\n"
    listed, common = _word_list(order, order.size, *((6, 1) if short else (30, 3)), question + prefix)
    return Sample(example + opening + listed, question, prefix, tuple(common))


def _frequent_words(order: Order) -> Sample:
    """Words of six random letters by Zipf's law with exponent 2; the first of them is noise, the next three are asked
    for."""
    chance = order.chance
    words = _distinct(lambda c: "".join(c.choices(string.ascii_lowercase, k=6)), max(order.length // 50, 4), chance)
    words[0] = "..."
    share = order.size * 6 / math.pi**2  # zeta(2) = pi^2 / 6
    listed = [word for rank, word in enumerate(words, 1) for _ in range(int(share / rank**2))]
    chance.shuffle(listed)
    opening = "Read the coded text below and count how often each coded word appears. "
    question = "\nQuestion: Ignore the dots '...'. Which three words appear most often in the coded text above?"
    prefix = " Answer: The three words that appear most often in the coded text above are:"
    return Sample(opening + " ".join(listed), question, prefix, tuple(words[1:4]))


def _task(hay: str, keys: str, values: str, least: int = 1, **counts: int) -> Task:
    return Task(partial(_needles, hay=hay, keys=keys, values=values, **counts), 128, least)


TASKS = {
    "niah_single_1": _task("noise", "words", "numbers"),
    "niah_single_2": _task("text", "words", "numbers"),
    "niah_single_3": _task("text", "words", "uuids"),
    "niah_multikey_1": _task("text", "words", "numbers", hidden=4),
    "niah_multikey_2": _task("needles", "words", "numbers"),
    "niah_multikey_3": _task("needles", "uuids", "uuids"),
    "niah_multivalue": _task("text", "words", "numbers", each=4),
    "niah_multiquery": _task("text", "words", "numbers", hidden=4, asked=4),
    "vt": Task(_track, 30, HOPS + 1),
    "cwe": Task(_common_words, 120, COMMON),
    "fwe": Task(_frequent_words, 50, 16 * 2),
}


def make_sample(name: str, hay: Hay, size: int, length: int, seed: int, index: int) -> Sample:
    """Return sample `index` of a task; a single needle walks over all depths, in an order of the seed.

    Raises:
        ValueError: the hay holds too little for this size.
    """
    depths = list(DEPTHS)
    random.Random(f"{seed} {name} depths").shuffle(depths)
    chance = random.Random(f"{seed} {name} {length} {index}")
    return TASKS[name].make(Order(chance, hay, size, length, depths[index % len(depths)]))


def score(said: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that stand in what was said, whatever the case (the benchmark's metric)."""
    said = said.lower()
    return sum(answer.lower() in said for answer in answers) / len(answers)
