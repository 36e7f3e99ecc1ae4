"""transformers' Trainer with the loss of losses/distillation.py, with teachers, and with detection of divergence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from darwinlm.config.training import DistillationConfig
from darwinlm.evaluation.quality import perplexity_of
from darwinlm.losses.distillation import LastHidden, Losses, Target, chunked_loss, hidden_for_logits
from darwinlm.runtime.files import write_record, write_text
from darwinlm.runtime.progress import say
from darwinlm.runtime.seal import digests
from darwinlm.training.directory import FINISHED
from darwinlm.types import DarwinError

Batch = dict[str, Tensor]


class DivergedError(DarwinError):
    """The loss, its gradient or the weights are no longer finite. No step was taken with such a loss or gradient."""


@runtime_checkable
class Teacher(Protocol):
    """A source of the distributions that the student learns."""

    def target(self, batch: Batch, temperature: float) -> Target:
        """Return the distribution after every token but the last of each sequence, in their order."""
        ...


class RecoveryTrainer(Trainer):
    """Trains on packed sequences with the chunked loss, in the order of the data set.

    Args:
        teacher: the teacher, or None for cross-entropy alone.
        held_out: sequences on which perplexity and KL divergence are measured.
        provenance: written into every checkpoint last, as a mark that the checkpoint is complete.
        log: a file with lines of JSON, which agrees with the history in a checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        train: Dataset,
        held_out: Dataset,
        teacher: Teacher | None,
        distillation: DistillationConfig,
        provenance: Mapping[str, Any],
        log: Path,
    ):
        super().__init__(model, args, train_dataset=train, eval_dataset=held_out)
        if any(isinstance(module, FSDPModule) for module in model.modules()):  # whose blocks are sharded already
            plugin: Any = self.accelerator.state.fsdp_plugin
            plugin.auto_wrap_policy = None
        self.remove_callback(PrinterCallback)
        self.add_callback(_Log(log))
        self.teacher = teacher
        self.distillation = distillation
        self.provenance = dict(provenance)
        self.loss_is_scaled_for_ga = False  # the loss is a mean over a batch
        self.model_accepts_loss_kwargs = False
        wrapper: Any = model
        inner: Any = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
        self._hidden_for_logits = hidden_for_logits(inner)
        self._objective = inner.loss_function = _Objective(self._hidden_for_logits.__enter__(), distillation.weight)
        # Cross-entropy, KL and batches since they were logged, on the device: to read them is to wait for it.
        self._sums = torch.zeros(3, dtype=torch.float64, device=args.device)
        self._wrong = torch.zeros((), device=args.device)  # the losses of this step that are not finite
        self._counted = 1.0  # predictions that count in a batch of this step, on average over all processes

    def create_accelerator_and_postprocess(self) -> None:
        """Do as the Trainer does, and set up FSDP on CPUs, which torch supports but accelerate (1.15) skips.

        Gradients of shards are summed in float32; accelerate would sum them in the precision of the products.
        """
        super().create_accelerator_and_postprocess()
        # Without a cache of them, copies of weights in low precision are there no longer than they are used.
        self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        state: Any = self.accelerator.state
        settings: Any = self.args.fsdp_plugin_args
        if settings and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**settings)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and self.accelerator.mixed_precision == "bf16":
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Return a linear warm-up, whose first step counts, and a cosine down to 0 after the last step."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = LambdaLR(optimizer, partial(share_of_rate, warmup=warmup, steps=num_training_steps))
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss over a batch's tokens that count, weighted by their number within the step.

        So the gradient of a step is that of the mean over all of its tokens that count, wherever they are.
        """
        teacher = self.teacher if self.distillation.weight > 0 else None
        losses = self._losses(model, inputs, teacher, self.distillation.temperature)
        counts = counted(inputs)
        weight = 1.0 if counts is None else len(counts) / self._counted
        self._sums += weight * torch.stack((losses.cross_entropy, losses.kl, torch.ones_like(losses.kl))).to(self._sums)
        return (losses.loss * weight, {}) if return_outputs else losses.loss * weight

    def get_batch_samples(self, *given: Any, **named: Any) -> Any:
        """Return the batches of a step as the Trainer does, and count what counts in them."""
        batches, items = super().get_batch_samples(*given, **named)
        marked = [rows for batch in batches if (rows := counted(batch)) is not None]
        if marked:
            total = self._over_processes(torch.tensor(float(sum(map(len, marked))), device=self.args.device))
            self._counted = max(1.0, float(total)) / (len(marked) * self.accelerator.num_processes)
        return batches, items

    def _losses(self, model: nn.Module, batch: Batch, teacher: Teacher | None, temperature: float) -> Losses:
        """Compute the loss inside the model's forward pass, where DistributedDataParallel and FSDP expect it."""
        ids = batch["input_ids"]
        target = None if teacher is None else teacher.target(batch, temperature)
        self._objective.set(target, temperature, counted(batch))
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        return self._objective.take(loss)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Run one batch forwards and backwards.

        Raises:
            DivergedError: on all processes, if a loss of the step is not finite; the step's last batch finds it.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._wrong += ~loss.isfinite()
        if self.accelerator.sync_gradients and self._over_processes(self._wrong) > 0:  # once a step
            raise DivergedError(f"the loss of step {self.state.global_step + 1} is not a finite number")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            raise DivergedError(f"the gradient of step {self.state.global_step + 1} is not finite")
        return norm

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Return perplexity on the held-out sequences and, with a teacher, KL(teacher || model) in nats a token."""
        data: Any = self.eval_dataset
        model: Any = self.model_wrapped
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        was_training = model.training
        model.eval()
        parts = sources_of(data)
        sums = torch.zeros(len(parts), 3, dtype=torch.float32, device=self.args.device)
        with torch.no_grad():
            for index in range(rank, -(-len(data) // world) * world, world):  # the same number for each process
                item = data[min(index, len(data) - 1)]
                batch = {name: tensor[None].to(self.args.device) for name, tensor in item.items()}
                losses = self._losses(model, batch, self.teacher, 1.0)
                if index < len(data):
                    weight = 1.0 if (rows := counted(batch)) is None else len(rows) / (batch["input_ids"].shape[1] - 1)
                    each = torch.stack((losses.cross_entropy, losses.kl, torch.ones_like(losses.kl))).to(sums)
                    sums[part_of(data, index)] += weight * each
        model.train(was_training)
        sums = self._over_processes(sums)
        metrics = self._figures(sums.sum(0), "")
        for part, own in zip(parts, sums, strict=True) if len(parts) > 1 else ():
            metrics |= self._figures(own, f" on {part}")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _figures(self, sums: Tensor, where: str) -> dict[str, float]:
        """Perplexity and KL from sums over sequences; none where nothing counts."""
        loss, kl, count = sums.tolist()
        if not count:
            return {}
        # Over the teacher's likeliest tokens alone it is less than the divergence, so it has another name.
        name = "eval_kl_top_k" if self.distillation.top_k else "eval_kl"
        perplexity = {f"eval_perplexity{where}": perplexity_of(loss / count)}
        return perplexity | ({f"{name}{where}": kl / count} if self.teacher else {})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the parts of the loss, as means over the last steps, with the loss itself."""
        if "loss" in logs:
            cross_entropy, kl, batches = self._over_processes(self._sums.float().to(self.args.device)).tolist()
            weight, softened = self.distillation.weight, self.distillation.temperature**2
            logs["cross_entropy"] = logs["loss"] = cross_entropy / max(batches, 1)
            if self.teacher is not None and weight > 0:
                logs["kl"] = kl / max(batches, 1)
                # From its float32 parts, because sharded models return a loss in the precision of their products.
                logs["loss"] = (1 - weight) * logs["cross_entropy"] + weight * softened * logs["kl"]
            self._sums.zero_()
        super().log(logs, start_time)

    def _over_processes(self, sums: Tensor) -> Tensor:
        total: Any = self.accelerator.reduce(sums, "sum")
        return total

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """Return a sampler without shuffling: the data set is in its final order already."""
        dataset: Any = train_dataset or self.train_dataset
        return SequentialSampler(dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint if all weights are finite, and mark it complete once all processes have written it."""
        parts = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters())
        wrong = (~torch.stack([part.isfinite().all() for part in parts]).all()).float()
        if self._over_processes(wrong) > 0:
            raise DivergedError(f"the weights after step {self.state.global_step} are not finite")
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            step = self.state.global_step
            directory = Path(str(self.args.output_dir)) / f"checkpoint-{step}"
            write_record(directory / FINISHED, {"step": step, "files": digests(directory)}, self.provenance)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do as the Trainer does, but gather sharded weights singly and tied ones once, at which it (5.23) fails."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        model: Any = self.model_wrapped
        state, gathered = {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in gathered:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                gathered[id(parameter)] = whole.detach().cpu() if self.args.should_save else None
            state[name] = gathered[id(parameter)]
        if self.args.should_save:
            self._save(output_dir, state)

    def close(self) -> None:
        """Let the model's forward pass make logits again."""
        self._hidden_for_logits.__exit__(None, None, None)


def share_of_rate(step: int, warmup: int, steps: int) -> float:
    """The share of the learning rate that a step has: `(step + 1) / (warmup + 1)` at first, then half a cosine.

    Args:
        step: from 0.
        warmup: steps before the first one that has the whole rate.
        steps: all steps. The one after them would have 0.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def counted(batch: Mapping[str, Tensor]) -> Tensor | None:
    """The places after which the prediction counts, among all tokens but the last of each sequence; None if all do."""
    return batch["counts"][..., :-1].flatten().nonzero().flatten() if "counts" in batch else None


def sources_of(data: Any) -> tuple[str, ...]:
    """The sources of held-out sequences, by name; one without a name where they do not say."""
    return getattr(getattr(data, "sequences", data), "sources", ("",))


def part_of(data: Any, index: int) -> int:
    """The number of the source of a held-out sequence."""
    places = getattr(getattr(data, "sequences", data), "places", None)
    return 0 if places is None else int(places[index, 0])


class _Objective:
    """The loss function that a model's forward pass calls; it reads the hidden states that were kept there."""

    def __init__(self, last_hidden: LastHidden, kl_weight: float):
        self.last_hidden = last_hidden
        self.kl_weight = kl_weight
        self._target: Target | None = None
        self._temperature = 1.0
        self._rows: Tensor | None = None
        self._losses: Losses | None = None

    def set(self, target: Target | None, temperature: float, rows: Tensor | None) -> None:
        self._target, self._temperature, self._rows = target, temperature, rows

    def __call__(self, logits: Tensor, labels: Tensor, *_: Any, **__: Any) -> Tensor:
        hidden, labels, target = self.last_hidden.take()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), self._target
        if self._rows is not None:
            rows = self._rows.to(hidden.device)
            hidden, labels, target = hidden[rows], labels[rows], None if target is None else target.at(rows)
        self._losses = chunked_loss(
            hidden,
            self.last_hidden.logits,
            labels,
            target,
            kl_weight=self.kl_weight,
            temperature=self._temperature,
        )
        return self._losses.loss

    def take(self, loss: Tensor) -> Losses:
        """Return the losses of the latest pass, with `loss` as the model's wrappers returned it."""
        assert self._losses is not None
        losses, self._losses, self._target = self._losses, None, None
        return losses._replace(loss=loss)


class _Log(TrainerCallback):
    """Writes the history to the screen and to a file."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        sharded = [name for name, module in model.named_modules() if name and isinstance(module, FSDPModule)]
        if sharded:
            say(f"FSDP2: {len(sharded)} modules, each decoder block one, shared by {args.world_size} processes")
        if state.is_world_process_zero:  # without what came after the checkpoint
            write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in state.log_history))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == state.max_steps:  # also what came after the last multiple of log_every
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or "train_runtime" in (logs or {}):
            return
        line = state.log_history[-1]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
        shown = {name.removeprefix("eval_"): value for name, value in line.items() if name not in ("epoch", "step")}
        kind = "held-out" if "eval_perplexity" in line else "training"
        values = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in shown.items())
        say(f"{kind}: step {line['step']}/{state.max_steps}, {values}")
