"""Documents: named texts, cut into chunks at sentence ends and wrapped for the context encoder.

    text  ->  sentences  ->  chunks of at most `chunk_tokens` tokens  ->  token ids (prefix + chunk + suffix)

The wrapping is the base model's own chat format: an empty system turn, the chunk as the user's turn, and the
opening of the model's turn (the method's section 3.1). It comes from the tokenizer's chat template, not a table.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from pathlib import Path, PurePath

from PIL import Image

from d2l_lib.formats.text_files import read_document

Document = str | Path | Image.Image
Documents = Document | Sequence[Document] | Mapping[str, Document]

SENTINEL, _SYSTEM_SENTINEL = "d2lcontentgoeshere", "d2lsystemgoeshere"
LONGEST_SHOWN, MOST_SHOWN = 60, 10  # characters of a name, and names, that a display or an error shows
TEMPLATE_SECONDS = 10.0  # a chat template that takes longer is stopped
_LONGEST_PATH = 500  # characters of a text that may be the name of a file
_NOT_IN_NAMES = {"Cs": "an unpaired surrogate", "Cc": "a control character", "Zl": "a line end", "Zp": "a line end"}

# Sentence ends: Latin marks before white space, CJK marks anywhere, blank lines.
# The look-behind and the possessive `++` keep the search linear on long runs of marks.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s+|[。！？]+[”’」』）]*\s*|\n[^\S\n]*+\n\s*")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Z]|[Dd]r|Mr|Mrs|Ms|Prof|Sr|Jr|St|Mt|vs|cf|[Ff]igs?|Eq|Vol|pp|ca|e\.g|i\.e)\.$"
)
# A sentence that does not fit is cut at line ends, then at white space, then between characters.
_LINE_END = re.compile(r"\n\s*")
_WORD_END = re.compile(r"\s+")


@dataclass(frozen=True)
class Chunk:
    """A stretch of one document: `text` is `document_text[span[0]:span[1]]`; `index` counts from 0 within it."""

    document: str
    index: int
    span: tuple[int, int]
    text: str


# --- names and checks -------------------------------------------------------------------------------------------


def check_text(text: object, name: str) -> str:
    """`text` itself, unchanged, if it has something to read in it.

    TypeError for anything but str. ValueError for a text of white space, control or other invisible characters alone,
    and for an unpaired surrogate, which no tokenizer can encode.
    """
    if not isinstance(text, str):
        hint = "decode it first, e.g. data.decode('utf-8')" if isinstance(text, bytes) else "pass a str"
        raise TypeError(f"{name} is {type(text).__name__}, not text: {hint}")
    if not any(unicodedata.category(character)[0] not in "ZC" for character in text):
        problem = "it is empty" if not text else f"its {len(text)} characters are all white space or invisible"
        raise ValueError(f"{name} holds no text ({problem}): nothing to read")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has an unpaired surrogate at character {error.start}: it is not valid Unicode; "
            "read the file again with errors='replace'"
        ) from error
    return text


def check_count(value: object, name: str) -> None:
    """ValueError unless `value` is a whole number (Python's or numpy's) of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def shorten(text: str, longest: int = LONGEST_SHOWN) -> str:
    """The text, cut to at most `longest` characters with an ellipsis."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def some_of(names: Collection[object], most: int = MOST_SHOWN, quoted: bool = False) -> str:
    """The first `most` names in one line, each shortened (and `quoted`), and the number of the others."""
    short = (shorten(str(name)) for name in islice(names, most))
    shown = ", ".join(repr(name) if quoted else name for name in short)
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def check_name(name: object, what: str = "document name") -> str:
    """`name` itself, if it can be the name of a document.

    TypeError for anything but str, and for a blank name. ValueError for an unpaired surrogate (no file can hold it),
    a control character or a line end (no list of names can show it).
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} {shorten(repr(name))} must be a text that is not blank, not {type(name).__name__}")
    if name and name.isprintable() and not name.isspace():  # the usual case, quickly
        return name
    kinds = [unicodedata.category(character) for character in name]
    if all(kind in ("Zs", "Zl", "Zp", "Cc", "Cf") for kind in kinds):
        raise TypeError(f"{what} {shorten(repr(name))} must be a text that is not blank")
    for kind, character in zip(kinds, name, strict=True):
        if kind in _NOT_IN_NAMES:
            raise ValueError(
                f"{what} {shorten(repr(name))} has {_NOT_IN_NAMES[kind]} ({ascii(character)[1:-1]}): give another name"
            )
    return name


