"""The fitness of a genome: how far its candidate is from the dense model after a little training (section 3.2)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import inf, isfinite
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from darwinlm.config.run import SearchConfig
from darwinlm.data.draw import expect_answers
from darwinlm.data.packing import cut, scramble
from darwinlm.database.stitch import Stitcher
from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.losses.metrics import Metric, metric, predicted_tokens
from darwinlm.model.blocks import Blocks, Resident
from darwinlm.model.states import last_states
from darwinlm.runtime import parallel
from darwinlm.search.candidate_training import KEPT_BYTES, CandidateTrainer, Trained, rounded
from darwinlm.search.lockstep import WAVE_BYTES, Lockstep, Pair
from darwinlm.types import Genome, SelectionStage

BATCH_TOKENS = 2048  # in one forward pass: with more, its allocations take twice the time on a CPU


@runtime_checkable
class Scorer(Protocol):
    """What an allocator needs to score genomes."""

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        """Score genomes after the stage's training on its fitness tokens; lower is better, infinity means divergence.

        `parent` is a hint that saves time: a genome from which these, and those scored next, differ little.
        """
        ...


class Fitness:
    """Scores genomes by a metric on fixed tokens; lower is better.

    A stage takes exactly its number of tokens from the beginning of the text: whole sequences, then the beginning of
    the next. Every candidate sees the same tokens, and nothing is computed twice for a genome. Without training, a
    later stage scores only what it adds: whole sequences that no earlier one has scored, and its own beginning of one.
    With training, it trains only on the tokens that it adds. Without training, candidates run in lockstep, each from
    the first block in which it differs from the parent. None of this changes a score.

    Batches and candidates are split among processes. A score does not depend on which process computes it.

    Args:
        stitcher: makes the candidates; its dense model is the reference.
        token_ids: the text that the metric is computed on. A share of each sequence, once it is cut, is put in random
            order (`config.scrambled`), but not for perplexity.
        training_ids: the text that candidates are trained on before they are scored.
        config: settings whose stages determine the batches, so that a score does not depend on earlier calls.
        bos: the token that begins every sequence, if the model expects one.
        blocks: the dense model's blocks, if they are not on the device with what else it has.
        keeps_states: whether the parent's states in front of every block are kept on the device, or else in the host's
            memory; they save the blocks before the first that differs.
        kept_bytes: the most that the states of survivors in training take on the device.
        wave_bytes: the most that candidates' hidden states take between two blocks.
        counts: for `token_ids` as `search` and `training_ids` as `training`, whether the prediction after each token
            counts; all do where it is missing. Scrambling moves tokens, and not which places count.

    Raises:
        UsageError: if a stage has no token that counts.
    """

    def __init__(
        self,
        stitcher: Stitcher,
        token_ids: Int[Tensor, "sequences length"],
        training_ids: Int[Tensor, "training_sequences length"],
        config: SearchConfig,
        bos: int | None = None,
        blocks: Blocks | None = None,
        keeps_states: bool = True,
        kept_bytes: int = KEPT_BYTES,
        wave_bytes: int = WAVE_BYTES,
        counts: Mapping[str, Bool[Tensor, "_ length"]] | None = None,
    ):
        counted = counts or {}
        expect_answers(counted.get("search"), config)
        self.stitcher = stitcher
        self.device = stitcher.dense.device
        self.length = token_ids.shape[1]
        self._last_training = max(stage.training_tokens for stage in config.stages)
        self._batches, self._counts, self._of_tokens = self._batch(token_ids, config, counted.get("search"))
        self._config = config
        teacher = stitcher.dense if config.loss == "distillation" else None
        consumers = [unit.consumer for unit in stitcher.grid.units] if config.trains == "consumers" else None
        ends = {stage.training_tokens for stage in config.stages}
        pieces = cut(training_ids, ends, bos)
        which = cut(counted["training"], ends, None) if "training" in counted else None
        taught = None if blocks is None else partial(last_states, stitcher.dense, stitcher.family, blocks, pieces)
        settings = teacher, consumers, kept_bytes, taught
        self._trainer = CandidateTrainer(pieces, config.learning_rate, self.device, *settings, counts=which)
        self._elsewhere = blocks
        blocks = blocks or Resident(stitcher.dense, stitcher.family)
        kept_on = self.device if keeps_states else torch.device("cpu")
        self._lockstep = Lockstep(stitcher, blocks, self._batches, kept_on, wave_bytes)
        self._logits = Logits.of(stitcher.dense)
        self._metrics: dict[int, Metric] = {}  # by batch
        self._sums: defaultdict[Genome, dict[int, float]] = defaultdict(dict)  # of untrained candidates, by batch
        self._trained: dict[tuple[Genome, SelectionStage], float] = {}
        self._owners: dict[Genome, int] = {}  # the process that holds earlier results for a genome

    def _batch(
        self,
        token_ids: Int[Tensor, "sequences length"],
        config: SearchConfig,
        counted: Bool[Tensor, "sequences length"] | None,
    ) -> tuple[list[Tensor], list[Tensor | None], dict[int, list[int]]]:
        """The batches, what counts in each, and for each number of fitness tokens which of them a stage scores."""
        share = 0.0 if config.metric == "perplexity" else config.scrambled
        counts = {stage.fitness_tokens: divmod(stage.fitness_tokens, self.length) for stage in config.stages}
        most, step = max(sequences for sequences, _ in counts.values()), max(1, BATCH_TOKENS // self.length)
        ends = sorted({0, *(sequences for sequences, _ in counts.values()), *range(0, most, step)})
        whole = scramble(token_ids[:most], share)
        batches = [whole[start:end] for start, end in pairwise(ends)]
        marks = [None if counted is None else counted[start:end] for start, end in pairwise(ends)]
        of_tokens = {}
        for tokens, (sequences, rest) in counts.items():
            of_tokens[tokens] = list(range(ends.index(sequences)))
            if rest > (config.metric == "perplexity"):  # which no single token has
                of_tokens[tokens].append(len(batches))
                batches.append(scramble(token_ids[sequences : sequences + 1, :rest], share))
                marks.append(None if counted is None else counted[sequences : sequences + 1, :rest])
        return [batch.to(self.device) for batch in batches], marks, of_tokens

    def _predicted(self, stage: SelectionStage) -> int:
        """The tokens that count in a stage."""
        name, indices = self._config.metric, self._of_tokens[stage.fitness_tokens]
        return sum(predicted_tokens(name, self._batches[index], self._counts[index]) for index in indices)

    def scores(self, genomes: Sequence[Genome], stage: SelectionStage, parent: Genome | None = None) -> list[float]:
        """Return the metric of each genome, in nats a token, on the stage's fitness tokens; all processes take part."""
        if stage.training_tokens:
            return self._train_and_score(genomes, stage)
        indices = self._of_tokens[stage.fitness_tokens]
        self._add_sums([(g, i) for i in indices for g in dict.fromkeys(genomes) if i not in self._sums[g]], parent)
        return [self._mean(stage, self._sums[genome]) for genome in genomes]

    def score(self, genome: Genome, stage: SelectionStage, parent: Genome | None = None) -> float:
        """Return the score of one genome, as `scores` does for several."""
        return self.scores([genome], stage, parent)[0]

    def model(self, genome: Genome) -> PreTrainedModel:
        """Return the whole model of a candidate, untrained, on the device."""
        return self.stitcher.stitch(genome, self._elsewhere)

    @torch.no_grad()
    def _add_sums(self, pairs: list[Pair], parent: Genome | None) -> None:
        """Let every process score its share of the pairs of a genome and a batch: by batch first, then by genome."""
        share = -(-len(pairs) // parallel.processes())
        mine = pairs[parallel.rank() * share :][:share]
        self._add_metrics({index for _, index in mine}, parent)
        totals: dict[Pair, float] = {}
        for wave in self._lockstep.hidden(mine, parent):
            of_batch: dict[int, list[Pair]] = defaultdict(list)
            for pair in wave:
                of_batch[pair[1]].append(pair)
            for index, those in of_batch.items():
                states = [wave[pair].flatten(0, 1) for pair in those]
                totals |= zip(those, self._metrics[index].totals(states, self._logits), strict=True)
        sums = parallel.sums_everywhere([totals.get(pair, 0.0) for pair in pairs])
        for (genome, index), total in zip(pairs, sums, strict=True):
            self._sums[genome][index] = total

    def _add_metrics(self, indices: Collection[int], parent: Genome | None = None) -> None:
        """Run the dense model on batches that nothing was scored on yet."""
        dense = self.stitcher.grid.dense()
        new = [(dense, index) for index in sorted(indices) if index not in self._metrics]
        for wave in self._lockstep.hidden(new, parent):
            for (_, index), states in wave.items():
                ids, counts, name = self._batches[index], self._counts[index], self._config.metric
                self._metrics[index] = metric(name, states, self._logits, ids, self._config.top_k, counts)

    def _mean(self, stage: SelectionStage, sums: Mapping[int, float]) -> float:
        """Return the mean over a stage's tokens that count, given the sum over each batch."""
        mean = sum(sums[index] for index in self._of_tokens[stage.fitness_tokens]) / self._predicted(stage)
        return mean if isfinite(mean) else inf

    def _train_and_score(self, genomes: Sequence[Genome], stage: SelectionStage) -> list[float]:
        """Return the scores of candidates after the stage's training, each by the process that it is assigned to."""
        scores = [0.0] * len(genomes)
        best: list[tuple[float, int]] = []  # of this process so far: these may be trained further
        for index, owner in enumerate(self._assign(genomes)):
            if owner != parallel.rank():
                continue
            key = genomes[index], stage
            trained = None
            if key not in self._trained:
                self._trained[key], trained = self._score_trained(*key)
            scores[index] = self._trained[key]
            best = sorted([*best, (scores[index], index)])[: stage.survivors]
            self._trainer.forget_all_but([*(genomes[i] for _, i in best), *genomes[index + 1 :]])
            may_go_on = (scores[index], index) in best and stage.training_tokens < self._last_training
            if trained is not None and may_go_on:
                self._trainer.keep(genomes[index], trained)
        return parallel.sums_everywhere(scores)

    def _assign(self, genomes: Sequence[Genome]) -> list[int]:
        """Return which process trains each genome: the one that holds earlier results, unless it has its full share."""
        count = parallel.processes()
        share = -(-len(genomes) // count)
        loads = [0] * count
        for genome in genomes:
            owner = self._owners.get(genome, -1)
            if owner < 0 or loads[owner] == share:
                owner = loads.index(min(loads))
            loads[owner] += 1
            self._owners[genome] = owner
        return [self._owners[genome] for genome in genomes]

    def _score_trained(self, genome: Genome, stage: SelectionStage) -> tuple[float, Trained]:
        """The score of a candidate after a stage's training, and what was trained."""
        trained = self._trainer.train(genome, partial(self.model, genome), stage.training_tokens)
        indices = self._of_tokens[stage.fitness_tokens]
        with rounded(trained.model, trained.model.dtype) as model, torch.no_grad():
            self._add_metrics(indices)
            sums = {}
            for index in indices:
                states = hidden_states(model, self._batches[index]).flatten(0, 1)
                (sums[index],) = self._metrics[index].totals([states], self._logits)
        return self._mean(stage, sums), trained
