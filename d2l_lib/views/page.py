"""The frame of every viewer: style, messages, and what a page does while it is busy.

A page never loses what a person gives it. Work that an event on the page starts runs in a thread, one job after
another. Meanwhile the page takes text and clicks, shows a bar, and can be stopped. Work that a program starts (a cell,
a test, the building of the page) runs at once and ends before the call returns.
"""

import inspect
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as W

from d2l_lib.formats import markup

CSS = """
.d2l-view { font-family: var(--jp-ui-font-family, sans-serif); font-size: 13px; line-height: 1.5; }
.d2l-view { color: var(--jp-ui-font-color1, inherit); overflow-wrap: anywhere; }
.widget-html-content:has(> .d2l-view) { min-width: 0; }
.d2l-view table { border-collapse: collapse; width: 100%; }
.d2l-view table th, .d2l-view table td { text-align: left; vertical-align: top; padding: 4px 10px 4px 0; }
.d2l-view th, .d2l-view td { border-bottom: 1px solid #8884; overflow-wrap: anywhere; min-width: 3.5em; }
.d2l-view mark { background: #ffe08a; color: #000; padding: 1px 2px; border-radius: 2px; }
.d2l-view .d2l-text { white-space: pre-wrap; }
.d2l-view .d2l-document { max-height: 22em; overflow-y: auto; padding: 8px; }
.d2l-view .d2l-document { border: 1px solid #8886; border-radius: 4px; }
.d2l-view .d2l-note { color: var(--jp-ui-font-color2, #666); }
.d2l-view .d2l-error { color: var(--jp-error-color1, #b3261e); }
.d2l-view .d2l-columns { display: grid; gap: 10px; }
.d2l-view .d2l-columns { grid-template-columns: repeat(auto-fit, minmax(min(15em, 100%), 1fr)); }
.d2l-view .d2l-pane { border: 1px solid #8886; border-radius: 4px; padding: 6px 10px; min-width: 0; }
.d2l-view .d2l-state { border-left: 3px solid #8886; padding-left: 8px; }
.d2l-view h4 { margin: 6px 0 2px; }
"""
REVEAL_S = 0.3  # shorter work shows no bar and disables no control, which would lose the keyboard focus
# Text typed before a click needs so long to arrive: a page holds it back while an earlier text is read.
_SETTLE_S = 0.2
REDRAW_S = 0.1  # between two moves of a bar, at least

Report = Callable[[int, int], None]


class Stopped(Exception):
    """Raised in work that a person stopped."""


# --- pages ------------------------------------------------------------------------------------------------------------


def render_view(view: str, body: str, /, **data: Any) -> str:
    """A page of the class `d2l-view d2l-<view>` around `body`, which is HTML.

    data: each becomes an escaped data-* attribute. Dollar signs start no formula.
    """
    attributes = "".join(f' data-{name.replace("_", "-")}="{markup.escape(value)}"' for name, value in data.items())
    classes = f"d2l-view d2l-{view} {markup.NO_FORMULAS}"
    return f'<style>{CSS}</style><div class="{classes}"{attributes}>{body}</div>'


def render_message(message: str, is_error: bool = False) -> str:
    """One line of status; an error is coloured, and screen readers announce it."""
    return _render_messages([(message, is_error)])


def _render_messages(messages: Sequence[tuple[str, bool]]) -> str:
    """Lines of status, one per (text, whether it is an error)."""
    lines = [
        f'<div role="{"alert" if is_error else "status"}" class="d2l-{"error" if is_error else "note"}">'
        f"{markup.escape(text)}</div>"
        for text, is_error in messages
    ]
    return render_view("message", "".join(lines))


class Viewer(W.VBox):
    """Widgets in a column that also have a plain HTML form, for pages without a kernel: `static_html`."""

    def __init__(self, children: Sequence[W.Widget], static_html: str):
        super().__init__(list(children))
        self.static_html = static_html

    def _repr_mimebundle_(self, **options) -> dict:
        return super()._repr_mimebundle_(**options) | {"text/html": self.static_html}


def plural(n: int, thing: str) -> str:
    """ "1 sentence", "3 sentences"."""
    return f"{n} {thing}{'' if n == 1 else 's'}"


def short(text: str, length: int) -> str:
    """The text, or the beginning of a longer one."""
    return text if len(text) <= length else text[: length - 1] + "…"


def visible(text: str) -> str:
    """The text of a token: line ends and tabs become signs."""
    return text.replace("\n", "↵").replace("\r", "␍").replace("\t", "⇥")


def wrapped(children: Sequence[W.Widget]) -> W.HBox:
    """Controls in a row that breaks where the page is narrow."""
    return W.HBox(list(children), layout=W.Layout(flex_flow="row wrap", align_items="center", width="100%"))


