"""The viewer for self-generated data shows what the files hold, reads no more than it needs, and survives bad files."""

import copy
import io
import json
import math
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from pages import Tags, controls, page
from toy_models import HOSTILE

from d2l_lib.documents import context_ids, question_ids, stop_ids
from d2l_lib.engine import TransformersEngine
from d2l_lib.formats import markup
from d2l_lib.formats.shards import MANIFEST, PUBLISHED, SCHEMA
from d2l_lib.training import selfgen
from d2l_lib.views import shards
from d2l_lib.views.samples import evidence_spans
from d2l_lib.views.shards import (
    AGREEMENTS,
    Decoder,
    ShardFile,
    agreement,
    matching_sentences,
    render_shard_sample,
    view_shards,
)

TOKENIZER = tiny_models.build_tokenizer()
K = 16
LAMPS = "Ada lives in Velm. She paints lamps. The lake is cold."


def row(document: str, *asked: tuple) -> dict:
    """A row of a shard. asked: (question, answer, reference, kind, lowest probability of the answer's tokens)."""
    made = {name: [] for name in SCHEMA.names}
    made |= {"document": document, "ctx_ids": context_ids(TOKENIZER, document)}
    for question, answer, reference, kind, lowest in asked:
        prompt = question_ids(TOKENIZER, question)
        ids = TOKENIZER(answer, add_special_tokens=False)["input_ids"] + stop_ids(TOKENIZER)[-1:]
        p = np.full(len(ids), 0.97)
        p[len(ids) // 2] = lowest
        first = (p > 0.5).astype(float)  # the chosen token is the most likely one, or else the second
        values = np.stack([np.where(first, p, 0.6 - p / 2), np.where(first, (1 - p) / 2, p)], 1)
        rest = np.tile(np.geomspace(1e-3, 1e-6, K - 2), (len(ids), 1))
        others = np.array([[token for token in range(70, 90) if token != i][: K - 1] for i in ids])
        indices = np.where(first[:, None] > 0, np.insert(others, 0, ids, 1), np.insert(others, 1, ids, 1))
        made["input_ids"].append(prompt + ids)
        made["response_start_end"].append([len(prompt), len(prompt) + len(ids)])
        made["logprobs_vals"].append(list(np.log(np.concatenate([values, rest], 1)).astype(np.float16)))
        made["logprobs_indices"].append(indices.tolist())
        texts = {"questions": question, "answers": answer, "references": reference, "kinds": kind, "closed": False}
        for name, value in texts.items():
            made[name].append(value)
    return made


ROWS = [
    row(LAMPS, ("What does Ada paint?", "lamps", "lamps", "one_hop", 0.8), ("Where?", "Velm", "Orm", "one_hop", 0.3)),
    row("Bo sells emoji 🙂.", ("What does Bo sell?", "emoji 🙂", "emoji 🙂", "list", 0.9)),
    row("Nobody asked."),
    row(
        "The bank of Orm has 12 staff. " * 4,
        ("How many?", "It has 12.", "12", "number", 0.95),
        ("Who rules Zed?", "I do not know.", None, "unanswerable", 0.05),
        ("Is it in Orm?", "Yes", "Yes", "yes_no", 0.6),
    ),
]
N = sum(len(each["questions"]) for each in ROWS)


def write(path: Path, rows=ROWS, columns=tuple(SCHEMA.names), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA).select(columns), path, **options)
    return path


@pytest.fixture(scope="module")
def decoder():
    return Decoder(TOKENIZER)


@pytest.fixture(params=["ours", "published"])
def shard(request, tmp_path, decoder):
    """ROWS in two row groups, with our text columns or without."""
    columns = SCHEMA.names if request.param == "ours" else list(PUBLISHED)
    return ShardFile(write(tmp_path / "shard.parquet", columns=columns, row_group_size=2), decoder)


# --- what is in a file ------------------------------------------------------------------------------------------------


