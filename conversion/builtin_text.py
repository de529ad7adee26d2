"""English text that every CPython carries: the help topics of `pydoc_data`, split into training and held-out text.

The held-out topics are those that conversion.nll and the README report on. Topics quote each other: whole paragraphs
of "compound" stand in "for", "while" and others. A topic that shares a paragraph with a held-out one is neither trained
nor evaluated on, and one that only repeats what longer training topics say is left out.
"""

from pydoc_data.topics import topics


HELD_OUT = ("specialnames", "string-methods", "compound")
PARAGRAPH = 60  # characters; shorter ones are headings and phrases that any text may share


def paragraphs(text: str) -> set[str]:
    """The paragraphs of a text that are long enough to be recognised, their white space made equal."""
    blocks = (" ".join(block.split()) for block in text.split("\n\n"))
    return {block for block in blocks if len(block) >= PARAGRAPH}


def held_out_topics() -> dict[str, str]:
    """Topics that nothing here trains on, by name: for evaluation."""
    return {name: topics[name] for name in HELD_OUT if name in topics}


def training_topics() -> dict[str, str]:
    """Topics to train on, by name, in alphabetical order; they share no paragraph with a held-out one."""
    held_out = set().union(*map(paragraphs, held_out_topics().values()))
    seen: set[str] = set()
    found = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        blocks = paragraphs(topics[name])
        if name in HELD_OUT or blocks & held_out or not blocks - seen:
            continue
        seen |= blocks
        found.append(name)
    return {name: topics[name] for name in sorted(found)}
