"""Processes of their own for tests, forked from one that has imported torch, where that is possible.

Environment variables are those of the test's process when the first one starts: set others in the function.
"""

import multiprocessing
import os
import socket
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


def start_together(n_processes: int, function: Callable, *arguments: Any) -> list[BaseProcess]:
    """The running processes, which call the function; each is told what torchrun tells."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(_together, rank, n_processes, port, function, arguments) for rank in range(n_processes)]


def _together(rank: int, n_processes: int, port: int, function: Callable, arguments: tuple) -> None:
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_processes, "LOCAL_WORLD_SIZE": n_processes}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    function(*arguments)


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
