"""Processes of their own for tests, forked from one that has imported torch, where that is possible.

Environment variables are those of the test's process when the first one starts: set others in the function.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOAD = ["d2l_lib.training.recipes", "d2l_lib.studies.baselines", "d2l_lib.views.plots"]


def _context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    return context


def start(function: Callable, *arguments: Any) -> BaseProcess:
    """The running process, which calls the function."""
    process = _context().Process(target=function, args=arguments)
    process.start()
    return process


def run(function: Callable, *arguments: Any, timeout: float = 300) -> Any:
    """What the function returns. RuntimeError shows what it raised; TimeoutError after so many seconds."""
    receiver, sender = _context().Pipe(duplex=False)
    process = start(_call, sender, function, arguments)
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise TimeoutError(f"{function.__name__} took more than {timeout:g} s")
        result, error = receiver.recv()
    finally:
        process.kill()
        process.join()
    if error:
        raise RuntimeError(f"{function.__name__} failed:\n{error}")
    return result


def _call(sender: Connection, function: Callable, arguments: tuple) -> None:
    try:
        sender.send((function(*arguments), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()[-4000:]))
