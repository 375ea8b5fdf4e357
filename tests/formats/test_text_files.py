"""Documents in files: what is read, what it is called, and how everything else is refused."""

import random

import pytest
from PIL import Image
from tiny_models import build_model

from d2l_lib.documents import name_documents, name_texts_and_images
from d2l_lib.formats.text_files import html_text, read_document

PAGE = """<!DOCTYPE html><html><head><title>Codes</title><style>p { color: red }</style>
<script>var hidden = "<p>no</p>";</script></head><body><h1>The &quot;old&quot; code</h1>
<p>It is   <b>42</b>17 &amp; not &lt;5&gt;.<br>A new line&nbsp;here.</p><template>unseen</template>
<ul><li>one</li><li>two</li></ul><pre>  kept
    as it is</pre><!-- a comment --><table><tr><td>a</td><td>b</td></tr></table></body></html>"""


def minimal_pdf(text: str) -> bytes:
    """A PDF of one page with one line of text."""
    stream = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(content))
    return content + head + table + tail


@pytest.fixture
def write(tmp_path):
    def written(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


@pytest.mark.parametrize("ending", [".txt", ".md", ".rst", ".py", ".tex", ""])
def test_plain_text_is_read_as_it_stands(write, ending):
    text = "# The <b>code</b> is 4217 — é.\n\tLast line"
    assert read_document(write(f"notes{ending}", text)) == text


def test_line_ends_and_byte_order_marks_are_understood(write):
    assert read_document(write("a.txt", b"one\r\ntwo\rthree")) == "one\ntwo\nthree"
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        assert read_document(write("b.txt", "Größe: 5\n".encode(encoding))) == "Größe: 5\n"


def test_a_page_is_read_without_tags_scripts_and_styles(write):
    text = read_document(write("page.html", PAGE))
    assert text.split("\n\n") == [
        "Codes",
        'The "old" code',
        "It is 4217 & not <5>.\nA new line\u00a0here.",
        "one\ntwo",
        "  kept\n    as it is",
        "a\tb\n",
    ]
    latin = '<meta charset="iso-8859-1"><p>caf\u00e9</p>'.encode("latin-1")
    assert read_document(write("latin.htm", latin)) == "café\n"


def test_any_page_is_read_to_its_end():
    rng = random.Random(0)
    parts = [
        "<p>",
        "</p>",
        "<pre>",
        "</pre>",
        "<script>",
        "</script>",
        "<",
        ">",
        "&",
        "&amp;",
        "<!--",
        "-->",
        "</",
        "a ",
    ]
    for _ in range(300):
        text = html_text("<p>first</p>" + "".join(rng.choice(parts) for _ in range(30)))
        assert text.startswith("first")


def test_a_pdf_is_read(write):
    pytest.importorskip("pypdf")
    assert read_document(write("paper.pdf", minimal_pdf("The code is 4217."))) == "The code is 4217."
    with pytest.raises(ValueError, match=r"paper\.pdf could not be read as a PDF"):
        read_document(write("paper.pdf", b"no PDF at all"))
    with pytest.raises(ValueError, match=r"paper\.pdf holds no text .*pictures"):
        read_document(write("paper.pdf", minimal_pdf("")))


def test_a_pdf_without_the_extra_says_what_to_install(write, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
    with pytest.raises(ImportError, match=r"paper\.pdf is a PDF.*pip install pypdf"):
        read_document(write("paper.pdf", minimal_pdf("x")))


def test_what_is_no_text_is_refused_with_the_file_and_the_byte(write):
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 3 \(0xe9\) does not fit.*latin-1"):
        read_document(write("a.txt", "café".encode("latin-1")))
    with pytest.raises(ValueError, match=r"a\.bin is no text: byte 1 is 0x00"):
        read_document(write("a.bin", b"a\0b"))
    with pytest.raises(ValueError, match=r"a\.docx is not UTF-8.*Read are \.txt, \.md, \.html, \.pdf"):
        read_document(write("a.docx", b"PK\x03\x04\xff\xfe"))
    with pytest.raises(ValueError, match=r"a\.png is an image.*PIL\.Image\.open"):
        read_document(write("a.png", b"\x89PNG"))


def test_what_is_not_there_or_empty_is_refused(write, tmp_path):
    for content in ("", " \n", b"\xef\xbb\xbf"):
        with pytest.raises(ValueError, match=r"a\.txt holds no text"):
            read_document(write("a.txt", content))
    with pytest.raises(ValueError, match=r"a\.html holds no text"):
        read_document(write("a.html", "<script>x</script>"))
    with pytest.raises(FileNotFoundError, match=r"no document at .*missing\.txt"):
        read_document(tmp_path / "missing.txt")
    with pytest.raises(IsADirectoryError, match="is a folder: pass its files"):
        read_document(tmp_path)


def test_files_are_named_by_their_names(write):
    first, second = write("a.txt", "First."), write("b.md", "Second.")
    assert name_documents(first) == {"a.txt": "First."}
    assert name_documents([first, "Third.", second]) == {"a.txt": "First.", "document 2": "Third.", "b.md": "Second."}
    assert name_documents({"mine": first, "b": "text"}) == {"mine": "First.", "b": "text"}
    assert list(name_documents([first, first, first])) == ["a.txt", "a.txt (2)", "a.txt (3)"]


def test_files_stand_beside_pictures(write):
    picture = Image.new("L", (2, 2))
    named = name_texts_and_images([write("a.txt", "First."), picture])
    assert named["a.txt"] == "First."
    assert named["document 2"].mode == "RGB"


def test_a_text_that_names_a_file_is_no_document(write, tmp_path, monkeypatch):
    path = write("README.md", "The code is 4217.")
    for text in (str(path), f" {path}\n"):
        with pytest.raises(ValueError, match="is the name of a file: pass Path"):
            name_documents(text)
        with pytest.raises(ValueError, match="is the name of a file"):
            name_texts_and_images([Image.new("L", (2, 2)), text])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'README.md' is the name of a file: pass Path\('README.md'\)"):
        name_documents("README.md")
    assert name_documents({"a name": "README.md"}) == {"a name": "README.md"}
    assert name_documents("README.txt") == {"document": "README.txt"}  # there is no such file
    assert name_documents(tmp_path.name) == {"document": tmp_path.name}
    assert name_documents("x" * 5000 + "\0") == {"document": "x" * 5000 + "\0"}


def test_the_model_reads_files(write):
    model = build_model()
    path = write("notes.html", "<p>The code is 4217.</p>")
    adapter = model.internalize(path)
    assert adapter.documents == ["notes.html"]
    assert adapter == model.internalize({"notes.html": read_document(path)})
    assert [one.documents for one in model.internalize_each([path, "Text."])] == [["notes.html"], ["document 2"]]
    with pytest.raises(ValueError, match="is the name of a file"):
        model.internalize(str(path))


BAD_NAMES = ["r\udce9sum\udce9.txt", "a\nb", "a\x1bb", "a\u2029b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be_kept_are_refused_before_anything_is_computed(name, monkeypatch):
    model = build_model()
    monkeypatch.setattr(model, "_encode", None)
    for call in (model.internalize, model.internalize_each, name_documents):
        with pytest.raises(ValueError, match="document name .* give another name"):
            call({"fine": "One.", name: "The code is 4217."})
    with pytest.raises(ValueError, match="document name .* give another name"):
        model.internalize({name: Image.new("L", (2, 2))})
