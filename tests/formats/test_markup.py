"""Any text as HTML: what a browser reads is the text itself, and nothing in it is a formula or an element."""

from html.parser import HTMLParser

import pytest

from d2l_lib.formats import markup

TEXTS = ["$5 and $7", r"\(x\) \[y\] \begin{a}", "<b>&amp;</b>", "a\r\nb\tc\x1b[31m", "\u202eabc\u200b", "'\"", "é漢😀"]


class Reader(HTMLParser):
    """The text of a page, the names of its elements, and its pieces of text as a search for formulas sees them."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.pieces, self.elements = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.pieces.append("")

    def handle_endtag(self, tag):
        self.pieces.append("")

    def handle_data(self, data):
        self.pieces[-1:] = ["".join([*self.pieces[-1:], data])]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    ("make", "elements"), [(markup.escape, set()), (markup.inline, {"bdi"}), (markup.without_formulas, {"span"})]
)
def test_the_text_is_kept_and_makes_no_element(make, elements, text):
    read = Reader(make(text))
    assert "".join(read.pieces) == text and set(read.elements) <= elements


@pytest.mark.parametrize("text", TEXTS)
def test_signs_of_formulas_stand_alone_where_typesetting_cannot_be_switched_off(text):
    page = markup.without_formulas(text)
    assert "$" not in page and "\\" not in page, "labels are searched before they are read as HTML"
    assert all(piece in ("$", "\\") or not {"$", "\\"} & {*piece} for piece in Reader(page).pieces)


def test_what_html_cannot_hold_is_shown_by_a_sign():
    assert markup.escape("a\0b\ud800") == "a\u2400b\ufffd"
    assert markup.escape("\r") == "&#13;", "it would become a line feed"


@pytest.mark.parametrize("text", ["a\u2066b", "a\u2069b\u2067\u2068c\u2069", "\u2069\u2069", "\u202ex\u2066y"])
def test_an_isolate_that_is_left_open_ends_with_its_text(text):
    for shown in ("".join(Reader(markup.inline(text)).pieces), markup.isolated(text)):
        depths, depth = [], 0
        for character in shown:
            depth += (character in "\u2066\u2067\u2068") - (character == "\u2069")
            depths.append(depth)
        assert text in shown and depth == 0 and min(depths) >= 0
    assert markup.isolated("notes, part 2") == "notes, part 2"
    assert markup.isolated("\u05d0\u05d1") == "\u2068\u05d0\u05d1\u2069"
