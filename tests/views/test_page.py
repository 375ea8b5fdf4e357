"""What a page does while it is busy: one job after another, nothing lost, everything usable afterwards."""

import threading
import types

import ipywidgets as W
import pytest
from pages import Tags
from toy_models import HOSTILE

from d2l_lib.views import page
from d2l_lib.views.page import Pager, Work


def said(work: Work) -> str:
    return Tags(work.status.value).text


def is_idle(work: Work) -> bool:
    hidden = work.bar.layout.visibility == "hidden"
    return not work.is_busy and hidden and work.stop_button.disabled and not any(c.disabled for c in work.held)


class Gate:
    """Work that waits, in steps, until it may go on."""

    def __init__(self, steps: int = 1):
        self.steps, self.began, self.go = steps, threading.Event(), threading.Event()

    def __call__(self, report):
        for done in range(self.steps):
            self.began.set()
            assert self.go.wait(30)
            report(done + 1, self.steps)
        return "result"


def test_no_formula_is_made_of_a_page():
    root = Tags(page.render_view("x", "costs $5 to $6", value=HOSTILE)).root()
    assert {"d2l-view", "d2l-x", "tex2jax_ignore", "mathjax_ignore"} <= set(root["class"].split())
    assert root["data-value"] == HOSTILE


def test_a_program_has_the_result_when_the_call_returns():
    work, results = Work(), []
    work.start("adding ...", lambda report: 1 + 1, results.append, ready="added")
    assert results == [2] and said(work) == "added" and is_idle(work)


def test_a_page_stays_free_and_jobs_run_in_the_order_they_came():
    work, gate, results = Work(background=True), Gate(), []
    work.start("the first ...", gate, results.append)
    assert gate.began.wait(30)
    work.start("the second ...", lambda report: "second", results.append)
    assert results == [] and "the first ..." in said(work) and "then: the second" in said(work)
    gate.go.set()
    work.wait()
    assert results == ["result", "second"] and said(work) == "ready" and is_idle(work)


def test_a_job_started_by_another_waits_for_its_end():
    work, order = Work(), []

    def outer(report):
        work.start("inner ...", lambda report: order.append("inner"))
        order.append("outer")

    work.start("outer ...", outer)
    assert order == ["outer", "inner"]


def test_the_bar_counts(monkeypatch):
    monkeypatch.setattr(page, "REVEAL_S", 0.0)
    monkeypatch.setattr(page, "REDRAW_S", 0.0)
    work, half, go = Work(background=True), threading.Event(), threading.Event()

    def read(report):
        report(1_000, 2_000)
        half.set()
        assert go.wait(30)

    work.start("reading ...", read, unit="chunks")
    assert half.wait(30)
    bar, count, stop = work.bar.children
    assert (bar.value, bar.max, count.value) == (1_000, 2_000, "1,000 of 2,000 chunks")
    work._reveal()
    assert work.bar.layout.visibility == "visible" and not stop.disabled
    go.set()
    work.wait()
    assert is_idle(work)


def test_a_count_that_stays_does_not_hide_the_next():
    """An answer reports the same count with every token; what comes after its last one takes long."""
    work, shown = Work(), []

    def answer(report):
        work._redrawn -= 2 * page.REDRAW_S
        report(0, 3)
        work._redrawn -= 2 * page.REDRAW_S  # a while later
        report(0, 3)
        report(1, 3)
        shown.append(work._count.value)

    work.start("answering ...", answer, unit="answers")
    assert shown == ["1 of 3 answers"]


def test_stop_ends_the_work_at_its_next_report_and_what_waits():
    work, gate, dropped, results = Work(background=True), Gate(1000), [], []
    work.start("reading ...", gate, results.append, dropped.append)
    work.start("waiting ...", lambda report: 1, results.append, lambda reason: dropped.append(f"second {reason}"))
    assert gate.began.wait(30)
    work.stop_button.disabled = False
    work.stop_button.click()
    assert "stopping after this step: reading" in said(work)
    gate.go.set()
    work.wait()
    assert (results, dropped) == ([], ["second stopped", "stopped"])
    assert "stopped: reading" in said(work) and is_idle(work)
    work.start("again ...", lambda report: 2, results.append)
    work.wait()
    assert results == [2]


def test_work_that_never_reports_is_not_kept_once_it_was_stopped():
    work, go, began, results = Work(background=True), threading.Event(), threading.Event(), []
    work.start("reading ...", lambda report: (began.set(), go.wait(30)), results.append)
    assert began.wait(30)
    work.stop()
    go.set()
    work.wait()
    assert results == [] and is_idle(work)