def test_samples_are_the_questions_of_all_rows_in_order(shard):
    samples = [shard.sample(number) for number in range(shard.n_samples)]
    asked = [
        (each["document"].strip(), *one)
        for each in ROWS
        for one in zip(each["questions"], each["answers"], strict=True)
    ]
    assert [(s.document.strip(), s.question, s.answer) for s in samples] == asked, "stored or decoded, it is the same"
    kinds = [kind for each in ROWS for kind in each["kinds"]]
    assert [s.kind for s in samples] == (kinds if shard.has_texts else [None] * N)
    assert samples[0].document_tokens == len(context_ids(TOKENIZER, LAMPS))
    assert shard.sample(1) == samples[1], "pages may come in any order"


def test_tokens_carry_the_teachers_probabilities(shard):
    sample = shard.sample(1)  # "Velm" with one token that the teacher found second best
    assert "".join(token.text for token in sample.tokens) == "Velm<end>" and sample.finished
    assert [round(token.probability, 2) for token in sample.tokens] == [0.97, 0.97, 0.3, 0.97, 0.97]
    assert [token.rank for token in sample.tokens] == [1, 1, 2, 1, 1]
    assert {len(token.alternatives) for token in sample.tokens} == {K}
    for token in sample.tokens:
        assert token.alternatives[token.rank - 1] == (token.text, pytest.approx(token.probability))


def test_parts_of_a_character_show_as_such(shard):
    assert [token.text for token in shard.sample(2).tokens] == [*"emoji ", *["\ufffd"] * 4, "<end>"]


def test_a_token_that_is_not_listed_is_bounded_by_the_last_alternative():
    values = np.log([[0.5, 0.3, 0.1], [0.6, 0.2, 0.1]])
    p, rank = shards.probabilities(np.array([8, 5]), values, np.array([[7, 8, 9], [7, 8, 9]]))
    np.testing.assert_allclose(p, [0.3, 0.1])
    assert rank.tolist() == [2, 0]
    token = shards.AnswerToken("x", 0.1, 0, (("y", 0.6), ("z", 0.2)))
    assert "≤10" in Tags(shards.render_token(token, 1)).text


def test_filters_find_what_looking_at_every_sample_would(shard):
    samples = [shard.sample(number) for number in range(N)]
    lowest = [min(token.probability for token in s.tokens) for s in samples]

    def expect(right, **wanted) -> int:
        expected = [number for number, sample in enumerate(samples) if right(number, sample)]
        for _ in range(2):  # read, then remembered
            assert shard.find(**wanted).tolist() == expected
        return len(expected)

    assert expect(lambda i, s: True) == N
    assert expect(lambda i, s: "lamps" in s.document, text="LAMPS") == 2
    assert expect(lambda i, s: "?" in s.question, text="?") == N, "a search is for the letters, not a pattern"
    assert expect(lambda i, s: s.document_tokens >= 100, document_tokens=(100, math.inf)) == 3
    assert expect(lambda i, s: s.document_tokens <= 60, document_tokens=(0, 60)) == 1
    assert expect(lambda i, s: False, document_tokens=(60, 50)) == 0
    assert expect(lambda i, s: lowest[i] <= 0.3, probability=(0, 0.3)) == 2
    assert expect(lambda i, s: 0.5 <= lowest[i] <= 0.91, probability=(0.5, 0.91)) == 3
    assert expect(lambda i, s: s.kind == "one_hop", kind="one_hop") == 2 * shard.has_texts
    assert expect(lambda i, s: agreement(s.answer, s.reference) == "differs", agreement="differs") == shard.has_texts
    both = {"text": "orm", "probability": (0.9, 1)}
    assert expect(lambda i, s: "Orm" in s.document and lowest[i] >= 0.9, **both) == 1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The lamps.", "lamps", "agrees"),
        ("She paints lamps, I think", "lamps", "contains the reference"),
        ("clamps", "lamps", "differs"),
        ("lamps", "", "differs"),
        ("lamps", None, "no reference"),
        (None, "lamps", "differs"),
    ],
)
def test_agreement(answer, reference, expected):
    assert agreement(answer, reference) == expected in AGREEMENTS