def check_texts(texts: object, what: str) -> list[str]:
    """Several texts as a list.

    what: their name in errors, in the plural.
    TypeError for one text alone, bytes, a mapping, a set, what cannot be iterated, and a member that is no text.
    """
    if isinstance(texts, str):
        raise TypeError(f"{what} must be a list of texts, not one text: put it into a list, [{shorten(texts)!r}]")
    if isinstance(texts, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(texts, Iterable):
        raise TypeError(f"{what} must be a list of texts, not {type(texts).__name__}")
    several = list(texts)
    for number, text in enumerate(several, 1):
        if not isinstance(text, str):
            raise TypeError(f"{what} must be texts; number {number} is {type(text).__name__}")
    return several


def name_documents(documents: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, str]:
    """Every input of `internalize` as {name: text}, checked.

    A text is named "document", the texts of a list "document 1", "document 2", ...; a mapping brings its names.
    A Path is read (see `read_document`); without a name it takes the file's.
    TypeError for other values. ValueError for no document, a text without content (see check_text), a wrong name (see
    check_name), and a text without a name that is the name of a file.
    """
    texts_have_names = isinstance(documents, Mapping)
    return {name: _checked_text(one, name, texts_have_names) for name, one in _name_each(documents).items()}


def _checked_text(document: object, name: str, has_name: bool) -> str:
    """The text of one document, read if it is a Path; has_name: whether the caller named it. See `name_documents`."""
    check_name(name)
    if isinstance(document, PurePath):
        document = read_document(document)
    elif isinstance(document, str) and not has_name:
        _check_no_file(document)
    return check_text(document, f"document {shorten(name)!r}" if name != "document" else "the document")


def is_image(document: object) -> bool:
    """Whether this document is a picture (a PIL image)."""
    return isinstance(document, Image.Image)


def name_texts_and_images(documents: Documents) -> dict[str, Document]:
    """Every input of `internalize` as {name: text or RGB picture}, checked as `name_documents` does.

    A picture alone is named "image"; in a list it counts like a text ("document 2").
    ValueError names a picture that cannot be read.
    """
    if is_image(documents):
        documents = {"image": documents}
    has_names = isinstance(documents, Mapping)
    return {
        name: _in_colours(one, check_name(name)) if is_image(one) else _checked_text(one, name, has_names)
        for name, one in _name_each(documents).items()
    }


def _in_colours(image: Image.Image, name: str) -> Image.Image:
    """The picture in RGB, as every processor reads it."""
    try:
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"image {name!r} could not be read ({error}): open or copy the file again") from error


def _name_each(documents: object) -> dict[str, object]:
    """One document, a list or {name: document} as {name: document}, the documents unchecked.

    A Path takes the file's name; in a list, a repeated name gets a number: "name (2)".
    TypeError for other values, ValueError for no document.
    """
    if isinstance(documents, str):
        named = {"document": documents}
    elif isinstance(documents, PurePath):
        named = {_name_of(documents): documents}
    elif isinstance(documents, Mapping):
        named = dict(documents)
    elif isinstance(documents, Sequence) and not isinstance(documents, (bytes, bytearray, memoryview)):
        names = [_name_of(one) if isinstance(one, PurePath) else f"document {i}" for i, one in enumerate(documents, 1)]
        named = dict(zip(_all_different(names), documents, strict=True))
    else:
        raise TypeError(
            f"documents must be a text, a Path, a list of these or {{name: text}}, not {type(documents).__name__}"
        )
    if not named:
        raise ValueError("no documents given: pass a text, a Path, a list of these or {name: text}")
    return named


def _name_of(path: PurePath) -> str:
    """A file's name; of a folder without one ("." or "/"), its path."""
    return path.name or str(path)


def _all_different(names: Sequence[str]) -> list[str]:
    """The names; a repeated one becomes "name (2)", "name (3)", ..."""
    used, last, different = set(names), {}, []
    for name in names:
        one = name
        if name in last:
            number = last[name] + 1
            while f"{name} ({number})" in used:
                number += 1
            one, last[name] = f"{name} ({number})", number
        else:
            last[name] = 1
        used.add(one)
        different.append(one)
    return different


