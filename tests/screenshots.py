"""Take the README's pictures of the chat and of the trace viewer: `make screenshots`.

Both are run in JupyterLab in Chromium, on bundled models, and end up in figures/.
"""

import sys
import tempfile
from pathlib import Path

import browser
from PIL import Image

from d2l_lib.records import project_root

HEIGHT = 806  # pixels: the pictures stand beside each other
PICTURES = ("screenshot_chat.png", "screenshot_trace.png")
CELLS = (
    "import random\nimport d2l_lib as d2l\nfrom d2l_lib import records, viewers\nfrom d2l_lib.tasks import world\n"
    "demo = records.project_root() / 'data' / 'demo'\n"
    "name, asked = next(iter(records.read_json(demo / 'questions.json').items()))\n"
    "model = d2l.load('tiny/qa')\nrng = random.Random(1)\ndocument = world.draw_document(rng, 'test', 8)\n"
    "question = world.question_about(random.Random(0), document.facts[0])",
    "viewers.chat(models={'SmolLM2-135M, real text': 'smollm2', 'small, generated world': model}, "
    "documents={name.removesuffix('.md').replace('_', ' '): (demo / name).read_text()}, question=asked[0][0], "
    "examples=viewers.bundled_examples())",
    "adapter = model.internalize({'a small world': document.text})\n"
    "wrong = model.internalize(world.draw_document(rng, 'test', 8).text)\n"
    "viewers.view_attribution(model, adapter, {'a small world': document.text}, question.text, question.answer, "
    "question.evidence, wrong=wrong)",
)


def take(folder: Path) -> None:
    """Write PICTURES into a folder."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        browser.open_lab(Path(scratch)) as lab,
        lab.opened("pictures", list(CELLS)) as page,
    ):
        browser.resize(page, 1300, 1600)
        for name, view in zip(PICTURES, (".d2l-answers", ".d2l-trace-answer"), strict=True):
            page.locator(view).first.wait_for()
            cell = page.locator(".jp-CodeCell", has=page.locator(view)).first
            cell.locator(".jp-OutputArea-output").last.screenshot(path=folder / name)
            picture = Image.open(folder / name)
            picture.crop((0, 0, picture.width, min(picture.height, HEIGHT))).save(folder / name)


if __name__ == "__main__":
    if reason := browser.why_not():
        sys.exit(reason)
    take(project_root() / "figures")
    print("wrote", *(f"figures/{name}" for name in PICTURES))
