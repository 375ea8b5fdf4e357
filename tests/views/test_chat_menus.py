"""The chat with several models, example documents, answers that appear as they are written, and warnings."""

import threading
from dataclasses import dataclass

import pytest
import tiny_models
from pages import Tags, controls, page, panes
from toy_models import HOSTILE, SlowModel, ToyModel

from d2l_lib import viewers
from d2l_lib.views.conversation import IN_PROMPT, SPARSELY, WITH_ADAPTER, Chat, Conversation
from d2l_lib.views.examples import ModelMenu, bundled_examples, checked_examples, suggestions

LAMPS = {
    "lamps": ("Ada paints lamps.", ["What does Ada paint?", "Who paints?"]),
    "lake": ("The lake is cold.", ["How?"]),
}


@dataclass
class NamedModel(ToyModel):
    """A ToyModel that signs its answers."""

    name: str = ""

    def answer(self, question, adapter, system="", blocks=None, read="sum"):
        return f"{self.name}: {super().answer(question, adapter, system, blocks, read)}"


class Sparse(NamedModel):
    has_null_block = True


def choose(chat: Chat, name: str) -> None:
    controls(chat)["Model"].value = name
    chat.work.wait()


def status(chat: Chat) -> str:
    return page(chat, "message").text


def test_another_model_internalizes_what_is_inside_and_answers_in_a_turn_of_its_own():
    first, second = NamedModel(name="first"), Sparse(name="second")
    chat = viewers.chat(
        models={"one": first, "two": lambda: second}, documents={"a": "A.", "b": "B."}, question="What?"
    )
    control = controls(chat)
    assert control["Model"].options == ("one", "two") and second.internalized == []
    controls(chat._listed.widgets[0])["Weight"].value = 0.5
    control["System"].value = "Be brief."
    choose(chat, "two")
    assert second.internalized == ["a", "b"] and first.internalized == ["a", "b"]
    assert [(turn.model, turn.question) for turn in chat.turns] == [("one", "What?"), ("two", "What?")]
    answer = "second: inside=A.*0.5; B.*1; bias=1; prompt=[Be brief.] What?; read=sparse"
    assert chat.turns[1].answers[0] == (SPARSELY, answer)
    assert control["Reading"].value == "sparse", "each model is read as it was trained"
    shown = page(chat, "answers").text
    assert shown.index("answered by two") < shown.index("answered by one")
    assert "Model: two" in page(chat, "inside").text and status(chat) == "ready"
    choose(chat, "one")
    assert chat.turns[2].answers[0][0] == WITH_ADAPTER and chat.turns[2].model == "one"
    assert len(first.internalized) == 4, "nothing that one model wrote is read by another"


def test_one_model_has_no_menu_and_no_name():
    chat = viewers.chat(NamedModel(name="x"), {"a": "A."}, "What?")
    assert not {"Model", "Examples", "Add example"} & controls(chat).keys()
    assert chat.turns[0].model == "" and "answered by" not in chat.static_html + chat._answers.value
    assert "Model:" not in chat.static_html and "Ask for example" not in chat.static_html


@pytest.mark.parametrize("breaks", ["loading", "internalizing"])
def test_a_model_that_fails_leaves_the_old_one_and_says_why(breaks):
    class Broken(NamedModel):
        def internalize_each(self, documents):
            raise ValueError("too long for me")

    def load():
        if breaks == "loading":
            raise FileNotFoundError("nothing at 'two'")
        return Broken(name="second")

    chat = viewers.chat(models={"one": NamedModel(name="first"), "two": load}, documents={"a": "A."}, question="What?")
    choose(chat, "two")
    reason = "FileNotFoundError: nothing at" if breaks == "loading" else "ValueError: too long for me"
    assert reason in status(chat) and "The model is still one." in status(chat)
    assert controls(chat)["Model"].value == "one" and len(chat.turns) == 1
    controls(chat)["Question"].value = "Who?"
    assert chat.turns[-1].answers[0][1].startswith("first: inside=A.*1;") and chat.turns[-1].model == "one"
    controls(chat)["Question"].value = ""
    choose(chat, "two")
    assert "The model is still one." in status(chat), "it is tried again"


