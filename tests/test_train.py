"""Training: against a loop by hand, resumed after a real kill, stopped before it is lost, exported."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pruned
import runs
import tiny
import trainings
from darwinlm.commands.train import train
from darwinlm.config.run import EvaluationConfig
from darwinlm.config.training import DistillationConfig, TrainConfig
from darwinlm.data.stream import draw_held_out, draw_sequences
from darwinlm.evaluation.generation import continuations
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.model.checkpoint import Checkpoint
from darwinlm.model.reading import load
from darwinlm.report.html import NAME
from darwinlm.types import DarwinError, UsageError

PATIENCE = 60.0  # seconds


@pytest.fixture(scope="module")
def export(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned tiny Llama with tied embeddings."""
    return trainings.write_pruned(checkpoints["llama-gqa"], tmp_path_factory.mktemp("pruned"))


@pytest.fixture(scope="module")
def whole(
    export: Path, checkpoints: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainConfig:
    """A training with a teacher that was never stopped."""
    config = trainings.distilled(export, text, tmp_path_factory.mktemp("whole") / "out", checkpoints["llama-gqa"])
    train(config)
    return config


def test_the_loss_curve_is_that_of_a_loop_by_hand(export: Path, text: Path, tmp_path: Path):
    """AdamW without weight decay, warm-up, cosine, clipping, and accumulation that is one large batch."""
    config = trainings.short(export, text, tmp_path / "out")
    found = trainings.losses(train(config).history)
    model: Any = Checkpoint(export).load(torch.float32, pruned.CPU).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate, weight_decay=0.0)
    sequences = draw_sequences(
        config.data, trainings.STEPS * trainings.BATCH, tiny.tokenizer(), config.stream, tmp_path / "cache", config.seed
    )
    expected = []
    warmup = config.training.warmup_steps
    for step in range(trainings.STEPS):
        angle = np.interp(step, [warmup, trainings.STEPS], [0, np.pi])
        for group in optimizer.param_groups:
            group["lr"] = (
                config.training.learning_rate * np.interp(step, [-1, warmup], [0, 1]) * (1 + np.cos(angle)) / 2
            )
        start = step * trainings.BATCH
        ids = torch.stack([sequences[i]["input_ids"] for i in range(start, start + trainings.BATCH)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=2e-5)
    assert found[-1] < found[0] - 0.1
    exported: Any = load(tmp_path / "out" / "model").eval()
    ids = pruned.token_ids()
    torch.testing.assert_close(exported(ids).logits, model.eval()(ids).logits, rtol=1e-3, atol=1e-3)


def test_held_out_figures_are_those_of_evaluate(whole: TrainConfig, export: Path, checkpoints: dict[str, Path]):
    result = json.loads((Path(whole.out) / "result.json").read_text())
    held_out = draw_held_out(whole.data, 10, tiny.tokenizer(), whole.stream, Path(whole.out) / "cache")
    ids = torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])
    models: Any = {"dense": load(checkpoints["llama-gqa"]), "before": load(export), "after": load(f"{whole.out}/model")}
    figures = perplexity_and_kl(models, ids)
    for name in ("before", "after"):
        assert result[name]["perplexity"] == pytest.approx(figures[name].perplexity, rel=1e-4)
        assert result[name]["kl"] == pytest.approx(figures[name].kl, rel=1e-4)
    assert result["after"]["kl"] < result["before"]["kl"]
    page = (Path(whole.out) / NAME).read_text()
    for name in ("before", "after"):
        told = "".join(f"<td>{figure:.4g}</td>" for figure in result[name].values())
        assert f'<td class="words">{name}</td>{told}' in page
        for text in continuations(models[name], tiny.tokenizer(), EvaluationConfig().prompts, 32):
            assert escape(text) in page


