"""Questions on texts by a small model, in English: one sentence and one opening at a time, and what of it is left out.

    document -> (sentence, opening) pairs -> the writer goes on from the opening -> question, kind = the opening

A model of 135 M parameters asked for a list of questions asks what "the text" is about. It does better with one
sentence before it and the first word of the question in its mouth. An opening is used where the sentence has what it
asks for: "When" with a year or a month, "Who" with a name. The sentence is the question's evidence.

Much of what comes is still useless. `question_problem` and `answer_problem` name the reasons for which a question or
an answer is left out; `formats.shards` counts them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from d2l_lib.documents import question_ids, split_sentences

PROMPT = "{sentence}\n\nWrite a short question about this sentence."
_MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
_COUNT = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|"
    "nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million"
)
OPENINGS = {  # opening: what a sentence has for it
    "Who": r"(?:[a-z,] )[A-Z]\w+ (?:[a-z]{2,3} )?[A-Z]\w+|^[A-Z]\w+ [A-Z]\w+ \w+",
    "When": rf"\b(?:1\d|20)\d\d\b|\b(?:{_MONTH})\b",
    "Where": rf"\b(?:in|at|near|from|between|off) (?:the )?(?!{_MONTH})[A-Z]\w+",
    "How many": rf"\b(?!(?:1\d|20)\d\d\b)\d[\d,.]* [a-z]|\b(?:{_COUNT}) [a-z]",
    "Why": r"\b(?:because|since|so that|which is why)\b",
    "What did": r"\b\w+ed\b",
}
_LONGEST_COPY, _LONGEST_ANSWER_COPY = 12, 40  # words in a row that the document may have too
_LONGEST_ROUND = 8  # words
_ABOUT_THE_TEXT = re.compile(
    r"\b(?:the|this|that|these|those|following|above|given)\s+(?:\w+\s+)?(?:text|passage|paragraph|article|document|"
    r"excerpt|sentences?|questions?|answers?|author|writer|statement|list)\b",
    re.I,
)
_COMMON = frozenset(  # words of four letters and more that any question may have
    "about after also been before could does during from happen happened have into many might much place shall should "
    "some than that their them then there these they this those were what when where which while whose will with would "
    "your".split()
)


class Written(NamedTuple):
    """A question that a model wrote: its text, its opening in lower case, and the characters of its sentence."""

    text: str
    kind: str
    span: tuple[int, int]


def write_questions(
    rng: random.Random,
    texts: Sequence[str],
    writer,
    counts: Counter,
    *,
    most: int,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[list[Written]]:
    """For each text the questions that `writer` (an engine) wrote on it, at most `most`.

    counts: gains "writer_REASON" for each question that was left out (see `question_problem`).
    max_new_tokens: of a question. temperature: 0 is greedy.
    """
    chosen = [(place, *pair) for place, text in enumerate(texts) for pair in _draw_pairs(rng, text, most)]
    sentences = [PROMPT.format(sentence=texts[place][slice(*span)]) for place, span, _ in chosen]
    tokenizer = writer.tokenizer
    begun = [opening for *_, opening in chosen]
    prompts = [
        ids + tokenizer(opening, add_special_tokens=False)["input_ids"]
        for ids, opening in zip(question_ids(tokenizer, sentences), begun, strict=True)
    ]
    seed = rng.getrandbits(63)
    replies = writer.reply(prompts, max_new_tokens, temperature, seed)
    written: list[list[Written]] = [[] for _ in texts]
    for (place, span, opening), reply in zip(chosen, replies, strict=True):
        if reply is None:
            counts["writer_too_long"] += 1
            continue
        said = opening + tokenizer.decode(reply.ids, skip_special_tokens=True)
        question, mark, _ = said.partition("?")
        question = " ".join(question.split()) + mark
        own = written[place]
        if not mark:
            problem = "not_a_question" if reply.finished else "cut_off"
        elif _words(question) in [_words(other.text) for other in own]:
            problem = "duplicate"
        else:
            problem = question_problem(question, texts[place])
        if problem:
            counts[f"writer_{problem}"] += 1
        else:
            own.append(Written(question, opening.lower(), span))
    return written


def _draw_pairs(rng: random.Random, text: str, most: int) -> list[tuple[tuple[int, int], str]]:
    """At most `most` pairs of a sentence's span and an opening that suits it, in the order of the text."""
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in split_sentences(text)]
    pairs = [
        (span, opening) for span in spans for opening, needs in OPENINGS.items() if re.search(needs, text[slice(*span)])
    ]
    return [pairs[place] for place in sorted(rng.sample(range(len(pairs)), min(most, len(pairs))))]


# --- what is left out ------------------------------------------------------------------------------------------------


def question_problem(question: str, document: str) -> str | None:
    """The reason for which a written question is left out; None for one that is kept.

    about_the_text: it asks about the text itself ("What is the text about?").
    goes_round: the same words come again at once (see `goes_round`).
    repeats_text: more than 12 words in a row stand in the document too.
    off_text: it has a name or a number that the document lacks, or the document lacks most of its longer words.
    """
    if _ABOUT_THE_TEXT.search(question):
        return "about_the_text"
    if goes_round(question):
        return "goes_round"
    if _longest_common_run(question, document) > _LONGEST_COPY:
        return "repeats_text"
    return "off_text" if _is_off_text(question, document) else None


def answer_problem(answer: str, question: str, document: str) -> str | None:
    """The reason for which a teacher's answer is left out; None for one that is kept.

    empty: it has no letter and no digit.
    no_answer: it speaks of an answer and ends before it comes ("The answer is:").
    repeats_question: it says nothing but the question.
    goes_round: as for questions.
    repeats_text: more than 40 words in a row stand in the document too.
    """
    words = _words(answer)
    if not words:
        return "empty"
    if answer.rstrip().endswith(":"):
        return "no_answer"
    if words == _words(question):
        return "repeats_question"
    if goes_round(answer):
        return "goes_round"
    return "repeats_text" if _longest_common_run(answer, document) > _LONGEST_ANSWER_COPY else None


def goes_round(text: str) -> bool:
    """Whether three to eight words come twice in a row ("of the hills of the hills"), or one or two four times."""
    words = _words(text)
    for size in range(1, _LONGEST_ROUND + 1):
        length = size * (2 if size > 2 else 4)
        for start in range(len(words) - length + 1):
            if words[start : start + length - size] == words[start + size : start + length]:
                return True
    return False


def _is_off_text(question: str, document: str) -> bool:
    inside = _words(document)
    known, beginnings = set(inside), {word[:4] for word in inside}
    _, *others = re.findall(r"\w+", question)
    named = [word.casefold() for word in others if word[0].isupper() or word[0].isdigit()]
    if any(word not in known for word in named):
        return True
    longer = [word for word in _words(question)[1:] if len(word) > 3 and word not in _COMMON]
    return 2 * sum(word[:4] in beginnings for word in longer) < len(longer) or not (longer or named)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _longest_common_run(text: str, document: str) -> int:
    """The most words in a row that both texts have."""
    words, inside = _words(text), f" {' '.join(_words(document))} "
    longest = 0
    for start in range(len(words)):
        while start + longest < len(words) and f" {' '.join(words[start : start + longest + 1])} " in inside:
            longest += 1
    return longest