class Column(W.VBox):
    """Widgets in a column that grows. Adding one sends a part of the column to the page, not all of it."""

    _PART = 50  # widgets

    @property
    def widgets(self) -> list[W.Widget]:
        """The widgets of the column."""
        return [widget for part in self.children for widget in part.children]

    def add(self, widget: W.Widget) -> None:
        if self.children and len(self.children[-1].children) < self._PART:
            self.children[-1].children = [*self.children[-1].children, widget]
        else:
            self.children = [*self.children, W.VBox([widget])]

    def take_out(self, widget: W.Widget) -> None:
        for part in self.children:
            if widget in part.children:
                part.children = [other for other in part.children if other is not widget]
                if not part.children:
                    self.children = [other for other in self.children if other is not part]


# --- events -----------------------------------------------------------------------------------------------------------

_own = threading.local()  # .changes: how many `quietly` blocks this thread is in


@contextmanager
def quietly() -> Iterator[None]:
    """Inside the `with` block this thread sets controls without calling their handlers (see `listen`)."""
    _own.changes = getattr(_own, "changes", 0) + 1
    try:
        yield
    finally:
        _own.changes -= 1


def listen(control: W.Widget, handler: Callable[[Any], None]) -> None:
    """Call `handler(change)` whenever the value of `control` changes, except `quietly`."""

    def pass_on(change: Any) -> None:
        if not getattr(_own, "changes", 0):
            handler(change)

    control.observe(pass_on, "value")