def test_what_is_exported_is_still_pruned_and_tied(whole: TrainConfig, export: Path):
    trained, before = Path(whole.out) / "model", export
    assert {p.name for p in trained.iterdir()} == {p.name for p in before.iterdir()}
    configs = [json.loads((path / "config.json").read_text()) for path in (trained, before)]
    assert configs[0] == configs[1]
    weights = [load_file(path / "model.safetensors") for path in (trained, before)]
    assert {n: t.shape for n, t in weights[0].items()} == {n: t.shape for n, t in weights[1].items()}
    assert "lm_head.weight" not in weights[0]
    assert not torch.equal(weights[0]["model.embed_tokens.weight"], weights[1]["model.embed_tokens.weight"])
    model: Any = load(trained)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_been(whole: TrainConfig, tmp_path: Path):
    """SIGKILL after the first checkpoint; the history and the weights are those of the one that was not killed."""
    config = trainings.distilled(Path(whole.model), Path(whole.data), tmp_path / "out", Path(str(whole.teacher)))
    arguments, environment = runs.process(*runs.command(config, name="train"))
    first = tmp_path / "out" / "checkpoints" / "checkpoint-4" / "darwinlm.json"
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as running:
        deadline = time.monotonic() + PATIENCE
        while not first.exists():
            assert running.poll() is None, running.stderr and running.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        running.kill()
        assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "model").exists()
    half = tmp_path / "out" / "checkpoints" / "checkpoint-11"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half a file")
    resumed, uninterrupted = train(config), train(whole)
    assert resumed.history == uninterrupted.history
    ours, theirs = (load_file(each.exported / "model.safetensors") for each in (resumed, uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_was_trained_is_not_trained_again(whole: TrainConfig, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(whole.out, out)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    before = (out / "log.jsonl").read_bytes()
    again = train(trainings.distilled(Path(whole.model), Path(whole.data), out, Path(str(whole.teacher))))
    assert (out / "log.jsonl").read_bytes() == before
    assert again.result["after"] == train(whole).result["after"]
    ours, theirs = (load_file(p / "model" / "model.safetensors") for p in (out, Path(whole.out)))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_changes_nothing(dtype: str, export: Path, text: Path, tmp_path: Path):
    curves = []
    for checkpointing in (False, True):
        changes = {"gradient_checkpointing": checkpointing, "dtype": dtype, "warmup_steps": 1}
        config = trainings.short(export, text, tmp_path / str(checkpointing), tokens=256, training=changes)
        curves.append(trainings.losses(train(config).history))
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_steps_too_small_for_bfloat16_are_not_lost(export: Path, text: Path, tmp_path: Path):
    """Products are bfloat16, weights float32: at 1e-6 every weight still moves."""
    changes = {"learning_rate": 1e-6, "warmup_steps": 0, "dtype": "bfloat16"}
    trained = train(trainings.short(export, text, tmp_path / "out", tokens=512, training=changes)).exported
    name = "model.layers.0.mlp.up_proj.weight"
    before, after = (load_file(path / "model.safetensors")[name] for path in (export, trained))
    assert (before != after).float().mean() > 0.9
    assert (
        torch.equal(before.bfloat16(), after.bfloat16()) or (before.bfloat16() != after.bfloat16()).float().mean() < 0.1
    )


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(export: Path, text: Path, tmp_path: Path):
    out = tmp_path / "out"
    changes = {"learning_rate": 1e18, "warmup_steps": 6, "log_every": 1, "save_every": 1, "max_gradient_norm": 1e30}
    with pytest.raises(
        DarwinError, match=r"training diverged: .* step \d+ .*the last good state is in .*checkpoint-\d+"
    ):
        train(trainings.short(export, text, out, training=changes))
    kept = [path for path in (out / "checkpoints").iterdir() if (path / "darwinlm.json").exists()]
    assert kept
    for path in kept:
        assert all(tensor.isfinite().all() for tensor in load_file(path / "model.safetensors").values())
    assert not (out / "model").exists()


def test_weights_that_are_not_finite_are_never_kept(text: Path, checkpoints: dict[str, Path], tmp_path: Path):
    """A model whose loss is no number from the start: refused at its first step, nothing kept."""
    model = tmp_path / "model"
    shutil.copytree(checkpoints["qwen2"], model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(DarwinError, match="no state was kept yet"):
        train(trainings.short(model, text, tmp_path / "out"))


def test_low_rank_adapters_are_merged(whole: TrainConfig, export: Path, text: Path, tmp_path: Path):
    pytest.importorskip("peft")
    changes = {"lora_rank": 4, "learning_rate": 1e-2}
    result = train(trainings.short(export, text, tmp_path / "out", training=changes))
    assert result.result["after"]["perplexity"] < result.result["before"]["perplexity"]
    before, after = (load_file(path / "model.safetensors") for path in (export, result.exported))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj.weight" in name}
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 4
    models: Any = {"exported": load(result.exported)}
    held_out = draw_held_out(str(text), 10, tiny.tokenizer(), trainings.SHORT.stream, tmp_path / "out" / "cache")
    ids = torch.stack([held_out[i]["input_ids"] for i in range(len(held_out))])
    figures = perplexity_and_kl(models, ids)["exported"]
    assert math.isclose(figures.perplexity, result.result["after"]["perplexity"], rel_tol=1e-4)


def test_every_step_is_in_the_log(whole: TrainConfig, tmp_path: Path):
    """Also those after the last multiple of `log_every`."""
    fewer = replace(whole.training, log_every=5, save_every=5)
    found = trainings.losses(train(replace(whole, out=str(tmp_path / "out"), training=fewer)).history)
    each = trainings.losses(train(whole).history)
    assert len(each) % 5, "a last step that is no multiple"
    means = [sum(part) / len(part) for part in (each[i : i + 5] for i in range(0, len(each), 5))]
    assert found == pytest.approx(means, rel=1e-6)


def test_a_reporter_is_told_what_the_log_says(export: Path, text: Path, tmp_path: Path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = train(trainings.short(export, text, tmp_path / "out", training={"report_to": ("tensorboard",)}))
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    told = events.EventAccumulator(str(file)).Reload()
    assert [event.value for event in told.Scalars("train/loss")] == pytest.approx(trainings.losses(result.history))
    kept = [line["eval_perplexity"] for line in result.history if "eval_perplexity" in line]
    assert [event.value for event in told.Scalars("eval/perplexity")] == pytest.approx(kept)


@pytest.mark.slow
def test_wrong_arguments_are_one_sentence(
    export: Path, text: Path, checkpoints: dict[str, Path], whole: TrainConfig, tmp_path: Path
):
    out = tmp_path / "out"
    other = tmp_path / "other"
    shutil.copytree(checkpoints["llama-gqa"], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    cases = [
        (
            trainings.short(export, text, out, tokens=10**5, stream={"sequence_length": 512}),
            "256 positions of the model, found 512",
        ),
        (trainings.distilled(export, text, out, other), "expected the tokenizer of .* found another in"),
        (trainings.short(export, text, out, tokens=10**9), "too little text .* expected 1,000,000,000 tokens"),
        (trainings.short(export, text, out, training={"batch_size": 3}), "a multiple of 2 .* found 3"),
        (
            trainings.short(export, text, out, training={"report_to": ("paper",)}),
            "report-to: expected what is installed",
        ),
    ]
    for config, sentence in cases:
        with pytest.raises(UsageError, match=sentence):
            train(config)
        assert not (out / "train.yaml").exists()
    assert (out / "cache").exists()  # and yet the right command may use it
    assert train(trainings.short(export, text, out)).result["after"]["perplexity"] > 1


def test_a_checkpoint_of_another_training_is_refused(whole: TrainConfig, tmp_path: Path):
    out = tmp_path / "out"
    config = trainings.distilled(Path(whole.model), Path(whole.data), out, Path(str(whole.teacher)), seed=1)
    shutil.copytree(Path(whole.out) / "checkpoints", out / "checkpoints")
    shutil.copy(Path(whole.out) / "train.yaml", out / "train.yaml")
    with pytest.raises(UsageError, match=r"holds another run \(its seed is 0, not 1\)"):
        train(config)
    (out / "train.yaml").write_text((out / "train.yaml").read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UsageError, match="checkpoint of another training: expected the same text and settings"):
        train(config)


@pytest.mark.slow
def test_top_k_of_the_whole_vocabulary_trains_like_the_teacher_itself(whole: TrainConfig, tmp_path: Path):
    """Logits from the disk, which are rounded to half precision."""
    export, text, dense = Path(whole.model), Path(whole.data), Path(str(whole.teacher))
    cached = replace(
        trainings.distilled(export, text, tmp_path / "out", dense),
        distillation=DistillationConfig(weight=0.5, top_k=tiny.VOCAB),
        cache=str(tmp_path / "cache"),
    )
    found = train(cached).history
    expected = train(whole).history
    assert trainings.losses(found) == pytest.approx(trainings.losses(expected), abs=3e-3)
    assert [line["eval_kl_top_k"] for line in found if "eval_kl_top_k" in line] == pytest.approx(
        [line["eval_kl"] for line in expected if "eval_kl" in line], abs=3e-3
    )


@pytest.mark.slow
def test_the_teachers_logits_are_written_once_for_many_runs(whole: TrainConfig, tmp_path: Path):
    """Another seed reads them; what is deleted, or cut off by a kill, is written again and alone."""
    export, text, dense = Path(whole.model), Path(whole.data), Path(str(whole.teacher))
    settings = {"distillation": DistillationConfig(top_k=8, temperature=2.0), "cache": str(tmp_path / "cache")}
    first = replace(trainings.distilled(export, text, tmp_path / "first", dense), **settings)
    train(first)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    logits = [path for path in files if "logits-" in str(path.relative_to(tmp_path))]
    assert len(logits) >= 4
    lost = logits[0]
    lost.unlink()
    lost.with_suffix(".partial").write_bytes(b"half a file")
    second = train(replace(first, out=str(tmp_path / "second"), seed=1))
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert [path for path in files if again[path] != files[path]] == [lost]
    assert len(second.history) == len(train(first).history)
    assert trainings.losses(second.history) != trainings.losses(train(first).history)
    lost.write_bytes(lost.read_bytes()[:-8])
    third = replace(first, out=str(tmp_path / "third"), seed=2)
    with pytest.raises(DarwinError, match=f"{lost.name} is damaged .*; delete it and run"):
        train(third)
    lost.unlink()
    train(third)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 8])
def test_a_teacher_may_have_another_padding(
    top_k: int, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """Rows of its output embedding beyond the tokens count for nothing, whatever they hold."""
    dense, padded = checkpoints["llama-mha"], tmp_path / "padded"
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    model.resize_token_embeddings(tiny.VOCAB + 64, mean_resizing=False)
    model.get_output_embeddings().weight.data[tiny.VOCAB :].normal_(std=3.0)  # likely tokens, if they were any
    model.save_pretrained(padded)
    tiny.tokenizer().save_pretrained(padded)
    student = trainings.write_pruned(dense, tmp_path)
    learned = []
    for teacher in (dense, padded):
        config = trainings.distilled(student, text, tmp_path / f"taught-{teacher.name}", teacher)
        config = replace(config, distillation=replace(config.distillation, top_k=top_k))
        learned.append(trainings.losses(train(config).history))
    assert learned[1] == pytest.approx(learned[0], abs=1e-4)
