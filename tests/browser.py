"""Drive notebooks in JupyterLab in headless Chromium, as a person would: `with open_lab(folder) as lab:`.

Server, kernels and browser keep all their files in `folder` and are ended with the block. Nothing but 127.0.0.1 is
talked to.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
    from playwright.sync_api import Error as BrowserError
except ImportError:
    sync_playwright = expect = None
    Browser = Page = BrowserError = Exception

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_MS = 60_000
# without a grammar of web addresses that nothing here is checked by: it takes three seconds of a core
LAB = "import sys; sys.modules['rfc3987_syntax'] = None; from jupyterlab.labapp import main; sys.exit(main())"

KERNEL_IS_READY = """() => {
    const kernel = window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel;
    return Boolean(kernel) && kernel.status === 'idle' && kernel.connectionStatus === 'connected';
}"""
ALL_CELLS_HAVE_RUN = """() => {
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')];
    return prompts.length > 0 && prompts.every(prompt => /\\[\\d+\\]/.test(prompt.textContent || ''));
}"""


def chromium() -> str | None:
    """The path of an installed Chromium, or None."""
    return next((path for name in CHROMIUM_NAMES if (path := shutil.which(name))), None)


def why_not() -> str | None:
    """Why the browser tests cannot run here, or None if they can."""
    if sync_playwright is None:
        return "playwright is not installed (pip install playwright)"
    if chromium() is None:
        return "no Chromium found (on Debian and Ubuntu: apt-get install chromium)"
    return None


def write_notebook(path: Path, sources: list[str]) -> Path:
    """`path`, now a notebook of these code cells."""
    cells = [
        {"cell_type": "code", "id": f"c{n}", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for n, source in enumerate(sources)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    page = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(page), encoding="utf-8")
    return path


class Lab:
    """JupyterLab for the notebooks of a folder, in a running Chromium."""

    def __init__(self, folder: Path, address: str, chromium: "Browser"):
        self._folder, self._address, self._chromium = folder, address, chromium

    @contextlib.contextmanager
    def opened(self, name: str, sources: list[str]) -> Iterator["Page"]:
        """The page of a new notebook of these code cells, all of which have been run without an error."""
        write_notebook(self._folder / f"{name}.ipynb", sources)
        page = self._chromium.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        try:
            page.goto(f"{self._address}/lab/tree/{name}.ipynb?reset")
            page.wait_for_selector("#jupyterlab-splash", state="detached")
            page.wait_for_selector(".jp-Notebook .jp-Cell")
            # the toolbar already says idle while the kernel is still connecting; a run sent then is lost
            page.wait_for_function(KERNEL_IS_READY)
            page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
            page.wait_for_function(ALL_CELLS_HAVE_RUN)
            assert errors_shown(page) == []
            yield page
        finally:
            with contextlib.suppress(BrowserError):
                page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
                page.close()


@contextlib.contextmanager
def open_lab(folder: Path) -> Iterator[Lab]:
    """JupyterLab for notebooks in `folder`."""
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    with _lab(folder, home) as address, sync_playwright() as playwright:
        places = {"HOME": str(home), "XDG_CONFIG_HOME": str(home / "config"), "XDG_CACHE_HOME": str(home / "cache")}
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"], env=os.environ | places
        )
        try:
            expect.set_options(timeout=20_000)
            yield Lab(folder, address, browser)
        finally:
            with contextlib.suppress(BrowserError):
                browser.close()


def resize(page: "Page", width: int, height: int = 1000) -> None:
    """Give the window another size, and wait until JupyterLab, which places its parts itself, has done so."""
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_function(
        """() => {
            const right = document.querySelector('#jp-main-dock-panel').getBoundingClientRect().right;
            return innerWidth - 100 < right && right <= innerWidth;  // a bar of buttons is beside it
        }"""
    )
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def sticking_out(page: "Page", output: str) -> list[str]:
    """The classes of all elements within the last `output` (a CSS selector) that end to the right of it."""
    return page.evaluate(
        """selector => {
            const root = [...document.querySelectorAll(selector)].at(-1);
            const right = root.getBoundingClientRect().right + 1;
            const wide = [...root.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > right);
            return wide.map(e => e.className).concat(root.scrollWidth > root.clientWidth ? ['scrolls'] : []);
        }""",
        output,
    )


def contrast(page: "Page", text: str) -> float:
    """The contrast of the last element `text` (a CSS selector) with what is behind it: 1 (none) to 21."""
    return page.evaluate(
        """selector => {
            const parse = color => [...color.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
            const element = [...document.querySelectorAll(selector)].at(-1);
            let behind = element;
            while (parse(getComputedStyle(behind).backgroundColor)[3] < 1) behind = behind.parentElement;
            const back = parse(getComputedStyle(behind).backgroundColor), ink = parse(getComputedStyle(element).color);
            const shown = [0, 1, 2].map(i => ink[3] * ink[i] + (1 - ink[3]) * back[i]);
            const light = color => [0, 1, 2].reduce((sum, i) => {
                const c = color[i] / 255, linear = c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
                return sum + linear * [0.2126, 0.7152, 0.0722][i];
            }, 0.05);
            const [a, b] = [light(shown), light(back)];
            return Math.max(a, b) / Math.min(a, b);
        }""",
        text,
    )


def errors_shown(page: "Page") -> list[str]:
    """The text of every error that a cell of the page shows."""
    return page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()


@contextlib.contextmanager
def _lab(folder: Path, home: Path) -> Iterator[str]:
    """The address of a JupyterLab server for `folder`; it and its kernels are ended with the block."""
    port = _free_port()
    names = ("CONFIG_DIR", "DATA_DIR", "RUNTIME_DIR")
    environment = os.environ | {f"JUPYTER_{name}": str(home / name.lower()) for name in names}
    environment |= {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    environment |= {
        "IPYTHONDIR": str(home / "ipython"),
        "npm_config_cache": str(home / "npm"),
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests" / "views"])),
    }
    # no question about news may cover the page
    notification = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    notification.parent.mkdir(parents=True, exist_ok=True)
    notification.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    log = home / "lab.log"
    command = [
        *(sys.executable, "-c", LAB, "--no-browser", "--allow-root", "--LabApp.expose_app_in_browser=True"),
        *(
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=",
        ),
        f"--ServerApp.root_dir={folder}",
    ]
    with open(log, "w") as said:
        server = subprocess.Popen(
            command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_until_up(address, server, log)
        yield address
    finally:
        # asked nicely, the server ends its kernels, which are not in its process group
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_up(address: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"JupyterLab stopped while starting:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api/status", timeout=1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"JupyterLab did not answer within {PATIENCE_MS / 1000:.0f} s:\n{log.read_text()[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