def test_names_of_models_are_loaded_by_name(monkeypatch):
    loaded = []
    monkeypatch.setattr("d2l_lib.loading.load", lambda name: loaded.append(name) or NamedModel(name=name))
    chat = viewers.chat(models={"real": "smollm2", "world": "tiny/qa"}, question="What?")
    assert loaded == ["smollm2"]
    choose(chat, "world")
    choose(chat, "real")
    choose(chat, "world")
    assert loaded == ["smollm2", "tiny/qa"], "what was loaded is kept"
    assert chat.turns[-1].answers[0][1].startswith("tiny/qa: prompt=What?")
    assert viewers.chat("tiny/qa").conversation.model.name == "tiny/qa"


def test_the_model_to_begin_with():
    one, two, other = ToyModel(), ToyModel(), ToyModel()
    models = {"one": one, "two": two, "three": "tiny"}
    assert ModelMenu(None, models).first == "one" and ModelMenu(two, {"x": "tiny", "two": two}).first == "two"
    assert ModelMenu("two", models).first == "two" and ModelMenu("tiny", models).first == "three"
    menu = ModelMenu(other, models)
    assert menu.first == menu.names[0] == "the given model" and menu.names[1:] == ["one", "two", "three"]
    assert menu.get(menu.first) is other and menu.get("two") is two
    assert ModelMenu(other).names == [] and ModelMenu(other).get("") is other
    with pytest.raises(TypeError, match="no model: give one"):
        ModelMenu()
    with pytest.raises(TypeError, match="name of a model"):
        ModelMenu(None, {" ": one})


def test_a_document_that_comes_and_one_that_goes_while_the_model_changes():
    slow = SlowModel()
    chat = viewers.chat(models={"one": ToyModel(), "two": slow}, documents={"a": "A.", "b": "B."}, background=True)
    chat.work.wait()
    control = controls(chat)
    control["Model"].value = "two"
    slow.began.wait(10)
    control["Name"].value, control["Document"].value = "c", "C."
    control["Add document"].click()
    while "then: internalizing c" not in status(chat):
        chat.work._threads[0].join(0.01)
    assert "changing to two: internalizing 2 documents again ..." in status(chat)
    controls(chat._listed.widgets[0])["Remove"].click()
    assert chat.conversation.model_name == "one", "the old model answers meanwhile"
    slow.go.set()
    chat.work.wait()
    assert (chat.conversation.model_name, list(chat.conversation.texts)) == ("two", ["b", "c"])
    assert slow.internalized == ["a", "b", "c"]
    assert [block.text for block in chat.conversation.adapter().blocks] == ["B.", "C."]


def test_a_change_of_model_is_stopped_and_taken_back():
    slow = SlowModel()
    chat = viewers.chat(models={"one": ToyModel(), "two": slow, "three": ToyModel()}, documents="A.", background=True)
    chat.work.wait()
    menu = controls(chat)["Model"]
    menu.value = "two"
    slow.began.wait(10)
    chat.work.stop()
    chat.work.wait()
    assert menu.value == chat.conversation.model_name == "one" and "stopped: changing to two" in status(chat)
    slow.began.clear()
    menu.value = "two"
    slow.began.wait(10)
    menu.value = "one"  # chosen back: nothing is said
    chat.work.wait()
    assert chat.conversation.model_name == "one" and chat.work.status.value == ""
    slow.began.clear()
    menu.value = "two"
    slow.began.wait(10)
    menu.value = "three"
    chat.work.wait()
    assert chat.conversation.model_name == "three"


