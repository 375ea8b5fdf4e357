"""Training runs on `transformers.Trainer`: batches in order, one report line per so many steps, resumable.

Batches are functions of (seed, step), and the Trainer saves the optimizer. A killed run continues from its last
checkpoint and ends with the weights of an uninterrupted one. Under torchrun every process takes its share of each
step's batches, also on several nodes (`slurm` writes the script): a step, its batches, its gradient and its log line
are the same whatever the number of processes, and a run may go on with another number. To the last bit that holds on
one kind of machine where each process has one thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, SequentialSampler, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from d2l_lib.formats.writing import FolderKind, name_failed_writes, remove_output
from d2l_lib.hypernetwork import names_without_decay
from d2l_lib.presets import Schedule
from d2l_lib.records import append_jsonl, read_appended, read_json, write_jsonl
from d2l_lib.training.notes import Step
from d2l_lib.training.processes import end_group_at_exit, processes

_LOG = "log.jsonl"
_STATE = "trainer_state.json"  # written last: a checkpoint without it is not whole
_NOTES = "notes"  # in it: what was noted since the last report
# What the Trainer writes into a checkpoint.
_TRAINING_CHECKPOINT = FolderKind(
    "checkpoint of a training",
    (
        _STATE,
        *"model.safetensors model-*-of-*.safetensors model.safetensors.index.json optimizer.pt scheduler.pt".split(),
        *"scaler.pt rng_state.pth rng_state_*.pth training_args.bin config.json generation_config.json".split(),
    ),
    lambda folder: (),
)


class _Report(TrainerCallback):
    """Report lines, printed and (as JSON) in `run`/log.jsonl: step, seconds trained, rate, the step's own report.

    The same numbers go to `run`/tensorboard if the package tensorboard is installed. Seconds count on over
    interruptions. A resumed start drops the lines of steps that will be trained again, and goes on with what the
    checkpoint noted.
    """

    def __init__(self, path: Path, model: Step):
        self.path, self.model = path, model

    def on_train_begin(self, args, state, control, **kwargs):
        kept = [line for line in read_log(self.path) if line["step"] <= state.global_step]
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.start = time.monotonic()
        self.board = None
        before = state.stateful_callbacks.pop(_NOTES, {})
        self.model.notes.sums = before if state.is_world_process_zero else {}
        if state.is_world_process_zero:
            write_jsonl(self.path, kept)
            if find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        self.model.notes.gather()
        if not state.is_world_process_zero:
            return
        said = self.model.report()
        line = {
            "step": state.global_step,
            "seconds": round(self.seconds_before + time.monotonic() - self.start, 1),
            "loss": said["total_loss"],  # the step's own report may replace it with the loss without penalties
            "total_loss": said["total_loss"],
            "learning_rate": logs["learning_rate"],
            **said,
        }
        append_jsonl(self.path, line)
        if self.board is not None:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, line["step"])
        rest = "  ".join(
            f"{name} {value:.3f}"
            for name, value in line.items()
            if name not in ("step", "seconds", "total_loss", "learning_rate")
        )
        print(f"step {line['step']:>5}  {line['seconds']:>6.0f} s  {rest}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.board is not None:
            self.board.close()


class _Stop(TrainerCallback):
    """Ends a run after a step, with a checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_save = control.should_training_stop = True


class _Together(torch.optim.Optimizer):
    """Several optimizers with disjoint parameters that step and are saved as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers, self.defaults = list(optimizers), {}

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict:
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self, closure=None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


class _Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` as `InOrderTrainer` uses it, with products in float32.

    Torch's multiplies in bfloat16, which takes many times as long on a CPU that has none.
    """

    def __init__(self, parameters, lr: float, weight_decay: float):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                x = p.grad.lerp(momentum, 0.95)
                x = x.T if p.shape[0] > p.shape[1] else x
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values of x go near to 1
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.T if p.shape[0] > p.shape[1] else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


