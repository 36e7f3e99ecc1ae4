"""Post-training: `darwinlm train`. A pruned model recovers on text, alone or with the dense model as its teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, set_seed

from darwinlm.commands.run_directory import FREE, TRAIN_SETTINGS, claim, explain_failures, open_model, versions_text
from darwinlm.commands.train_page import what_it_writes, write_training_page
from darwinlm.config.checks import expect
from darwinlm.config.training import TrainConfig
from darwinlm.data.packing import tokenizer_fingerprint
from darwinlm.data.stream import Sequences, draw_held_out, draw_sequences
from darwinlm.export.card import trained_card
from darwinlm.export.hf import export_hf
from darwinlm.export.verify import Expected
from darwinlm.losses.distillation import Target, teacher_target
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.families import block_sizes_of
from darwinlm.model.size import parameter_count
from darwinlm.report.html import NAME, unless_it_fails
from darwinlm.report.training_page import changed_parts
from darwinlm.runtime import parallel
from darwinlm.runtime.device import resolve_device, resolve_dtype
from darwinlm.runtime.files import read_json, write_record
from darwinlm.runtime.progress import quiet_transformers, say
from darwinlm.runtime.trackers import check_trackers
from darwinlm.training.adapters import add_adapters, merge_adapters
from darwinlm.training.arguments import accumulation, is_sharded, training_arguments
from darwinlm.training.directory import FINISHED, Training
from darwinlm.training.judge import judging
from darwinlm.training.own_text import with_own_text, writes_own_text
from darwinlm.training.sharding import load_sharded
from darwinlm.training.teacher_logits import CachedTeacher, TaughtSequences, TeacherLogits
from darwinlm.training.trainer import Batch, DivergedError, RecoveryTrainer, Teacher
from darwinlm.types import DarwinError, UsageError

LEFT_BEHIND = ("cache", "student", "teacher")  # what a refused command may leave, and the next one uses


OPTIMIZER, SHARDS = "optimizer.pt", "pytorch_model_fsdp_0"  # in a checkpoint; the latter if it is sharded


def train(config: TrainConfig) -> Training:
    """Train a model and export it. What an earlier, interrupted call has done is not done again.

    Raises:
        UsageError: if a setting cannot be used; a directory that was new is left as if nothing had happened.
        DarwinError: if the training fails or diverges. The same call goes on from the last checkpoint.
    """
    thrift = "lower --training.micro-batch-size or switch on --training.gradient-checkpointing"
    training = Training(config.out)
    explained = explain_failures(f"the training in {config.out}", thrift)
    held = parallel.shared_directory(training.path, lambda: _claim(training, config))
    with explained, parallel.together(), held:
        if training.result_path.exists():
            say(f"{training.path} is finished: {training.exported} is the model")
            return training
        work = _open(training, config)
        last = _train(work)
        if parallel.first():
            _export(work, last)
            _conclude(work, last)
    return training


def check(config: TrainConfig, student: Checkpoint, teacher: Checkpoint | None) -> None:
    """Check the settings of a training before anything is computed for it.

    Args:
        student: the model that will be trained, or one of the same family and tokenizer.

    Raises:
        UsageError: if a setting cannot be used.
    """
    training, distillation, length = config.training, config.distillation, config.stream.sequence_length
    resolve_device(config.device)
    student.check_length(length, "stream.sequence-length")
    if teacher is not None:
        teacher.check_length(length, "stream.sequence-length")
        _check_tokenizers(config, student, teacher)
    vocabulary = student.config.vocab_size
    expect(distillation.top_k <= vocabulary, "distillation.top_k", f"at most {vocabulary:,}", distillation.top_k)
    check_trackers(training.report_to, "training.report-to")
    accumulation(config)
    if training.lora_rank and find_spec("peft") is None:
        raise UsageError("--training.lora-rank wants the package peft: pip install '.[lora]' in a clone of darwinlm")
    if training.fsdp and parallel.processes() == 1:
        say("--training.fsdp: there is one process, which has nothing to share; torchrun starts several")


def _claim(training: Training, config: TrainConfig) -> None:
    """Claim the directory for these settings; all of them may change until there is a checkpoint."""
    begun = training.result_path.exists() or any(training.checkpoints.glob(f"*/{FINISHED}"))
    claim(training.path, TRAIN_SETTINGS, config, LEFT_BEHIND, () if begun else [field.name for field in fields(config)])


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What every step of a training reads: its directory and settings, models, text, and where to compute.

    Attributes:
        checkpoint: the model that is trained.
        held_out: the sequences that it is evaluated on.
        cache: the directory for tokens and the teacher's logits.
        dtype: the precision of the products; weights that train are float32.
        provenance: what determines the result, which every checkpoint records.
    """

    training: Training
    config: TrainConfig
    checkpoint: Checkpoint
    teacher: Checkpoint | None
    sequences: Sequences
    held_out: Sequences
    cache: Path
    device: torch.device
    dtype: torch.dtype
    provenance: dict[str, Any]