def _check_no_file(text: str) -> None:
    """ValueError for a text that is the name of a file: a name is hardly ever the text to read."""
    name = text.strip()
    if is_name_of_file(name):
        raise ValueError(
            f"{name!r} is the name of a file: pass Path({name!r}) to read the file, or {{'a name': {name!r}}} to read "
            f"these {len(name)} letters as they stand"
        )


def is_name_of_file(text: str) -> bool:
    """Whether there is a file of this name; any text may be asked about."""
    if not text or len(text) > _LONGEST_PATH or not text.isprintable():
        return False
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


# --- wrapping -----------------------------------------------------------------------------------------------------


class TemplateRefuses(ValueError):
    """A chat template that does not take these messages, such as one without a system turn."""


def from_template(chat, messages: list[dict], **options):
    """The result of `chat.apply_chat_template` (a tokenizer's or processor's) for these messages.

    TemplateRefuses where the template refuses the messages or is damaged. ValueError for a template that reaches
    outside its sandbox, and for one that takes longer than TEMPLATE_SECONDS.
    """
    from jinja2.exceptions import SecurityError, TemplateError

    try:
        with _stopped_after(TEMPLATE_SECONDS):
            return chat.apply_chat_template(messages, **options)
    except SecurityError as error:
        raise ValueError(
            f"the chat template asks for what no template may do ({shorten(str(error), 200)}): do not trust this model"
        ) from error
    except TimeoutError as error:
        raise ValueError(str(error)) from error
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        problem = shorten(" ".join(str(error).split()), 200)
        raise TemplateRefuses(f"the chat template failed ({type(error).__name__}: {problem})") from error


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Inside the `with` block a chat template of this thread that takes longer raises TimeoutError.

    Under a debugger there is no limit.
    """
    if sys.gettrace() is not None:
        yield
        return
    end = None

    def look(frame, event, argument):
        nonlocal end
        if frame.f_code.co_filename != "<template>":  # as jinja calls the code of a template
            return None
        end = time.monotonic() + seconds if end is None else end
        if time.monotonic() > end:
            raise TimeoutError(f"the chat template does not end: stopped after {seconds:g} s")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(None)


def _render(tokenizer, messages: list[dict[str, str]], generation_prompt: bool = True) -> str:
    """The chat template's text for these messages, without thinking and with a fixed date where it has such options."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "this tokenizer has no chat template, and the method reads documents in chat format: use the "
            "instruction-tuned version of the model, or set tokenizer.chat_template"
        )
    options = {"enable_thinking": False, "date_string": "26 Jul 2024"}
    options |= {"tokenize": False, "add_generation_prompt": generation_prompt}
    rendered = from_template(tokenizer, messages, **options)
    if SENTINEL in rendered:
        return rendered
    # Some vision-language models' templates show a list of parts only.
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        return from_template(tokenizer, parts, **options)
    except TemplateRefuses:
        return rendered


def _around_sentinel(rendered: str) -> tuple[str, str]:
    """The text before and after the one sentinel in a rendered template."""
    if (count := rendered.count(SENTINEL)) != 1:
        raise ValueError(f"the chat template must show the user's text once, not {count} times: {rendered!r}")
    before, _, after = rendered.partition(SENTINEL)
    return before, after


def _document_wrapping(tokenizer) -> tuple[str, str]:
    """The text around a document: empty system turn, user turn, generation prompt.

    A template that refuses a system turn (Gemma-2's) gets a blank line before the text instead, as in the published
    checkpoints.
    """
    user = {"role": "user", "content": SENTINEL}
    try:
        return _around_sentinel(_render(tokenizer, [{"role": "system", "content": ""}, user]))
    except TemplateRefuses:
        before, after = _around_sentinel(_render(tokenizer, [user]))
        return before + "\n\n", after