@pytest.mark.parametrize(
    ("document", "answer", "marked"),
    [
        (LAMPS, "lamps", ["She paints lamps."]),
        (LAMPS, "LAMPS.", ["She paints lamps."]),
        (LAMPS, "lamp", []),
        (LAMPS, "Velm, lamps", ["Ada lives in Velm.", "She paints lamps."]),
        ("Tom and Ann won. Ann left.", "Tom and Ann", ["Tom and Ann won."]),
        ("Say yes. Or no.", "Yes", []),
        ("It says (a+b). C+ is here.", "(a+b)", ["It says (a+b)."]),
        ("", "x", []),
        (LAMPS, " ", []),
    ],
)
def test_sentences_that_hold_the_answer(document, answer, marked):
    assert [document[start:end] for start, end in matching_sentences(document, answer)] == marked


# --- reading no more than is needed -----------------------------------------------------------------------------------


class Recorder(io.RawIOBase):
    """A file that remembers which bytes were read of it."""

    def __init__(self, path: Path):
        self._file, self.ranges = open(path, "rb"), []  # noqa: SIM115

    def readable(self):
        return True

    seekable = readable

    def seek(self, *where):
        return self._file.seek(*where)

    def tell(self):
        return self._file.tell()

    def read(self, size=-1):
        start = self._file.tell()
        data = self._file.read(size)
        if self._file.read(1):  # a reading to the end is for the footer
            self._file.seek(-1, io.SEEK_CUR)
            self.ranges.append((start, start + len(data)))
        return data

    def touched(self, metadata) -> set[tuple[int, str]]:
        """(row group, column) of all column chunks of which something was read since the last call."""
        found = set()
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(number)
                start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
                if any(a < start + chunk.total_compressed_size and b > start for a, b in self.ranges):
                    found.add((group, chunk.path_in_schema.split(".")[0]))
        self.ranges.clear()
        return found


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """100,000 samples on 12,500 documents, in five row groups."""
    table = pa.Table.from_pylist([row(LAMPS, *[("Who?", "Velm", "Velm", "one_hop", 0.8)] * 8)], schema=SCHEMA)
    many = table.take(pa.array(np.zeros(2500, dtype=int)))
    path = tmp_path_factory.mktemp("large") / "large.parquet"
    with pq.ParquetWriter(path, SCHEMA) as file:
        for _ in range(5):
            file.write_table(many)
    return path


def test_only_what_is_looked_at_is_read(large, decoder, monkeypatch):
    metadata, recorder, real = pq.read_metadata(large), Recorder(large), pq.ParquetFile
    monkeypatch.setattr(shards.pq, "ParquetFile", lambda path, **options: real(recorder, **options))
    shard = ShardFile(large, decoder)
    assert shard.n_samples == 100_000
    light = {(group, name) for group in range(5) for name in ("response_start_end", "kinds")}
    assert recorder.touched(metadata) == light, "opening reads two light columns"
    assert shard.sample(100_000 - 1).question == "Who?"
    assert recorder.touched(metadata) == {(4, name) for name in SCHEMA.names}, "a page reads its row group"
    shard.sample(100_000 - 2)
    assert recorder.touched(metadata) == set(), "the sample beside it is there already"

    told = []
    assert len(shard.find(document_tokens=(1, 1000), tell=lambda *what: told.append(what))) == 100_000
    assert recorder.touched(metadata) == {(group, n) for group in range(5) for n in ("response_start_end", "ctx_ids")}
    assert told == [("document tokens", group) for group in range(5)]
    assert len(shard.find(document_tokens=(1000, 2000), tell=lambda *what: told.append(what))) == 0
    assert recorder.touched(metadata) == set() and len(told) == 5, "it is known by now"
    assert len(shard.find(kind="none of these", probability=(0.5, 1))) == 0
    assert recorder.touched(metadata) == set(), "no sample is left for which the heavy columns would matter"
    assert shard.cost("document tokens") < shard.cost("probability") < large.stat().st_size


def test_viewer_of_very_many(large):
    viewer = view_shards(large.parent, TOKENIZER)
    control = controls(viewer)
    assert control["Sample"].max == 100_000
    control["Sample"].value = 77_777
    assert page(viewer, "shard").root().items() >= {"data-position": "77776", "data-matches": "100000"}.items()
    control["Search"].value = "nowhere to be found"
    assert "text in 5 of 5 row groups" in messages(viewer)


# --- the viewer -------------------------------------------------------------------------------------------------------


def messages(viewer) -> str:
    return " ".join(Tags(child.value).text for child in viewer.children if "d2l-message" in getattr(child, "value", ""))


