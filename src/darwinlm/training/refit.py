"""Refit: the consumers of a stitched model, trained together towards the dense model's distribution.

The database solves each unit alone and against the dense model's activations, so errors accumulate with depth and
nothing corrects their sum. Least squares on the pruned model's activations repairs little of it, because the lost
activations are hardly a linear function of the remaining ones (docs/log.md). Refit therefore follows the gradient of
the divergence: one pass of AdamW over fresh tokens, which changes only the matrices that elimination has re-solved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from darwinlm.config.run import RefitConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.losses.gradients import KLGradient
from darwinlm.losses.logits import Logits
from darwinlm.model.families import linear_at
from darwinlm.runtime.files import as_json, read_tensors, write_tensors
from darwinlm.runtime.progress import say, track
from darwinlm.training.optimizer_state import set_state, state_of
from darwinlm.types import DarwinError, Genome

SAVE_SECONDS = 60.0  # between two saved states: about the most work that is lost when the process is killed


WARM_UP = 0.1  # of all steps


@torch.enable_grad()
def refit(
    stitcher: Stitcher,
    genome: Genome,
    token_ids: Int[Tensor, "sequences length"],
    config: RefitConfig,
    file: Path,
    provenance: dict[str, Any],
) -> dict[str, Float[Tensor, "d_out kept"]]:
    """Return the float32 weights of the stitched model's consumers, by path, after one pass over `token_ids`.

    The pass minimises KL(dense || stitched), the mean over tokens, by AdamW without weight decay. The learning rate
    rises over the first tenth of the steps and falls to zero as a cosine. `file` keeps the result, and before that the
    state of the pass: a later call continues from it and ends with the same weights.

    Raises:
        DarwinError: if `file` is of another refit, or the refit diverges.
    """
    identity = as_json(provenance | {"genome": genome.levels, "refit": asdict(config)})
    done, tensors = _read(file, identity)
    steps = -(-len(token_ids) // config.batch_size)
    if done == steps:
        return {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}
    dense, model = stitcher.dense, stitcher.stitch(genome)
    alive = [index for index, level in enumerate(genome.levels) if level < stitcher.grid.highest(index)]
    weights = _own_weights(model, [stitcher.grid.units[index].consumer for index in alive])
    # Fused: the default on a GPU takes as much memory again as the weights.
    optimizer = torch.optim.AdamW(list(weights.values()), weight_decay=0.0, fused=True)
    if tensors:
        set_state(weights, optimizer, tensors)
    logits, device = (Logits.of(dense), Logits.of(model)), dense.device
    low = dense.dtype == torch.bfloat16
    saved, divergences = time.monotonic(), []
    targets = _last_states(dense, token_ids[done * config.batch_size :])
    with _set_aside(dense, model):
        for step in track(range(done, steps), "refit", steps, done):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, steps)
            batch, total = token_ids[step * config.batch_size :][: config.batch_size], 0.0
            for ids in batch.split(1):
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                    total += _accumulate(model, logits, ids.to(device), next(targets), batch.numel())
            if not math.isfinite(total):
                raise DarwinError(
                    f"the refit diverged at step {step + 1}: lower --refit.learning-rate, or --refit.tokens 0 leaves "
                    "it out"
                )
            divergences.append(total)
            nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if time.monotonic() - saved > SAVE_SECONDS:
                _write(file, weights, optimizer, step + 1, identity)
                saved = time.monotonic()
    say(f"refit: KL {_mean(divergences[:8]):.4f} in the first steps, {_mean(divergences[-8:]):.4f} in the last")
    _write(file, weights, None, steps, identity)
    return {path: weight.detach() for path, weight in weights.items()}


def set_consumers(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Put refitted consumers into a stitched model, in the model's precision."""
    for path, weight in weights.items():
        old = linear_at(model, path)
        _replace(model, path, weight.to(old.weight))


def _own_weights(model: PreTrainedModel, consumers: list[str]) -> dict[str, nn.Parameter]:
    """Put float32 copies of the weights that train into the model, and return them; all others are frozen."""
    model.requires_grad_(False)
    weights = {}
    for path in consumers:
        new = _replace(model, path, linear_at(model, path).weight.detach().float().clone())
        new.weight.requires_grad_(True)
        weights[path] = new.weight
    return weights


def _replace(model: PreTrainedModel, path: str, weight: Tensor) -> nn.Linear:
    old = linear_at(model, path)
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = old.bias
    model.set_submodule(path, new)
    return new


def _last_states(
    dense: PreTrainedModel, token_ids: Int[Tensor, "sequences length"]
) -> Iterator[Float[Tensor, "length d_out"]]:
    """Yield the dense model's last hidden states on each sequence; on a GPU they are computed first and wait outside.

    They are thousands of times smaller than the logits, and the dense model need not be there any more.
    """

    def states() -> Iterator[Tensor]:
        for ids in token_ids.split(1):
            with torch.no_grad():
                hidden = dense.get_decoder()(ids.to(dense.device), use_cache=False).last_hidden_state
            yield hidden.flatten(0, 1)

    return states() if dense.device.type == "cpu" else iter([hidden.cpu() for hidden in states()])


@contextmanager
def _set_aside(dense: PreTrainedModel, model: PreTrainedModel) -> Iterator[None]:
    """Keep what the dense model alone holds in the host's memory, and compute activations twice, on a GPU.

    The weights, gradients and moments that train take most of it. Its output embedding is shared with the model.
    """
    device = dense.device
    if device.type == "cpu":
        yield
        return
    recompute(model)
    shared = {id(weight) for weight in model.parameters()}
    aside = [(weight, weight.data.cpu()) for weight in dense.parameters() if id(weight) not in shared]
    for weight, _ in aside:
        weight.data = weight.data.new_empty(0)
    try:
        yield
    finally:
        for weight, data in aside:
            weight.data = data.to(device)


def recompute(model: PreTrainedModel) -> None:
    """Let every block of a model in evaluation mode compute its activations a second time instead of keeping them."""
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, again
        block.training = True  # which blocks ask for; the modules in them still drop nothing out


def _accumulate(
    model: PreTrainedModel,
    logits: tuple[Logits, Logits],
    ids: Int[Tensor, "one length"],
    dense_hidden: Float[Tensor, "length d_out"],
    tokens: int,
) -> float:
    """Add the gradient of a sequence's divergence over `tokens`, and return that divergence."""
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    divergence = KLGradient(logits[0], dense_hidden.to(hidden.device), tokens)
    hidden.backward(logits[1].gradient(hidden, divergence))
    return divergence.total / tokens


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _mean(values: list[float]) -> float:
    return sum(values) / max(len(values), 1)


def _read(file: Path, identity: dict[str, Any]) -> tuple[int, dict[str, Tensor]]:
    """The steps that an earlier call has done and the tensors that it saved, none if it saved nothing."""
    if not file.exists():
        return 0, {}
    record, tensors = read_tensors(file)
    if record["provenance"] != identity:
        raise DarwinError(f"{file} is of another refit: expected this run's; delete it and run the command again")
    return record["steps"], tensors


def _write(
    file: Path,
    weights: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW | None,
    steps: int,
    identity: dict[str, Any],
) -> None:
    write_tensors(file, state_of(weights, optimizer), identity, steps=steps)
