"""The chat at a person's pace: texts, clicks and sliders that come while it works; stops, interrupts and errors."""

import pytest
import tiny_models
from pages import controls, page, panes
from toy_models import SlowModel, ToyModel

from d2l_lib import viewers
from d2l_lib.row_reading import RowReading, answer_rows
from d2l_lib.views.conversation import IN_PROMPT, ROUTED, SPARSELY, WITH_ADAPTER, WITHOUT, Chat


def begin(model, *arguments) -> tuple[Chat, dict]:
    """A chat that works in a thread, and its controls."""
    chat = viewers.chat(model, *arguments, background=True)
    return chat, controls(chat)


def add(chat: Chat, text: str, name: str = "") -> None:
    control = controls(chat)
    control["Name"].value, control["Document"].value = name, text
    control["Add document"].click()


def until(chat: Chat, condition) -> None:
    """Waits for the page, without a limit of its own: what never comes hangs, and says where."""
    while not condition():
        chat.work._threads[0].join(0.01)


def status(chat: Chat) -> str:
    return page(chat, "message").text


def inside(chat: Chat) -> dict[str, str]:
    return chat.conversation.texts


def test_texts_added_during_work_wait_and_are_added():
    model = SlowModel()
    chat, control = begin(model)
    add(chat, "First.", "first")
    until(chat, model.began.is_set)
    assert control["Document"].value == "", "what was taken leaves the box free"
    add(chat, "Second.", "second")
    until(chat, lambda: chat.work.has("add") and "second" in status(chat))
    control["Document"].value = "Third, not added yet."
    assert inside(chat) == {} and "internalizing first ..." in status(chat)
    model.go.set()
    chat.work.wait()
    assert inside(chat) == {"first": "First.", "second": "Second."}
    assert control["Document"].value == "Third, not added yet." and "empty" not in status(chat)


def test_events_that_come_after_the_work_find_what_is_in_the_box_now():
    """A kernel without threads to spare: what a person did meanwhile arrives in one go, when the work is done."""

    class Typed(ToyModel):
        def internalize_each(self, documents):
            if self.internalized == []:
                control["Document"].value = "Second."
                control["Add document"].click()  # within the work, too
            return super().internalize_each(documents)

    chat = viewers.chat(Typed())
    control = controls(chat)
    add(chat, "First.")
    assert list(inside(chat).values()) == ["First.", "Second."]
    control["Document"].value = "Third."
    control["Add document"].click()
    control["Add document"].click()  # a double click
    assert list(inside(chat).values()) == ["First.", "Second.", "Third."]
    assert control["Document"].value == ""


def test_a_double_click_adds_once_and_scolds_nobody():
    model = SlowModel()
    chat, control = begin(model)
    add(chat, "First.")
    control["Add document"].click()
    until(chat, model.began.is_set)
    control["Add document"].click()
    model.go.set()
    chat.work.wait()
    assert inside(chat) == {"document 1": "First."} and 'role="alert"' not in chat.work.status.value


def test_sliders_during_work_lose_nothing_and_count_in_the_end():
    model = SlowModel()
    chat, control = begin(model, None, "What?")
    until(chat, model.began.is_set)
    add(chat, "First.", "first")
    control["Adapter strength"].value = 0.5
    control["Bias strength"].value = 0.25
    until(chat, lambda: chat.work.has("add"))
    model.go.set()
    chat.work.wait()
    assert panes(chat)[WITH_ADAPTER] == "inside=First.*0.5; bias=0.25; prompt=What?"
    assert len(chat.turns) == 1 and status(chat) == "ready"


def test_the_end_of_an_answer_does_not_hide_that_a_text_was_not_added():
    chat = viewers.chat(ToyModel(), {"a": "A."}, "What?")
    add(chat, "   ")
    controls(chat)["Adapter strength"].value = 0.5
    assert "ValueError: document is empty" in status(chat) and "ready" in status(chat)
    assert controls(chat)["Document"].value == "   "
    add(chat, "B.")
    assert status(chat) == "ready"