def test_viewer_pages_and_filters(tmp_path):
    write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", ROWS[:1])
    viewer = view_shards(tmp_path, TOKENIZER)
    control = controls(viewer)
    shown = page(viewer, "shard")
    assert shown.root().items() >= {"data-position": "0", "data-matches": str(N), "data-agreement": "agrees"}.items()
    assert "<mark>She paints lamps.</mark>" in viewer.children[-1].value
    assert "search for the words of the reference answer" in shown.text and ": 1 sentence" in shown.text
    assert control["Previous"].disabled
    control["Next"].click()
    shown = page(viewer, "shard")
    assert shown.root().items() >= {"data-position": "1", "data-agreement": "differs"}.items()
    assert "lowest probability 30.0 %" in shown.text
    control["Kind"].value = "unanswerable"
    assert page(viewer, "shard").root()["data-matches"] == "1" and control["Next"].disabled
    assert f"1 of {N} samples match" in messages(viewer)
    control["Clear filters"].click()
    control["Lowest p, %"].value = (0, 30)
    assert page(viewer, "shard").root()["data-matches"] == "2"
    assert "scanned once for this: probability in 1 of 1 row groups" in messages(viewer)
    control["Teacher"].value = "no reference"
    assert page(viewer, "shard").root()["data-matches"] == "1"
    control["Clear filters"].click()
    control["Tokens from"].value = "100"
    assert page(viewer, "shard").root()["data-matches"] == "3"
    control["Tokens from"].value = "many"
    assert "'many' is not a whole number" in messages(viewer) and control["Next"].disabled
    control["Tokens from"].value = ""
    control["Search"].value = "no such text"
    assert "No sample matches." in page(viewer, "shard").text
    control["File"].value = "b.parquet"
    assert page(viewer, "shard").root()["data-samples"] == "2" and control["Search"].value == ""


def test_each_token_shows_number_colour_and_alternatives_without_javascript(tmp_path):
    write(tmp_path / "a.parquet")
    viewer = view_shards(tmp_path, TOKENIZER)
    controls(viewer)["Sample"].value = 2
    tags = page(viewer, "shard")
    tokens = [attributes for tag, attributes in tags.elements if "d2l-token" in attributes.get("class", "")]
    assert [token["class"].split()[1] for token in tokens] == [f"d2l-level{level}" for level in (1, 1, 3, 1, 1)]
    assert all(token["tabindex"] == "0" for token in tokens)
    assert tokens[2]["title"] == "token 3: 30.0 %, rank 2 of 16"
    assert tags.text.count("▸") == len(tokens)
    assert not any(name.startswith("on") for _, attributes in tags.elements for name in attributes)


def test_published_files_work_without_texts(tmp_path):
    write(tmp_path / "a.parquet", columns=list(PUBLISHED))
    viewer = view_shards(tmp_path, TOKENIZER)
    tags, control = page(viewer, "shard"), controls(viewer)
    assert control["Kind"].disabled and control["Teacher"].disabled
    assert "texts are decoded" in messages(viewer) and "not recorded" in tags.text
    assert "the words of the teacher's answer" in tags.text and "She paints lamps." in tags.text
    control["Search"].value = "bo sells"
    assert page(viewer, "shard").root()["data-matches"] == "1"


def test_what_the_teacher_answered_without_the_document_is_not_marked_in_it(tmp_path):
    write(tmp_path / "a.parquet", [row(LAMPS, ("Who?", "lamps", "lamps", "encyclopedia", 0.9))])
    viewer = view_shards(tmp_path, TOKENIZER)
    assert "the teacher did not see it" in page(viewer, "shard").text and "<mark>" not in viewer.children[-1].value


def test_a_page_without_kernel_keeps_a_table_and_the_first_sample(tmp_path):
    write(tmp_path / "a.parquet")
    bundle = view_shards(tmp_path, TOKENIZER)._repr_mimebundle_()
    tags = Tags(bundle["text/html"])
    tables = [attributes for _, attributes in tags.elements if "d2l-shard-table" in attributes.get("class", "")]
    assert tables[0]["data-rows"] == "5" and tables[0]["data-samples"] == str(N)
    assert "How many?" in tags.text and "Point at a token" in tags.text
    json.dumps(bundle)


