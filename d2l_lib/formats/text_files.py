"""Documents in files, as text: plain text in UTF-8, Markdown, HTML without its tags, and PDF with an extra.

Encodings are not guessed: the error for another one, or for no text, names the first byte that does not fit.
"""

from __future__ import annotations

import codecs
import re
from html.parser import HTMLParser
from pathlib import Path, PurePath

_READ = ".txt, .md, .html, .pdf and other plain text in UTF-8 (.rst, .tex, .py, ...)"
_HTML = (".html", ".htm", ".xhtml")
_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff")
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"))
_MARKS += ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_CHARSET = re.compile(rb"""<meta[^>]{0,200}charset\s*=\s*["']?([A-Za-z0-9_.:-]{1,40})""", re.IGNORECASE)
_UNSEEN = {"script", "style", "template"}
_BLOCKS = {"address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt"}
_BLOCKS |= {"fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header"}
_BLOCKS |= {"hr", "li", "main", "nav", "ol", "p", "pre", "section", "summary", "table", "title", "tr", "ul"}


def read_document(path: PurePath) -> str:
    """The text of a file, by its ending: HTML without tags, scripts and styles; the pages of a PDF; else plain text.

    The encoding is that of the byte-order mark, else UTF-8, else (HTML) what the page declares.
    FileNotFoundError for no file, IsADirectoryError for a folder. ValueError names a file that is no text or has none.
    ImportError where the extra for PDF is missing.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: pass its files, e.g. sorted(Path({str(path)!r}).glob('*.txt'))")
    if not path.exists():
        raise FileNotFoundError(f"no document at {path}: there is no such file")
    if not path.is_file():
        raise ValueError(f"{path} is no ordinary file: pass a file that can be read to its end")
    ending = path.suffix.lower()
    if ending in _IMAGES:
        raise ValueError(f"{path} is an image: pass it as PIL.Image.open({str(path)!r}). Read are {_READ}")
    if ending == ".pdf":
        text = _pdf_text(path)
    else:
        text = _decoded(path, path.read_bytes(), ending in _HTML)
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        text = html_text(text) if ending in _HTML else text
    if not text.strip():
        reason = "its pages hold pictures only, or nothing" if ending == ".pdf" else "it is empty, or blank"
        raise ValueError(f"{path} holds no text ({reason}): nothing to read")
    return text


def _decoded(path: Path, content: bytes, is_html: bool) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        declared = _CHARSET.search(content[:4096]) if is_html else None
        if declared:
            try:
                return content.decode(declared[1].decode("ascii"))
            except (LookupError, ValueError):
                pass
        raise ValueError(
            f"{path} is not {encoding.upper()}: byte {error.start} ({content[error.start]:#04x}) does not fit. "
            f"Read are {_READ}; for text in another encoding pass {{name: path.read_text(encoding='latin-1')}}"
        ) from error
    if "\0" in text:
        raise ValueError(f"{path} is no text: byte {content.index(0)} is 0x00. Read are {_READ}")
    return text


class _Text(HTMLParser):
    """The visible text of a page: a line for each block, white space as one space except in <pre>."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = []
        self.line: list[str] = []
        self.unseen = self.as_is = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.unseen += tag in _UNSEEN
        if tag in _BLOCKS or tag == "br":
            self.end_line(blank=tag != "br" and tag not in ("li", "tr", "dt", "dd"))
        elif tag in ("td", "th") and self.line:
            self.line.append("\t")
        self.as_is += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        self.unseen = max(0, self.unseen - (tag in _UNSEEN))
        if tag in _BLOCKS:
            self.end_line(blank=tag not in ("li", "tr", "dt", "dd"))
        self.as_is = max(0, self.as_is - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.line.append(data if self.as_is else re.sub(r"[ \t\r\n\f]+", " ", data))

    def end_line(self, blank: bool) -> None:
        text = "".join(self.line)
        text = text.rstrip() if self.as_is else re.sub(r" ?\t ?", "\t", re.sub(r" +", " ", text)).strip()
        self.line = []
        if text.strip():
            self.lines.append(text)
        if blank and self.lines and self.lines[-1]:
            self.lines.append("")


def html_text(page: str) -> str:
    """The text of an HTML page without tags, scripts and styles; entities decoded, blank lines between blocks."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    parser.end_line(blank=False)
    return "\n".join(parser.lines).strip() + "\n"


def _pdf_text(path: Path) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError as error:
        raise ImportError(
            f"{path} is a PDF, and reading one needs pypdf (the extra pdf), which is not installed: pip install pypdf"
        ) from error
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise ValueError("it is locked with a password")
        pages = [page.extract_text() for page in reader.pages]
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"{path} could not be read as a PDF ({error}): open it and save it again") from error
    return "\n\n".join(page.strip() for page in pages if page.strip())
