"""The router, trained on documents of one split and judged on those of another.

d2l study router-weights --keep tiny/qa   # data/full_runs/router_weights.jsonl, and the weights in the model
"""

from __future__ import annotations

import pandas as pd
import torch

from d2l_lib.formats.checkpoints import SETTINGS, write_router
from d2l_lib.formats.schemas import CheckpointSettings, check
from d2l_lib.loading import find_checkpoint
from d2l_lib.model import DocToLoRA
from d2l_lib.records import read_json, write_json
from d2l_lib.router import Router
from d2l_lib.studies import earlier_rows
from d2l_lib.tasks.scores import wilson
from d2l_lib.training.router import DEFAULT, Asked, RouterPreset, calibrate, draw_questions, train_router

JUDGED = "yes_no, judged"
_AT_ONCE = 64  # questions of a pass


@torch.no_grad()
def _marks(router: Router, asked: list[Asked]) -> list[dict]:
    """kind, idea and whether the choice is right, of each question and idea."""
    marks = []
    for start in range(0, len(asked), _AT_ONCE):
        some = asked[start : start + _AT_ONCE]
        scores, verdicts = router([one.responses for one in some])
        for one, place, of_each in zip(some, (scores.argmax(1) - 1).tolist(), verdicts, strict=True):
            right = place in one.right if one.right else place < 0
            marks.append({"kind": one.kind, "idea": "router", "right": right})
            if one.verdict is not None:
                judged = place >= 0 and bool(of_each[place] > 0) == one.verdict
                marks.append({"kind": JUDGED, "idea": "router", "right": judged})
            keys = one.responses.rows[:, -1].float().unflatten(-1, (2, router.config.n_layers, -1))[:, 0]
            norms = keys.norm(dim=-1).T  # [layers, K], at the last token
            for idea, score in (("keys of the last layer", norms[-1]), ("keys of all layers", norms.sum(0))):
                marks.append({"kind": one.kind, "idea": idea, "right": int(score.argmax()) in one.right})
    return marks


def measure_router_weights(
    model: DocToLoRA,
    n: int,
    seed: int,
    training_seed: int = 0,
    splits: tuple[str, str] = ("train", "validation"),
    p: RouterPreset = DEFAULT,
) -> tuple[pd.DataFrame, Router]:
    """(right choices by kind of question and idea, the router): trained on one split, calibrated on the other, and
    counted on `n` other questions of that.

    Columns: kind, idea, n, share, low, high. A choice is right that holds the answer; where no block does, only the
    router can be right, by choosing none. JUDGED: the verdict on a yes/no question with the block that is chosen.
    """
    router = train_router(model, training_seed, p, splits[0])
    calibrate(model, router, p.calibration, training_seed, splits[1], p.error)
    marks = pd.DataFrame(_marks(router, list(draw_questions(model, router, n, seed, splits[1]))))
    rows = []
    for (kind, idea), right in marks.groupby(["kind", "idea"], sort=False)["right"]:
        low, high = wilson(int(right.sum()), len(right))
        counted = {"n": len(right), "share": right.mean(), "low": low, "high": high}
        rows.append({"kind": kind, "idea": idea} | counted)
    return pd.DataFrame(rows).assign(split=splits[1], training_seed=training_seed), router


def keep_router(model: str, router: Router) -> None:
    """Write the router into a model's folder; ValueError for a published checkpoint file."""
    folder = find_checkpoint(model)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a published checkpoint and cannot keep a router: model.save a folder first")
    settings = read_json(folder / SETTINGS)
    check(CheckpointSettings, settings, folder / SETTINGS, "model.save the folder again")
    settings["meta"] = settings.get("meta", {}) | {"router": write_router(folder, router)}
    write_json(folder / SETTINGS, settings)


def run(model: DocToLoRA, n: int, seed: int, training_seed: int, keep: str | None) -> list[dict]:
    """The record: `measure_router_weights`; the folder of model `keep` takes the weights. Rows of other trainings
    stay.
    """
    table, router = measure_router_weights(model, n, seed, training_seed)
    if keep is not None:
        keep_router(keep, router)
    rows = [row for row in earlier_rows("router_weights") if row["training_seed"] != training_seed]
    return sorted(rows + table.to_dict("records"), key=lambda row: row["training_seed"])