def test_hostile_text_stays_text(tmp_path):
    hostile = row(HOSTILE, (HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0.4))
    name = "<img src=x onerror=alert(1)>.parquet"
    write(tmp_path / name, [hostile])
    record = {"file": name, "counts": {"kept": HOSTILE, "questions": 1, "unfinished": HOSTILE}}
    (tmp_path / MANIFEST).write_text(json.dumps({"shards": [record], "settings": {"max_new_tokens": HOSTILE}}))
    viewer = view_shards(tmp_path, TOKENIZER)
    assert viewer.children[-1].value.count("d2l-token d2l") > 50
    for html_page in (
        viewer.children[-1].value,
        viewer.static_html,
        *(getattr(c, "value", "") for c in viewer.children),
    ):
        tags = Tags(html_page)
        assert not tags.names() & {"script", "img"}
        assert all(not name.startswith("on") for _, attributes in tags.elements for name in attributes)
    assert page(viewer, "shard").text.count(HOSTILE) >= 6
    controls(viewer)["Kind"].value = HOSTILE
    assert page(viewer, "shard").root()["data-kind"] == HOSTILE


def test_what_selfgen_makes_is_shown_with_what_it_left_out(tmp_path):
    model = tiny_models.build_base_model(TOKENIZER, window=2048)
    engine = TransformersEngine("random", model, TOKENIZER)
    model.get_output_embeddings().weight.data[engine.stops] *= 3
    settings = selfgen.Settings(documents=4, shard_size=4, questions=3, longest=3, max_new_tokens=16)
    totals = selfgen.generate(settings, tmp_path, engine)["totals"]
    assert 0 < totals["kept"] < totals["questions"]
    viewer = view_shards(tmp_path, TOKENIZER)
    text = page(viewer, "shard").text
    assert f"{totals['kept']} of {totals['questions']} questions kept" in text
    assert f"answers without a stop token within 16 tokens ({totals['unfinished']})" in text
    table = pq.read_table(tmp_path / "shard-00000.parquet")
    assert page(viewer, "shard").root()["data-matches"] == str(totals["kept"])
    assert table["questions"][0][0].as_py() in text
    assert "another tokenizer" not in messages(viewer)
    other = tiny_models.build_tokenizer(tiny_models.NO_SYSTEM_TEMPLATE)
    assert "another tokenizer" in messages(view_shards(tmp_path, other))


def test_what_was_left_out_of_a_small_models_questions_is_told_in_words(tmp_path):
    record = {"file": "a.parquet", "counts": {"kept": 2, "questions": 3, "writer_off_text": 4, "answer_goes_round": 1}}
    told = {
        style: shards._describe_dropped(
            tmp_path / "a.parquet", {"shards": [record], "settings": {"writer_style": style}}
        )
        for style in ("lists", "openings")
    }
    assert told["openings"].endswith("left out: written questions: off text (4); answers: goes round (1).")
    assert "items of the writer's lists: off text (4)" in told["lists"]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_folders_without_shards(tmp_path):
    (tmp_path / "file").write_text("no folder")
    write(tmp_path / "good" / "a.parquet")
    viewer = view_shards(tmp_path / "missing", TOKENIZER)
    folder = controls(viewer)["Folder"]
    assert "missing does not exist" in messages(viewer) and "missing does not exist" in viewer.static_html
    for name, reason in (
        (".", "holds no .parquet files"),
        ("file", "is a file: give its folder"),
        ("\0", "does not exist"),
    ):
        folder.value = str(tmp_path / name)
        assert reason in messages(viewer)
        assert controls(viewer)["Next"].disabled and controls(viewer)["File"].options == ()
    controls(viewer)["Search"].value = "nothing is open"
    folder.value = str(tmp_path / "good")
    assert page(viewer, "shard").root()["data-matches"] == str(N) and "exist" not in messages(viewer)