def test_what_was_refused_is_forgotten_once_a_person_has_gone_on():
    """By other words in the box, by removing a document, or by clearing the answers."""
    for go_on in (
        lambda chat: setattr(controls(chat)["Document"], "value", "C."),
        lambda chat: setattr(controls(chat)["Name"], "value", "c"),
        lambda chat: controls(chat.children[1].widgets[0])["Remove"].click(),
        lambda chat: controls(chat)["Clear"].click(),
    ):
        chat = viewers.chat(ToyModel(), {"a": "A.", "b": "B."}, "What?")
        add(chat, "B.", "a")
        assert "remove it first" in status(chat)
        go_on(chat)
        assert "remove it first" not in status(chat)


def test_a_text_that_cannot_be_added_is_kept_beside_the_one_typed_meanwhile():
    model = SlowModel()
    chat, control = begin(model)
    add(chat, " ", "blank")
    until(chat, model.began.is_set)
    control["Document"].value = "Typed meanwhile."
    model.go.set()
    chat.work.wait()
    assert control["Document"].value == "Typed meanwhile." and inside(chat) == {}
    kept = chat.children[2]
    assert "not added: blank (1 characters): ValueError" in kept.widgets[0].children[0].value
    controls(kept)["Put back"].click()
    assert "holds another text" in status(chat) and control["Document"].value == "Typed meanwhile."
    control["Document"].value = ""
    controls(kept)["Put back"].click()
    assert (control["Name"].value, control["Document"].value) == ("blank", " ") and kept.widgets == []


def test_stop_in_a_long_document_gives_it_back():
    model = SlowModel(chunk=10)
    chat, control = begin(model)
    add(chat, "x" * 1000, "long")
    until(chat, model.began.is_set)
    assert control["Stop"] is chat.work.stop_button
    chat.work.stop()
    model.go.set()
    chat.work.wait()
    assert inside(chat) == {} and "stopped: internalizing long" in status(chat)
    assert (control["Name"].value, control["Document"].value) == ("long", "x" * 1000)
    control["Add document"].click()
    chat.work.wait()
    assert list(inside(chat)) == ["long"]


def test_stop_reaches_what_waits():
    model = SlowModel()
    chat, control = begin(model)
    add(chat, "First.", "first")
    until(chat, model.began.is_set)
    add(chat, "Second.", "second")
    until(chat, lambda: "then: internalizing second" in status(chat))
    chat.work.stop()
    model.go.set()
    chat.work.wait()
    assert inside(chat) == {}
    assert (
        control["Document"].value == "Second." and "not added: first" in chat.children[2].widgets[0].children[0].value
    )


def test_stop_between_answers_leaves_no_turn():
    model = SlowModel()
    chat, control = begin(model, None, "What?")
    until(chat, model.began.is_set)
    chat.work.stop()
    model.go.set()
    chat.work.wait()
    assert chat.turns == [] and "stopped: answering" in status(chat)
    control["Ask"].click()
    chat.work.wait()
    assert [turn.question for turn in chat.turns] == ["What?"] and status(chat) == "ready"


class Breaking(ToyModel):
    """Raises `error` once from `where`."""

    error, where = None, ""

    def _break(self, place: str) -> None:
        if self.error is not None and self.where == place:
            error, self.error = self.error, None
            raise error

    def internalize_each(self, documents):
        adapters = super().internalize_each(documents)
        self._break("internalize")
        return adapters

    def answer(self, *arguments, **options):
        self._break("answer")
        return super().answer(*arguments, **options)


def test_an_interrupt_adds_nothing_and_loses_nothing():
    model = Breaking()
    chat = viewers.chat(model, {"a": "A."})
    control = controls(chat)
    model.error, model.where = KeyboardInterrupt(), "internalize"
    add(chat, "B.", "b")
    assert list(inside(chat)) == ["a"] and "stopped: internalizing b" in status(chat)
    assert (control["Name"].value, control["Document"].value) == ("b", "B.")
    assert not any(widget.disabled for name, widget in control.items() if name != "Stop")
    control["Add document"].click()
    assert list(inside(chat)) == ["a", "b"]
    model.error, model.where = KeyboardInterrupt(), "answer"
    control["Question"].value = "What?"
    assert chat.turns == [] and "stopped: answering" in status(chat)
    control["Ask"].click()
    assert len(chat.turns) == 1