def test_a_conversation_goes_to_another_model():
    first, second = tiny_models.build_model(seed=0), tiny_models.build_model(seed=1)
    conversation = Conversation(first, "first")
    conversation.add("Ada lives in Velm. The lake is cold.", "a")
    conversation.weights["a"], conversation.adapter_strength = 0.5, 2.0
    moved = conversation.moved(second, "second")
    assert (conversation.model, moved.model, moved.model_name) == (first, second, "second")
    conversation.take(moved)
    expected = second.internalize("Ada lives in Velm. The lake is cold.").scaled(0.5).scaled(2.0)
    assert [b.A.keys() for b in conversation.adapter().blocks] == [b.A.keys() for b in expected.blocks]
    assert conversation.answers("Who?")[0][1] == second.answer("Who?", conversation.adapter())
    stale = conversation.moved(first)
    conversation.add("Another.", "b")
    with pytest.raises(ValueError, match="document 'b' came meanwhile"):
        conversation.take(stale)
    assert conversation.model is second and len(conversation.inside()) == 2


# --- examples ---------------------------------------------------------------------------------------------------------


def test_an_example_comes_in_with_questions_that_a_click_asks():
    chat = viewers.chat(ToyModel(), examples=LAMPS)
    control = controls(chat)
    assert control["Examples"].options == ("lamps", "lake") and chat._suggested.children == ()
    control["Add example"].click()
    assert chat.conversation.texts == {"lamps": "Ada paints lamps."} and chat.turns == []
    assert [button.description for button in chat._suggested.children[1:]] == LAMPS["lamps"][1]
    controls(chat._suggested)["Who paints?"].click()
    assert panes(chat)[WITH_ADAPTER] == "inside=Ada paints lamps.*1; bias=1; prompt=Who paints?"
    assert control["Question"].value == "Who paints?" and len(chat.turns) == 1
    control["Add example"].click()
    assert "lamps is inside already" in status(chat) and len(chat.conversation.texts) == 1
    control["Examples"].value = "lake"
    control["Add example"].click()
    assert [button.description for button in chat._suggested.children[1:]] == [
        "What does Ada paint?",
        "How?",
        "Who paints?",
    ]
    assert len(chat.turns) == 1 and "The lake" in panes(chat)[IN_PROMPT]
    controls(chat._listed.widgets[0])["Remove"].click()
    assert [button.description for button in chat._suggested.children[1:]] == ["How?"]


def test_the_static_page_lists_the_questions_and_names_the_model():
    text, questions = LAMPS["lamps"]
    models = {"one": ToyModel(), "two": ToyModel()}
    chat = viewers.chat(models=models, documents={"lamps": text}, question=questions[0], examples=LAMPS)
    shown = Tags(chat._repr_mimebundle_()["text/html"])
    assert "Ask for example: What does Ada paint? · Who paints?" in shown.text
    assert "Model: one" in shown.text and "answered by one" in shown.text
    assert not {"button", "select", "script"} & shown.names()


def test_suggestions_take_turns_and_end():
    examples = checked_examples({"a": ("A.", ["a1", "a2", "a3"]), "b": ("B.", ["b1", "b2"])})
    assert suggestions(examples, ["b", "other", "a"], 4) == [("b", "b1"), ("a", "a1"), ("b", "b2"), ("a", "a2")]
    assert suggestions(examples, [], 4) == []


@pytest.mark.parametrize("wrong", ["A.", ("A.", "What?"), ("A.",), (3, ["What?"]), ("A.", [3])])
def test_examples_of_another_form_are_refused(wrong):
    with pytest.raises(TypeError, match="example 'a'"):
        viewers.chat(ToyModel(), examples={"a": wrong})


def test_the_bundled_examples():
    examples = bundled_examples()
    assert list(examples) == ["harbour museum", "iron bridge", "seed collector", "a small world"]
    assert examples == bundled_examples("smollm2") | bundled_examples("tiny/qa") == checked_examples(examples)
    assert all(len(one.questions) >= 7 and 300 < len(one.text) < 3000 for one in examples.values())
    with pytest.raises(ValueError, match="no bundled examples for 'gemma'"):
        bundled_examples("gemma")


