"""What every test shares: the environment, set before torch is imported, and where the reference values are."""

import gc
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# One thread: on shared cores several make torch about ten times slower. Offline: a missing model fails at once
# instead of being sought.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("MPLCONFIGDIR", str(ROOT / ".cache" / "matplotlib"))
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402

# Until all modules are there, Python seeks no cycles among a million objects that stay; afterwards only in newer ones.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """From here on cycles are collected."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every process begins with its share of the files with slow tests, so that none has a long one left at the end.

    Processes get equal runs of the list, one after another, and take from one another in the end. The order within a
    file stays.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def n_slow(path: Path) -> int:
        return sum(any(item.get_closest_marker(name) for name in ("slow", "browser")) for item in files[path])

    shares: list[list[pytest.Item]] = [[] for _ in range(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))]
    slow = [0] * len(shares)
    for path in sorted(files, key=n_slow, reverse=True):
        load = slow if n_slow(path) else [len(share) for share in shares]
        smallest = load.index(min(load))
        shares[smallest] += files[path]
        slow[smallest] += n_slow(path)
    items[:] = [item for share in shares for item in share]


@pytest.fixture(scope="session", autouse=True)
def _own_adapter_cache(tmp_path_factory) -> None:
    """Commands keep adapters in a folder of this run."""
    os.environ["D2L_ADAPTER_CACHE"] = str(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """The folder of the recorded reference values."""
    from recordings import GOLDEN

    return GOLDEN


@pytest.fixture(scope="session")
def recording_of(golden_root):
    """The folder of one recording, by name; skips the test where it is not there: one of them is bundled."""

    def find(name: str) -> Path:
        if not (golden_root / name / "golden.json").is_file():
            pytest.skip(f"no recording {name} in {golden_root}: set D2L_GOLDEN to a folder of all")
        return golden_root / name

    return find


@pytest.fixture(scope="session")
def project_folder() -> Path:
    """The top folder of this clone."""
    return ROOT
