"""Refit: the weights of a stitched model, trained together towards the dense model's distribution.

The database solves each unit alone and against the dense model's activations, so errors accumulate with depth and
nothing corrects their sum. Least squares on the pruned model's activations repairs little of it, because the lost
activations are hardly a linear function of the remaining ones (docs/log.md). Refit therefore follows the gradient of
the divergence: one pass of AdamW over fresh tokens. It trains the consumers whole, which elimination has re-solved, and
of all other matrices in the blocks a low-rank update, which takes little of a GPU's memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from darwinlm.config.run import RefitConfig
from darwinlm.database.stitch import Stitcher, open_up
from darwinlm.losses.gradients import KLGradient
from darwinlm.losses.logits import Logits
from darwinlm.model.blocks import Blocks, Resident
from darwinlm.model.families import linear_at
from darwinlm.model.family import Family
from darwinlm.model.states import last_states
from darwinlm.runtime import parallel
from darwinlm.runtime.files import as_json, read_tensors, write_tensors
from darwinlm.runtime.progress import say, track
from darwinlm.training.activations import recompute
from darwinlm.training.low_rank import DOWN, UP, add_updates
from darwinlm.training.optimizer_state import set_state, state_of
from darwinlm.types import DarwinError, Genome

FORWARD_TOKENS = 2048  # of a step that a GPU runs at a time: one short sequence leaves it waiting for the host
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
    blocks: Blocks | None = None,
    counts: Bool[Tensor, "sequences length"] | None = None,
) -> dict[str, Float[Tensor, "_ _"]]:
    """Return what one pass over `token_ids` makes of a stitched model's weights, for `set_refitted`.

    They are float32: by path, the weights of consumers, `[d_out, kept]`, and for another linear module in a block
    `PATH.low_rank_up` and `PATH.low_rank_down`, `[d_out, rank]` and `[rank, d_in]`, whose product its weight gains.

    The pass minimises KL(dense || stitched), the mean over tokens, by AdamW without weight decay. The learning rate
    rises over the first tenth of the steps and falls to zero as a cosine. `file` keeps the result, and before that the
    state of the pass: a later call continues from it and ends with the same weights. Processes share the sequences of
    every step, and all return the same weights.

    Args:
        blocks: the dense model's blocks, if they are not on the device with what else it has.
        counts: whether the prediction after each token counts in the divergence; if None, all do.

    Raises:
        DarwinError: on all processes, if `file` is of another refit, or the refit diverges.
        PeerLostError: if another process has ended.
    """
    earlier = refitted(genome, config, file, provenance)
    if earlier is not None:
        return earlier
    identity = _identity(genome, config, provenance)
    done, tensors = _read(file, identity)
    parallel.wait_for_all()  # every process has read the file before the first one writes it
    steps, idle = -(-len(token_ids) // config.batch_size), parallel.processes() - config.batch_size
    if idle > 0 and parallel.first():
        say(f"refit: {idle} processes wait for those that share steps of {config.batch_size} (--refit.batch-size)")
    counted = torch.ones_like(token_ids, dtype=torch.bool) if counts is None else counts
    each = (tensor.split(config.batch_size)[done:] for tensor in (token_ids, counted))
    together = sequences_at_once(stitcher.dense.device, token_ids.shape[1])
    batches = [_Batch.of(ids, counts, together) for ids, counts in zip(*each, strict=True)]
    mine = [ids for batch in batches for ids in batch.sequences]
    dense, source = stitcher.dense, blocks or Resident(stitcher.dense, stitcher.family)
    saved, divergences = time.monotonic(), list[float]()
    with closing(last_states(dense, stitcher.family, source, mine)) as targets:
        learner = _Learner.of(stitcher, genome, config.rank, blocks, tensors)
        states = (targets.read(index).flatten(0, 1) for index in range(len(mine)))
        for step, batch in zip(track(range(done, steps), "refit", steps, done), batches, strict=True):
            divergences.append(learner.step(batch, states, config.learning_rate * _schedule(step, steps)))
            if not math.isfinite(divergences[-1]):
                raise DarwinError(
                    f"the refit diverged at step {step + 1}: lower --refit.learning-rate, or --refit.tokens 0 leaves "
                    "it out"
                )
            if time.monotonic() - saved > SAVE_SECONDS:
                _write(file, learner.weights, learner.optimizer, step + 1, identity)
                saved = time.monotonic()
    say(f"refit: KL {_mean(divergences[:8]):.4f} in the first steps, {_mean(divergences[-8:]):.4f} in the last")
    _write(file, learner.weights, None, steps, identity)
    return {path: weight.detach().cpu() for path, weight in learner.weights.items()}


def sequences_at_once(device: torch.device, length: int) -> int:
    """Return how many sequences of a step run in one forward pass, if the process has as many of them."""
    return 1 if device.type == "cpu" else max(1, FORWARD_TOKENS // length)


def refitted(
    genome: Genome, config: RefitConfig, file: Path, provenance: dict[str, Any]
) -> dict[str, Float[Tensor, "_ _"]] | None:
    """Return what `refit` has returned, or None if it has not ended. Raises `DarwinError` if it is another refit's."""
    _, tensors = _read(file, _identity(genome, config, provenance))
    if not tensors or any(name.startswith("exp_avg.") for name in tensors):
        return None
    return {name.removeprefix("weight."): tensor for name, tensor in tensors.items()}


def _identity(genome: Genome, config: RefitConfig, provenance: dict[str, Any]) -> dict[str, Any]:
    settings = asdict(config)
    if not config.rank:
        del settings["rank"]  # which earlier versions did not have
    return as_json(provenance | {"genome": genome.levels, "refit": settings})