def test_hostile_names_and_questions_stay_text():
    models = {HOSTILE: NamedModel(name="x", window=10**9), "two": ToyModel()}
    chat = viewers.chat(
        models=models, documents={HOSTILE: HOSTILE}, question=HOSTILE, examples={HOSTILE: (HOSTILE, [HOSTILE])}
    )
    shown = Tags(chat.static_html)
    assert not {"img", "script"} & shown.names()
    assert f"answered by {HOSTILE}" in shown.text and f"Ask for example: {HOSTILE}" in shown.text


# --- answers as they are written --------------------------------------------------------------------------------------


class Writing(ToyModel):
    """Writes its answer letter by letter."""

    def answer(self, question, adapter, system="", blocks=None, read="sum", stream=None):
        answer = super().answer(question, adapter, system, blocks, read)
        for end in range(len(answer) if stream else 0):
            stream(answer[: end + 1])
        return answer


def test_answers_appear_as_they_are_written(monkeypatch):
    monkeypatch.setattr("d2l_lib.views.conversation.REDRAW_S", 0.0)
    chat = viewers.chat(Writing(), {"a": "A."})
    seen = []
    chat._writing.observe(lambda change: seen.append(Tags(change["new"]).text), "value")
    controls(chat)["Question"].value = "What?"
    first = [text for text in seen if WITH_ADAPTER in text and "base model" not in text]
    assert first[0] == f"QuestionWhat?{WITH_ADAPTER}…" and first[-1].endswith("inside=A.*1; bias=1; prompt=What?")
    assert len(first) == 1 + len("inside=A.*1; bias=1; prompt=What?")
    assert seen[-2].endswith(panes(chat)[IN_PROMPT]) and chat._writing.value == ""


def test_the_place_of_each_answer_is_shown_before_its_first_word(monkeypatch):
    monkeypatch.setattr("d2l_lib.views.conversation.REDRAW_S", 1000.0)
    chat = viewers.chat(Writing(), {"a": "A."})
    seen = []
    chat._writing.observe(lambda change: seen.append(Tags(change["new"]).text), "value")
    controls(chat)["Question"].value = "What?"
    last = [text for text in seen if IN_PROMPT in text]
    assert len(last) == 1 and last[0].endswith(f"prompt=What?{IN_PROMPT}…"), "a long prompt is read meanwhile"


def test_stop_ends_an_answer_between_two_tokens(monkeypatch):
    monkeypatch.setattr("d2l_lib.views.conversation.REDRAW_S", 0.0)
    reached, go = threading.Event(), threading.Event()

    class Endless(ToyModel):
        def answer(self, question, adapter, stream=None):
            for _ in range(1000):
                stream("word ")
                reached.set()
                go.wait(10)
            return "never"

    chat = viewers.chat(Endless(), None, background=True)
    controls(chat)["Question"].value = "What?"
    reached.wait(10)
    assert "word" in chat._writing.value
    chat.work.stop()
    go.set()
    chat.work.wait()
    assert chat.turns == [] and chat._writing.value == "" and "stopped: answering" in status(chat)


def test_a_model_streams_the_answer_that_it_gives():
    model = tiny_models.build_model()
    adapter = model.internalize("Ada lives in Velm.")
    for options in ({}, {"read": "sparse"}, {"blocks": 1}):
        texts = []
        answer = model.answer("Who?", adapter, max_new_tokens=12, stream=texts.append, **options)
        assert texts and answer == model.answer("Who?", adapter, max_new_tokens=12, **options)
        assert texts[-1] == answer.rstrip("\ufffd") and len(texts) <= 12
    with pytest.raises(ValueError, match="stream follows the answer to one question"):
        model.answer(["Who?"], adapter, stream=texts.append)

    def refuse(text):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        model.answer("Who?", adapter, stream=refuse)
    assert model.answer("Who?", adapter, max_new_tokens=12, blocks=1) == answer, "the model is as it was"
