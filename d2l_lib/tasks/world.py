"""The generated world: fictional people, places, organisations, works and events, and questions about them.

Every document is made from facts (subject, relation, value). The character span of each fact is known, so answers,
evidence and interference can be scored against ground truth. Three rules hold everywhere:

* A name or a compound value belongs to exactly one split (`train`, `validation`, `test`, or `encyclopedia`), by a hash
  of its words (`split_of`). So do numbers and years. Splits never share names or values.
* The *encyclopedia* is one fixed set of entities (`encyclopedia()`), which the base model learns closed-book in
  pre-training.
* Everything is a function of a `random.Random`: the same seed gives the same text on every machine.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from d2l_lib.documents import check_texts

SPLITS = ("train", "validation", "test", "encyclopedia")
UNKNOWN = "I do not know."
KINDS = ("one_hop", "number", "date", "paraphrase", "two_hop", "yes_no", "which_of", "list", "unanswerable")
ONE_HOP_KINDS = ("one_hop", "number", "date")


# ------------------------------------------------------------------------------------------------------------- values
def split_of(value: str) -> str:
    """The split of `value`, by a stable hash of the text: 70% train, 10% each of the other three."""
    bucket = hashlib.sha256(value.encode()).digest()[0] % 10
    return SPLITS[max(0, bucket - 6)]


_ONSETS = """
    Ab Ald Am And Ang Ar Ash Bal Bar Bel Ben Ber Bor Bran Bren Bri Cal Car Cas Cor Cra Dal Dar Del Dor Dra Dun Ed El
    Em Er Fal Far Fen Fer Fin Gal Gar Gil Glen Gor Gra Had Hal Har Hel Hol Il In Is Jal Jan Jor Kal Kar Kel Kir Lan
    Lar Len Lin Lor Lum Mal Mar Mel Mer Mil Mor Nar Nel Nor Ol Or Os Pal Par Pel Per Pol Quin Ral Ran Rel Rin Ros
    Sal San Sel Ser Sol Tal Tan Tar Ter Tor Tul Ul Ur Val Van Ver Vil Vor Wal Wen Wil Yar Yor Zan Zel Zor
""".split()
_PERSON_ENDINGS = """
    a ana ard ea elle en ena eth ia ian ic in ina ion is ka la lin mir na nel on or ra ric rik ro sa tha us va vin
""".split()
_SURNAME_ENDINGS = """
    ack ane art ast bert by combe cott dale den der dine don ett ford gan gate ham hart iver kin land ley low man
    mond ner ock ov por ridge row ser ske son stead stone ton vale vell ward well wick wood worth
""".split()
_PLACE_ENDINGS = """
    aven bay borough bridge burg bury cliff cross dell fell field firth gard grove haven head holm hurst market mere
    mouth pool port shire side stead thorpe vik water
""".split()
_ORGANISATIONS = """
    Academy Archive Bank Brewery Foundry Guild Institute Library Mill Museum Observatory Press Railway Society
    Theatre Works
""".split()
_WORK_HEADS = """
    Ballad Book Chronicle Garden House Journey Lantern Legend Letter Map Mirror Portrait River Secret Shadow Song
    Tale Tower Voyage Winter
""".split()
_EVENT_HEADS = """
    Assembly Congress Exhibition Fair Festival Games Marathon Parade Regatta Summit Symposium Tournament
""".split()
_ADJECTIVES = """
    amber ancient blue bright broken bronze coastal copper crimson distant early eastern frozen golden green grey
    hidden hollow iron ivory late little lunar marble northern old pale quiet red rural silent silver southern stone
    tidal velvet western white wild winter
""".split()
_TRADES = """
    baker botanist carpenter chemist clockmaker cook dancer engraver farmer fisher gardener glassblower historian
    judge lawyer mason miller nurse painter pilot poet potter sailor singer surgeon tailor teacher weaver
""".split()
_GOODS = """
    apples barrels bells boats books bricks candles carpets cheese clocks coins dyes flutes glass gloves honey ink
    instruments kites lamps lenses maps medals paper pens pottery ropes rugs salt shoes soap tea tiles toys
    umbrellas wine wool
