"""Fitness equals an independent computation, and training before selection does what it should."""

from __future__ import annotations

import copy
from dataclasses import replace
from math import inf
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

import tiny
from darwinlm.cli import PRESETS
from darwinlm.config.run import SearchConfig
from darwinlm.data.packing import scramble
from darwinlm.database.stitch import Stitcher
from darwinlm.losses.logits import Logits
from darwinlm.losses.metrics import divergence, predicted_tokens
from darwinlm.losses.metrics import metric as make_metric
from darwinlm.model.blocks import InHostMemory
from darwinlm.runtime import parallel
from darwinlm.search import candidate_training
from darwinlm.search.fitness import Fitness
from darwinlm.types import Genome, MetricName, SelectionStage
from pruned import CPU, prune, token_ids, zero_masked

STAGES = tuple(SelectionStage(1, tokens) for tokens in (64, 128, 256))
PAPER = tuple(
    SelectionStage(**stage) for stage in yaml.safe_load((PRESETS / "paper.yaml").read_text())["search"]["stages"]
)


@pytest.fixture(scope="module", params=["llama-gqa", "qwen2"])
def stitcher(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Stitcher:
    return prune(checkpoints[request.param], tmp_path_factory.mktemp("database")).stitcher


def fitness(stitcher: Stitcher, stages: tuple[SelectionStage, ...] = STAGES, metric: MetricName = "kl") -> Fitness:
    config = SearchConfig(stages=stages, learning_rate=1e-3, metric=metric, top_k=20, scrambled=0.0)
    return Fitness(stitcher, token_ids(1, 8), token_ids(2, 8), config)


def random_genomes(stitcher: Stitcher, count: int) -> list[Genome]:
    rng, grid = Random(1), stitcher.grid
    return [Genome(tuple(rng.randint(0, grid.highest(i)) for i in range(len(grid.units)))) for _ in range(count)]


def test_fitness_is_the_kl_of_the_zero_masked_model(stitcher: Stitcher) -> None:
    scorer = fitness(stitcher)
    for genome in random_genomes(stitcher, 4):
        masked = zero_masked(stitcher.dense, stitcher.database, genome)
        for stage, sequences in zip(STAGES, (2, 4, 8), strict=True):
            ids = token_ids(1, 8)[:sequences]
            log_p = stitcher.dense(ids).logits.double().log_softmax(-1)
            log_q = masked(ids).logits.double().log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            assert scorer.score(genome, stage) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("metric", ["kl", "top-k-kl"])
def test_the_dense_model_has_no_divergence(stitcher: Stitcher, metric: MetricName) -> None:
    assert abs(fitness(stitcher, metric=metric).score(stitcher.grid.dense(), STAGES[-1])) < 1e-6


@pytest.mark.parametrize("metric", ["top-k-kl", "perplexity"])
def test_the_other_metrics_are_those_of_the_stitched_model(stitcher: Stitcher, metric: MetricName) -> None:
    for genome in random_genomes(stitcher, 3):
        expected = oracle(metric, stitcher.dense, stitcher.stitch(genome), token_ids(1, 8))
        assert fitness(stitcher, metric=metric).score(genome, STAGES[-1]) == pytest.approx(expected, abs=1e-4)


def oracle(metric: MetricName, dense: Any, candidate: Any, ids: torch.Tensor, top_k: int = 20) -> float:
    """The metrics equal their plain formulas in float64."""
    log_p, log_q = (model(ids).logits.double().log_softmax(-1) for model in (dense, candidate))
    if metric == "perplexity":
        return -log_q[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    if metric == "top-k-kl":
        known = log_p.topk(top_k).indices
        p, q = (part.exp().gather(-1, known) for part in (log_p, log_q))
        p, q = (torch.cat([part, 1 - part.sum(-1, keepdim=True)], -1) for part in (p, q))
        return (p * (p / q).log()).sum(-1).mean().item()
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["granite", "gemma2", "phi3", "olmo2"])
@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_logits_are_scaled_and_capped_as_the_family_does(
    family: str, metric: MetricName, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    stitcher = prune(checkpoints[family], tmp_path).stitcher
    stage = SelectionStage(1, 256)
    for genome in random_genomes(stitcher, 2):
        expected = oracle(metric, stitcher.dense, stitcher.stitch(genome), token_ids(1, 8))
        assert fitness(stitcher, (stage,), metric).score(genome, stage) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vocabulary", [320, 5000])
@pytest.mark.parametrize("metric", ["kl", "top-k-kl"])
def test_divergences_hold_for_peaked_and_flat_distributions(vocabulary: int, metric: MetricName) -> None:
    """This holds for bfloat16 logits too, because sums are in float32 or better."""
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = tiny.COMMON | {"vocab_size": vocabulary}
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    for scale in (0.01, 1.0, 20.0):
        model.lm_head.weight.data.normal_(std=scale / 5, generator=generator)
        ids = torch.randint(vocabulary, (6, 100), generator=generator)
        with torch.inference_mode():
            states = model.get_decoder()(ids).last_hidden_state
            hidden = states.flatten(0, 1)
            reference = make_metric(metric, states, Logits.of(model), ids, 20)
            other = hidden + 0.1 * torch.randn(hidden.shape, generator=generator)
            log_p, log_q = (model.lm_head(states).double().log_softmax(-1) for states in (hidden, other))
        if metric == "top-k-kl":
            known = log_p.topk(20).indices
            p, q = (part.exp().gather(-1, known) for part in (log_p, log_q))
            p, q = (torch.cat([part, (1 - part.sum(-1, keepdim=True)).clamp(min=1e-12)], -1) for part in (p, q))
            expected = (p * (p / q).log()).sum().item()
        else:
            expected = (log_p.exp() * (log_p - log_q)).sum().item()
        with torch.inference_mode():
            (total,) = reference.totals([other], Logits.of(model))
        assert total / predicted_tokens(metric, ids) == pytest.approx(expected / 600, abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("vocabulary", [49_152, 152_064])
def test_the_many_small_probabilities_of_a_large_vocabulary_count(vocabulary: int) -> None:
    """The dense model's logits have a standard deviation of 3, and the candidate's are flatter."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.75)
    ids = torch.randint(vocabulary, (1, 8))
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0]
        log_p, log_q = (model.lm_head(states).double().log_softmax(-1) for states in (hidden, 0.7 * hidden))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        logits = Logits.of(model)
        found, none = divergence(hidden, logits).totals([0.7 * hidden, hidden], logits)
    assert found / 8 == pytest.approx(expected, abs=5e-5)
    assert none == 0


def test_a_score_does_not_depend_on_what_was_asked_before(stitcher: Stitcher) -> None:
    genome = random_genomes(stitcher, 1)[0]
    in_steps = fitness(stitcher)
    steps = [in_steps.score(genome, stage) for stage in STAGES]
    assert fitness(stitcher).score(genome, STAGES[-1]) == steps[-1]
    assert in_steps.score(genome, STAGES[0]) == steps[0]


def test_reuse_of_the_parents_pass_changes_nothing(stitcher: Stitcher) -> None:
    parent, *others = random_genomes(stitcher, 4)
    children = [parent.replace({index: 1 - min(parent.levels[index], 1)}) for index in range(len(parent.levels))]
    reusing = fitness(stitcher)
    for genome in [*children, *others, parent]:
        assert reusing.score(genome, STAGES[-1], parent) == fitness(stitcher).score(genome, STAGES[-1])


@pytest.mark.parametrize("metric", ["kl", "top-k-kl", "perplexity"])
@pytest.mark.parametrize("keeps_states", [True, False])
@pytest.mark.parametrize("wave_bytes", [1, 40_000, 1 << 30])
def test_a_population_in_lockstep_has_the_scores_of_candidates_alone(
    stitcher: Stitcher, metric: MetricName, keeps_states: bool, wave_bytes: int
) -> None:
    """To the last bit, in waves of one candidate, of some or of all; and with another parent in the next generation."""
    config = SearchConfig(stages=STAGES, metric=metric, top_k=20)
    text = token_ids(1, 8)
    together = Fitness(stitcher, text, text, config, keeps_states=keeps_states, wave_bytes=wave_bytes)
    first, second, *others = random_genomes(stitcher, 4)
    for parent in (first, second, first):
        mutants = [parent.replace({index: 1 - min(parent.levels[index], 1)}) for index in range(len(parent.levels))]
        genomes = [*mutants, *others, parent, mutants[0]]
        for stage in STAGES:
            alone = [Fitness(stitcher, text, text, config, keeps_states=False).score(g, stage) for g in genomes[-4:]]
            assert together.scores(genomes, stage, parent)[-4:] == alone
            genomes = genomes[1::2] + genomes[-2:]


def test_a_block_runs_once_for_all_candidates_that_are_alike_so_far(
    stitcher: Stitcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those before the first that differs from the parent's do not run again."""
    made, block = list[int](), stitcher.block
    monkeypatch.setattr(stitcher, "block", lambda number, *given: (made.append(number), block(number, *given))[1])
    grid, last = stitcher.grid, stitcher.grid.units[-1].block
    scorer, parent = fitness(stitcher), Genome((1,) * len(grid.units))
    mutants = [parent.replace({len(grid.units) - 1: level}) for level in (0, 2, 3)]
    scorer.scores([grid.dense()], STAGES[0])
    made.clear()
    scorer.scores([parent, *mutants], STAGES[0], parent)
    assert sorted(made) == [*range(last), *[last] * 4]
    made.clear()
    scorer.scores([parent.replace({len(grid.units) - 1: 4})], STAGES[0], parent)
    assert made == [last]


def test_training_lowers_the_divergence_on_the_text_trained_on(stitcher: Stitcher) -> None:
    """Training changes the score, is deterministic, and leaves the candidate's own weights as they are."""
    genome = random_genomes(stitcher, 1)[0]
    plain, trained = SelectionStage(1, 256), SelectionStage(1, 256, training_tokens=256)
    scorer = fitness(stitcher, (plain, trained))
    before = scorer.score(genome, plain)
    after = scorer.score(genome, trained)
    assert after != before
    assert fitness(stitcher, (plain, trained)).score(genome, trained) == after
    assert fitness(stitcher, (plain,)).score(genome, plain) == before
    more = SelectionStage(1, 256, training_tokens=64)
    assert fitness(stitcher, (more,)).score(genome, more) not in (before, after)


@pytest.mark.parametrize("metric", ["kl", "top-k-kl", "perplexity"])
def test_a_bfloat16_candidate_is_scored_in_float32(stitcher: Stitcher, metric: MetricName) -> None:
    """Logits are bfloat16, but sums over them are not: in bfloat16 these would be wrong by hundredths."""
    dense: Any = copy.deepcopy(stitcher.dense)
    dense.to(torch.bfloat16)
    low = Stitcher(dense, stitcher.family, stitcher.database)
    for genome in random_genomes(stitcher, 3):
        expected = oracle(metric, dense, low.stitch(genome), token_ids(1, 8))
        assert fitness(low, metric=metric).score(genome, STAGES[-1]) == pytest.approx(expected, abs=1e-3)


def test_a_candidate_that_training_breaks_has_diverged(stitcher: Stitcher) -> None:
    config = SearchConfig(stages=TRAINED, learning_rate=3e38)
    scorer = Fitness(stitcher, token_ids(1, 8), token_ids(2, 8), config)
    assert scorer.scores(random_genomes(stitcher, 2), TRAINED[0]) == [inf, inf]


TRAINED = tuple(SelectionStage(2, 64, tokens) for tokens in (64, 128, 256))


def bytes_written() -> int:
    """By this process so far, to files and to whatever else."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar"))


@pytest.mark.parametrize("trains", ["all", "consumers"])
@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_survivors_go_on_training_where_they_stood(
    stitcher: Stitcher, kept_bytes: int, trains: Literal["all", "consumers"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept or trained again, survivors equal those trained from scratch to the last bit, and nothing is written."""
    genomes = random_genomes(stitcher, 4)

    def anew() -> Fitness:
        config = SearchConfig(stages=TRAINED, learning_rate=1e-3, trains=trains)
        return Fitness(stitcher, token_ids(1, 8), token_ids(2, 8), config, kept_bytes=kept_bytes)

    scorer, steps = anew(), list[int]()
    step = scorer._trainer._step
    monkeypatch.setattr(scorer._trainer, "_step", lambda *given: (steps.append(given[3]), step(*given)))
    for count, stage in zip((4, 2, 2), TRAINED, strict=True):
        steps.clear()
        before = bytes_written()
        scores = scorer.scores(genomes[:count], stage)
        assert bytes_written() - before < 1 << 14  # a state has more than a hundred thousand
        # Sequences of 32 tokens: only those that the stage adds are trained on, unless both survivors were others.
        whole, added = stage.training_tokens // 32, {64: 2, 128: 2, 256: 4}[stage.training_tokens]
        assert len(steps) in (count * added, added + whole, count * whole)
        assert kept_bytes or len(steps) == count * whole
        if stage is TRAINED[0]:
            assert steps == [0, 1] * 4, "all candidates see the same sequences"
        assert scores == [anew().score(genome, stage) for genome in genomes[:count]]
        assert len(scorer._trainer._kept) <= (stage.survivors if kept_bytes else 0)
        genomes = [genomes[i] for i in sorted(range(count), key=scores.__getitem__)]
    assert len(steps) == 2 * (4 if kept_bytes else 8)


@pytest.mark.parametrize("neighbours", [2, 3])
def test_processes_of_a_machine_share_the_memory_for_trained_survivors(
    stitcher: Stitcher, neighbours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is just enough for two processes that each keep two survivors."""
    genomes, most = random_genomes(stitcher, 4), []
    keep = candidate_training.CandidateTrainer.keep

    def noted(
        trainer: candidate_training.CandidateTrainer, genome: Genome, trained: candidate_training.Trained
    ) -> None:
        keep(trainer, genome, trained)
        most.append(sum(state.bytes for state in trainer._kept.values()))

    monkeypatch.setattr(candidate_training.CandidateTrainer, "keep", noted)
    fitness(stitcher, TRAINED).scores(genomes, TRAINED[0])
    monkeypatch.setattr(parallel, "neighbours", lambda: neighbours)
    scorer = fitness(stitcher, TRAINED)
    kept_bytes = scorer._trainer.kept_bytes = 2 * max(most)
    most.clear()
    scorer.scores(genomes, TRAINED[0])
    assert (max(most) == kept_bytes // 2) == (neighbours == 2)
    assert max(most) <= kept_bytes // neighbours


def test_dropout_plays_no_part_in_a_score(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Dropout would draw random numbers that a resumed search could not repeat."""
    case = prune(checkpoints["llama-gqa"], tmp_path)
    for block in case.stitcher.dense.model.layers:  # pyright: ignore[reportAttributeAccessIssue]
        block.self_attn.attention_dropout = 0.5
    (genome,), stage = random_genomes(case.stitcher, 1), TRAINED[1]
    assert len({fitness(case.stitcher, TRAINED).score(genome, stage) for _ in range(3)}) == 1


def test_training_is_at_the_rate_and_on_the_tokens_given(stitcher: Stitcher) -> None:
    (genome,), stage = random_genomes(stitcher, 1), TRAINED[-1]
    usual = SearchConfig(stages=TRAINED, learning_rate=1e-3)
    settings = [(usual, 2), (usual, 2), (replace(usual, learning_rate=2e-3), 2), (usual, 3), (usual, 1)]
    scores = [Fitness(stitcher, token_ids(1, 8), token_ids(seed, 8), c).score(genome, stage) for c, seed in settings]
    assert scores[0] == scores[1]
    assert len(set(scores)) == 4


def test_no_more_than_the_survivors_are_kept(stitcher: Stitcher) -> None:
    scorer, most = fitness(stitcher, TRAINED), 0
    keep = scorer._trainer.keep

    def watched(genome: Genome, trained: candidate_training.Trained) -> None:
        nonlocal most
        keep(genome, trained)
        most = max(most, len(scorer._trainer._kept))

    scorer._trainer.keep = watched
    genomes = random_genomes(stitcher, 6)
    scores = scorer.scores(genomes, TRAINED[0])
    assert most == TRAINED[0].survivors
    best = sorted(genomes, key=lambda genome: scores[genomes.index(genome)])[:2]
    assert set(scorer._trainer._kept) == set(best)
    scorer.scores(best, TRAINED[-1])
    assert not scorer._trainer._kept


def test_processes_share_candidates_and_keep_those_they_have_begun(
    stitcher: Stitcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    scorer, genomes = fitness(stitcher), random_genomes(stitcher, 6)
    assert scorer._assign(genomes) == [0, 1, 0, 1, 0, 1]
    assert scorer._assign([genomes[i] for i in (3, 2, 5, 4)]) == [1, 0, 1, 0]
    # One process has begun three: it keeps its share of two, and the third begins again in another process.
    assert scorer._assign([genomes[i] for i in (0, 2, 4)]) == [0, 0, 1]


def test_a_candidate_that_diverges_is_worst(stitcher: Stitcher) -> None:
    scorer = fitness(stitcher)
    scorer._sums[stitcher.grid.dense()] = {0: float("nan")}
    assert scorer.score(stitcher.grid.dense(), STAGES[0]) == float("inf")


EXACT = tuple(SelectionStage(1, tokens) for tokens in (20, 50, 64, 90))


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_a_stage_scores_exactly_its_tokens(stitcher: Stitcher, metric: MetricName) -> None:
    """Whole sequences of 32 tokens, then the beginning of the next one, scrambled at its own end."""
    scrambled = 0.0 if metric == "perplexity" else 0.25
    config = SearchConfig(stages=EXACT, metric=metric)
    text, (genome,) = token_ids(1, 8), random_genomes(stitcher, 1)
    scorer, candidate = Fitness(stitcher, text, text, config), stitcher.stitch(genome)
    for stage in EXACT:
        whole, rest = divmod(stage.fitness_tokens, 32)
        parts = [*scramble(text[:whole], scrambled).split(1), scramble(text[whole : whole + 1, :rest], scrambled)]
        sums = [
            oracle(metric, stitcher.dense, candidate, part) * weight(metric, part) for part in parts if part.numel()
        ]
        predicted = sum(weight(metric, part) for part in parts if part.numel())
        assert scorer.score(genome, stage) == pytest.approx(sum(sums) / predicted, rel=1e-4, abs=1e-6)


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every forward pass from now on, as the embedding looks them up."""
    read, look_up = list[int](), functional.embedding

    def spy(ids: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        read.append(ids.numel())
        return look_up(ids, *arguments, **keywords)

    monkeypatch.setattr(functional, "embedding", spy)
    return read


def weight(metric: MetricName, ids: torch.Tensor) -> int:
    """The number of tokens that a mean is over: without a context, the first is not predicted."""
    return ids.numel() - (metric == "perplexity")


@pytest.mark.parametrize(
    ("length", "stages"),
    [
        (48, tuple(SelectionStage(1, 8 << i, tokens) for i, tokens in enumerate((70, 350, 700, 1400)))),
        pytest.param(250, PAPER, marks=pytest.mark.slow),
    ],
)
def test_candidates_are_scored_and_trained_on_the_tokens_that_stages_name(
    stitcher: Stitcher, length: int, stages: tuple[SelectionStage, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As counted where the embedding looks tokens up, for sequences of a length that divides none of the numbers."""
    config = SearchConfig(stages=stages, learning_rate=1e-4)
    text = torch.randint(4, tiny.VOCAB, (stages[-1].training_tokens // length + 1, length))
    scorer = Fitness(stitcher, text, text, config)
    scorer._add_metrics(range(len(scorer._batches)))  # for which the dense model runs
    (genome,), read = random_genomes(stitcher, 1), counted_reads(monkeypatch)
    trained = 0
    for stage in stages:
        read.clear()
        scorer.score(genome, stage)
        scorer._trainer.forget_all_but([genome])
        expected = stage.training_tokens - trained + stage.fitness_tokens
        assert sum(read) == expected, "and what earlier stages have trained is not trained again"
        trained = stage.training_tokens


@pytest.mark.parametrize("length", [16, 48, 64, 120])
def test_the_tokens_that_stages_add_are_those_that_are_scored(stitcher: Stitcher, length: int) -> None:
    """`plan`, and the budget of other methods, count what a search really reads."""
    config = SearchConfig(stages=tuple(SelectionStage(1, tokens) for tokens in (20, 20, 50, 64, 90)))
    text = torch.randint(4, tiny.VOCAB, (8, length))
    scorer = Fitness(stitcher, text, text, config)
    for stage in config.stages:  # so that the dense model has run
        scorer.score(stitcher.grid.dense(), stage)
    norm: Any = stitcher.dense.get_submodule(stitcher.family.final_norm)
    read: list[int] = []
    counting = norm.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[:2].numel()))
    (genome,), added = random_genomes(stitcher, 1), []
    for stage in config.stages:
        read.clear()
        scorer.score(genome, stage)
        added.append(sum(read))
    counting.remove()
    assert added == config.added_tokens(length)


@pytest.mark.parametrize("loss", ["cross-entropy", "distillation"])
def test_candidates_are_trained_alike_where_the_dense_model_is_elsewhere(
    loss: Literal["cross-entropy", "distillation"], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    case = prune(checkpoints["llama-gqa"], tmp_path)
    config, genomes = SearchConfig(stages=TRAINED, learning_rate=1e-3, loss=loss), random_genomes(case.stitcher, 3)
    texts = token_ids(1, 8), token_ids(2, 8), config
    expected = Fitness(case.stitcher, *texts).scores(genomes, TRAINED[1])
    blocks = InHostMemory.of(case.stitcher.dense, case.stitcher.family, CPU)
    assert Fitness(case.stitcher, *texts, blocks=blocks).scores(genomes, TRAINED[1]) == expected


@pytest.mark.parametrize("family", ["llama-gqa", "olmo2"])  # whose norms over all heads are selected from
def test_narrow_modules_outlive_the_visit_of_the_block_that_they_were_made_from(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """The same levels again, in other candidates, and in a whole model, are those of a model that stays."""
    case = prune(checkpoints[family], tmp_path)
    config, text = SearchConfig(stages=STAGES), token_ids(1, 8)
    genome, other = random_genomes(case.stitcher, 2)
    expected = [Fitness(case.stitcher, text, text, config).score(each, STAGES[-1]) for each in (genome, other)]
    again = prune(checkpoints[family], tmp_path / "again").stitcher
    blocks = InHostMemory.of(again.dense, again.family, CPU)
    scorers = [Fitness(again, text, text, config, blocks=blocks) for _ in range(2)]
    for scorer in scorers:
        assert [scorer.score(each, STAGES[-1]) for each in (genome, other)] == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(again.stitch(genome, blocks)(text).logits, case.stitcher.stitch(genome)(text).logits)
