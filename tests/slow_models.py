"""A model whose work lasts: for pages that stay usable meanwhile."""

import threading

from test_viewers import ToyModel


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