""".split()
_SUBJECTS = """
    bees birds bridges castles caves clouds comets deserts dragons farms fish forests harbours horses islands kings
    lakes lighthouses machines miners monks mountains oceans orchards rain rivers roads ruins ships stars storms
    trains trees villages volcanoes wars whales winds wolves
""".split()
_MONTHS = "January February March April May June July August September October November December".split()


def _compound(first: Sequence[str], second: Sequence[str]) -> Callable[[random.Random, str], str]:
    def draw(rng: random.Random, split: str) -> str:
        return _draw_in_split(lambda: f"{rng.choice(first)} {rng.choice(second)}", split)

    return draw


def check_split(split: str) -> None:
    """ValueError for a name that is not in SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"the world has no split {split!r}; choose one of {', '.join(SPLITS)}")


def _draw_in_split(draw: Callable[[], str], split: str) -> str:
    check_split(split)
    while split_of(value := draw()) != split:
        pass
    return value


def _word(rng: random.Random, endings: Sequence[str], split: str) -> str:
    return _draw_in_split(lambda: rng.choice(_ONSETS) + rng.choice(endings), split)


def _person(rng: random.Random, split: str) -> str:
    return f"{_word(rng, _PERSON_ENDINGS, split)} {_word(rng, _SURNAME_ENDINGS, split)}"


def _place(rng: random.Random, split: str) -> str:
    return _word(rng, _PLACE_ENDINGS, split)


def _organisation(rng: random.Random, split: str) -> str:
    return f"the {_word(rng, _SURNAME_ENDINGS, split)} {rng.choice(_ORGANISATIONS)}"


def _work(rng: random.Random, split: str) -> str:
    return f"the {rng.choice(_WORK_HEADS)} of {_word(rng, _PLACE_ENDINGS, split)}"


def _event(rng: random.Random, split: str) -> str:
    return f"the {_word(rng, _PLACE_ENDINGS, split)} {rng.choice(_EVENT_HEADS)}"


def _number(rng: random.Random, split: str) -> str:
    return _draw_in_split(lambda: str(rng.randint(100, 9999)), split)


def _year(rng: random.Random, split: str) -> str:
    return _draw_in_split(lambda: str(rng.randint(1000, 2999)), split)


def _date(rng: random.Random, split: str) -> str:
    return _draw_in_split(lambda: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1000, 2999)}", split)


_VALUES: dict[str, Callable[[random.Random, str], str]] = {
    "person": _person,
    "place": _place,
    "organisation": _organisation,
    "work": _work,
    "event": _event,
    "number": _number,
    "year": _year,
    "date": _date,
    "trade": _compound(_ADJECTIVES, _TRADES),
    "goods": _compound(_ADJECTIVES, _GOODS),
    "topic": _compound(_ADJECTIVES, _SUBJECTS),
}
_ENTITY_TYPES = ("person", "place", "organisation", "work", "event")


# ---------------------------------------------------------------------------------------------------------- relations
@dataclass(frozen=True)
class _Relation:
    """One typed relation and all its wordings; `{s}` is the subject, `{v}` the value."""

    name: str
    subject: str
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    paraphrases: tuple[str, ...]
    yes_no: str
    which_of: str
    role: str = ""  # noun phrase for the value, "the founder of {s}": the first hop of two-hop questions
    listing: str = ""  # asks for every subject with this value

    @property
    def kind(self) -> str:
        return {"number": "number", "year": "date", "date": "date"}.get(self.value, "one_hop")