def test_an_interrupt_of_the_cell_is_one():
    model = Breaking()
    model.error, model.where = KeyboardInterrupt(), "internalize"
    with pytest.raises(KeyboardInterrupt):
        viewers.chat(model, {"a": "A."})


@pytest.mark.parametrize("error", [ValueError("no"), OSError("gone"), TypeError("odd"), MemoryError()])
def test_an_error_leaves_no_turn_without_answers(error):
    model = Breaking()
    chat = viewers.chat(model, {"a": "A."}, "What?")
    before = panes(chat)
    model.error, model.where = error, "answer"
    controls(chat)["Question"].value = "Who?"
    if isinstance(error, ValueError):  # what one way of answering cannot do is told in its place
        assert panes(chat)[WITH_ADAPTER] == before[WITH_ADAPTER]  # the older turn is read last
        assert [turn.answers[0][1] for turn in chat.turns][1] == "(no answer: no)"
    else:
        assert [turn.question for turn in chat.turns] == ["What?"] and panes(chat) == before
        assert type(error).__name__ in status(chat)
        controls(chat)["Ask"].click()
        assert [turn.question for turn in chat.turns] == ["What?", "Who?"]
    assert all(len(turn.answers) == 3 for turn in chat.turns)


def test_an_empty_message_sends_nothing():
    calls = []

    class Counting(ToyModel):
        def answer(self, *arguments, **options):
            calls.append(arguments)
            return super().answer(*arguments, **options)

    chat = viewers.chat(Counting(), {"a": "A."})
    control = controls(chat)
    for text in ("", "   ", "\t"):
        control["Question"].value = text
        control["Ask"].click()
        assert "type a question first" in status(chat) and 'role="alert"' not in chat.work.status.value
    assert calls == [] and chat.turns == []
    control["Question"].value = "What?"
    assert status(chat) == "ready" and len(chat.turns) == 1


def test_a_cleared_system_box_clears_the_system_message():
    chat = viewers.chat(ToyModel(), {"a": "A."}, "What?")
    control = controls(chat)
    control["System"].value = "Be brief."
    assert panes(chat)[WITHOUT] == "prompt=[Be brief.] What?" and "Be brief." in chat.turns[-1].state
    control["System"].value = ""
    assert panes(chat)[WITHOUT] == "prompt=What?" and "Be brief." not in chat.turns[-1].state


def test_a_turn_says_what_was_inside_where_that_changed():
    chat = viewers.chat(ToyModel(), {"a": "A."}, "One?")
    control = controls(chat)
    control["Question"].value = "Two?"
    control["Question"].value = ""
    control["Adapter strength"].value = 0.5
    controls(chat.children[1])["Weight"].value = 0.25
    add(chat, "B.", "b")
    control["Question"].value = "Three?"
    assert [turn.state for turn in chat.turns] == [
        "inside: a; adapter 1.00, bias 1.00",
        "inside: a; adapter 1.00, bias 1.00",
        "inside: a (weight 0.25), b; adapter 0.50, bias 1.00",
    ]
    lines = [line for line in page(chat, "answers").text.split("Question") if "inside:" in line]
    assert len(lines) == 2 and lines[0] == "changed: inside: a (weight 0.25), b; adapter 0.50, bias 1.00"
    control["Question"].value = ""
    for row in chat.children[1].widgets:
        controls(row)["Remove"].click()
    control["Question"].value = "Four?"
    assert chat.turns[-1].state == "inside: nothing"


def test_a_turn_is_about_what_was_inside_when_it_was_answered():
    model = SlowModel()
    chat, control = begin(model, None, "One?")
    until(chat, model.began.is_set)
    control["Question"].value = "Two?"
    add(chat, "First.", "first")
    until(chat, lambda: chat.work.has("add"))
    model.go.set()
    chat.work.wait()
    assert [(turn.question, turn.state) for turn in chat.turns] == [
        ("One?", "inside: nothing"),
        ("Two?", "inside: first; adapter 1.00, bias 1.00"),
    ]


