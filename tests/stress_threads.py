"""Threads that use one model at once: each gets the answers of its own adapters, and nothing stays behind.

python tests/stress_threads.py --threads 8 --answers 100
"""

import argparse
import threading
import time

import d2l_lib as d2l
from d2l_lib import lora
from d2l_lib.tasks import needles


def run(threads: int, answers: int, *, length: int = 128, internalize: bool = True) -> dict[str, int]:
    """Counts of (answers, wrong, errors, internalized, hooks): `threads` threads ask `answers` questions each.

    They ask in turn with one adapter, with lists of adapters and without any, and inside `applied`; beside them one
    thread internalizes the same documents again and again and compares. hooks: what is left on the model at the end.
    """
    model = d2l.load("tiny")
    model.hypernetwork.train()  # internalizing must leave it so
    numbers = [f"{4217 + 481 * i}" for i in range(threads)]
    stacks = [needles.build_haystack(model.tokenizer, length, depth=0.5, number=n) for n in numbers]
    adapters = model.internalize_each([one.text for one in stacks])
    questions = [one.question for one in stacks]
    expected = [model.answer(q, a, max_new_tokens=8) for q, a in zip(questions, adapters, strict=True)]
    plain = [model.answer(q, None, max_new_tokens=8) for q in questions]
    assert len(set(expected)) == threads, "the adapters must differ, or a mix-up would not show"
    counts = dict.fromkeys(("answers", "wrong", "errors", "internalized"), 0)
    counting, done = threading.Lock(), threading.Event()

    def count(what: str, n: int = 1) -> None:
        with counting:
            counts[what] += n

    def ask(i: int) -> None:
        options = {"max_new_tokens": 8}
        for turn in range(answers):
            j = (i + turn) % threads
            try:
                if turn % 4 == 1:
                    pair = [questions[i], questions[j], questions[i]]
                    right = model.answer(pair, [adapters[i], adapters[j], None], **options) == [
                        expected[i], expected[j], plain[i],
                    ]  # fmt: skip
                elif turn % 4 == 2:
                    right = model.answer(questions[i], None, **options) == plain[i]
                elif turn % 4 == 3:
                    with model.applied(adapters[j]):
                        right = model.answer(questions[j], **options) == expected[j]
                else:
                    right = model.answer(questions[i], adapters[i], **options) == expected[i]
                count("answers")
                count("wrong", not right)
            except Exception as error:  # whatever it is, it is counted and shown
                count("errors")
                print(f"thread {i}, answer {turn}: {type(error).__name__}: {error}")

    def read() -> None:
        while not done.is_set():
            place = counts["internalized"] % threads
            try:
                again = model.internalize_each([stacks[place].text])[0]
                count("wrong", not _same(again, adapters[place]))
                count("internalized")
            except Exception as error:
                count("errors")
                print(f"internalizing: {type(error).__name__}: {error}")
                return

    workers = [threading.Thread(target=ask, args=(i,)) for i in range(threads)]
    reader = threading.Thread(target=read)
    for one in workers + [reader] * internalize:
        one.start()
    for one in workers:
        one.join()
    done.set()
    if internalize:
        reader.join()
    left = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.base_model.modules())
    left += lora.is_applied(model.base_model) + (not model.hypernetwork.training)
    counts["wrong"] += [
        model.answer(q, a, max_new_tokens=8) for q, a in zip(questions, adapters, strict=True)
    ] != expected
    return counts | {"hooks": left}


def _same(first: d2l.Adapter, second: d2l.Adapter) -> bool:
    """Equal blocks, whatever the document is called."""
    return all(
        (one.A[module] == other.A[module]).all() and (one.B[module] == other.B[module]).all()
        for one, other in zip(first.blocks, second.blocks, strict=True)
        for module in one.A
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--answers", type=int, default=100)
    given = parser.parse_args()
    start = time.perf_counter()
    print(run(given.threads, given.answers), f"{time.perf_counter() - start:.0f} s")
