"""What a chat offers before anything was typed: models by name, and example documents with questions."""

import json
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from d2l_lib.documents import check_name, check_texts
from d2l_lib.formats.text_files import read_document
from d2l_lib.records import project_root
from d2l_lib.tasks import world

_GIVEN = "the given model"
_N_FACTS = 8  # of the example from the generated world


class Example(NamedTuple):
    """A document and questions about it."""

    text: str
    questions: tuple[str, ...] = ()


def bundled_examples(*models: str) -> dict[str, Example]:
    """The bundled example documents by name, with questions about them: for `chat(..., examples=)`.

    models: "smollm2" gives three short articles (data/demo), "tiny" or "tiny/qa" a document of the generated world
        whose names no training saw. None: all. ValueError for another name.
    """
    wanted = dict.fromkeys(name.partition("/")[0] for name in models or _MAKERS)
    for name in wanted:
        if name not in _MAKERS:
            raise ValueError(f"no bundled examples for {name!r}: choose of {', '.join(_MAKERS)}")
    return {title: example for name in wanted for title, example in _MAKERS[name]().items()}


def checked_examples(examples: Mapping[str, Any] | None) -> dict[str, Example]:
    """{name: Example} of {name: (text or Path, questions)}; TypeError or ValueError says what is wrong."""
    checked = {}
    for name, one in (examples or {}).items():
        check_name(name)
        is_pair = isinstance(one, (tuple, list)) and len(one) == 2
        if not is_pair or not isinstance(one[0], (str, PurePath)) or isinstance(one[1], str):
            raise TypeError(f"example {name!r} must be (text, [questions]), not {type(one).__name__}")
        text = read_document(one[0]) if isinstance(one[0], PurePath) else one[0]
        questions = (question.strip() for question in check_texts(one[1], f"questions of example {name!r}"))
        checked[name] = Example(text, tuple(question for question in questions if question))
    return checked


class ModelMenu:
    """Models by name. Each is loaded when it is first wanted, and kept then.

    models: {name: a model, a name or folder that `d2l.load` knows, or a function without arguments that gives a
        model}. None or {}: `model` alone, without a name.
    model: the first one to use: a model, or a name of the menu. One that is not in the menu leads it. None: the menu's
        first.

    Attributes: `names` (of the menu; empty for one model without a name), `first` (the name of the first one to use).
    """

    def __init__(self, model: Any = None, models: Mapping[str, Any] | None = None):
        self._sources = {check_name(name, "name of a model"): one for name, one in (models or {}).items()}
        if model is None and not self._sources:
            raise TypeError("no model: give one, or several by name as models={name: model}")
        self.names = list(self._sources)
        if model is None:
            self.first = self.names[0]
        elif isinstance(model, str) and model in self._sources:
            self.first = model
        else:
            same = (name for name, one in self._sources.items() if one is model or (_is_name(one) and one == model))
            self.first = next(same, _GIVEN if self.names else "")
            if self.first not in self._sources:
                self._sources = {self.first: model} | self._sources
                self.names = list(self._sources) if self.names else []
        self._loaded: dict[str, Any] = {}

    def has_loaded(self, name: str) -> bool:
        """Whether the model of this name needs no loading."""
        return name in self._loaded or not _must_load(self._sources[name])

    def get(self, name: str) -> Any:
        """The model of this name; raises what its loading raises."""
        if name not in self._loaded:
            source = self._sources[name]
            if _is_name(source):
                from d2l_lib.loading import load  # which imports torch

                self._loaded[name] = load(source)
            else:
                self._loaded[name] = source() if _must_load(source) else source
        return self._loaded[name]


def _is_name(source: Any) -> bool:
    return isinstance(source, (str, PurePath))


def _must_load(source: Any) -> bool:
    return _is_name(source) or (callable(source) and not hasattr(source, "answer"))


def suggestions(examples: Mapping[str, Example], inside: Iterable[str], most: int) -> list[tuple[str, str]]:
    """At most `most` (name, question) of the examples that are inside, each document's first before any second."""
    of_each = [[(name, question) for question in examples[name].questions] for name in inside if name in examples]
    longest = max(map(len, of_each), default=0)
    return [questions[place] for place in range(longest) for questions in of_each if place < len(questions)][:most]


# --- the bundled ones -------------------------------------------------------------------------------------------------


def _demo() -> dict[str, Example]:
    folder = project_root() / "data" / "demo"
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return {
        PurePath(file).stem.replace("_", " "): Example(
            (folder / file).read_text(encoding="utf-8"), tuple(question for question, _ in pairs)
        )
        for file, pairs in questions.items()
    }


def _small_world() -> dict[str, Example]:
    document = world.draw_document(random.Random(0), "test", _N_FACTS)
    asked = (world.question_about(random.Random(0), fact).text for fact in document.facts)
    return {"a small world": Example(document.text, tuple(asked))}


_MAKERS: dict[str, Callable[[], dict[str, Example]]] = {"smollm2": _demo, "tiny": _small_world}