def _ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text, without added special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _ids_of_all(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """`_ids` of each text. The tokenizers library is asked for ids alone, which spares it the rest."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    own = (getattr(type(tokenizer), name, None) for name in ("__call__", "_encode_plus"))
    is_plain = all(getattr(one, "__module__", "").startswith("transformers.") for one in own)
    if len(texts) < 2 or not is_plain or not hasattr(backend, "encode_batch_fast"):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    first = _ids(tokenizer, texts[0])  # sets padding, truncation and special tokens as they have to be
    others = backend.encode_batch_fast(texts[1:], add_special_tokens=False)
    if backend.padding or backend.truncation:  # another thread has asked for other settings meanwhile
        return [_ids(tokenizer, text) for text in texts]
    return [first, *(one.ids for one in others)]


def _special_texts(tokenizer) -> set[str]:
    """The names of the tokenizer's special (control) tokens, e.g. "<end_of_turn>"."""
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _plain_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a text in which special tokens' names, cut after their first character, are ordinary text."""
    names = sorted(_special_texts(tokenizer), key=len, reverse=True)
    pieces = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
    cut = [half for piece in pieces for half in ((piece[:1], piece[1:]) if piece in names else (piece,)) if half]
    if not cut:
        return []
    distinct = list(dict.fromkeys(cut))  # one call for all: a text may hold thousands of names
    ids = dict(zip(distinct, tokenizer(distinct, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
    return [token for half in cut for token in ids[half]]


def _wrap(tokenizer, before: str, texts: Sequence[str], after: str) -> list[list[int]]:
    """Token ids of before + text + after for each text; only the template gives special tokens."""
    names = _special_texts(tokenizer)
    texts = [text.strip() for text in texts]
    plain = [not any(name in text for name in names) for text in texts]
    whole = [before + text + after for text, is_plain in zip(texts, plain, strict=True) if is_plain]
    encoded = iter(_ids_of_all(tokenizer, whole))
    return [
        next(encoded) if is_plain else _ids(tokenizer, before) + _plain_ids(tokenizer, text) + _ids(tokenizer, after)
        for text, is_plain in zip(texts, plain, strict=True)
    ]


def chat_affixes(tokenizer) -> tuple[list[int], list[int]]:
    """(prefix, suffix): token ids around every chunk, from the tokenizer's chat template."""
    before, after = _document_wrapping(tokenizer)
    return _ids(tokenizer, before), _ids(tokenizer, after)


def context_ids(tokenizer, texts: str | Sequence[str]) -> list[int] | list[list[int]]:
    """Token ids of a chunk (or of each of several) for the context encoder; special tokens' names stay plain text."""
    before, after = _document_wrapping(tokenizer)
    ids = _wrap(tokenizer, before, [texts] if isinstance(texts, str) else texts, after)
    return ids[0] if isinstance(texts, str) else ids


def question_ids(tokenizer, questions: str | Sequence[str], system: str = "") -> list[int] | list[list[int]]:
    """Token ids of a question (or of each of several): user turn and generation prompt, no system turn.

    system: a message at the template's place for it; a template without one (Gemma-2's) gets it in the user's turn.
    ValueError where the template silently drops the system message. Raises as check_text does.
    """
    several = [questions] if isinstance(questions, str) else questions
    if isinstance(several, (bytes, bytearray, Mapping, Set)) or not isinstance(several, Iterable):
        raise TypeError(f"questions must be a text or a list of texts, not {type(several).__name__}")
    several = list(several)
    for number, question in enumerate(several, 1):
        check_text(question, "the question" if isinstance(questions, str) else f"question {number}")
    if not isinstance(system, str):
        raise TypeError(f"the system message must be a text, not {type(system).__name__}")
    before, after = _question_wrapping(tokenizer, system.strip())
    ids = _wrap(tokenizer, before, several, after)
    return ids[0] if isinstance(questions, str) else ids


def answer_ids(tokenizer, answer: str, *, after_space: bool = False) -> list[int]:
    """Token ids of an answer, without an end of the turn. after_space: as it stands inside a text, after a space."""
    if not after_space:
        return tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
    ids = tokenizer(" " + answer.strip(), add_special_tokens=False)["input_ids"]
    return ids[1:] if len(ids) > 1 and not tokenizer.decode(ids[:1]).strip() else ids


def question_affixes(tokenizer) -> tuple[list[int], list[int]]:
    """(prefix, suffix): token ids around every question; an answer follows the suffix."""
    before, after = _question_wrapping(tokenizer, "")
    return _ids(tokenizer, before), _ids(tokenizer, after)


def _question_wrapping(tokenizer, system: str) -> tuple[str, str]:
    user = {"role": "user", "content": SENTINEL}
    if not system:
        return _around_sentinel(_render(tokenizer, [user]))
    check_text(system, "the system message")
    if any(name in system for name in _special_texts(tokenizer)):
        raise ValueError("the system message holds the name of a special token of the chat template: leave it out")
    try:
        rendered = _render(tokenizer, [{"role": "system", "content": system}, user])
        # A short message may be a word of the template, so a rare word tests whether system messages show.
        probe = _render(tokenizer, [{"role": "system", "content": _SYSTEM_SENTINEL}, user])
    except TemplateRefuses:
        before, after = _around_sentinel(_render(tokenizer, [user]))
        return f"{before}{system}\n\n", after
    if _SYSTEM_SENTINEL not in probe:
        raise ValueError(
            "this chat template leaves system messages out, so the model would not see it: put it into the question, "
            'f"{system}\\n\\n{question}", or set a tokenizer.chat_template with a system turn'
        )
    return _around_sentinel(rendered)


def stop_ids(tokenizer) -> list[int]:
    """Tokens that end an answer: end of text, and the special token after the model's turn in the template."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": SENTINEL}]
    after = _ids(tokenizer, _around_sentinel(_render(tokenizer, turns, generation_prompt=False))[1].lstrip())
    special = {tokenizer.convert_tokens_to_ids(name) for name in _special_texts(tokenizer)}
    if after and after[0] in special and after[0] not in stops:
        stops.append(after[0])
    return stops


# --- sentences and chunks -------------------------------------------------------------------------------------------


def _cut(start: int, end: int, ends: list[int]) -> list[tuple[int, int]]:
    """[start, end) cut after each of the positions `ends`."""
    edges = [start, *(position for position in ends if start < position < end), end]
    return list(zip(edges, edges[1:], strict=False))


def sentence_number(place: int) -> int:
    """The number of a sentence in texts, tables and figures, from 1 on through all documents; place: from 0."""
    return place + 1


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character spans (start, end) of the sentences, which cover the text; white space belongs to the sentence before.

    A sentence ends at `.`, `!`, `?` before white space, at CJK stops and at blank lines. It does not end at common
    abbreviations and initials ("Dr. M. Finch") or at a full stop before a lower-case word.
    """
    if not text:
        return []
    ends = []
    for match in _SENTENCE_END.finditer(text):
        following = text[match.end() : match.end() + 1]
        full_stop = match.group().rstrip() == "." and match.group().count("\n") < 2
        abbreviation = _ABBREVIATION.search(text, max(0, match.start() - 12), match.start() + 1)
        if not (full_stop and (following.islower() or abbreviation)):
            ends.append(match.end())
    return _join_blank(text, _cut(0, len(text), ends))


class _TokenCounter:
    """Token counts of stretches of one text, each stretch on its own."""

    def __init__(self, text: str, tokenizer):
        self.text, self.tokenizer = text, tokenizer
        self.known: dict[str, int] = {}
        self.has_special = any(name in text for name in _special_texts(tokenizer))

    def count(self, spans: list[tuple[int, int]], joined: bool = False) -> list[int]:
        """Tokens of each span without the white space around it; joined: with the white space before it."""
        texts = [self.text[start:end].strip() for start, end in spans]
        if joined:
            texts = [self._space_before(start) + text for (start, _), text in zip(spans, texts, strict=True)]
        unknown = [text for text in dict.fromkeys(texts) if text not in self.known]
        if self.has_special:
            encoded = [_plain_ids(self.tokenizer, text) for text in unknown]
        else:
            encoded = self.tokenizer(unknown, add_special_tokens=False, verbose=False)["input_ids"] if unknown else []
        self.known |= {text: len(ids) for text, ids in zip(unknown, encoded, strict=True)}
        return [self.known[text] for text in texts]

    def _space_before(self, start: int) -> str:
        """The white space before a stretch."""
        first = start
        while first > 0 and self.text[first - 1].isspace():
            first -= 1
        return self.text[first:start]


def _fill(sizes: list[int], limit: int) -> list[int]:
    """The end index of each group of neighbours, filled greedily up to a sum of `limit`."""
    groups, total = [], 0
    for index, size in enumerate(sizes):
        if index and total + size > limit:
            groups.append(index)
            total = 0
        total += size
    return [*groups, len(sizes)]


def _balanced(sizes: list[int], limit: int) -> list[int]:
    """As _fill with the smallest limit that needs no more groups, so that their sizes are as equal as possible."""
    groups = _fill(sizes, limit)
    low, high = max(sizes), limit
    while low < high:
        middle = (low + high) // 2
        if len(_fill(sizes, middle)) <= len(groups):
            high = middle
        else:
            low = middle + 1
    return _fill(sizes, high)


def _group(spans: list[tuple[int, int]], sizes: list[int], limit: int) -> list[tuple[int, int]]:
    """Neighbouring spans joined into balanced groups of at most `limit` tokens."""
    joined, first = [], 0
    for last in _balanced(sizes, limit):
        joined.append((spans[first][0], spans[last - 1][1]))
        first = last
    return joined


def _split_long(counter: _TokenCounter, span: tuple[int, int], limit: int) -> list[tuple[int, int]]:
    """A stretch of more than `limit` tokens, cut to fit: at line ends, else at white space, else anywhere."""
    start, end = span
    for pattern in (_LINE_END, _WORD_END):
        pieces = _cut(start, end, [match.end() for match in pattern.finditer(counter.text, start, end)])
        if len(pieces) > 1:
            break
    else:
        if end - start == 1:
            raise ValueError(
                f"chunk_tokens={limit} is too small: the character {counter.text[start]!r} alone takes "
                f"{counter.count([span])[0]} tokens"
            )
        middle = (start + end) // 2
        pieces = [(start, middle), (middle, end)]
    return _fit(counter, pieces, limit)


def _fit(counter: _TokenCounter, spans: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    """Spans joined into groups of at most `limit` tokens, as counted; spans that are too long are split first."""
    fitting: list[tuple[int, int]] = []
    for span, size in zip(spans, counter.count(spans), strict=True):
        fitting += [span] if size <= limit else _split_long(counter, span, limit)
    groups = _group(fitting, counter.count(fitting, joined=True), limit)
    # Rarely a joined text takes more tokens than its parts, where tokens merge differently.
    counts = counter.count(groups)
    if max(counts) <= limit:
        return groups
    result = []
    for (start, end), count in zip(groups, counts, strict=True):
        if count <= limit:
            result.append((start, end))
            continue
        inside = [span for span in fitting if start <= span[0] and span[1] <= end]
        half = len(inside) // 2
        result += _fit(counter, inside[:half], limit) + _fit(counter, inside[half:], limit)
    return result


def chunk_document(text: str, tokenizer, chunk_tokens: int, name: str = "document") -> list[Chunk]:
    """The document as chunks of at most `chunk_tokens` tokens each, without the chat wrapping.

    Cuts lie at sentence ends. Only a sentence that exceeds a chunk is cut: at line ends, else between words, else
    between characters. Greedy filling sets the number of chunks; their sizes are as equal as possible.
    The spans follow each other and cover the whole text. Raises as check_text does; ValueError for a
    `chunk_tokens` that is no positive whole number or smaller than one character's tokens.
    """
    check_text(text, f"document {name!r}" if name != "document" else "the document")
    check_count(chunk_tokens, "chunk_tokens")
    counter = _TokenCounter(text, tokenizer)
    spans = _fit(counter, split_sentences(text), chunk_tokens)
    spans = _join_blank(text, spans)
    return [Chunk(name, index, span, text[slice(*span)]) for index, span in enumerate(spans)]


def _join_blank(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans, each blank one joined to the span before it, a blank first one to the span after it."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and (not text[start:end].strip() or not text[slice(*joined[-1])].strip()):
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def open_turn(tokenizer, text: str) -> list[int]:
    """Token ids of a chat whose user's turn begins with `text` and is still open."""
    whole, empty = question_ids(tokenizer, [f"{text}x", f"{text}y"])
    n = next(i for i, (a, b) in enumerate(zip(whole, empty, strict=False)) if a != b)
    return whole[:n]


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of what turns text into tokens: vocabulary, rules, special tokens and chat template."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    rules |= {"padding": None, "truncation": None}  # the last call sets these
    whole = [rules, tokenizer.get_vocab(), tokenizer.chat_template, sorted(map(str, tokenizer.all_special_tokens))]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