def test_clear_while_it_answers_leaves_nothing_behind():
    model = SlowModel()
    chat, control = begin(model, None, "What?")
    until(chat, model.began.is_set)
    control["Clear"].click()
    model.go.set()
    chat.work.wait()
    assert chat.turns == [] and page(chat, "answers").root()["data-turns"] == "0"
    control["Ask"].click()
    chat.work.wait()
    assert len(chat.turns) == 1


def test_edit_can_be_cancelled_and_gives_the_draft_back():
    chat = viewers.chat(ToyModel(), {"a": "A.", "b": "B."})
    control = controls(chat)
    first, second = chat.children[1].widgets
    assert control["Cancel"].layout.display == "none"
    control["Name"].value, control["Document"].value = "c", "A draft."
    controls(first)["Edit"].click()
    assert control["Document"].value == "A." and control["Cancel"].layout.display is None
    controls(second)["Edit"].click()
    assert control["Document"].value == "B.", "an unchanged text is left for another"
    control["Document"].value = "B, changed."
    controls(first)["Edit"].click()
    assert "'b' in the box is changed" in status(chat) and control["Document"].value == "B, changed."
    control["Cancel"].click()
    assert (control["Name"].value, control["Document"].value) == ("c", "A draft.") and not control["Name"].disabled
    assert inside(chat) == {"a": "A.", "b": "B."} and control["Cancel"].layout.display == "none"
    controls(first)["Edit"].click()
    control["Document"].value = "New A."
    controls(chat)["Replace document"].click()
    assert inside(chat)["a"] == "New A." and control["Document"].value == "A draft."


def test_removing_a_document_keeps_its_changed_text_in_the_box():
    chat = viewers.chat(ToyModel(), {"a": "A."})
    control = controls(chat)
    [row] = chat.children[1].widgets
    controls(row)["Edit"].click()
    control["Document"].value = "A, changed."
    controls(row)["Remove"].click()
    controls(row)["Remove"].click()  # a double click
    assert inside(chat) == {} and (control["Name"].value, control["Document"].value) == ("a", "A, changed.")
    control["Add document"].click()
    assert inside(chat) == {"a": "A, changed."}


def test_a_document_removed_while_it_is_replaced_leaves_its_new_text():
    model = SlowModel()
    model.go.set()
    chat, control = begin(model, {"a": "A."})
    chat.work.wait()
    model.go.clear()
    model.began.clear()
    [row] = chat.children[1].widgets
    controls(row)["Edit"].click()
    control["Document"].value = "New A."
    controls(chat)["Replace document"].click()
    until(chat, model.began.is_set)
    controls(row)["Remove"].click()
    model.go.set()
    chat.work.wait()
    assert inside(chat) == {} and control["Document"].value == "New A." and "no document named 'a'" in status(chat)


def test_a_name_that_is_on_its_way_is_taken():
    model = SlowModel()
    chat, control = begin(model)
    add(chat, "First.", "one")
    until(chat, model.began.is_set)
    add(chat, "Second.", "one")
    until(chat, lambda: "is being internalized" in status(chat))
    assert control["Document"].value == "Second."
    model.go.set()
    chat.work.wait()
    assert inside(chat) == {"one": "First."} and control["Document"].value == "Second."


def test_a_long_text_shows_a_bar_on_the_page_and_while_the_page_is_built():
    seen = []

    class Reporting(ToyModel):
        def internalize_each(self, documents, progress=None):
            seen.append(progress)
            return super().internalize_each(documents)

    chat = viewers.chat(Reporting(), {"short": "A.", "long": "x" * 130_000})
    add(chat, "B.")
    assert seen[:2] == [None, True] and callable(seen[2])


def test_chat_compares_three_ways_and_never_puts_the_document_into_the_adapters_prompt():
    answers = panes(viewers.chat(ToyModel(), {"lamps": "Ada paints lamps."}, "What?"))
    assert answers == {
        WITH_ADAPTER: "inside=Ada paints lamps.*1; bias=1; prompt=What?",
        WITHOUT: "prompt=What?",
        IN_PROMPT: "prompt=Ada paints lamps.\n\nWhat?",
    }