class InOrderTrainer(Trainer):
    """A Trainer that takes batches in order and exempts `without_decay` from weight decay.

    keep: number of last checkpoints to keep (None: all). Only files that a Trainer writes are deleted.
    batches_per_step: over all processes.
    muon_rate: learning rate of Muon (Jordan et al. 2024) for the matrices with weight decay; all else follows AdamW.
    muon_float32: Muon's products in float32.

    Where Muon learns, the parameters in the model's `rates` {name: factor} learn at factor times AdamW's rate, without
    decay.
    """

    without_decay: frozenset[str] = frozenset()
    keep: int | None = None
    batches_per_step: int = 1
    muon_rate: float | None = None
    muon_float32: bool = False
    _taken: int = 0  # batches of this step that this process has taken
    _unsynced: nn.Module | None = None  # the model whose processes do not add up gradients themselves

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self._sums: dict[nn.Parameter, torch.Tensor] = {}  # gradients of this step's batches so far

    def create_optimizer(self, model=None):
        if self.muon_rate is None or self.optimizer is not None:
            return super().create_optimizer() if model is None else super().create_optimizer(model)
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        decayed = set(self.get_decay_parameter_names(self.model))
        matrices = [p for name, p in named if p.dim() == 2 and name in decayed]
        rates = getattr(self.model, "rates", {})
        apart = [(p, rates[name]) for name, p in named if name in rates]
        chosen = set(map(id, matrices + [p for p, _ in apart]))
        others = [(name in decayed, p) for name, p in named if id(p) not in chosen]
        rest = [
            {"params": [p for decays, p in others if decays], "weight_decay": self.args.weight_decay},
            {"params": [p for decays, p in others if not decays], "weight_decay": 0.0},
        ]
        a = self.args
        rest += [{"params": [p], "weight_decay": 0.0, "lr": factor * a.learning_rate} for p, factor in apart]
        betas = a.adam_beta1, a.adam_beta2
        adam = torch.optim.AdamW(rest, lr=a.learning_rate, betas=betas, eps=a.adam_epsilon, fused=True)
        options = {"lr": self.muon_rate, "weight_decay": a.weight_decay}
        if not matrices:  # an optimizer needs something to learn
            self.optimizer = adam
        elif self.muon_float32:
            self.optimizer = _Together([adam, _Muon(matrices, **options)])
        else:
            muon = torch.optim.Muon(matrices, **options, adjust_lr_fn="match_rms_adamw")
            self.optimizer = _Together([adam, muon])
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, and their number of contexts in all processes if the model asks for it."""
        self._taken = 0
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and self.model_accepts_loss_kwargs:
            own = torch.tensor(sum(inputs["batch"].n_contexts for inputs in batches), device=device)
            items = self.accelerator.gather(own).sum()
        return batches, items

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def training_step(self, model, *arguments, **options):
        several = self.batches_per_step > 1  # with one, random numbers go on from the checkpoint
        if several:
            self._seed_batch()
            if isinstance(model, DistributedDataParallel) and model is not self._unsynced:
                model.register_comm_hook(None, noop_hook)
                self._unsynced = model
        loss = super().training_step(model, *arguments, **options)
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not a number: lower the learning rate; earlier checkpoints are kept")
        self.model.notes.add("total_loss", loss.item() / self.args.world_size, 1 / self.batches_per_step)
        if several:
            self._add_gradients()
        return loss

    def _add_gradients(self) -> None:
        """Add a batch's gradient to those of its step; after the last one, all processes' sum is the gradient.

        In float64 nearly all sums of float32 are exact, so it does not matter which process took which batch.
        """
        wide = torch.float32 if self.args.device.type == "mps" else torch.float64
        for p in self.model.parameters():
            if p.grad is not None:
                self._sums[p] = self._sums.get(p, 0) + p.grad.to(wide)
                p.grad = None
        if self._taken < self.current_gradient_accumulation_steps:
            return
        learned = [p for p in self.model.parameters() if p.requires_grad]
        present = torch.tensor([p in self._sums for p in learned], dtype=torch.int32, device=self.args.device)
        if self.args.world_size > 1:  # a parameter may have had no gradient in one process
            dist.all_reduce(present, dist.ReduceOp.MAX)
        learned = [p for p, is_present in zip(learned, present.tolist(), strict=True) if is_present]
        totals = [self._sums[p] if p in self._sums else torch.zeros_like(p, dtype=wide) for p in learned]
        if self.args.world_size > 1:  # all in one call: each takes time, the more the more processes there are
            flat = torch.cat([total.flatten() for total in totals])
            dist.all_reduce(flat)
            totals = flat.split([p.numel() for p in learned])
        for p, total in zip(learned, totals, strict=True):
            p.grad = (total.view_as(p) / self.args.world_size).to(p.dtype)
        self._sums = {}

    def _seed_batch(self) -> None:
        """Give the next batch random numbers of its own, whichever process takes it and after whatever start."""
        place = self._taken * self.args.world_size + self.args.process_index  # in the step
        number = self.state.global_step * self.batches_per_step + place
        torch.manual_seed(random.Random(f"batch/{self.args.seed}/{number}").getrandbits(32))
        self._taken += 1

    def _save_checkpoint(self, model, trial):
        self.model.notes.gather()
        self.state.stateful_callbacks[_NOTES] = self.model.notes.sums
        with name_failed_writes(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)
        if self.args.should_save and self.keep is not None:
            whole = [folder for folder in checkpoints(Path(self.args.output_dir)) if is_whole(folder)]
            for folder in whole[: -self.keep]:
                _delete(folder)

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if name not in self.without_decay]


@dataclass(frozen=True)
class Run:
    """How this machine trains: where a run is kept, its seed, and technical options.

    folder: checkpoints and log; a killed run continues there.
    save_steps, report_steps: optimizer steps between checkpoints, and between log lines.
    stop_at: end with a checkpoint after so many steps of the full schedule.
    keep: number of last checkpoints to keep (None: all).
    bf16: bfloat16 autocast around float32 parameters.
    recompute: see `step.Internalization`.
    compiled: torch.compile for the Perceiver; needs a compiler.
    arguments: further TrainingArguments of transformers.
    """

    folder: Path
    seed: int = 0
    save_steps: int = 250
    report_steps: int = 50
    stop_at: int | None = None
    keep: int | None = 2
    bf16: bool = False
    recompute: bool = False
    compiled: bool = False
    arguments: Mapping[str, object] = field(default_factory=dict)

    def stage(self, name: str, **changes) -> Run:
        """This run with a folder of its own for stage `name`, and other changes."""
        return replace(self, folder=self.folder / name, **changes)


def fit(model: Step, batches: Dataset, schedule: Schedule, run: Run) -> None:
    """Train `model` on `batches` in order, from the last checkpoint in `run.folder` on.

    model: its forward takes `batch` (or the fields of a batch that is a dict) and returns {"loss": ...}. `report` gives
        numbers for the log. With `accepts_loss_kwargs` it also takes num_items_in_batch, the contexts of a step, and
        divides its sums by it: then batches of unequal numbers of contexts can be accumulated.
    schedule: `steps` and `warmup_steps` count batches. An optimizer step has `batches_per_step` batches, of which each
        of W processes takes every W-th; what is left of `steps` after the last whole step is not learned.

    ValueError if W does not divide `batches_per_step`. FloatingPointError if the loss is not a number; earlier
    checkpoints are kept. RuntimeError if one process sees several GPUs. FileExistsError if the folder holds checkpoints
    or a log of another program. OSError names a checkpoint that cannot be written.
    """
    end_group_at_exit()
    arguments, each = _training_arguments(schedule, run), schedule.batches_per_step
    run.folder.mkdir(parents=True, exist_ok=True)
    _check_run(run.folder)
    whole = arguments.max_steps * each
    trainer = InOrderTrainer(
        model=model,
        args=arguments,
        train_dataset=batches if len(batches) <= whole else Subset(batches, range(whole)),
        data_collator=_named_batch,
        callbacks=[_Report(run.folder / _LOG, model)],
    )
    trainer.keep, trainer.batches_per_step = run.keep, each
    trainer.muon_rate, trainer.muon_float32 = schedule.muon_rate, schedule.muon_float32
    if run.stop_at is not None:
        trainer.add_callback(_Stop(run.stop_at))
    if hasattr(model, "hypernetwork"):
        names = names_without_decay(model.hypernetwork)
        trainer.without_decay = frozenset(f"hypernetwork.{name}" for name in names)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=_last_whole_checkpoint(run.folder))


def _training_arguments(schedule: Schedule, run: Run) -> TrainingArguments:
    """The Trainer's settings, in optimizer steps; RuntimeError if one process sees several GPUs."""
    floor, each = schedule.min_learning_rate, schedule.batches_per_step
    options = {"ddp_find_unused_parameters": False} | dict(run.arguments)
    arguments = TrainingArguments(
        output_dir=str(run.folder),
        max_steps=max(1, schedule.steps // each),
        per_device_train_batch_size=1,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02} if floor is None else {"min_lr": floor},
        warmup_steps=max(1, round(schedule.warmup_steps / each)),
        weight_decay=0.01,
        adam_beta2=schedule.adam_beta2,
        logging_steps=run.report_steps,
        logging_nan_inf_filter=False,
        save_steps=run.save_steps,
        seed=run.seed,
        bf16=run.bf16,
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),  # else the Trainer refuses bfloat16 there
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        remove_unused_columns=False,
        **options | {"gradient_accumulation_steps": schedule.accumulation(processes())},
    )
    if arguments.n_gpu > 1:
        raise RuntimeError(
            "one process sees several GPUs: start one for each with torchrun --nproc_per_node, or show it one with "
            "CUDA_VISIBLE_DEVICES"
        )
    return arguments