def _plain(label: str) -> str:
    return label.removesuffix(" ...")


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def takes(function: Callable, parameter: str, by_name: bool = False) -> bool:
    """Whether `function` can be called with the keyword `parameter`. by_name: not as one of any `**options`."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    takes_any = not by_name and any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return parameter in parameters or takes_any


def from_page() -> bool:
    """Whether an event on a page runs this code; False in a cell and in a program without kernel."""
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None) if "IPython" in sys.modules else None
    if kernel is None:
        return False
    return (kernel.get_parent("shell") or {}).get("header", {}).get("msg_type") == "comm_msg"


# --- work -------------------------------------------------------------------------------------------------------------


@dataclass
class _Job:
    label: str
    work: Callable[[Report], Any]
    done: Callable[[Any], None] | None
    dropped: Callable[[str], None] | None
    key: Hashable = None
    replaces: bool = False
    ready: str = "ready"
    unit: str = ""
    stop: threading.Event = field(default_factory=threading.Event, init=False)
    is_outdated: bool = field(default=False, init=False)


class Work:
    """The jobs of a page, one after another, with a status line, a progress bar and a Stop button.

    background: True runs jobs in a thread, False at once. None: in a thread what an event on the page starts, at once
        what a program starts.
    held: controls that are disabled while a job runs.

    Attributes:
        status, bar: a W.HTML; bar and Stop in a row. The page shows both.
        lock: an RLock that `done` and `dropped` hold. Handlers that touch the same things must hold it too.
        was_interrupted: whether the keyboard interrupted the work.
    """

    def __init__(self, background: bool | None = None, held: Sequence[W.Widget] = ()):
        self.background, self.held, self.lock = background, list(held), threading.RLock()
        self.status = W.HTML()
        self._progress = W.IntProgress(min=0, max=1, layout=W.Layout(flex="1 1 120px", width="auto", min_width="80px"))
        self._count = W.Label(layout=W.Layout(min_width="9em"))
        self.stop_button = W.Button(
            description="Stop", icon="stop", tooltip="end this, and what waits behind it", disabled=True
        )
        self.bar = W.HBox([self._progress, self._count, self.stop_button], layout=W.Layout(visibility="hidden"))
        self.stop_button.on_click(lambda _: self.stop())
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._messages: dict[Hashable, tuple[str, bool]] = {}  # the message that the last job of each key left
        self._ready = ""
        self._threads: list[threading.Thread] = []
        self._disabled = {control: control.disabled for control in self.held}  # when nothing runs
        self._is_held = False
        self._redrawn = 0.0
        self.was_interrupted = False

    @property
    def is_busy(self) -> bool:
        """Whether a job runs or waits."""
        return self._running is not None or bool(self._waiting)

    def has(self, key: Hashable) -> bool:
        """Whether a job of this key runs or waits."""
        jobs = [*self._waiting, *([self._running] if self._running else [])]
        return any(job.key == key and not job.is_outdated for job in jobs)

    def start(
        self,
        label: str,
        work: Callable[[Report], Any],
        done: Callable[[Any], None] | None = None,
        dropped: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        """Put a job behind those that wait.

        label: the status meanwhile, as in "reading ..."; "" for short work.
        work: called as work(report) without the lock. It may call report(done, total) at any time, which moves the bar
            and raises Stopped after Stop.
        done: called with the result of `work`.
        dropped: called with the reason instead if the job failed or was stopped, even before it began.
        options:
            key: of jobs of one kind. The error of one stays on the page until the next of its kind begins.
            replaces: drop or end earlier jobs of this key silently.
            ready: the status afterwards.
            unit: what `report` counts, such as "chunks".
        """
        job = _Job(label, work, done, dropped, **options)
        with self.lock:
            if job.replaces:
                self.leave_out(lambda other: other == job.key)
            begins = not self.is_busy
            self._waiting.append(job)
            self._messages.pop(job.key, None)
            if not begins:
                self._draw()
                return
            self._running = self._waiting.popleft()
        if self._in_thread():
            self._spawn(self._run_all)
        else:
            self._run_all()

    def leave_out(self, is_meant: Callable[[Hashable], bool]) -> None:
        """Drop or end the jobs whose key is meant, silently: their `dropped` is not called."""
        with self.lock:
            self._waiting = deque(job for job in self._waiting if not is_meant(job.key))
            if self._running is not None and is_meant(self._running.key):
                self._running.is_outdated = True
                self._running.stop.set()

    def stop(self) -> None:
        """End the current job at its next report, and drop those that wait."""
        with self.lock:
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                self._drop(job, "stopped")
            if self._running is not None:
                self._running.stop.set()
            self._draw()

    def tell(self, text: str, is_error: bool = False, key: Hashable = None) -> None:
        """Show `text` in the status until the next job of this key begins."""
        with self.lock:
            self._messages.pop(key, None)
            if text:
                self._messages[key] = (text, is_error)
            self._draw()

    def forget(self, is_meant: Callable[[Hashable], bool]) -> None:
        """Take the messages out of the status whose key is meant."""
        with self.lock:
            self._messages = {key: message for key, message in self._messages.items() if not is_meant(key)}
            self._draw()

    def soon(self, action: Callable[[], None]) -> None:
        """Call `action`; after an event on the page a moment later, once the text typed before has arrived."""
        if self._in_thread():
            self._spawn(action, _SETTLE_S)
        else:
            action()

    def hold(self, controls: Sequence[W.Widget]) -> None:
        """From now on, disable these too while a job runs."""
        with self.lock:
            self.held += controls
            self._disabled |= {control: control.disabled for control in controls}

    def disable(self, control: W.Widget, is_disabled: bool) -> None:
        """Set whether a held control is disabled while nothing runs."""
        with self.lock:
            self._disabled[control] = is_disabled
            control.disabled = is_disabled or self._is_held

    def wait(self) -> None:
        """Return once nothing runs or waits. Not for callbacks."""
        while alive := [thread for thread in self._threads if thread.is_alive()]:
            alive[0].join()

    # --- one after another ----------------------------------------------------------------------------------------

    def _in_thread(self) -> bool:
        if threading.current_thread() in self._threads:  # as from another job's `done`
            return True
        return from_page() if self.background is None else self.background

    def _spawn(self, action: Callable[[], None], delay: float = 0.0) -> None:
        thread = threading.Timer(delay, copy_context().run, [action])
        thread.daemon = True  # never keeps a kernel from ending
        with self.lock:
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()
        _Interrupts.pass_to(self)

    def _run_all(self) -> None:
        if threading.current_thread() in self._threads:
            reveal = threading.Timer(REVEAL_S, self._reveal)
            reveal.daemon = True
            reveal.start()
        else:
            self._hold(True)
        try:
            while self._running is not None:
                self._run(self._running)
                self._next()
        except BaseException:  # an interrupt between two jobs
            with self.lock:
                self._running = None
                self.was_interrupted = True
                self.stop()
                self._next()

    def _next(self) -> None:
        """The next job, or the end of them all."""
        with self.lock:
            self._running = self._waiting.popleft() if self._waiting else None
            if self._running is None:
                self.bar.layout.visibility, self.stop_button.disabled = "hidden", True
                self._hold(False)
                self._draw()

    def _run(self, job: _Job) -> None:
        try:
            with self.lock:
                self._progress.value, self._progress.max, self._count.value = 0, 1, ""
                self._draw()
            result = job.work(lambda done, total: self._report(job, done, total))
            with self.lock:
                if job.stop.is_set():
                    raise Stopped
                if job.done is not None:
                    job.done(result)
                self._ready = job.ready
        except Stopped:
            if not job.is_outdated:
                self._drop(job, "stopped")
        except KeyboardInterrupt:
            self.was_interrupted = True
            self._drop(job, "stopped")
            self.stop()
        except Exception as error:  # of any type: the person at the page has to see it
            if not job.is_outdated:
                self._drop(job, _named(error), is_error=True)

    def _drop(self, job: _Job, reason: str, is_error: bool = False) -> None:
        with self.lock:
            text = f"{reason}: {_plain(job.label)}" if job.label and not is_error else reason
            self._messages.pop(job.key, None)
            self._messages[job.key], self._ready = (text, is_error), ""
            if job.dropped is not None:
                try:
                    job.dropped(reason)
                except Exception as error:  # shown too; the page goes on
                    self._messages[job.key, "dropped"] = (_named(error), True)

    def _report(self, job: _Job, done: int, total: int) -> None:
        if job.stop.is_set():
            raise Stopped
        now, count = time.monotonic(), f"{done:,} of {total:,} {job.unit}".strip()
        if count == self._count.value:  # the next change then waits for nothing
            return
        if now - self._redrawn >= REDRAW_S or done >= total:
            self._redrawn = now
            with self.lock:
                self._progress.max = max(1, total)
                self._progress.value = done
                self._count.value = count

    # --- what is seen ---------------------------------------------------------------------------------------------

    def _reveal(self) -> None:
        with self.lock:
            if self._running is not None:
                self.bar.layout.visibility, self.stop_button.disabled = "visible", False
                self._hold(True)

    def _hold(self, is_held: bool) -> None:
        """Disable the held controls, or set them back to their state while nothing runs."""
        with self.lock:
            self._is_held = is_held
            for control, is_disabled in self._disabled.items():
                control.disabled = is_disabled or is_held

    def _draw(self) -> None:
        lines = [*self._messages.values()]
        if self._running is not None:
            ending = self._running.stop.is_set() and not self._running.is_outdated
            label = self._running.label
            lines.append((f"stopping after this step: {_plain(label)}" if ending else label, False))
            if coming := [_plain(job.label) for job in self._waiting if job.label]:
                lines.append((f"then: {'; '.join(coming)}", False))
        elif self._ready:
            lines.append((self._ready, False))
        lines = [line for line in lines if line[0]]
        self.status.value = _render_messages(lines) if lines else ""


class Pager:
    """A slider and two buttons to go through numbered things.

    show: called when a person moves.
    work: the controls are disabled while one of its jobs runs.

    Attributes: `controls` (the three widgets), `n` (number of things), `place` (from 0, of the current one).
    """

    def __init__(self, what: str, n: int, show: Callable[[], None], work: Work):
        self.n, self._show, self._work = n, show, work
        self.slider = W.IntSlider(description=what.capitalize(), min=1, max=max(1, n), continuous_update=False)
        self.previous = W.Button(description="Previous", icon="arrow-left", tooltip=f"the {what} before this one")
        self.following = W.Button(description="Next", icon="arrow-right", tooltip=f"the {what} after this one")
        self.controls = [self.slider, self.previous, self.following]
        work.hold(self.controls)
        listen(self.slider, self._moved)
        self.previous.on_click(lambda _: self._step(-1))
        self.following.on_click(lambda _: self._step(+1))
        self._limit()

    @property
    def place(self) -> int:
        return self.slider.value - 1

    def restart(self, n: int) -> None:
        """Go to the first of now `n` things, without calling show."""
        with quietly():
            self.n = n
            self.slider.value, self.slider.max = 1, max(1, n)
        self._limit()

    def _step(self, change: int) -> None:
        self.slider.value = min(max(1, self.slider.value + change), max(1, self.n))

    def _moved(self, _: Any) -> None:
        self._limit()
        self._show()

    def _limit(self) -> None:
        ends = {self.previous: self.slider.value <= 1, self.following: self.slider.value >= self.n}
        for button, is_disabled in ends.items():
            self._work.disable(button, is_disabled)


class _Interrupts:
    """Makes the interrupt of a kernel, which an idle kernel ignores, end the work of its pages."""

    _pages: list[Work] = []

    @classmethod
    def pass_to(cls, work: Work) -> None:
        """From the next turn of the event loop on; nothing without a loop, or outside the main thread."""
        import asyncio

        if threading.current_thread() is not threading.main_thread():
            return
        with suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            cls._pages = [page for page in cls._pages if page.is_busy and page is not work] + [work]
            loop.call_later(0.05, cls._install)  # once the kernel has restored what it sets around a handler

    @classmethod
    def _install(cls) -> None:
        import signal

        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, cls._stop)

    @classmethod
    def _stop(cls, *_: Any) -> None:
        for page in cls._pages:
            threading.Thread(target=page.stop, daemon=True).start()  # a handler must not wait for a lock
