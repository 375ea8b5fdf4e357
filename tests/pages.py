"""What a page or a viewer shows, read back."""

import re
from html.parser import HTMLParser

import ipywidgets as W

from d2l_lib.views.page import Viewer


class Tags(HTMLParser):
    """All elements with their attributes, and the visible text of each class that is asked for."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text, self._style = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._style = tag == "style"

    def handle_endtag(self, tag):
        self._style = False

    def handle_data(self, data):
        self.text += "" if self._style else data

    def names(self) -> set:
        return {tag for tag, _ in self.elements}

    def root(self) -> dict:
        return next(attributes for tag, attributes in self.elements if "d2l-view" in attributes.get("class", ""))


def controls(widget: W.Widget) -> dict[str, W.Widget]:
    """Every control below `widget` by its description (the last one of a name wins)."""
    found = {}
    for child in getattr(widget, "children", ()):
        found |= controls(child)
    if getattr(widget, "description", ""):
        found[widget.description] = widget
    return found


def page(viewer: Viewer, kind: str) -> Tags:
    """The page of one kind as it is shown now."""
    pages = [child.value for child in viewer.children if isinstance(child, W.HTML) and f"d2l-{kind}" in child.value]
    return Tags(pages[-1])


def panes(viewer: Viewer) -> dict[str, str]:
    """{where it came from: answer} as shown now."""
    html_of = next(
        child.value for child in viewer.children if isinstance(child, W.HTML) and "d2l-answers" in child.value
    )
    pieces = re.findall(
        r'<div class="d2l-pane" data-source="([^"]*)">.*?<div class="d2l-text">(.*?)</div>', html_of, flags=re.DOTALL
    )
    return dict(pieces)
