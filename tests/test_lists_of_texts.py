"""One text where several are expected is refused, and not taken as a list of letters."""

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from torch import nn

from d2l_lib import base_model, routing
from d2l_lib.analysis import report, trust
from d2l_lib.documents import check_texts
from d2l_lib.formats.shards import find_shards
from d2l_lib.formats.writing import atomic_folder
from d2l_lib.presets import changed, preset
from d2l_lib.routing import gated
from d2l_lib.studies import base_scores, baselines, faithfulness, notebooks, speed
from d2l_lib.studies.retrieval import PassageIndex, Retrieval
from d2l_lib.tasks import qa, scores, world
from d2l_lib.tasks.questions import world_samples
from d2l_lib.training import selfgen, slurm
from d2l_lib.training.context_distillation import ContextDistillation
from d2l_lib.views.conversation import Conversation

MODEL = SimpleNamespace(
    writes_rows=False, gate=None, least_relevance=0.0, tokenizer=None, window=9, answer=lambda *_, **__: []
)
TABLE = pd.DataFrame({"correct": [True], "what": ["answer"], "method": "m", "dataset": "d", "document": "x"})
RNG = random.Random(0)


def written(texts):
    return selfgen.written_documents(RNG, selfgen.Settings(), texts, None, Counter())


CALLS = {
    "routing.route": lambda texts: routing.route(MODEL, texts, [None]),
    "routing.relevance": lambda texts: routing.relevance(MODEL, texts, [None] * 5),
    "routing.leads_and_divergences": lambda texts: routing.leads_and_divergences(MODEL, texts, [None] * 5),
    "gated": lambda texts: gated(MODEL, texts, None),
    "reports.find_questions": lambda texts: report.find_questions(MODEL, texts),
    "reports.ask_about": lambda texts: report.ask_about(MODEL, texts, 1, 0),
    "reports.score_answers": lambda texts: report.score_answers(MODEL, texts, [[1]], [None]),
    "base_scores.greedy_answers": lambda texts: base_scores.greedy_answers(MODEL, None, texts),
    "presets.changed": lambda texts: changed(preset("tiny").needle, texts),
    "baselines.Internalized": lambda texts: baselines.Internalized(MODEL).answer((None, "x"), texts),
    "baselines.InContext": lambda texts: baselines.InContext(MODEL).answer("x", texts),
    "baselines.NoContext": lambda texts: baselines.NoContext(MODEL).answer(None, texts),
    "Retrieval": lambda texts: Retrieval(MODEL).answer(PassageIndex(["x"]), texts),
    "PassageIndex": PassageIndex,
    "ContextDistillation.prepare": lambda texts: ContextDistillation(MODEL, "oracle").prepare("x", texts),
    "ContextDistillation.answer": lambda texts: ContextDistillation(MODEL, 1).answer(None, texts),
    "baselines.costs": lambda texts: baselines.costs(TABLE, texts),
    "faithfulness.study": lambda texts: faithfulness.study(MODEL, 1, 0, kinds=texts),
    "trust.drawn": lambda texts: next(trust.drawn(0, texts, 1, 2)),
    "trust.curves_of": lambda texts: trust.curves_of(MODEL, 1, 0, texts),
    "speed.cost_table": lambda texts: speed.cost_table(TABLE, texts),
    "notebooks.choose_notebooks": lambda texts: notebooks.choose_notebooks([Path("00_a.ipynb")], texts),
    "world.questions": lambda texts: world.questions(RNG, None, texts),
    "world_samples": lambda texts: world_samples(1, 0, kinds=texts),
    "scores.summarise": lambda texts: scores.summarise(TABLE, texts),
    "qa.summarise_scores": lambda texts: qa.summarise_scores(TABLE, texts),
    "selfgen.written_documents": written,
    "selfgen.parse_questions": lambda texts: selfgen.parse_questions("", earlier=texts),
    "slurm.sbatch_script, shards": lambda texts: slurm.sbatch_script("paper-gemma", shards=texts),
    "slurm.sbatch_script, extra": lambda texts: slurm.sbatch_script("paper-gemma", shards=["x"], extra=texts),
    "base_model.target_linears": lambda texts: base_model.target_linears(nn.Identity(), texts),
    "base_model.module_sizes": lambda texts: base_model.module_sizes(nn.Identity(), texts),
    "atomic_folder": lambda texts: atomic_folder("folder", keep=texts).__enter__(),
    "Conversation.free_name": lambda texts: Conversation(MODEL).free_name(texts),
    "check_texts": lambda texts: check_texts(texts, "texts"),
}


@pytest.mark.parametrize("wrong", ["Code?", b"Code?", {"Code?": 1}, {"Code?"}, None, 3, ["Code?", 3]], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_list_of_texts_is_refused(name, wrong):
    with pytest.raises(TypeError, match="must be (a list of )?texts"):
        CALLS[name](wrong)


def test_lists_of_texts_are_taken():
    for several in (["a", "b"], ("a", "b"), iter(["a", "b"])):
        assert check_texts(several, "texts") == ["a", "b"]
    assert check_texts([], "texts") == []


def test_one_place_of_shards_is_one_place(tmp_path):
    file = tmp_path / "a.parquet"
    file.touch()
    assert find_shards(str(file)) == find_shards(file) == find_shards([file]) == {str(file): [file]}
    assert find_shards(str(tmp_path)) == {str(tmp_path): [file]}
    with pytest.raises(FileNotFoundError, match="no shards at nowhere"):
        find_shards("nowhere")