def test_a_corrupted_file_is_named_and_the_rest_stays_usable(tmp_path):
    good = write(tmp_path / "c.parquet")
    (tmp_path / "a.parquet").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "b.parquet").write_bytes(b"")
    viewer = view_shards(tmp_path, TOKENIZER)
    assert "a.parquet is not a readable" in messages(viewer) and "b.parquet is not a readable" in messages(viewer)
    assert "a.parquet is not a readable" in Tags(viewer.static_html).text
    assert controls(viewer)["File"].value == "c.parquet" and page(viewer, "shard").root()["data-matches"] == str(N)
    controls(viewer)["File"].value = "a.parquet"
    assert "a.parquet is not a readable" in messages(viewer) and controls(viewer)["Next"].disabled
    shutil.copy(good, tmp_path / "a.parquet")
    controls(viewer)["File"].value = "c.parquet"
    controls(viewer)["File"].value = "a.parquet"
    assert page(viewer, "shard").root()["data-file"] == "a.parquet"


def test_damage_inside_a_row_group_spares_the_others(tmp_path):
    path = write(tmp_path / "a.parquet", row_group_size=2, compression="zstd")
    metadata = pq.read_metadata(path)
    column = next(
        chunk
        for chunk in map(metadata.row_group(1).column, range(metadata.num_columns))
        if chunk.path_in_schema.startswith("logprobs_vals")
    )
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    viewer = view_shards(tmp_path, TOKENIZER)
    control = controls(viewer)
    assert page(viewer, "shard").root()["data-position"] == "0"
    control["Sample"].value = 5
    assert "a.parquet, row group 2 of 2" in messages(viewer) and "logprobs_vals" in messages(viewer)
    control["Sample"].value = 2
    assert page(viewer, "shard").root()["data-position"] == "1"
    control["Lowest p, %"].value = (50, 100)
    assert "a.parquet, row group 2 of 2" in messages(viewer)
    control["Clear filters"].click()
    control["Search"].value = "bank of orm"
    assert f"3 of {N} samples match" in messages(viewer), "the columns that a search reads are whole"
    assert "cannot be read" in Tags(viewer.static_html).text, "the table names the samples that it cannot show"


def ragged(change) -> list[dict]:
    """ROWS, where the last one has been changed."""
    last = copy.deepcopy(ROWS[-1])
    change(last)
    return [*ROWS[:-1], last]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda last: last["input_ids"].pop(), "column input_ids, row 3: not one value for each question"),
        (lambda last: last["logprobs_vals"].pop(), "column logprobs_vals, row 3: not one value for each question"),
        (lambda last: last["questions"].pop(), "column questions, row 3: not one value for each question"),
        (
            lambda last: last["logprobs_vals"].__setitem__(1, last["logprobs_vals"][1][1:]),
            "column logprobs_vals, row 3: not one list for each answer token",
        ),
        (
            lambda last: last["logprobs_indices"].__setitem__(1, [[1], *last["logprobs_indices"][1][1:]]),
            "column logprobs_indices, row 3: lists of different lengths",
        ),
        (
            lambda last: last.update(logprobs_indices=[[t[:5] for t in q] for q in last["logprobs_indices"]]),
            "column logprobs_indices, row 3: not as long as logprobs_vals",
        ),
        (lambda last: last["response_start_end"].__setitem__(0, [1]), "response_start_end, row 3: an answer needs"),
        (
            lambda last: last["response_start_end"].__setitem__(0, [9, 9]),
            "response_start_end, row 3: an answer is empty",
        ),
        (
            lambda last: last["response_start_end"].__setitem__(0, [0, 10**6]),
            "row 3: an answer is empty or lies outside",
        ),
        (lambda last: last["input_ids"].__setitem__(0, None), "row 3: an answer is empty or lies outside input_ids"),
        (lambda last: last["logprobs_indices"][0][0].__setitem__(0, 99_999), "token 99999 is not in this tokenizer"),
    ],
)
def test_ragged_columns_are_told_where_they_are(tmp_path, change, reason):
    write(tmp_path / "a.parquet", ragged(change))
    viewer = view_shards(tmp_path, TOKENIZER)
    assert page(viewer, "shard").root()["data-position"] == "0", "the other rows are shown"
    controls(viewer)["Sample"].value = 4
    assert reason in messages(viewer)
    controls(viewer)["Sample"].value = 1
    assert page(viewer, "shard").root()["data-position"] == "0"