class _Batch(NamedTuple):
    """The sequences of a step that this process runs, a few together, which of their predictions count, and how many
    of all processes' do."""

    sequences: list[Int[Tensor, "few length"]]
    counts: list[Bool[Tensor, "few length"]]
    tokens: int

    @classmethod
    def of(
        cls, token_ids: Int[Tensor, "sequences length"], counts: Bool[Tensor, "sequences length"], together: int
    ) -> _Batch:
        mine = slice(parallel.rank(), None, parallel.processes())
        own, counted = ([] if not len(each[mine]) else list(each[mine].split(together)) for each in (token_ids, counts))
        return cls(own, counted, int(counts.sum()))


@dataclass
class _Learner:
    """The stitched model, its weights that train, and their optimizer.

    Attributes:
        logits: of the dense model and of the stitched one.
    """

    model: PreTrainedModel
    logits: tuple[Logits, Logits]
    weights: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    gradients: _Gradients

    @classmethod
    def of(
        cls, stitcher: Stitcher, genome: Genome, rank: int, blocks: Blocks | None, state: dict[str, Tensor]
    ) -> _Learner:
        """A learner in the state that was saved, or at its beginning if none was."""
        model, levels = stitcher.stitch(genome, blocks), enumerate(genome.levels)
        alive = [index for index, level in levels if level < stitcher.grid.highest(index)]
        weights = _own_weights(model, [stitcher.grid.units[index].consumer for index in alive])
        if rank:
            others = [path for path in _linears(model, stitcher.family) if path not in weights]
            open_up(model, others)
            weights |= add_updates(model, others, rank)
        if stitcher.dense.device.type != "cpu":
            recompute(model)
        # Fused: the default on a GPU takes as much memory again as the weights.
        optimizer = torch.optim.AdamW(list(weights.values()), weight_decay=0.0, fused=True)
        if state:
            set_state(weights, optimizer, state)
        logits = Logits.of(stitcher.dense), Logits.of(model)
        return cls(model, logits, weights, optimizer, _Gradients(list(weights.values())))

    def step(self, batch: _Batch, targets: Iterator[Tensor], learning_rate: float) -> float:
        """Take a step, all processes together, and return the divergence before it; none if that is not finite.

        Args:
            targets: the dense model's last hidden states on this process's sequences, in order.
        """
        total, device = 0.0, self.model.device
        low = self.model.dtype == torch.bfloat16
        for ids, counts in zip(batch.sequences, batch.counts, strict=True):
            dense_hidden, rows = next(targets), counts.flatten().nonzero().flatten().to(device)
            if not len(rows):
                continue
            # Without a cache of them, the weights in low precision are there for a block at a time.
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low, cache_enabled=False):
                total += _accumulate(self.model, self.logits, ids.to(device), rows, dense_hidden, batch.tokens)
        total = self.gradients.sum_with(total)
        if math.isfinite(total):
            nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
            self.gradients.clear()
        return total


class _Gradients:
    """The gradients of all weights in one buffer, which processes add up in one exchange a step."""

    def __init__(self, weights: Sequence[nn.Parameter]):
        sizes = [weight.numel() for weight in weights]
        self.buffer = torch.zeros(sum(sizes) + 1, device=weights[0].device if weights else None)
        for weight, part in zip(weights, self.buffer[:-1].split(sizes), strict=True):
            weight.grad = part.view_as(weight)

    def sum_with(self, divergence: float) -> float:
        """Add up the gradients of all processes and their divergences, and return the sum of the latter."""
        self.buffer[-1] = divergence
        parallel.sum_everywhere(self.buffer)
        return self.buffer[-1].item()

    def clear(self) -> None:
        self.buffer.zero_()


def set_refitted(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Put what `refit` has returned into a model that was stitched alike, in the model's precision."""
    open_up(model, weights)
    for path, weight in weights.items():
        module, _, kind = path.rpartition(".")
        if kind == DOWN:
            old, up = linear_at(model, module).weight, weights[f"{module}.{UP}"]
            _replace(model, module, (old.float() + (up @ weight).to(old.device)).to(old))
        elif kind != UP:
            _replace(model, path, weight.to(linear_at(model, path).weight))


def _own_weights(model: PreTrainedModel, consumers: list[str]) -> dict[str, nn.Parameter]:
    """Put float32 copies of the weights that train into the model, and return them; all others are frozen."""
    model.requires_grad_(False)
    open_up(model, consumers)
    weights = {}
    for path in consumers:
        new = _replace(model, path, linear_at(model, path).weight.detach().float().clone())
        new.weight.requires_grad_(True)
        weights[path] = new.weight
    return weights


def _linears(model: PreTrainedModel, family: Family) -> list[str]:
    """The paths of the linear modules in a model's blocks."""
    blocks = model.get_submodule(family.blocks)
    return [f"{family.blocks}.{path}" for path, module in blocks.named_modules() if isinstance(module, nn.Linear)]


def _replace(model: PreTrainedModel, path: str, weight: Tensor) -> nn.Linear:
    old = linear_at(model, path)
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = old.bias
    model.set_submodule(path, new)
    return new


def _accumulate(
    model: PreTrainedModel,
    logits: tuple[Logits, Logits],
    ids: Int[Tensor, "sequences length"],
    rows: Int[Tensor, " rows"],
    dense_hidden: Float[Tensor, "tokens d_out"],
    tokens: int,
) -> float:
    """Add the gradient of the divergence after some tokens of sequences over `tokens`, and return that divergence."""
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows]
    divergence = KLGradient(logits[0], dense_hidden.to(hidden.device)[rows], tokens)
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
    if parallel.first():
        write_tensors(file, state_of(weights, optimizer), identity, steps=steps)