def test_sparse_reading_is_a_choice_that_a_turn_remembers():
    model = ToyModel()
    chat = viewers.chat(model, {"a": "A."}, "One?")
    control = controls(chat)
    assert [name for name, _ in control["Reading"].options] == ["published sum", "sparse reading"]
    control["Reading"].value = "sparse"
    answers = panes(chat)
    assert answers[SPARSELY] == "inside=A.*1; bias=1; prompt=One?; read=sparse" and WITH_ADAPTER not in answers
    assert (answers[WITHOUT], answers[IN_PROMPT]) == ("prompt=One?", "prompt=A.\n\nOne?")
    assert len(chat.turns) == 1, "the same question again replaces its answers"
    add(chat, "B.", "b")
    assert panes(chat)[ROUTED].endswith("; blocks=1"), "the most relevant block is summed with the bias"
    control["Question"].value = "Two?"
    control["Question"].value = ""
    control["Reading"].value = "sum"
    control["Question"].value = "Three?"
    assert [turn.state.partition("bias 1.00")[2] for turn in chat.turns] == ["; sparse reading", "; sparse reading", ""]
    assert chat.turns[-1].answers[0] == (WITH_ADAPTER, "inside=A.*1; B.*1; bias=1; prompt=Three?")
    lines = [line for line in page(chat, "answers").text.split("Question") if "inside:" in line]
    assert len(lines) == 2, "where the reading changed, the page says so"
    control["Reading"].value = "sparse"
    for row in chat.children[1].widgets:
        controls(row)["Remove"].click()
    assert chat.turns[-1].state == "inside: nothing" and chat.turns[-1].answers[0][0] == WITH_ADAPTER


def test_a_chat_begins_with_the_reading_that_its_model_was_trained_for():
    class Trained(ToyModel):
        has_null_block = True

    class SumAlone(ToyModel):
        has_null_block = True

        def answer(self, question, adapter, system="", blocks=None):
            return super().answer(question, adapter, system, blocks)

    class OfRows(ToyModel):
        writes_rows = True

    kinds = ((ToyModel, "sum", True), (Trained, "sparse", True), (SumAlone, "sum", False), (OfRows, "sparse", False))
    for kind, read, is_shown in kinds:
        chat = viewers.chat(kind(), {"a": "A."}, "What?")
        control = controls(chat)["Reading"]
        assert (control.value, control.layout.display is None) == (read, is_shown)
        assert chat.turns[0].answers[0][0] == (SPARSELY if read == "sparse" else WITH_ADAPTER)
    assert not tiny_models.build_model().has_null_block

    add(chat, "B.", "b")
    assert list(panes(chat)) == [SPARSELY, WITHOUT, IN_PROMPT], "rows choose by themselves, not block by block"


def test_a_model_of_rows_has_no_strengths():
    class OfRows(ToyModel):
        writes_rows = True

    chat = viewers.chat(models={"sums": ToyModel(), "rows": OfRows()}, documents={"a": "A."}, question="What?")
    control = controls(chat)
    dials = [control[name] for name in ("Adapter strength", "Bias strength")]
    control["Adapter strength"].value = 0.0
    control["Bias strength"].value = 0.5
    assert all(dial.layout.display is None for dial in dials)
    assert "adapter strength 0.00" in page(chat, "inside").text and "adapter 0.00" in chat.turns[-1].state
    control["Model"].value = "rows"
    assert all(dial.layout.display == "none" for dial in dials)
    assert panes(chat)[SPARSELY].startswith("inside=A.*1; bias=1;"), "dials that cannot be seen move nothing"
    assert "strength" not in page(chat, "inside").text and chat.turns[-1].state == "inside: a; sparse reading"
    control["Model"].value = "sums"
    assert all(dial.layout.display is None for dial in dials)
    assert panes(chat)[WITH_ADAPTER].startswith("inside=A.*0; bias=0.5;")


