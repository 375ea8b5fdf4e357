"""What every test shares: the environment, set before torch is imported, and where the reference values are."""

import os
from collections import Counter
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests first, so that no process is left with a long one at the end.

    The order within a file stays.
    """
    is_long = [any(item.get_closest_marker(name) for name in ("slow", "browser")) for item in items]
    n_long = Counter(item.path for item, long in zip(items, is_long, strict=True) if long)
    items.sort(key=lambda item: -n_long[item.path])


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
