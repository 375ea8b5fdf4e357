"""A model whose work lasts: for pages that stay usable meanwhile."""

import threading
import time

from test_viewers import ToyModel


class SlowModel(ToyModel):
    """A ToyModel that reads a text in steps of `chunk` characters and waits at each step and before each answer.

    Either `pause` seconds, or, where that is None, until `go` is set.
    """

    def __init__(self, pause: float | None = None, chunk: int = 500):
        super().__init__(window=10**9)
        self.pause, self.chunk = pause, chunk
        self.go, self.began = threading.Event(), threading.Event()

    def _step(self) -> None:
        self.began.set()
        if self.pause is None:
            assert self.go.wait(30)
        else:
            time.sleep(self.pause)

    def internalize_each(self, documents, progress=None):
        n_chunks = sum(-(-len(text) // self.chunk) for text in documents.values())
        for done in range(n_chunks):
            self._step()
            if callable(progress):
                progress(done + 1, n_chunks)
        return super().internalize_each(documents)

    def answer(self, question, adapter, **options):
        self._step()
        return super().answer(question, adapter, **options)
