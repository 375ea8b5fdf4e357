"""Studies under torchrun: two processes share the work and write the record of one; other studies refuse."""

import json
import os
from pathlib import Path

import processes
import pytest
import tiny_models

from d2l_lib import loading, studies
from d2l_lib.__main__ import main
from d2l_lib.records import read_jsonl
from d2l_lib.studies import base_scores, kinds, needle_scores, passages, probes, reading
from d2l_lib.training.processes import shared, together

TIMES = ("cpu_milliseconds", "seconds")


def record(folder: Path, words: list[str]) -> None:
    """Run a study on a small model in `folder`; questions-<rank>.json says what this process answered."""
    os.chdir(folder)
    model = tiny_models.build_model(window=8192)
    if words[0] == "reading":
        model = loading.load("tiny/qa")
    asked, answer = [], model.answer
    model.answer = lambda questions, *a, **options: (asked.extend(questions), answer(questions, *a, **options))[1]
    loading.load = lambda source: model
    needle_scores._NEEDLE_LENGTHS, needle_scores._IN_CONTEXT_LENGTHS, needle_scores._BATCH = (64, 100), (64,), 2
    kinds._AT_ONCE, passages._AT_ONCE, probes._DOCUMENT_COUNTS = 2, (3, 1e9), (1, 2)
    reading._SIZES, reading._TOGETHER, reading._KINDS = (8,), (2,), ("two_hop", "list")
    main(["study", *words])
    Path(f"questions-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(asked))


@pytest.fixture
def run(tmp_path):
    """run(words, n): (the rows of each file that n processes write, questions that each answered)."""

    def study(words: list[str], n: int) -> tuple[dict[str, list[dict]], list[list[str]]]:
        folder = tmp_path / str(n)
        (folder / "d2l_lib").mkdir(parents=True)
        (folder / "d2l_lib" / "__init__.py").touch()
        for process in processes.start_together(n, record, folder, words):
            process.join(300)
            assert process.exitcode == 0
        rows = {path.name: read_jsonl(path) for path in sorted((folder / "data" / "full_runs").iterdir())}
        return rows, [json.loads((folder / f"questions-{rank}.json").read_text()) for rank in range(n)]

    return study


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["needles", "--n", "5", "--seed", "3"],
        ["kinds", "--n", "5"],
        ["probes", "--n", "2"],
        ["reading", "--n", "20", "--only", "sparse", "in context"],
    ],
    ids=lambda words: words[0],
)
def test_two_processes_write_the_record_of_one(words, run):
    one, (all_questions,) = run(words, 1)
    two, each = run(words, 2)
    assert {*one} == {*two} == {f"{name.format(variant='ours', training_seed=0)}.jsonl" for name in files(words[0])}
    for name, rows in one.items():
        same = [[{k: v for k, v in row.items() if k not in TIMES} for row in own] for own in (rows, two[name])]
        assert same[0] == same[1] and len(rows) >= 3
    assert sorted(each[0] + each[1]) == sorted(all_questions), "each question is answered once"
    assert min(map(len, each)) >= 0.2 * len(all_questions)


def files(name: str) -> tuple[str, ...]:
    return studies.STUDIES[name].files


def parts(folder: Path) -> None:
    """Answers of the base model in batches, answers in parts, and pieces that share out pieces."""
    done = []

    def piece(number: int) -> list[int]:
        done.append(number)
        return shared(range(number), lambda inner: 10 * number + inner)

    model = tiny_models.build_model()
    prompts = [f"Who is {name}?" * (1 + i % 3) for i, name in enumerate("ABCDEFGH")]
    with together():
        answers = base_scores.greedy_answers(
            model.base_model, model.tokenizer, prompts, max_new_tokens=4, batch_tokens=150
        )
        passages._AT_ONCE = 3, 1e9
        replies, seconds = passages.ask(model, prompts, [None] * len(prompts), 4)
        result = {"answers": answers, "replies": replies, "nested": shared(range(4), piece), "none": shared([], piece)}
    assert seconds > 0
    facts = {"done": done, **result}
    (folder / f"{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.json").write_text(json.dumps(facts))


def test_every_process_has_all_results_in_order(tmp_path):
    for n in (1, 2):
        for process in processes.start_together(n, parts, tmp_path):
            process.join(120)
            assert process.exitcode == 0
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert (one.pop("done"), first.pop("done"), second.pop("done")) == ([0, 1, 2, 3], [0, 2], [1, 3])
    assert one == first == second and one["nested"] == [[], [10], [20, 21], [30, 31, 32]] and one["none"] == []
    assert len(set(one["answers"])) > 2 and len(set(one["replies"])) > 2


def test_a_study_of_one_process_refuses_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        main(["study", "gate", "--n", "2"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "gate runs in one process: start it without torchrun" in said and "needles, " in said
    with pytest.raises(SystemExit, match="0"):
        main(["study", "reading", "--help"])
    assert "torchrun" in capsys.readouterr().out