RELATIONS: tuple[_Relation, ...] = (
    _Relation(
        "birthplace",
        "person",
        "place",
        (
            "{s} was born in {v}.",
            "The birthplace of {s} is {v}.",
            "{s} came into the world in {v}.",
            "{s} came from {v}.",
        ),
        ("Where was {s} born?", "In which town was {s} born?"),
        ("What is the birthplace of {s}?", "Which town is the birthplace of {s}?"),
        "Was {s} born in {v}?",
        "Who was born in {v}, {a} or {b}?",
        role="the birthplace of {s}",
        listing="Which people were born in {v}?",
    ),
    _Relation(
        "birth_date",
        "person",
        "date",
        ("{s} was born on {v}.", "The birthday of {s} is {v}.", "The parish book records the birth of {s} on {v}."),
        ("When was {s} born?", "On which day was {s} born?"),
        ("What is the birthday of {s}?", "What is the date of birth of {s}?"),
        "Was {s} born on {v}?",
        "Who was born on {v}, {a} or {b}?",
    ),
    _Relation(
        "occupation",
        "person",
        "trade",
        ("{s} worked as a {v}.", "{s} earned a living as a {v}.", "By trade {s} was a {v}."),
        ("What was the occupation of {s}?", "What did {s} work as?"),
        ("How did {s} earn a living?", "Which trade did {s} follow?"),
        "Did {s} work as a {v}?",
        "Who worked as a {v}, {a} or {b}?",
    ),
    _Relation(
        "mentor",
        "person",
        "person",
        ("{s} was taught by {v}.", "{s} was a pupil of {v}.", "The mentor of {s} was {v}."),
        ("Who taught {s}?", "Who was the mentor of {s}?"),
        ("By whom was {s} taught?", "Whose pupil was {s}?"),
        "Was {s} taught by {v}?",
        "Who was taught by {v}, {a} or {b}?",
        role="the mentor of {s}",
        listing="Which people were taught by {v}?",
    ),
    _Relation(
        "employer",
        "person",
        "organisation",
        ("{s} was employed by {v}.", "{s} was given a post by {v}.", "{s} spent many years at {v}."),
        ("Who employed {s}?", "Which body employed {s}?"),
        ("Where did {s} work?", "At which body did {s} spend many years?"),
        "Was {s} employed by {v}?",
        "Who was employed by {v}, {a} or {b}?",
        role="the employer of {s}",
        listing="Which people were employed by {v}?",
    ),
    _Relation(
        "mayor",
        "place",
        "person",
        ("The mayor of {s} is {v}.", "{s} is led by {v}, its mayor.", "{s} elected {v} as its mayor."),
        ("Who is the mayor of {s}?", "Who serves as mayor of {s}?"),
        ("Whom did {s} elect as its mayor?", "Who leads the town hall of {s}?"),
        "Is {v} the mayor of {s}?",
        "Which town has {v} as its mayor, {a} or {b}?",
        role="the mayor of {s}",
    ),
    _Relation(
        "population",
        "place",
        "number",
        ("{s} has {v} inhabitants.", "The population of {s} is {v}.", "In {s} a census counted {v} people."),
        ("How many people live in {s}?", "What is the population of {s}?"),
        ("How many inhabitants does {s} have?", "How many people did a census count in {s}?"),
        "Does {s} have {v} inhabitants?",
        "Which town has {v} inhabitants, {a} or {b}?",
    ),
    _Relation(
        "export",
        "place",
        "goods",
        ("{s} is known for its {v}.", "The traders of {s} sell {v}.", "The main export of {s} is {v}."),
        ("What is {s} known for?", "What is the main export of {s}?"),
        ("What do the traders of {s} sell?", "Which goods made {s} known?"),
        "Is {s} known for its {v}?",
        "Which town is known for its {v}, {a} or {b}?",
        listing="Which towns are known for their {v}?",
    ),
    _Relation(
        "founder",
        "organisation",
        "person",
        ("{s} was founded by {v}.", "{s} goes back to {v}, who founded it.", "The founder of {s} was {v}."),
        ("Who founded {s}?", "Who was the founder of {s}?"),
        ("By whom was {s} founded?", "Who set up {s}?"),
        "Was {s} founded by {v}?",
        "Which was founded by {v}, {a} or {b}?",
        role="the founder of {s}",
    ),
    _Relation(
        "seat",
        "organisation",
        "place",
        ("{s} has its seat in {v}.", "The seat of {s} is in {v}.", "{s} occupies a tall house in {v}."),
        ("Where is the seat of {s}?", "In which town does {s} have its seat?"),
        ("Where is {s} based?", "Which town is home to {s}?"),
        "Does {s} have its seat in {v}?",
        "Which has its seat in {v}, {a} or {b}?",
        role="the seat of {s}",
        listing="Which bodies have their seat in {v}?",
    ),
    _Relation(
        "founding_year",
        "organisation",
        "year",
        ("{s} opened its doors in {v}.", "{s} was established in {v}.", "The history of {s} began in {v}."),
        ("In which year was {s} established?", "When did {s} open its doors?"),
        ("What is the founding year of {s}?", "When did the history of {s} begin?"),
        "Was {s} established in {v}?",
        "Which was established in {v}, {a} or {b}?",
    ),
    _Relation(
        "staff",
        "organisation",
        "number",
        ("{s} employs {v} people.", "The staff of {s} counts {v} people.", "The payroll of {s} lists {v} people."),
        ("How many people does {s} employ?", "How large is the staff of {s}?"),
        ("How many people are on the payroll of {s}?", "What is the size of the staff of {s}?"),
        "Does {s} employ {v} people?",
        "Which employs {v} people, {a} or {b}?",
    ),
    _Relation(
        "author",
        "work",
        "person",
        ("{s} was written by {v}.", "{s} came from the pen of {v}.", "The author of {s} is {v}."),
        ("Who wrote {s}?", "Who is the author of {s}?"),
        ("By whom was {s} written?", "Whose pen produced {s}?"),
        "Was {s} written by {v}?",
        "Which was written by {v}, {a} or {b}?",
        role="the author of {s}",
        listing="Which books were written by {v}?",
    ),
    _Relation(
        "publication_year",
        "work",
        "year",
        ("{s} was published in {v}.", "{s} first appeared in {v}.", "Readers could first buy {s} in {v}."),
        ("When was {s} published?", "In which year was {s} published?"),
        ("When did {s} first appear?", "What is the publication year of {s}?"),
        "Was {s} published in {v}?",
        "Which was published in {v}, {a} or {b}?",
    ),
    _Relation(
        "topic",
        "work",
        "topic",
        ("{s} is about {v}.", "The topic of {s} is {v}.", "{s} tells a story of {v}."),
        ("What is {s} about?", "What is the topic of {s}?"),
        ("What does {s} tell a story of?", "Which topic does {s} treat?"),
        "Is {s} about {v}?",
        "Which is about {v}, {a} or {b}?",
        listing="Which books are about {v}?",
    ),
    _Relation(
        "venue",
        "event",
        "place",
        ("{s} took place in {v}.", "{s} was held in {v}.", "The venue of {s} was {v}."),
        ("Where did {s} take place?", "Which town hosted {s}?"),
        ("What was the venue of {s}?", "In which town was {s} held?"),
        "Did {s} take place in {v}?",
        "Which took place in {v}, {a} or {b}?",
        role="the venue of {s}",
        listing="Which events took place in {v}?",
    ),
    _Relation(
        "winner",
        "event",
        "person",
        ("{s} was won by {v}.", "{s} ended with the victory of {v}.", "The winner of {s} was {v}."),
        ("Who won {s}?", "Who was the winner of {s}?"),
        ("By whom was {s} won?", "Who took first prize at {s}?"),
        "Was {s} won by {v}?",
        "Which was won by {v}, {a} or {b}?",
        role="the winner of {s}",
        listing="Which events were won by {v}?",
    ),
    _Relation(
        "opening_day",
        "event",
        "date",
        ("{s} opened on {v}.", "The opening day of {s} was {v}.", "Crowds came to the opening of {s} on {v}."),
        ("When did {s} open?", "On which day did {s} open?"),
        ("What was the opening day of {s}?", "What was the date of the opening of {s}?"),
        "Did {s} open on {v}?",
        "Which opened on {v}, {a} or {b}?",
    ),
    _Relation(
        "attendance",
        "event",
        "number",
        ("{s} drew {v} visitors.", "{s} was seen by {v} visitors.", "The attendance of {s} was {v}."),
        ("How many visitors came to {s}?", "What was the attendance of {s}?"),
        ("How many people attended {s}?", "How many visitors did {s} draw?"),
        "Did {s} draw {v} visitors?",
        "Which drew {v} visitors, {a} or {b}?",
    ),
)
RELATION = {relation.name: relation for relation in RELATIONS}
_RELATIONS_OF = {t: tuple(r for r in RELATIONS if r.subject == t) for t in _ENTITY_TYPES}

