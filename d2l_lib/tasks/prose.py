"""Needles in prose: one sentence of this project in a text that people wrote, and a question about it.

A haystack is a run of pieces of a text, each of whole sentences. The needle stands between two sentences of one of
them, so haystacks that share a text share all other pieces.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from d2l_lib.documents import chunk_document, split_sentences

KINDS = ("number", "word", "date")
_N_DEPTHS = 10
_N_STRETCHES = 3  # of the texts, which the haystacks of a length share
_WORDS = (
    "lantern copper willow saffron harbor marble thunder velvet orchard falcon amber juniper compass raven meadow "
    "cinder maple pebble tulip anchor barley crystal ember ginger hazel ivory jasmine kettle lavender magnet nutmeg"
).split()
_MONTHS = "January February March April May June July August September October November December".split()


@dataclass(frozen=True)
class Needle:
    """A sentence with the answer in it, and what is asked."""

    kind: str
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class ProseHaystack:
    """Pieces of a text with a needle in one of them.

    place: the number of that piece. depth: where it stands, 0 to 1. length_tokens: of all pieces, without the needle.
    stretch: the number of the text; haystacks of one share all other pieces.
    """

    pieces: tuple[str, ...]
    needle: Needle
    place: int
    depth: float
    length_tokens: int
    stretch: int

    @property
    def text(self) -> str:
        """The haystack as one text."""
        return " ".join(self.pieces)


def draw_needle(rng: random.Random, kind: str) -> Needle:
    """A needle with a fresh answer; kind: "number", "word" or "date", ValueError for others."""
    if kind == "number":
        answer = f"{rng.randrange(1000, 10000)}"
        return Needle(kind, f"The special magic number is {answer}.", "What is the special magic number?", answer)
    if kind == "word":
        answer = rng.choice(_WORDS)
        sentence = f"The secret password of the garden club is {answer}."
        return Needle(kind, sentence, "What is the secret password of the garden club?", answer)
    if kind == "date":
        answer = f"{rng.choice(_MONTHS)} {rng.randrange(1, 29)}"
        sentence = f"The next meeting of the garden club takes place on {answer}."
        return Needle(kind, sentence, "When does the next meeting of the garden club take place?", answer)
    raise ValueError(f"unknown kind of needle {kind!r}; choose one of {', '.join(KINDS)}")


def haystacks(
    texts: Sequence[str],
    tokenizer,
    length_tokens: int,
    n: int,
    seed: int,
    *,
    piece_tokens: int,
) -> Iterator[ProseHaystack]:
    """n haystacks of one length: depths spread over ten bins, kinds in turn.

    piece_tokens: longest piece with its needle.

    ValueError for texts that are too short.
    """
    rng = random.Random(f"prose/{seed}/{length_tokens}")
    room = max(_count(tokenizer, draw_needle(rng, kind).sentence) for kind in KINDS for _ in range(20)) + 4
    limit = piece_tokens - room
    if limit < 1:
        raise ValueError(f"pieces of {piece_tokens} tokens have no room for a needle of {room}: make them longer")
    stretches = [_stretch(texts, tokenizer, length_tokens, limit, rng) for _ in range(min(_N_STRETCHES, n))]
    for i in range(n):
        stretch = i % len(stretches)
        pieces, length = stretches[stretch]
        depth = ((i % _N_DEPTHS) + rng.random()) / _N_DEPTHS
        place = min(int(depth * len(pieces)), len(pieces) - 1)
        needle = draw_needle(rng, KINDS[i % len(KINDS)])
        ends = [end for _, end in split_sentences(pieces[place])]
        cut = rng.choice([0, *ends])
        before, after = pieces[place][:cut].rstrip(), pieces[place][cut:].lstrip()
        changed = " ".join(filter(None, (before, needle.sentence, after)))
        changed_pieces = (*pieces[:place], changed, *pieces[place + 1 :])
        yield ProseHaystack(changed_pieces, needle, place, depth, length, stretch)


def _stretch(
    texts: Sequence[str], tokenizer, length_tokens: int, limit: int, rng: random.Random
) -> tuple[list[str], int]:
    """(pieces, their tokens): about `length_tokens` tokens of one text after another, from a drawn place on."""
    order = list(texts)
    rng.shuffle(order)
    start = rng.randrange(max(1, len(order[0]) // 2))
    sentences = split_sentences(order[0][start:])
    order[0] = order[0][start + sentences[min(1, len(sentences) - 1)][0] :]  # from the next sentence on
    pieces, length = [], 0
    for text in order:
        for chunk in chunk_document(text[: 8 * (length_tokens - length) + 100], tokenizer, limit):
            piece = " ".join(chunk.text.split())
            size = _count(tokenizer, piece)
            if pieces and length + size > length_tokens:
                return pieces, length
            pieces.append(piece)
            length += size
    raise ValueError(f"the texts hold {length} tokens: haystacks of {length_tokens} need more")


def _count(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
