"""Samples and models without weights, quick to import; what a page shows of them tells what reached them."""

import threading
from dataclasses import dataclass, field, replace

HOSTILE = '<script>window.owned = 1</script><img src=x onerror="window.owned = 1">" \'&amp;'


def sample(**changes) -> dict:
    document = "Ada lives in Velm. She paints lamps. The lake is cold."
    start = document.index("She")
    given = {"document": document, "question": "What does Ada paint?", "answer": "lamps", "kind": "one_hop"}
    return given | {"evidence_start": start, "evidence_end": start + len("She paints lamps.")} | changes


SAMPLES = [
    sample(),
    sample(question="Where does Ada live?", answer="Velm", evidence_start=0, evidence_end=18),
    sample(
        question="How old is Ada?", answer="I do not know.", kind="unanswerable", evidence_start=None, evidence_end=None
    ),
    sample(document=HOSTILE, question=HOSTILE, answer=HOSTILE, kind=HOSTILE, evidence_start=0, evidence_end=8),
]


@dataclass(frozen=True)
class ToyBlock:
    document: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class ToyAdapter:
    """Blocks that remember their text, with the algebra that the chat uses."""

    blocks: tuple
    bias: object = "bias"
    bias_weight: float = 1.0

    def __add__(self, other):
        return replace(self, blocks=self.blocks + other.blocks)

    def __radd__(self, other):
        assert other == 0
        return self

    def scaled(self, weight):
        return replace(self, blocks=tuple(replace(block, weight=block.weight * weight) for block in self.blocks))

    def scaled_bias(self, weight):
        return replace(self, bias_weight=self.bias_weight * weight)


@dataclass
class ToyModel:
    """Answers with what it can see, so that a test can tell what reached it."""

    window: int = 400
    internalized: list = field(default_factory=list)

    def internalize_each(self, documents):
        if not all(text.strip() for text in documents.values()):
            raise ValueError("document is empty")
        self.internalized += documents
        return [ToyAdapter((ToyBlock(name, text),)) for name, text in documents.items()]

    def answer(self, question, adapter, system="", blocks=None, read="sum"):
        question = f"[{system}] {question}" if system else question
        if len(question) > self.window:
            raise ValueError(f"the prompt has {len(question)} characters, the window {self.window}")
        if adapter is None:
            return f"prompt={question}"
        inside = "; ".join(f"{block.text}*{block.weight:g}" for block in adapter.blocks)
        options = ("" if blocks is None else f"; blocks={blocks}") + ("" if read == "sum" else f"; read={read}")
        return f"inside={inside}; bias={adapter.bias_weight:g}; prompt={question}{options}"


class SlowModel(ToyModel):
    """A ToyModel that reads a text in steps of `chunk` characters and works on only while `go` is set.

    While it waits it reports, over and over, what is done. `began` is set by the first step. runs: answers do not wait,
    and texts only before their last chunk.
    """

    def __init__(self, chunk: int = 500, runs: bool = False):
        super().__init__(window=10**9)
        self.chunk, self.runs = chunk, runs
        self.go, self.began = threading.Event(), threading.Event()

    def internalize_each(self, documents, progress=None):
        n_chunks = sum(-(-len(text) // self.chunk) for text in documents.values())
        report = progress if callable(progress) else lambda done, total: None
        for done in range(n_chunks):
            self.began.set()
            while not (self.runs and done < n_chunks - 1) and not self.go.wait(0.05):
                report(done, n_chunks)
            report(done + 1, n_chunks)
        return super().internalize_each(documents)

    def answer(self, question, adapter, **options):
        self.began.set()
        assert self.runs or self.go.wait(60)
        return super().answer(question, adapter, **options)
