"""One generation of the search on SmolLM2-135M: the published form beside ours, and what each lever gives.

darwinlm database smollm2-135m --data vital-wiki --out RUN --database.levels 9 --target-level 3
python benchmarks/search.py RUN

Both score the same 16 offspring of one parent in the same stages on tokens of the same number, in one process; who
survives a stage is decided once, by ours. The published form is written plainly: for every candidate of every stage a
deep copy of the whole dense model, consumers of full width with zeros for what is pruned, logits of the dense model
and of the candidate over all tokens, fresh tokens in every stage, the parent scored again, and training from scratch
with AdamW on all weights in bfloat16. The levers are added one after another; "ours" is `Fitness` with its defaults,
after a first generation. With training the row before it is `--search.trains all`, and the last is ours under torchrun,
a process with one thread a core instead of one with a thread a core (without training that gains nothing: each has to
run the parent).
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from darwinlm.commands.plan.work import plan_search
from darwinlm.commands.run_directory import Run
from darwinlm.config.run import RefitConfig, RunConfig, SearchConfig
from darwinlm.data.corpus import read_corpus
from darwinlm.database.eliminate import columns_of
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database
from darwinlm.losses.logits import Logits, hidden_states
from darwinlm.losses.metrics import Metric, divergence
from darwinlm.model.checkpoint import find_checkpoint
from darwinlm.model.families import find_grid, linear_at
from darwinlm.model.size import parameter_count
from darwinlm.runtime import parallel
from darwinlm.runtime.files import read_json, write_json
from darwinlm.search.budget import Budget
from darwinlm.search.candidate_training import CandidateTrainer, rounded
from darwinlm.search.costs import parameter_costs
from darwinlm.search.fitness import Fitness
from darwinlm.search.mutation import within_kinds
from darwinlm.search.uniform import uniform
from darwinlm.types import Genome, SelectionStage

SURVIVORS = (8, 4, 2, 1)
FITNESS_TOKENS = (1024, 2048, 4096, 8192)
TRAINING_TOKENS = (512, 1024, 2048, 4096)
LENGTH = 512
CPU = torch.device("cpu")
OURS = {False: "ours: and the parent's blocks reused", True: "ours: and consumers alone train"}


@dataclass(frozen=True)
class Generation:
    """A parent, and who is scored in each stage."""

    parent: Genome
    candidates: tuple[tuple[Genome, ...], ...]
    stages: tuple[SelectionStage, ...]


@dataclass(frozen=True)
class Bench:
    """What every form is given."""

    stitcher: Stitcher
    text: Tensor
    training_text: Tensor

    def fresh(self, tokens: int, stage: int) -> Tensor:
        """Sequences that no other stage sees."""
        start = sum(FITNESS_TOKENS[:stage]) // LENGTH
        return self.text[start : start + tokens // LENGTH]


def zero_masked(bench: Bench, genome: Genome) -> PreTrainedModel:
    """A deep copy of the dense model, whose consumers have zeros where structures are gone."""
    model, database = copy.deepcopy(bench.stitcher.dense), bench.stitcher.database
    for index, (unit, level) in enumerate(zip(database.grid.units, genome.levels, strict=True)):
        weight = linear_at(model, unit.consumer).weight.data
        if level:
            weight.zero_()
        if 0 < level < database.grid.highest(index):
            found = database.level(index, level)
            weight[:, columns_of(found.kept, unit.structure_width)] = found.weight.to(weight.dtype)
    return model


def train_plainly(model: Any, sequences: Tensor) -> None:
    """AdamW on all weights, in the precision that they have."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    for ids in sequences.split(1):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval().requires_grad_(False)


def kl_of_whole_logits(bench: Bench, text: Tensor) -> Callable[[Any], float]:
    """Logits of a whole sequence at once, in the models' precision; the dense model's are made for every stage."""
    dense: Any = bench.stitcher.dense
    with torch.inference_mode():
        targets = [dense(ids, use_cache=False).logits for ids in text.split(1)]

    @torch.inference_mode()
    def score(model: Any) -> float:
        total = 0.0
        for ids, target in zip(text.split(1), targets, strict=True):
            log_q = model(ids, use_cache=False).logits.log_softmax(-1)
            total += float(F.kl_div(log_q, target.log_softmax(-1), log_target=True, reduction="sum"))
        return total

    return score


def kl_in_chunks(bench: Bench, text: Tensor) -> Callable[[Any], float]:
    """Logits of a few tokens at a time, against what is kept of the dense model from one generation to the next."""
    key = text.data_ptr(), len(text)
    if key not in REFERENCES:
        dense = bench.stitcher.dense
        REFERENCES[key] = divergence(hidden_states(dense, text).flatten(0, 1), Logits.of(dense))

    @torch.inference_mode()
    def score(model: Any) -> float:
        hidden = torch.cat([hidden_states(model, ids) for ids in text.split(4)]).flatten(0, 1)
        return REFERENCES[key].totals([hidden], Logits.of(model))[0]

    return score