def _open(training: Training, config: TrainConfig) -> _Work:
    """Open models and text. Whatever is wrong with the arguments is found here, before hours are spent."""
    try:
        device = resolve_device(config.device)
        with parallel.first_before_others():
            checkpoint = open_model(config.model, training.path / "student")
            teacher = None if config.teacher is None else open_model(config.teacher, training.path / "teacher")
        check(config, checkpoint, teacher)
        cache = Path(config.cache) if config.cache else training.path / "cache"
        data = _with_own_text(config, teacher, cache, device)
        text = data, config.steps * config.training.batch_size, checkpoint.tokenizer, config.stream, cache
        skip = -(-config.skip // config.stream.sequence_length)
        sequences = draw_sequences(*text, config.seed, skip, config.loss_tokens)
        held_out = draw_held_out(
            data,
            -(-config.training.evaluation_tokens // config.stream.sequence_length),
            checkpoint.tokenizer,
            config.stream,
            cache,
            config.loss_tokens,
        )
        for drawn, flag in ((sequences, "--tokens"), (held_out, "--training.evaluation-tokens")):
            drawn.check_ids(checkpoint.config.vocab_size)
            drawn.expect_counted(flag)
        provenance = {
            "model": checkpoint.agree_on_fingerprint(),
            "teacher": None if teacher is None else teacher.agree_on_fingerprint(),
            "text": sequences.fingerprint,
            "settings": _determining(config),
        }
        provenance = json.loads(json.dumps(provenance))  # as it reads in a checkpoint
        training.last_checkpoint(provenance)
        dtype = resolve_dtype(config.training.dtype, device)
    except DarwinError:
        if parallel.first() and not training.checkpoints.exists():
            (training.path / TRAIN_SETTINGS).unlink(missing_ok=True)
        raise
    return _Work(
        training=training,
        config=config,
        checkpoint=checkpoint,
        teacher=teacher,
        sequences=sequences,
        held_out=held_out,
        cache=cache,
        device=device,
        dtype=dtype,
        provenance=provenance,
    )


def _with_own_text(config: TrainConfig, teacher: Checkpoint | None, cache: Path, device: torch.device) -> str:
    """The text of a training, with what the dense model, the teacher, writes of it in files."""
    if not writes_own_text(config.data):
        return config.data
    if teacher is None:
        raise UsageError("--data self is what the dense model writes: expected --teacher, found none; name it")
    tokens = (
        config.steps * config.training.batch_size * config.stream.sequence_length,
        config.training.evaluation_tokens,
    )
    dtype = resolve_dtype(config.training.dtype, device)
    return with_own_text(config.data, teacher, tokens, config.own, cache, config.seed, device, dtype)


def _determining(config: TrainConfig) -> dict[str, Any]:
    """Settings that determine what a training makes of its model and text."""
    free = {name.removeprefix("training.") for name in FREE}
    settings = {name: value for name, value in asdict(config.training).items() if name not in free}
    return settings | asdict(config.distillation) | {"seed": config.seed}


def _check_tokenizers(config: TrainConfig, student: Checkpoint, teacher: Checkpoint) -> None:
    tokenizers = [tokenizer_fingerprint(checkpoint.tokenizer) for checkpoint in (student, teacher)]
    known = len(student.tokenizer)
    short = [checkpoint.config.vocab_size for checkpoint in (student, teacher) if checkpoint.config.vocab_size < known]
    if tokenizers[0] != tokenizers[1] or short:
        raise UsageError(
            f"--teacher: expected the tokenizer of {config.model} ({known:,} tokens), found another in "
            f"{config.teacher} ({len(teacher.tokenizer):,} tokens); name the dense model that it was pruned from"
        )


class _OnlineTeacher:
    """The teacher runs beside the student, in the precision of the products."""

    def __init__(self, model: PreTrainedModel, vocabulary: int):
        self.model = model
        self.vocabulary = vocabulary

    def target(self, batch: Batch, temperature: float) -> Target:
        return teacher_target(self.model, batch["input_ids"], temperature, self.vocabulary)


def _teacher(work: _Work) -> tuple[Teacher | None, Dataset, Dataset]:
    """The teacher, if there is one, and the sequences for training and evaluation, with its logits if cached."""
    checkpoint, config = work.teacher, work.config.distillation
    if checkpoint is None:
        return None, work.sequences, work.held_out

    # The rows that both output embeddings have; beyond the tokens they are padding, which may differ.
    vocabulary = min(work.checkpoint.config.vocab_size, checkpoint.config.vocab_size)

    def load() -> PreTrainedModel:
        return checkpoint.load(work.dtype, work.device).requires_grad_(False)

    if not config.top_k and not config.weight:
        with suppress(UsageError):  # a teacher that cannot be run by block stays beside the model
            judge, judged = judging(checkpoint, work.held_out, work.dtype, work.device, vocabulary)
            return judge, work.sequences, judged
    if not config.top_k:
        return _OnlineTeacher(load(), vocabulary), work.sequences, work.held_out

    def with_logits(sequences: Sequences, temperature: float) -> Dataset:
        logits = TeacherLogits.open(work.cache, checkpoint.fingerprint, config.top_k, temperature, vocabulary)
        logits.fill(sequences, load)
        return TaughtSequences(sequences, logits)

    learned = with_logits(work.sequences, config.temperature) if config.weight else work.sequences
    return CachedTeacher(), learned, with_logits(work.held_out, 1.0)


def _train(work: _Work) -> Path:
    """Train to the end, from the last checkpoint if there is one, and return the final checkpoint."""
    config, training = work.config, work.training
    last = training.last_checkpoint(work.provenance)
    if last is not None:
        finished = last.name == f"checkpoint-{config.steps}"
        if not finished:
            _check_resumable(last, work)
        if parallel.first():  # torchrun ends the others where this one fails
            training.check_checkpoint(last)
        if finished:
            return last
    teacher, sequences, held_out = _teacher(work)
    set_seed(config.seed)
    model = _student(work)
    with quiet_transformers():
        trainer = RecoveryTrainer(
            model,
            training_arguments(config, work.device, work.dtype, training.checkpoints, resumed=last is not None),
            sequences,
            held_out,
            teacher,
            config.distillation,
            work.provenance,
            training.log_path,
        )
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except DivergedError as error:
            good = training.last_checkpoint(work.provenance)
            kept = "no state was kept yet" if good is None else f"the last good state is in {good}"
            raise DarwinError(
                f"training diverged: {error}; {kept}; lower --training.learning-rate and choose another --out"
            ) from None
        finally:
            trainer.close()
    parallel.wait_for_all()
    last = training.last_checkpoint(work.provenance)
    assert last is not None
    return last


def _student(work: _Work) -> Any:
    """The model to train: in float32 what trains, in the precision of the products what only adapters train for."""
    training = work.config.training
    if is_sharded(work.config):
        return load_sharded(work.checkpoint, work.device, work.dtype)
    precision = work.dtype if training.lora_rank else torch.float32
    model = work.checkpoint.load(precision, work.device).requires_grad_(True).train()
    return add_adapters(model, training) if training.lora_rank else model


def _check_resumable(last: Path, work: _Work) -> None:
    """Raise `DarwinError` if a training cannot go on from a checkpoint exactly."""
    if is_sharded(work.config) and not (last / SHARDS).is_dir():
        raise DarwinError(
            f"--training.fsdp: expected {SHARDS} in {last}, found none: no sharded training of this version wrote it; "
            "choose another --out"
        )
    if not is_sharded(work.config) and not (last / OPTIMIZER).exists():
        raise DarwinError(
            f"expected {OPTIMIZER} in {last}, found none: resume a sharded training with --training.fsdp and several "
            "processes, or remove that checkpoint, and the training goes on from the one before"
        )


def _trained(work: _Work, last: Path) -> PreTrainedModel:
    """The model of the final checkpoint, with adapters merged, in the precision of the untrained one."""
    if work.config.training.lora_rank:
        # In the host's memory: in float32 the model is twice as large as the one that was trained.
        model: Any = merge_adapters(work.checkpoint.load(torch.float32, torch.device("cpu")), last)
    else:
        model = Checkpoint(last).load(work.checkpoint.dtype, work.device)
        model.config = work.checkpoint.skeleton().config  # the Trainer has changed the model's own
    for parameter in model.parameters():  # buffers stay float32, as rotary frequencies are when a model is loaded
        parameter.data = parameter.data.to(work.checkpoint.dtype)
    return model.to(work.device).eval()


def _export(work: _Work, last: Path) -> None:
    """Write the trained model as a directory that transformers loads, and check it in a fresh process."""
    training = work.training
    if training.exported.exists() and training.seal_path.exists():
        return
    shutil.rmtree(training.exported, ignore_errors=True)  # the process died before it had sealed it
    model = _trained(work, last)
    expected = Expected.of(model, work.checkpoint.whole) if work.config.verify else None
    source = work.checkpoint.path / "README.md"
    before = source.read_text(encoding="utf-8") if source.exists() else ""
    card = trained_card(before, work.config.model, _settings(work), parameter_count(model))
    sizes, tokenizer = block_sizes_of(model), work.checkpoint.tokenizer
    export_hf(model, sizes, tokenizer, training.exported, card, expected, work.checkpoint.path)
    training.seal_export(work.provenance)


def _settings(work: _Work) -> dict[str, str]:
    """A description of the training for its model card, by title."""
    config = work.config
    loss = "cross-entropy"
    if config.teacher is not None and config.distillation.weight > 0:
        share = config.distillation.weight
        loss = f"KL divergence from {config.teacher}" + (f" ({share:g}) and cross-entropy" if share < 1 else "")
    steps = f"{config.steps:,} steps of {config.training.batch_size:,} sequences of {config.stream.sequence_length:,}"
    return {
        "Trained from": config.model,
        "Text": config.data,
        "Tokens": f"{config.steps * config.training.batch_size * config.stream.sequence_length:,}: {steps} tokens",
        "Loss": loss,
        "Learning rate": f"{config.training.learning_rate:g}, warm-up {config.training.warmup_steps} steps, cosine",
        "Seed": str(config.seed),
        "Versions": versions_text(),
    }


def _conclude(work: _Work, last: Path) -> None:
    """Report, record and print the held-out figures before and after the training."""
    history = read_json(last / "trainer_state.json", "log_history")["log_history"]
    evaluations = [line for line in history if "eval_perplexity" in line]
    before, after = (_figures(evaluations[i]) for i in (0, -1))
    page = work.training.path / NAME
    with unless_it_fails(page):
        # A sharded model may be too large to write on one device.
        written = {} if is_sharded(work.config) else what_it_writes(work.training, work.checkpoint, work.device)
        write_training_page(
            page, work.config, work.checkpoint, _settings(work), work.provenance, history, (before, after), written
        )
    write_record(work.training.result_path, {"before": before, "after": after}, work.provenance)
    for sentence in changed_parts(before, after):
        say(sentence)
    for name, figures in (("before", before), ("after", after)):
        say(f"{name}: " + ", ".join(f"{what} {value:.4g}" for what, value in figures.items()))
    print(work.training.exported, page, sep="\n")


def _figures(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