def test_files_that_are_no_shards(tmp_path):
    pq.write_table(pa.table({"ctx_ids": [[1]], "x": [1]}), tmp_path / "a.parquet")
    viewer = view_shards(tmp_path, TOKENIZER)
    assert "a.parquet has no column input_ids, response_start_end, logprobs_vals" in messages(viewer)
    pq.write_table(pa.table({name: ["text"] for name in SCHEMA.names}), tmp_path / "b.parquet")
    controls(viewer)["Folder"].value = str(tmp_path) + "/"
    assert "b.parquet, row group 1 of 1, columns response_start_end: cannot be read" in messages(viewer)
    write(tmp_path / "c.parquet", [])
    controls(viewer)["Folder"].value = str(tmp_path)
    assert "No sample matches." in page(viewer, "shard").text and controls(viewer)["File"].value == "c.parquet"
    write(tmp_path / "c.parquet", ragged(lambda last: last["kinds"].pop()))
    assert "c.parquet, column kinds, row 3: not one value" in messages(view_shards(tmp_path, TOKENIZER))


def test_files_of_other_list_and_number_types(tmp_path, decoder):
    """As other writers store the same columns: 64-bit numbers, large lists, pairs of fixed size."""
    pair = pa.list_(pa.int64(), 2)
    types = {
        "ctx_ids": pa.large_list(pa.int64()),
        "response_start_end": pa.list_(pair),
        "logprobs_vals": pa.list_(pa.list_(pa.list_(pa.float32()))),
    }
    rows = [{name: each[name] for name in PUBLISHED} for each in ROWS]
    schema = pa.schema(PUBLISHED | types)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    shard = ShardFile(tmp_path / "a.parquet", decoder)
    assert [shard.sample(number).answer for number in range(2)] == ["lamps", "Velm"]
    assert shard.find(probability=(0, 0.3)).tolist() == [1, 4]


def test_unfinished_and_damaged_manifests(tmp_path):
    write(tmp_path / "a.parquet")
    (tmp_path / MANIFEST).write_text(json.dumps({"complete": False, "n_shards": 7}))
    assert "not all of its 7 shards" in messages(view_shards(tmp_path, TOKENIZER))
    for damaged in ("{", "[]", '{"shards": 3, "settings": [], "teacher": 1, "complete": true}'):
        (tmp_path / MANIFEST).write_text(damaged)
        assert "not recorded" in page(view_shards(tmp_path, TOKENIZER), "shard").text


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        view_shards(tmp_path, tiny_models.build_tokenizer(None))


def test_the_worlds_own_evidence_is_marked(tmp_path, decoder):
    """A question's evidence is where the world put it, also where its answer stands in other sentences too."""
    documents = selfgen.world_documents(random.Random(1), selfgen.Settings(unrelated_share=0.1), 25)
    rows, truth = [], []
    for text, asked in documents:
        rows.append(row(text, *((q.text, q.reference or "?", q.reference, q.kind, 0.9) for q in asked)))
        rows[-1]["evidence"] = [q.evidence for q in asked]
        truth += [(text, q) for q in asked]
    file = ShardFile(write(tmp_path / "world.parquet", rows), decoder)
    assert len(truth) >= 190 and file.n_samples == len(truth)
    by_words = 0
    for number, (text, question) in enumerate(truth):
        spans, words = file.sample(number).evidence()
        assert spans == [tuple(span) for span in question.evidence], (question, words)
        marks = re.findall(r"<mark>(.*?)</mark>", render_shard_sample(file.sample(number), 0, 1, 1, "f", ""), re.S)
        joined = evidence_spans([start for start, _ in spans], [end for _, end in spans], len(text))
        assert marks == [markup.escape(text[start:end]) for start, end in joined]
        by_words += question.with_document and matching_sentences(text, question.reference) == spans
    assert by_words < 0.9 * len(truth), "a search for words would not do"


def test_stored_evidence_outside_its_document_names_the_row(tmp_path, decoder):
    wrong = row(LAMPS, ("What?", "lamps", "lamps", "one_hop", 0.9)) | {"evidence": [[[0, 999]]]}
    with pytest.raises(ValueError, match="column evidence, row 0: a span is outside the document"):
        ShardFile(write(tmp_path / "wrong.parquet", [wrong]), decoder).sample(0)
