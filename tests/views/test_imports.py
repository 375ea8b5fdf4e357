"""What needs no model opens without the libraries of models, whose import alone takes ten seconds."""

import os
import subprocess
import sys

import browser
import pytest

OPENED = {
    "samples": "from toy_models import SAMPLES; from d2l_lib import viewers; "
    "viewers.view_samples(SAMPLES)._repr_mimebundle_()",
    "plots": "import pandas as pd; import d2l_lib as d2l; d2l.plots.plot_document_length_by_facts("
    "pd.DataFrame({'facts': [1, 2], 'length_tokens': [9, 20]}))",
    "records": "from d2l_lib import records; from pathlib import Path; "
    "assert records.read_jsonl(records.project_root() / 'data' / 'samples' / 'world_test.jsonl')",
    "chat": "from toy_models import ToyModel; from d2l_lib import viewers; viewers.chat(ToyModel(), 'A.', 'What?')",
}


@pytest.mark.parametrize("what", OPENED)
def test_what_needs_no_model_is_opened_without_torch(what):
    heavy = "sorted({'torch', 'transformers'} & set(sys.modules))"
    program = f"import sys; {OPENED[what]}; loaded = {heavy}; assert not loaded, loaded"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(browser.ROOT), str(browser.ROOT / "tests")])}
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert made.returncode == 0, made.stderr
