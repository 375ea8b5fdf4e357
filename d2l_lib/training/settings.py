"""The settings of self-generated data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from d2l_lib.documents import check_count
from d2l_lib.tasks import world

PROMPTS = {
    "plain": "{document}\n\n{question}",
    "guided": (
        "You are given a text and then a message. Rely on the text where the message is about it. Leave it aside where "
        "the two have nothing to do with each other. If the text itself tells you what to do, do so.\n\n"
        "{document}\n\n{question}"
    ),
    "brief": "{document}\n\n{question} Answer with a few words from the text.",
}
WRITERS = ("lists", "openings")


def _setting(default: Any, what: str) -> Any:
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class Settings:
    """What the data depend on, besides models and texts; ValueError for values that make no sense."""

    documents: int = _setting(1000, "how many documents")
    seed: int = _setting(0, "of documents, questions and sampled answers")
    shard_size: int = _setting(100, "documents in a shard")
    questions: int = _setting(8, "per document; with a writer of lists in each of its two rounds")
    unrelated_share: float = _setting(0.1, "of the questions: not about the document, answered without it")
    unanswerable_share: float = _setting(0.1, "of the questions: the document does not say")
    closed_share: float = _setting(0.0, "of the questions: worded so that only the bare answer is wanted")
    shortest: int = _setting(2, "fewest facts of a document of the world")
    longest: int = _setting(20, "most facts of a document of the world")
    split: str = _setting("train", "of the world: " + ", ".join(world.SPLITS))
    prompt: str = _setting("plain", "how the teacher is asked: " + ", ".join(PROMPTS))
    max_new_tokens: int = _setting(256, "answers that do not stop within this many tokens are dropped")
    temperature: float = _setting(0.0, "of the answers; 0 is greedy")
    writer_style: str = _setting("lists", "how a writer is asked: lists; openings (for small models, in English)")
    writer_max_new_tokens: int = _setting(1024, "of a writer's list of questions")
    writer_temperature: float = _setting(0.0, "of a writer's lists")
    batch_tokens: int = _setting(16384, "prompts and answers generated at once, padding included")

    def __post_init__(self):
        for name in ("documents", "shard_size", "questions", "shortest", "max_new_tokens", "writer_max_new_tokens"):
            check_count(getattr(self, name), name)
        check_count(self.batch_tokens, "batch_tokens")
        if self.longest < self.shortest:
            raise ValueError(f"longest is {self.longest} facts, shortest {self.shortest}")
        shares = (self.unrelated_share, self.unanswerable_share, self.closed_share)
        if not all(0 <= share <= 1 for share in shares) or shares[0] + shares[1] > 1:
            raise ValueError(f"shares must lie in 0..1, unrelated and unanswerable together too; they are {shares}")
        for name in ("temperature", "writer_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 (greedy) or larger, not {getattr(self, name)}")
        for name, known in (("split", world.SPLITS), ("prompt", tuple(PROMPTS)), ("writer_style", WRITERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(known)}")
        for setting in fields(self):  # 0 and 0.0 are one setting, also in the manifest
            object.__setattr__(self, setting.name, type(setting.default)(getattr(self, setting.name)))

    @property
    def n_shards(self) -> int:
        """Number of shards; the last one may hold fewer documents."""
        return math.ceil(self.documents / self.shard_size)
