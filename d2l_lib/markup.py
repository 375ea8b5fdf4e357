"""Any text as HTML: nothing in it runs, becomes a formula or moves what stands beside it, and nothing is lost."""

import html

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
    return f"<bdi>{escape(text)}</bdi>"


def without_formulas(text: object) -> str:
    """The same for a place where typesetting cannot be switched off, such as the label of a widget.

    No sign that begins or ends a formula stands beside another character, as each is an element of its own. Signs are
    written as numbers, for labels are searched for formulas before they are read as HTML.
    """
    return escape(text).replace("$", "<span>&#36;</span>").replace("\\", "<span>&#92;</span>")
