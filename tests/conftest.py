"""What every test shares: the environment, set before torch is imported, and where the reference values are."""

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


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """The recorded reference values: $D2L_GOLDEN, else ../shared/golden; skips the test where neither exists."""
    folder = Path(os.environ.get("D2L_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not (folder / "A" / "golden.json").is_file():
        pytest.skip(f"no reference values at {folder}; set D2L_GOLDEN to their folder")
    return folder


@pytest.fixture(scope="session")
def project_folder() -> Path:
    """The top folder of this clone."""
    return ROOT
