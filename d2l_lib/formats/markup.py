"""Any text as HTML: nothing in it runs, becomes a formula or moves what stands beside it, and nothing is lost."""

import html
import unicodedata

_TURNING = {"R", "AL", "LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # directions of writing
NO_FORMULAS = "tex2jax_ignore mathjax_ignore"  # classes inside which MathJax 2 and 3 leave dollar signs alone
# a carriage return would become a line feed, a null character would vanish, half a surrogate pair cannot be sent
_KEPT = {0x0D: "&#13;", 0x00: "\u2400"} | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def escape(text: object) -> str:
    """HTML whose text is this one's, for an element or a quoted attribute of its own.

    A null character is shown as its picture (U+2400), half a surrogate pair as U+FFFD.
    """
    return html.escape(str(text)).translate(_KEPT)


def inline(text: object) -> str:
    """The same for a place within a line: directions of writing in it end with it."""
    return f"<bdi>{escape(_closed(str(text)))}</bdi>"


def isolated(name: str) -> str:
    """A name for a line of plain text: directions of writing in it end with it. Most names stay as they are."""
    turns = any(unicodedata.bidirectional(character) in _TURNING for character in name)
    return f"\u2068{_closed(name)}\u2069" if turns else name


def _closed(text: str) -> str:
    """The text with a beginning for every end of an isolate in it, and an end for every beginning."""
    is_open = missing = 0
    for character in text:
        if character in "\u2066\u2067\u2068":
            is_open += 1
        elif character == "\u2069" and is_open:
            is_open -= 1
        elif character == "\u2069":
            missing += 1
    return "\u2068" * missing + text + "\u2069" * is_open


def without_formulas(text: object) -> str:
    """The same for a place where typesetting cannot be switched off, such as the label of a widget.

    No sign that begins or ends a formula stands beside another character, as each is an element of its own. Signs are
    written as numbers, for labels are searched for formulas before they are read as HTML.
    """
    return escape(text).replace("$", "<span>&#36;</span>").replace("\\", "<span>&#92;</span>")
