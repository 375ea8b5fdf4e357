"""The study of context distillation on real text: a teacher that reads its prompt, and LoRAs that learn its answers."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiny_models import build_pooled_model, build_rows_model

from d2l_lib.adapter import Adapter, Block
from d2l_lib.base_model import module_sizes
from d2l_lib.documents import question_ids
from d2l_lib.engine import TransformersEngine
from d2l_lib.formats.peft import merge
from d2l_lib.studies import distilled_passages
from d2l_lib.tasks import qa
from d2l_lib.tasks.short_questions import Written
from d2l_lib.training import context_distillation
from d2l_lib.training.context_distillation import ContextDistillation

DOCUMENTS = [f"Ada{i} lives in Velm{i}. Bo{i} paints lamps." for i in range(4)]
COSTS = ["seconds_prepare", "seconds_answer", "bytes_kept", "peak_memory_mib"]


@pytest.fixture(scope="module")
def model():
    model = build_rows_model()
    model.window = 1024
    return model


@pytest.fixture(scope="module")
def lora(model):
    """A LoRA that changes what the base model says."""
    modules = ["down_proj", "q_proj"]
    d_in, d_out = module_sizes(model.base_model, modules)
    torch.manual_seed(0)
    A, B = ({m: torch.randn(4, 3, side[m]) * 0.2 for m in modules} for side in (d_in, d_out))
    return Adapter((Block("reading", 0, None, 1.0, A, B),), None, 2.0, base_model="base", base_key=model.base_key)


def test_a_teacher_of_its_own_gives_the_answers(model, lora, monkeypatch):
    class Finishing(TransformersEngine):
        def reply(self, *arguments):
            return [replace(one, finished=True) for one in super().reply(*arguments)]

    teacher = merge(model.base_model, lora)
    asked = [f"Where does Ada{i} live?" for i in range(4)]
    learned = []
    monkeypatch.setattr(context_distillation, "TransformersEngine", Finishing)
    monkeypatch.setattr(ContextDistillation, "_train", lambda self, pairs: learned.append(pairs))
    for one in (teacher, None):
        ContextDistillation(build_pooled_model(), "oracle", max_new_tokens=8, teacher=one).prepare(DOCUMENTS[0], asked)
    prompts = question_ids(model.tokenizer, qa.with_document(DOCUMENTS[0], asked, model.tokenizer, 1024, 8))
    said = [[reply.ids for _, reply in pairs] for pairs in learned]
    for ids, network in zip(said, (teacher, model.base_model), strict=True):
        assert ids == [one.ids for one in TransformersEngine("it", network, model.tokenizer).reply(prompts, 8, 0.0, 0)]
    assert said[0] != said[1]


def test_questions_are_written_until_there_are_enough(model, monkeypatch):
    rounds = [["a?", "b?"], ["b?", "c?"], ["d?", "e?"], ["f?"]]
    settings = []

    def written(rng, texts, writer, counts, **how):
        settings.append(how)
        return [[Written(text, "who", (0, 1)) for text in rounds[len(settings) - 1]]]

    monkeypatch.setattr(distilled_passages, "write_questions", written)
    assert distilled_passages.written_questions(model, DOCUMENTS[0], 4, 0) == ["a?", "b?", "c?", "d?"]
    assert [how["temperature"] for how in settings] == [0.0, 0.7, 0.7], "greedy first, then others"


def test_every_method_answers_the_same_questions_with_its_costs(model, lora, tmp_path, monkeypatch):
    paragraphs = [
        {"context": text, "qas": [_asked(f"{i}{j}", text, *pair) for j, pair in enumerate(_pairs(i))]}
        for i, text in enumerate(DOCUMENTS)
    ]
    paragraphs[3]["qas"] = paragraphs[3]["qas"][:1]  # a passage with one question is not drawn
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"title": "all", "paragraphs": paragraphs}]}))
    monkeypatch.setattr(distilled_passages, "reading_lora", lambda model: lora)
    monkeypatch.setattr(distilled_passages, "load", lambda *place, **how: build_pooled_model())
    monkeypatch.setattr(distilled_passages, "written_questions", lambda model, document, n, seed: [f"Who? {document}"])
    monkeypatch.setattr(distilled_passages, "_MOST", 2)
    rows = distilled_passages.run(model, n=2, seed=0, questions=f"squad={file}", steps=1)
    table = pd.DataFrame(rows)
    assert len(table) == 15 and table["method"].nunique() == 5 and set(table["documents"]) == {2}
    assert set(table["n"]) == {4} and set(table["steps"]) == {1}
    assert table[COSTS].notna().all(axis=None) and (table["score"] >= 0).all()
    kept = table.drop_duplicates("method").set_index("method")["bytes_kept"]
    distilled = [kept[name] for name in kept.index if "distillation" in name]
    assert distilled[0] == distilled[1] > 0 == kept["question alone"]
    with_two = distilled_passages._some_passages(qa.load_named(f"squad={file}"), 9, 0)
    assert list(dict.fromkeys(with_two["document"])) == DOCUMENTS[:3]


def _pairs(i: int) -> list[tuple[str, str]]:
    return [(f"Where does Ada{i} live?", f"Velm{i}"), (f"What does Bo{i} paint?", "lamps"), (f"Who? {i}", f"Ada{i}")]


def _asked(name: str, text: str, question: str, answer: str) -> dict:
    return {"id": name, "question": question, "answers": [{"text": answer, "answer_start": text.index(answer)}]}