def test_a_turn_says_what_its_answer_was_read_from():
    model = tiny_models.build_rows_model()
    chat = viewers.chat(model, {"fen": "The fen is deep.", "mill": "The mill is old."}, "Where is the mill?")
    (turn,) = chat.turns
    table = answer_rows(model, turn.question, chat.conversation.adapter(), turn.answers[0][1])
    shares = table[table["row"] >= 0].groupby("document")["share"].sum()
    named = [f"{name} ({share:.0%})" for name, share in (shares / shares.sum()).items() if share >= 0.05]
    assert named and turn.read.startswith("The adapter's answer was read from ")
    assert all(one in turn.read for one in named)
    assert turn.read in page(chat, "answers").text.replace("&#x27;", "'")
    model.reading = RowReading(null_logit=1e4)
    assert "nothing was read" in chat.conversation.read_from(turn.question, "Ada")
    for name in ("fen", "mill"):
        chat.conversation.weights[name] = 0.0
    assert chat.conversation.read_from(turn.question, "Ada") == ""
    assert chat.conversation.read_from(turn.question, "(no answer: too long)") == ""


def test_chat_adds_weighs_and_removes_documents():
    model = ToyModel()
    viewer = viewers.chat(model, {"a": "A."}, "What?")
    control = controls(viewer)
    control["Document"].value = "B."
    control["Add document"].click()
    assert model.internalized == ["a", "document 1"]
    assert page(viewer, "inside").root()["data-documents"] == "2"
    assert control["Document"].value == "", "the box is ready for the next document"
    assert panes(viewer)[WITH_ADAPTER].startswith("inside=A.*1; B.*1;")
    assert panes(viewer)[ROUTED] == panes(viewer)[WITH_ADAPTER] + "; blocks=1"
    first, second = viewer.children[1].widgets
    controls(first)["Weight"].value = 0.5
    control["Adapter strength"].value = 2.0
    control["Bias strength"].value = 0.0
    assert panes(viewer)[WITH_ADAPTER] == "inside=A.*1; B.*2; bias=0; prompt=What?"
    assert "weight 0.50" in page(viewer, "inside").text and "bias strength 0.00" in page(viewer, "inside").text
    controls(second)["Remove"].click()
    assert panes(viewer)[WITH_ADAPTER] == "inside=A.*1; bias=0; prompt=What?"
    assert panes(viewer)[IN_PROMPT] == "prompt=A.\n\nWhat?"
    assert ROUTED not in panes(viewer), "one block has nothing to choose from"
    controls(first)["Remove"].click()
    assert page(viewer, "inside").root()["data-documents"] == "0"
    assert panes(viewer)[WITH_ADAPTER] == "prompt=What?"
    assert model.internalized == ["a", "document 1"], "weights and removal need no new pass of the model"


def test_chat_keeps_what_was_said_until_it_is_cleared():
    viewer = viewers.chat(ToyModel(), {"a": "A."}, "What?")
    control = controls(viewer)
    assert page(viewer, "answers").root()["data-turns"] == "1"
    control["Bias strength"].value = 0.5
    assert page(viewer, "answers").root()["data-turns"] == "1", "the same question again replaces its answers"
    control["Question"].value = "Who?"
    said = page(viewer, "answers")
    assert said.root()["data-turns"] == "2"
    assert said.text.index("Who?") < said.text.index("What?"), "the latest comes first"
    assert panes(viewer)[WITHOUT] == "prompt=What?"  # of two turns the older one is read last
    control["Clear"].click()
    assert page(viewer, "answers").root()["data-turns"] == "0"
    control["Ask"].click()
    assert page(viewer, "answers").root()["data-turns"] == "1"


def test_chat_edits_a_document_in_its_place_and_sends_the_system_message():
    model = ToyModel()
    viewer = viewers.chat(model, {"a": "A.", "b": "B."}, "What?")
    control = controls(viewer)
    first, second = viewer.children[1].widgets
    controls(first)["Weight"].value = 0.5
    controls(first)["Edit"].click()
    assert (control["Name"].value, control["Document"].value) == ("a", "A.") and control["Name"].disabled
    control["Document"].value = "  "
    controls(viewer)["Replace document"].click()
    assert "ValueError: document is empty" in page(viewer, "message").text
    assert panes(viewer)[WITH_ADAPTER].startswith("inside=A.*0.5; B.*1;")
    control["Document"].value = "New A."
    controls(viewer)["Replace document"].click()
    assert panes(viewer)[WITH_ADAPTER].startswith("inside=New A.*0.5; B.*1;")
    assert panes(viewer)[IN_PROMPT] == "prompt=New A.\n\nB.\n\nWhat?"
    assert (control["Name"].value, control["Document"].value, control["Name"].disabled) == ("", "", False)
    controls(second)["Edit"].click()
    controls(second)["Remove"].click()
    assert controls(viewer)["Add document"].description and control["Document"].value == ""
    control["System"].value = "Be brief."
    assert panes(viewer)[WITHOUT] == "prompt=[Be brief.] What?"