def test_an_error_stays_until_the_next_of_its_kind():
    work, dropped = Work(), []
    work.start("adding ...", lambda report: 1 / 0, dropped=dropped.append, key="add")
    assert dropped == ["ZeroDivisionError: division by zero"] and said(work) == dropped[0]
    assert 'role="alert"' in work.status.value
    work.start("answering ...", lambda report: 1, key="answer")
    assert said(work) == "ZeroDivisionError: division by zeroready", "the other's end does not hide it"
    work.start("adding ...", lambda report: 1, key="add")
    assert said(work) == "ready" and is_idle(work)


def test_what_fails_when_the_result_is_drawn_is_told_too():
    work, dropped = Work(), []
    work.start("drawing ...", lambda report: 1, lambda result: [][result], dropped.append)
    assert "IndexError" in said(work) and len(dropped) == 1 and is_idle(work)

    def fail(reason):
        raise KeyError("nowhere")

    work.start("drawing ...", lambda report: 1 / 0, dropped=fail)
    assert "ZeroDivisionError" in said(work) and "KeyError" in said(work) and is_idle(work)


def test_an_interrupt_leaves_the_page_as_a_stop_does():
    button = W.Button()
    work, dropped = Work(held=[button]), []

    def interrupted(report):
        assert button.disabled
        work.start("waiting ...", lambda report: 1, dropped=lambda reason: dropped.append(f"second {reason}"))
        raise KeyboardInterrupt

    work.start("reading ...", interrupted, dropped=dropped.append, key="read")
    assert dropped == ["stopped", "second stopped"] and "stopped: reading" in said(work)
    assert is_idle(work) and work.was_interrupted
    work.start("again ...", lambda report: 1, key="read")
    assert "stopped: reading" not in said(work)


def test_a_newer_job_takes_the_place_of_an_older_one_without_a_word():
    work, gate, results, dropped = Work(background=True), Gate(), [], []
    work.start("search a ...", gate, results.append, dropped.append, key="search", replaces=True)
    assert gate.began.wait(30)
    for name in ("b", "c"):
        options = {"key": "search", "replaces": True}
        work.start(f"search {name} ...", lambda report, name=name: name, results.append, dropped.append, **options)
    gate.go.set()
    work.wait()
    assert (results, dropped, said(work)) == (["c"], [], "ready")


def test_held_controls_are_what_they_were_afterwards():
    usable, unusable = W.Button(), W.Button(disabled=True)
    work, seen = Work(held=[usable, unusable]), []
    work.start("reading ...", lambda report: seen.append((usable.disabled, unusable.disabled)))
    assert seen == [(True, True)] and (usable.disabled, unusable.disabled) == (False, True)


def test_no_thread_is_left():
    before = set(threading.enumerate())
    work = Work(background=True)
    work.soon(lambda: work.start("reading ...", lambda report: report(1, 1)))
    work.wait()
    left = [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
    assert left == [] and not any(thread.is_alive() for thread in work._threads)


@pytest.mark.parametrize("kind, expected", [("comm_msg", True), ("execute_request", False), (None, False)])
def test_only_an_event_on_the_page_is_worked_on_beside_it(monkeypatch, kind, expected):
    """A cell that clicks a button, as a headless run may, has the result at once."""
    parent = {} if kind is None else {"header": {"msg_type": kind}}
    kernel = types.SimpleNamespace(get_parent=lambda channel: parent)
    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=kernel))
    monkeypatch.setitem(page.sys.modules, "IPython", shell)
    assert page.from_page() is expected
    work, threads = Work(), []
    work.start("reading ...", lambda report: threads.append(threading.current_thread()))
    work.wait()
    assert (threads[0] is not threading.current_thread()) is expected


def test_changes_made_quietly_are_not_a_persons():
    control, heard = W.IntText(), []
    page.listen(control, lambda change: heard.append(change["new"]))
    with page.quietly():
        control.value = 1
    control.value = 2
    assert heard == [2]


def test_a_pager_stays_within_its_ends_and_waits_while_work_runs():
    work, shown = Work(), []
    pager = Pager("sample", 3, lambda: shown.append(pager.place), work)
    slider, previous, following = pager.controls
    assert previous.disabled and not following.disabled
    for _ in range(4):
        following.click()
    assert shown == [1, 2] and following.disabled and not previous.disabled
    work.start("searching ...", lambda report: shown.append([one.disabled for one in pager.controls]))
    assert shown[-1] == [True, True, True] and [one.disabled for one in pager.controls] == [False, False, True]
    pager.restart(0)
    assert [one.disabled for one in pager.controls] == [False, True, True] and pager.place == 0


def test_a_column_sends_a_part_of_it_when_it_grows():
    column, sent = page.Column(), []
    rows = [W.Label(str(number)) for number in range(120)]
    column.observe(lambda change: sent.append(len(change["new"])), "children")
    for row in rows:
        column.add(row)
    assert sent == [1, 2, 3] and [len(part.children) for part in column.children] == [50, 50, 20]
    assert column.widgets == rows
    column.take_out(rows[60])
    column.take_out(rows[60])
    assert len(sent) == 3 and column.widgets == rows[:60] + rows[61:]