_DISTRACTORS = (
    "The weather was mild that {season}.",
    "A light {rain} fell all {day}.",
    "Nobody remembers the {thing} any more.",
    "The {thing} was painted again last {season}.",
    "Many visitors ask about the {thing}.",
    "It was a long {season}.",
    "The {day} was quiet and the streets were empty.",
    "An old {thing} stands near the gate.",
    "Some say the {thing} is lost.",
    "Little else is known.",
    "The records of that {season} are incomplete.",
    "The {thing} is closed on Sundays.",
    "A {thing} was found under the floor.",
    "People still talk about the {rain} of that {season}.",
    "The {thing} needs repair.",
)
_DISTRACTOR_WORDS = {
    "season": "spring summer autumn winter".split(),
    "rain": "rain snow hail mist".split(),
    "day": "morning afternoon evening day".split(),
    "thing": "clock bridge lamp fountain staircase garden gate statue well bell chapel barn".split(),
}


# ------------------------------------------------------------------------------------------------ facts and documents
@dataclass(frozen=True)
class Fact:
    """`subject` stands in `relation` (a name in `RELATION`) to `value`; `span`: the characters of its sentence."""

    subject: str
    relation: str
    value: str
    span: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, its kind (one of `KINDS`) and the character spans of the evidence sentences."""

    text: str
    answer: str
    kind: str
    evidence: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Document:
    """Prose that states `facts` (with spans) among distractor sentences, with names of `split`."""

    text: str
    facts: tuple[Fact, ...]
    split: str
    entities: tuple[tuple[str, str], ...] = field(default=())  # (type, name)


def _sentence(template: str, **words: str) -> str:
    text = template.format(**words)
    return text[0].upper() + text[1:]


def _distractor(rng: random.Random) -> str:
    return rng.choice(_DISTRACTORS).format(**{slot: rng.choice(words) for slot, words in _DISTRACTOR_WORDS.items()})


def draw_facts(rng: random.Random, split: str, n_facts: int) -> list[Fact]:
    """`n_facts` facts about fresh entities of `split`; values that are entities become subjects of later facts."""
    entities: list[tuple[str, str]] = []
    taken: set[str] = set()
    facts: list[Fact] = []
    stated: set[tuple[str, str]] = set()

    def fresh(kind: str) -> str:
        while (name := _VALUES[kind](rng, split)) in taken:
            pass
        taken.add(name)
        if kind in _ENTITY_TYPES:
            entities.append((kind, name))
        return name

    while len(facts) < n_facts:
        if not entities or rng.random() < 0.35:
            fresh(rng.choice(_ENTITY_TYPES))
        kind, subject = rng.choice(entities[-6:])
        relation = rng.choice(_RELATIONS_OF[kind])
        if (subject, relation.name) in stated:
            if all((subject, r.name) in stated for r in _RELATIONS_OF[kind]):
                fresh(rng.choice(_ENTITY_TYPES))
            continue
        known = [name for t, name in entities if t == relation.value and name != subject]
        shared = [f.value for f in facts if f.relation == relation.name and relation.listing]
        if known and rng.random() < 0.25:
            value = rng.choice(known)
        elif shared and rng.random() < 0.2 and (value := rng.choice(shared)) != subject:
            pass
        else:
            value = fresh(relation.value)
        stated.add((subject, relation.name))
        facts.append(Fact(subject, relation.name, value))
    return facts


def write_document(rng: random.Random, facts: Sequence[Fact], split: str, distractors: float = 0.2) -> Document:
    """Prose for `facts` in shuffled order, with about `distractors` other sentences per fact and some new lines."""
    order = list(facts)
    rng.shuffle(order)
    text, placed = "", []
    for fact in order:
        while rng.random() < distractors / (1 + distractors):
            text += _distractor(rng) + " "
        sentence = _sentence(rng.choice(RELATION[fact.relation].statements), s=fact.subject, v=fact.value)
        placed.append(replace(fact, span=(len(text), len(text) + len(sentence))))
        text += sentence + ("\n" if rng.random() < 0.08 else " ")
    names = {f.subject: RELATION[f.relation].subject for f in placed}
    for f in placed:
        if RELATION[f.relation].value in _ENTITY_TYPES:
            names.setdefault(f.value, RELATION[f.relation].value)
    return Document(text.rstrip(), tuple(placed), split, tuple((t, n) for n, t in names.items()))


def draw_document(rng: random.Random, split: str, n_facts: int, distractors: float = 0.2) -> Document:
    """A fresh document of `n_facts` facts with names and values of `split`."""
    return write_document(rng, draw_facts(rng, split, n_facts), split, distractors)


# ----------------------------------------------------------------------------------------------------------- questions
def ask(rng: random.Random, document: Document, kind: str) -> Question | None:
    """A random question of `kind` about `document`; None if it supports none (no chain, one subject only)."""
    if kind not in KINDS:
        raise ValueError(f"unknown question kind {kind!r}; choose from {', '.join(KINDS)}")
    return _ASKERS[kind](rng, document)


def questions(rng: random.Random, document: Document, kinds: Sequence[str] = KINDS, n: int = 1) -> list[Question]:
    """Up to `n` distinct questions, kinds drawn evenly among those that the document supports."""
    kinds = check_texts(kinds, "kinds")
    by_text: dict[str, Question] = {}
    for _ in range(8 * n):
        if len(by_text) == n:
            break
        question = ask(rng, document, rng.choice(kinds))
        if question is not None:
            by_text.setdefault(question.text, question)
    return list(by_text.values())


def question_about(rng: random.Random, fact: Fact, paraphrase: bool = False) -> Question:
    """A plain question with the answer `fact.value`."""
    relation = RELATION[fact.relation]
    template = rng.choice(relation.paraphrases if paraphrase else relation.questions)
    return Question(
        _sentence(template, s=fact.subject), fact.value, "paraphrase" if paraphrase else relation.kind, (fact.span,)
    )


def wordings(fact: Fact) -> list[str]:
    """Every plain question with the answer `fact.value`, paraphrases last."""
    relation = RELATION[fact.relation]
    return [_sentence(template, s=fact.subject) for template in (*relation.questions, *relation.paraphrases)]


def _ask_plain(kind: str) -> Callable[[random.Random, Document], Question | None]:
    def asker(rng: random.Random, document: Document) -> Question | None:
        facts = [f for f in document.facts if RELATION[f.relation].kind == kind]
        return question_about(rng, rng.choice(facts)) if facts else None

    return asker


def _ask_paraphrase(rng: random.Random, document: Document) -> Question | None:
    return question_about(rng, rng.choice(document.facts), paraphrase=True) if document.facts else None


def _ask_two_hop(rng: random.Random, document: Document) -> Question | None:
    chains = [
        (first, second)
        for first in document.facts
        if RELATION[first.relation].role
        for second in document.facts
        if second.subject == first.value and second.value != first.subject  # the answer is not in the question
    ]
    if not chains:
        return None
    first, second = rng.choice(chains)
    bridge = RELATION[first.relation].role.format(s=first.subject)
    text = _sentence(rng.choice(RELATION[second.relation].questions), s=bridge)
    return Question(text, second.value, "two_hop", (first.span, second.span))


def _ask_yes_no(rng: random.Random, document: Document) -> Question | None:
    if not document.facts:
        return None
    fact = rng.choice(document.facts)
    relation = RELATION[fact.relation]
    if rng.random() < 0.5:
        return Question(_sentence(relation.yes_no, s=fact.subject, v=fact.value), "Yes", "yes_no", (fact.span,))
    others = [f.value for f in document.facts if RELATION[f.relation].value == relation.value and f.value != fact.value]
    wrong = rng.choice(others) if others else _VALUES[relation.value](rng, document.split)
    return (
        Question(_sentence(relation.yes_no, s=fact.subject, v=wrong), "No", "yes_no", (fact.span,))
        if wrong != fact.value
        else None
    )


def _ask_which_of(rng: random.Random, document: Document) -> Question | None:
    if not document.facts:
        return None
    fact = rng.choice(document.facts)
    relation = RELATION[fact.relation]
    holders = {f.subject for f in document.facts if f.relation == fact.relation and f.value == fact.value}
    others = [name for t, name in document.entities if t == relation.subject and name not in holders]
    if not others:
        return None
    pair = [fact.subject, rng.choice(others)]
    rng.shuffle(pair)
    return Question(
        _sentence(relation.which_of, v=fact.value, a=pair[0], b=pair[1]), fact.subject, "which_of", (fact.span,)
    )


def _ask_list(rng: random.Random, document: Document) -> Question | None:
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in document.facts:
        if RELATION[fact.relation].listing:
            groups.setdefault((fact.relation, fact.value), []).append(fact)
    if not groups:
        return None
    several = [g for g in groups.values() if len(g) > 1]
    group = rng.choice(several if several and rng.random() < 0.7 else list(groups.values()))
    text = _sentence(RELATION[group[0].relation].listing, v=group[0].value)
    return Question(text, ", ".join(f.subject for f in group), "list", tuple(f.span for f in group))


def _ask_unanswerable(rng: random.Random, document: Document) -> Question | None:
    """Half about an unstated relation of somebody in the document, half about somebody who is not in it."""
    if document.entities and rng.random() < 0.5:
        kind, subject = rng.choice(document.entities)
        stated = {f.relation for f in document.facts if f.subject == subject}
        missing = [r for r in _RELATIONS_OF[kind] if r.name not in stated]
        if missing:
            return Question(_sentence(rng.choice(rng.choice(missing).questions), s=subject), UNKNOWN, "unanswerable")
    return unknown_question(rng, document.split, avoid={name for _, name in document.entities})


def unknown_question(rng: random.Random, split: str, avoid: set[str] = frozenset()) -> Question:
    """A question about a fresh entity of `split` that no text mentions; the right answer is `UNKNOWN`."""
    kind = rng.choice(_ENTITY_TYPES)
    while (subject := _VALUES[kind](rng, split)) in avoid:
        pass
    return Question(
        _sentence(rng.choice(rng.choice(_RELATIONS_OF[kind]).questions), s=subject), UNKNOWN, "unanswerable"
    )


_ASKERS: dict[str, Callable[[random.Random, Document], Question | None]] = {
    "one_hop": _ask_plain("one_hop"),
    "number": _ask_plain("number"),
    "date": _ask_plain("date"),
    "paraphrase": _ask_paraphrase,
    "two_hop": _ask_two_hop,
    "yes_no": _ask_yes_no,
    "which_of": _ask_which_of,
    "list": _ask_list,
    "unanswerable": _ask_unanswerable,
}


# -------------------------------------------------------------------------------------------------------- encyclopedia
@functools.cache
def encyclopedia(n_facts: int = 400) -> tuple[Fact, ...]:
    """The fixed facts that the base model knows closed-book, all of the split `encyclopedia`."""
    return tuple(draw_facts(random.Random("encyclopedia"), "encyclopedia", n_facts))


def encyclopedia_questions(rng: random.Random, n: int) -> Iterator[Question]:
    """`n` closed-book questions, facts drawn evenly; the evidence is empty, as there is no document."""
    facts = encyclopedia()
    for _ in range(n):
        yield replace(question_about(rng, rng.choice(facts), paraphrase=rng.random() < 0.3), evidence=())


def with_value(rng: random.Random, fact: Fact, split: str) -> Fact:
    """The same subject and relation with another value of `split`."""
    while (value := _VALUES[RELATION[fact.relation].value](rng, split)) == fact.value:
        pass
    return replace(fact, value=value)


def conflicting_document(
    rng: random.Random, n_facts: int, n_conflicts: int, split: str = "train"
) -> tuple[Document, list[tuple[Fact, Fact]]]:
    """(document of `split` in which encyclopedia facts have another value, pairs (its fact, the encyclopedia's))."""
    believed = rng.sample(encyclopedia(), n_conflicts)
    changed = [with_value(rng, fact, split) for fact in believed]
    document = write_document(rng, [*draw_facts(rng, split, n_facts), *changed], split)
    placed = {(f.subject, f.relation): f for f in document.facts}
    return document, [(placed[f.subject, f.relation], f) for f in believed]