def test_chat_says_what_went_wrong_and_goes_on():
    viewer = viewers.chat(ToyModel(), {"a": "A."})
    control = controls(viewer)
    control["Document"].value = "   "
    control["Add document"].click()
    assert "ValueError: document is empty" in page(viewer, "message").text
    assert control["Document"].value == "   ", "nothing that was typed is lost"
    control["Document"].value, control["Name"].value = "B.", "a"
    control["Add document"].click()
    assert "remove it first" in page(viewer, "message").text
    control["Name"].value = "long"
    control["Document"].value = "x" * 500
    control["Add document"].click()
    control["Question"].value = "What?"
    assert panes(viewer)[IN_PROMPT].startswith("(no answer: the prompt has")
    assert panes(viewer)[WITH_ADAPTER].startswith("inside=A.*1; xxx")
    assert "ready" in page(viewer, "message").text


def test_chat_takes_documents_as_internalize_does(tmp_path):
    (tmp_path / "lamps.txt").write_text("Ada paints lamps.")
    for documents in (tmp_path / "lamps.txt", {"lamps.txt": tmp_path / "lamps.txt"}):
        assert viewers.chat(ToyModel(), documents).conversation.texts == {"lamps.txt": "Ada paints lamps."}
    for documents, names in (("A.", ["document"]), (["A.", "B."], ["document 1", "document 2"]), ({"x": "A."}, ["x"])):
        model = ToyModel()
        viewers.chat(model, documents)
        assert model.internalized == names
    with pytest.raises(TypeError, match="a text, a Path, a list of these"):
        viewers.chat(ToyModel(), 3)


def test_chat_names_documents_without_reusing_a_name():
    conversation = viewers.Conversation(ToyModel())
    assert [conversation.add(text) for text in ("A", "B", "C")] == ["document 1", "document 2", "document 3"]
    conversation.remove("document 2")
    assert conversation.add("D") == "document 2"
    assert [row["name"] for row in conversation.inside()] == ["document 1", "document 3", "document 2"]


def test_conversation_holds_what_the_model_would():
    model = tiny_models.build_model()
    before = model.internalize("Something else.")
    conversation = viewers.Conversation(model)
    conversation.add("Ada lives in Velm.", "a")
    conversation.add("The lake is cold.", "b")
    assert model.current is before, "a page does not change what the model holds"
    both = model.internalize({"a": "Ada lives in Velm.", "b": "The lake is cold."})
    assert conversation.adapter() == both.scaled_bias(1.0)
    conversation.weights["b"], conversation.adapter_strength, conversation.bias_strength = 0.5, 2.0, 0.0
    assert conversation.adapter() == both.scaled(2.0).scaled(0.5, document="b").scaled_bias(0.0)
    conversation.remove("a")
    conversation.remove("b")
    assert conversation.adapter() is None
    assert conversation.answers("Who?")[0][1] == model.answer("Who?", None)


def test_conversation_reads_as_the_model_does():
    model = tiny_models.build_model()
    conversation = viewers.Conversation(model)
    conversation.add("Ada lives in Velm. The lake is cold.", "a")
    conversation.add("The bridge is old.", "b")
    both = conversation.adapter()
    assert conversation.answers("Who?")[0] == (WITH_ADAPTER, model.answer("Who?", both))
    conversation.read = "sparse"
    assert conversation.answers("Who?")[0] == (SPARSELY, model.answer("Who?", both, read="sparse"))
    assert model.answer("Who?", both, read="sparse") != model.answer("Who?", both)