def _named_batch(items: list) -> dict:
    """What `forward` takes, from a data set whose items are whole batches."""
    (batch,) = items
    return batch if isinstance(batch, dict) else {"batch": batch}


def read_log(path: Path) -> list[dict]:
    """The whole lines of a training log, [] without a file; ValueError names a line without step and seconds."""
    from d2l_lib.formats.schemas import LogLine, check

    lines = read_appended(path)
    for number, line in enumerate(lines, 1):
        check(LogLine, line, f"{path}, line {number}", "take that line out")
    return lines


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders in `run`, whole or not, oldest first."""
    folders = [folder for folder in run.glob("checkpoint-*") if folder.name.rpartition("-")[2].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint folder is complete: the Trainer writes trainer_state.json last."""
    try:
        step_of(checkpoint)
    except (OSError, ValueError):
        return False
    return True


def _check_run(run: Path) -> None:
    """FileExistsError if a folder holds checkpoints or a log that no training of this project wrote."""
    log = run / _LOG
    try:
        read_log(log)
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{log} is no log of a training ({error}): choose another folder for this run") from error
    if not log.exists() and (others := checkpoints(run)):
        raise FileExistsError(
            f"{run} holds {others[0].name} but no {_LOG}: these are checkpoints of another program, choose another "
            "folder for this run"
        )


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint, trainer_state.json first: a part of one never looks whole."""
    if left := remove_output(checkpoint, _TRAINING_CHECKPOINT):
        print(f"{checkpoint} stays, for it holds {', '.join(left[:5])}", flush=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint; ValueError if its trainer_state.json does not say."""
    from d2l_lib.formats.schemas import TrainerState, check

    path = checkpoint / _STATE
    return check(TrainerState, read_json(path), path, "delete this checkpoint, it is damaged").global_step


def _last_whole_checkpoint(run: Path) -> str | None:
    """The newest whole checkpoint folder in `run`; newer half-written ones (a killed run) are deleted."""
    for folder in reversed(checkpoints(run)):
        if is_whole(folder):
            return str(folder)
        with suppress(FileNotFoundError):  # another process of the run may be deleting it too
            _delete(folder)
    return None