REFERENCES: dict[tuple[int, int], Metric] = {}


def staged(bench: Bench, plan: Generation, *, narrow: bool, chunked: bool, nested: bool) -> None:
    """A generation with some of the levers; without any it is the published form."""
    tuner = CandidateTrainer(bench.training_text.split(1), 1e-5, CPU)
    for number, (candidates, stage) in enumerate(zip(plan.candidates, plan.stages, strict=True)):
        before = FITNESS_TOKENS[number - 1] if nested and number and not stage.training_tokens else 0
        text = bench.fresh(stage.fitness_tokens - before, number)
        score = kl_in_chunks(bench, text) if chunked else kl_of_whole_logits(bench, text)
        again = [] if nested or stage is not plan.stages[-1] else [plan.parent]
        for genome in [*again, *candidates]:
            model: Any = bench.stitcher.stitch(genome) if narrow else zero_masked(bench, genome)
            if stage.training_tokens and chunked:
                trained = tuner.train(genome, model, stage.training_tokens)  # forgets: from scratch
                with rounded(trained.model, model.dtype) as scored:
                    score(scored)
                continue
            if stage.training_tokens:
                model = copy.deepcopy(model) if narrow else model
                train_plainly(model, bench.training_text[: stage.training_tokens // LENGTH])
            score(model)


def ours(fitness: Fitness, plan: Generation) -> None:
    """A generation as `evolve` scores it."""
    fitness._sums.clear()
    fitness._trained.clear()
    fitness._owners.clear()
    fitness._lockstep._parent = None
    fitness._lockstep._kept.clear()
    for candidates, stage in zip(plan.candidates, plan.stages, strict=True):
        fitness.scores(candidates, stage, plan.parent)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def apart(run: Path, plan: Generation) -> float:
    """Seconds of `ours` in as many processes as there are threads here, after a first generation."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        write_json(
            file,
            {
                "parent": plan.parent.levels,
                "candidates": [[genome.levels for genome in stage] for stage in plan.candidates],
                "training": bool(plan.stages[-1].training_tokens),
            },
        )
        command = (
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(torch.get_num_threads()), __file__, str(run), "--plan", str(file),
        )  # fmt: skip
        found = subprocess.run(
            command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
        )
    return float(found.stdout)


def work_apart(run: Path, file: Path) -> None:
    """One process of those: the first says what the second generation took."""
    given = read_json(file)
    bench, _ = open_bench(run)
    schedule = stages(given["training"])
    rounds = tuple(tuple(Genome(tuple(levels)) for levels in stage) for stage in given["candidates"])
    plan = Generation(Genome(tuple(given["parent"])), rounds, schedule)
    fitness = Fitness(bench.stitcher, bench.text, bench.training_text, SearchConfig(stages=schedule, scrambled=0.0))
    with parallel.together():
        ours(fitness, plan)  # it ends for all at once: scores are shared
        taken = seconds(lambda: ours(fitness, plan))
        if parallel.first():
            print(taken)


def product_rate(size: int = 2048) -> float:
    """Operations a second of a square matrix product in bfloat16."""
    matrix = torch.randn(size, size).bfloat16()
    return 2 * size**3 / min(seconds(lambda: matrix @ matrix) for _ in range(8))


def open_bench(path: Path, dtype: torch.dtype = torch.bfloat16, device: torch.device = CPU) -> tuple[Bench, RunConfig]:
    """The models and texts of a run, and its settings."""
    run = Run.open(path)
    config = run.config
    checkpoint = find_checkpoint(config.model, run.path)
    grid = find_grid(checkpoint.skeleton(), checkpoint.config, config.database)
    database = Database(run.database, grid, read_json(run.database / "database.json", "provenance")["provenance"])
    stitcher = Stitcher(checkpoint.load(dtype, device), checkpoint.family, database)
    tokens = read_corpus(config.data, checkpoint.tokenizer, LENGTH, config.seed).draw(
        calibration=config.calibration.tokens, search=sum(FITNESS_TOKENS), training=TRAINING_TOKENS[-1]
    )
    return Bench(stitcher, tokens["search"], tokens["training"]), config


def even_at(bench: Bench, config: RunConfig, level: float) -> tuple[Genome, Budget]:
    """The uniform genome at a level, and the budget that it sets."""
    grid = bench.stitcher.grid
    dense_parameters = parameter_count(bench.stitcher.dense)
    costs = parameter_costs(grid, dense_parameters)
    return uniform(grid, costs, replace(config, target_level=level), dense_parameters)


def mutants(parent: Genome, budget: Budget, count: int) -> list[Genome]:
    """Distinct ones, as the paper mutates."""
    rng, found = Random(0), dict[Genome, None]()
    while len(found) < count:
        mutant = within_kinds(parent, budget, rng, 3)
        assert mutant is not None
        found[mutant] = None
    return list(found)


def stages(training: bool) -> tuple[SelectionStage, ...]:
    """The token schedule."""
    numbers = zip(SURVIVORS, FITNESS_TOKENS, TRAINING_TOKENS, strict=True)
    return tuple(SelectionStage(left, fitness, trained * training) for left, fitness, trained in numbers)


def plan_of(parent: Genome, offspring: list[Genome], fitness: Fitness, training: bool) -> Generation:
    """Who is scored in each stage, found by ours; this also warms it up."""
    candidates, rounds, schedule = tuple(offspring), [], stages(training)
    for stage in schedule:
        rounds.append(candidates)
        scores = dict(
            zip(candidates, fitness.scores(candidates, replace(stage, training_tokens=0), parent), strict=True)
        )
        candidates = tuple(sorted(candidates, key=scores.__getitem__)[: stage.survivors])
    return Generation(parent, tuple(rounds), schedule)


def planned(bench: Bench, plan: Generation) -> float:
    """Operations of a generation of ours, as `darwinlm plan` counts them."""
    dense, search = bench.stitcher.dense, SearchConfig(stages=plan.stages, generations=1)
    none = RefitConfig(tokens=0)
    work = plan_search(
        parameter_count(dense), dense.config, bench.stitcher.grid, plan.parent, search, none, LENGTH
    ).generations
    return work.forward + work.training


def measure(run: Path, bench: Bench, plan: Generation, fitness: Fitness, rate: float, repeats: int) -> None:
    """Print a row for each form: seconds, the ratio to the published one, and what this lever gave."""
    training = bool(plan.stages[-1].training_tokens)
    forms: dict[str, Callable[[], object]] = {
        "published form": lambda: staged(bench, plan, narrow=False, chunked=False, nested=False),
        "narrow models": lambda: staged(bench, plan, narrow=True, chunked=False, nested=False),
        "and loss in chunks, float32 masters" if training else "and loss in chunks": (
            lambda: staged(bench, plan, narrow=True, chunked=True, nested=False)
        ),
    }
    if training:
        config = SearchConfig(stages=plan.stages, trains="all", scrambled=0.0)
        every = Fitness(bench.stitcher, bench.text, bench.training_text, config)
        forms["and survivors train on, parent known"] = partial(ours, every, plan)
        ours(every, plan)
    else:
        forms["and nested tokens, parent known"] = lambda: staged(bench, plan, narrow=True, chunked=True, nested=True)
    forms[OURS[training]] = partial(ours, fitness, plan)
    ours(fitness, plan)  # the dense model's side, and memory that only the first generation of a search has to ask for
    staged(
        bench, Generation(plan.parent, (plan.candidates[-1],), plan.stages[:1]), narrow=True, chunked=True, nested=False
    )
    print(f"\n{'with' if training else 'without'} training\n\n| form | seconds | of published | this lever |")
    print("| --- | ---: | ---: | ---: |")
    timed: dict[str, Callable[[], float]] = {name: partial(seconds, work) for name, work in forms.items()}
    if training:
        timed["and a process a core"] = partial(apart, run, plan)
    taken: list[float] = []
    for name, work in timed.items():
        if name not in forms:  # others need the memory
            REFERENCES.clear()
            fitness._trainer.forget_all_but([])
        taken.append(median(work() for _ in range(repeats)))
        print(
            f"| {name} | {taken[-1]:.1f} | {taken[0] / taken[-1]:.2f}x | {taken[-2:][0] / taken[-1]:.2f}x |", flush=True
        )
    if training:  # the counter cannot watch gradients that are taken in parts
        operations = planned(bench, plan)
    else:
        with FlopCounterMode(display=False) as counter:
            ours(fitness, plan)
        operations = counter.get_total_flops()
    share = operations / taken[list(timed).index(OURS[training])] / rate
    print(f"\nours: {operations / 1e12:.2f} TFLOP, {share:.0%} of the rate of bf16 products, {rate / 1e9:.0f} GFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory with the database of SmolLM2-135M")
    parser.add_argument("--repeats", type=int, default=1, help="generations of each form, for their median")
    parser.add_argument("--offspring", type=int, default=16)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)  # of a process that torchrun has started
    arguments = parser.parse_args()
    if arguments.plan:
        work_apart(arguments.run, arguments.plan)
        return
    bench, config = open_bench(arguments.run)
    parent, budget = even_at(bench, config, config.database.levels / 3)
    offspring = mutants(parent, budget, arguments.offspring)
    rate = product_rate()
    print(f"{torch.get_num_threads()} threads, level {config.database.levels / 3:g} of {config.database.levels}")
    for training in (False, True):
        search = SearchConfig(stages=stages(training), scrambled=0.0)
        fitness = Fitness(bench.stitcher, bench.text, bench.training_text, search)
        plan = plan_of(parent, offspring, fitness, training)
        REFERENCES.clear()
        measure(arguments.run, bench, plan, fitness, rate, arguments.repeats)


if __name__ == "__main__":
    main()
