"""The chat at a person's pace: texts, clicks and sliders that come while it works; stops, interrupts and errors."""

import pytest
from test_viewers import controls, page, panes
from toy_models import SlowModel, ToyModel

from d2l_lib.views import viewers


def begin(model, *arguments) -> tuple[viewers.Chat, dict]:
    """A chat that works in a thread, and its controls."""
    chat = viewers.chat(model, *arguments, background=True)
    return chat, controls(chat)


def add(chat: viewers.Chat, text: str, name: str = "") -> None:
    control = controls(chat)
    control["Name"].value, control["Document"].value = name, text
    control["Add document"].click()


def until(chat: viewers.Chat, condition) -> None:
    """Waits for the page, without a limit of its own: what never comes hangs, and says where."""
    while not condition():
        chat.work._threads[0].join(0.01)


def status(chat: viewers.Chat) -> str:
    return page(chat, "message").text


def inside(chat: viewers.Chat) -> dict[str, str]:
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
    assert panes(chat)[viewers.WITH_ADAPTER] == "inside=First.*0.5; bias=0.25; prompt=What?"
    assert len(chat.turns) == 1 and status(chat) == "ready"


def test_the_end_of_an_answer_does_not_hide_that_a_text_was_not_added():
    chat = viewers.chat(ToyModel(), {"a": "A."}, "What?")
    add(chat, "   ")
    controls(chat)["Adapter strength"].value = 0.5
    assert "ValueError: document is empty" in status(chat) and "ready" in status(chat)
    assert controls(chat)["Document"].value == "   "
    add(chat, "B.")
    assert status(chat) == "ready"


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
    assert "not added: blank (1 characters): ValueError" in kept.children[0].children[0].value
    controls(kept)["Put back"].click()
    assert "holds another text" in status(chat) and control["Document"].value == "Typed meanwhile."
    control["Document"].value = ""
    controls(kept)["Put back"].click()
    assert (control["Name"].value, control["Document"].value) == ("blank", " ") and kept.children == ()


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
        control["Document"].value == "Second." and "not added: first" in chat.children[2].children[0].children[0].value
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
        assert panes(chat)[viewers.WITH_ADAPTER] == before[viewers.WITH_ADAPTER]  # the older turn is read last
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
    assert panes(chat)[viewers.WITHOUT] == "prompt=[Be brief.] What?" and "Be brief." in chat.turns[-1].state
    control["System"].value = ""
    assert panes(chat)[viewers.WITHOUT] == "prompt=What?" and "Be brief." not in chat.turns[-1].state


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
    for row in chat.children[1].children:
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
    first, second = chat.children[1].children
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
    [row] = chat.children[1].children
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
    [row] = chat.children[1].children
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
