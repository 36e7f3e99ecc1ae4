"""Plans: counts of published models by hand, of tiny models against what is really built."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

import pruned
import tiny
from darwinlm.cli import main
from darwinlm.commands.plan.rates import BlockRates, Rates, block_rates, measure_rates
from darwinlm.commands.plan.show import find_config
from darwinlm.commands.plan.work import Plan, Work, plan, plan_training
from darwinlm.config.run import CalibrationConfig, DatabaseConfig, GuardConfig, RefitConfig, SearchConfig
from darwinlm.config.training import DistillationConfig, GradualConfig, TrainingConfig
from darwinlm.database.stitch import Stitcher
from darwinlm.model.reading import skeleton
from darwinlm.search.memory import allowance, count_memory
from darwinlm.search.uniform import uniform_genome
from darwinlm.types import SelectionStage, UsageError

RECIPES = Path(__file__).parents[1] / "src" / "darwinlm" / "recipes"
RATES = Rates(products=1e9, forward=1e9, solves=1e9, inverses=1e9, sweeps=1e9, fills=1e9, loads=1e9, disk=1e9)


def planned(config: PreTrainedConfig, level: float = 5.0, **settings: object) -> Plan:
    return plan(config, CalibrationConfig(), DatabaseConfig(**settings), level, RATES)  # pyright: ignore[reportArgumentType]


def llama_2_7b() -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32, vocab_size=32000
    )


def llama_3_1_8b() -> PreTrainedConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=32, vocab_size=128256,
    )  # fmt: skip


def qwen_2_5_14b() -> PreTrainedConfig:
    return Qwen2Config(
        hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_key_value_heads=8,
        num_hidden_layers=48, vocab_size=152064, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "dense", "half", "bias"),
    [(llama_2_7b, 6.74, 3.50, 0), (llama_3_1_8b, 8.03, 4.67, 0), (qwen_2_5_14b, 14.77, 8.42, 1)],
)
def test_published_sizes(config: Callable[[], PreTrainedConfig], dense: float, half: float, bias: int) -> None:
    """Level 5 of 10 of the paper's models in billions of parameters, query heads pruned, and K and V once more for each
    query head that is left beyond their number: the paper counts them shared, which no checkpoint can hold."""
    model: Any = config()
    found = planned(model, structure="head")
    repeated = model.num_attention_heads // 2 - min(model.num_key_value_heads, model.num_attention_heads // 2)
    written_out = 2 * model.num_hidden_layers * repeated * 128 * (model.hidden_size + bias)
    assert round(found.parameters / 1e9, 2) == dense
    assert round((found.target_parameters - written_out) / 1e9, 2) == half


def test_llama_2_7b_by_hand() -> None:
    """32 blocks of four 4096 x 4096 and three 4096 x 11008 matrices, half of each; embeddings and norms stay."""
    found = planned(llama_2_7b(), structure="head")
    fixed = 2 * 32000 * 4096 + 4096 + 32 * 2 * 4096
    assert found.parameters == fixed + 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert found.target_parameters == fixed + 32 * (2 * 4096 * 4096 + 3 * 4096 * 5504)


@pytest.mark.parametrize("model", ["llama-gqa", "phi3", "olmo2", "starcoder2"])
def test_a_plan_says_what_is_built(model: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Parameters are those of the stitched model, bytes those of the database but for the files' heads and orders."""
    case = pruned.prune(checkpoints[model], tmp_path)
    settings = pruned.CONFIG
    found = plan(case.dense.config, CalibrationConfig(), settings, 2.0, RATES)
    genome = uniform_genome(case.database.grid, 2.0, settings.levels, Random(0))
    stitched = Stitcher(case.dense, case.checkpoint.family, case.database).stitch(genome)
    assert found.parameters == sum(parameter.numel() for parameter in case.dense.parameters())
    assert found.target_parameters == sum(parameter.numel() for parameter in stitched.parameters())
    grid = case.database.grid
    weights = [
        case.database.level(index, level).weight
        for index in range(len(grid.units))
        for level in range(1, grid.highest(index))
    ]
    assert found.disk_bytes == sum(weight.nbytes for weight in weights)


def test_tokens_take_time_to_measure_and_none_to_eliminate() -> None:
    config, database = llama_2_7b(), DatabaseConfig()
    none, short, long = (
        plan(config, CalibrationConfig(tokens=n), database, 5.0, RATES) for n in (512, 66_048, 131_584)
    )
    more, most = (at.calibration_seconds - none.calibration_seconds for at in (short, long))
    assert most == pytest.approx(2 * more)
    assert long.elimination_seconds == short.elimination_seconds
    assert long.memory_bytes - short.memory_bytes == 65536 * 4096 * 4


def test_weights_are_loaded_once_however_few_tokens_there_are() -> None:
    """At rates that make all else vanish: the blocks with their norms, the embedding, and no head."""
    rates = Rates(**dict.fromkeys(vars(RATES), math.inf) | {"loads": 1.0})
    found = plan(llama_2_7b(), CalibrationConfig(tokens=512), DatabaseConfig(), 5.0, rates)
    blocks = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096)
    assert found.calibration_seconds == 4 * (blocks + 32000 * 4096)


def test_activations_that_do_not_fit_are_planned_on_disk() -> None:
    few, many = (
        plan(llama_2_7b(), CalibrationConfig(tokens=tokens), DatabaseConfig(), 5.0, RATES)
        for tokens in (131_072, 524_288)
    )
    assert few.spilled_bytes == 0
    assert many.spilled_bytes == 524_288 * 4096 * 4
    assert many.memory_bytes < few.memory_bytes


def test_rates_are_positive_and_finite() -> None:
    rates = measure_rates(torch.bfloat16, size=128)
    waits = {"channel", "block"}  # of a GPU for its host
    assert all(0 < rate < 1e15 for name, rate in vars(rates).items() if name not in waits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_block_of_every_family_has_its_rates(dtype: torch.dtype) -> None:
    for family in tiny.CONFIGS:
        assert all(0 < rate < 1e15 for rate in vars(block_rates(tiny.CONFIGS[family], dtype, length=16)).values())


def test_work_is_done_at_its_own_rate() -> None:
    assert Work(3e9, 8e9).seconds(BlockRates(1e9, 4e9)) == 3 + 2


def test_a_config_is_found_by_directory_and_by_file(checkpoints: dict[str, Path]) -> None:
    for path in (checkpoints["phi3"], checkpoints["phi3"] / "config.json"):
        assert find_config(str(path)).to_dict()["intermediate_size"] == tiny.CONFIGS["phi3"].intermediate_size


def test_no_config_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config at .*; check it"):
        find_config(str(tmp_path))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates that take no seconds to measure."""
    monkeypatch.setattr("darwinlm.commands.plan.devices.measure_rates", lambda _: RATES)
    monkeypatch.setattr("darwinlm.commands.plan.devices.block_rates", lambda *_: BlockRates(1e12, 5e11))


@pytest.mark.usefixtures("quick")
def test_the_command_prints_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qwen_2_5_14b().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path / "config.json"), "--database.structure", "head"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^parameters +14\.77 B, ", printed, re.MULTILINE)
    both = r"9\.17 B, 36\.6\d GB, params=0\.621; 8\.4\d B where heads that are left share K and V$"
    assert re.search(rf"^at level 5 of 10, head +{both}", printed, re.MULTILINE)
    assert re.search(r"^at level 1 of 10, head +15\.27 B, .* refused, for it is no smaller", printed, re.MULTILINE)
    assert printed.count("refused, for") == 1


@pytest.mark.usefixtures("quick")
def test_a_plan_to_a_share_of_the_parameters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The uniform model of that size is planned for: the first below it, by less than a step of the levels."""
    llama_2_7b().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--target", "params=0.6"]) == 0
    printed = capsys.readouterr().out
    dense, pruned = (
        float(re.search(rf"^{row} +([\d.]+) B", printed, re.MULTILINE)[1])  # pyright: ignore[reportOptionalSubscript]
        for row in ("parameters", r"pruned to level [\d.]+")
    )
    assert 0.59 < pruned / dense <= 0.6 + 1e-3
    shares = [float(share) for share in re.findall(r"params=([\d.]+)$", printed, re.MULTILINE)]
    assert len(shares) == 9
    assert shares == sorted(shares, reverse=True), "a row for each level"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--target-level", "10"], "--target-level: expected a level between 0 and 10"),
        (["--target", "params=0.5", "--target-level", "5"], "expected one of them, found both"),
        (["--target", "params=half"], "--target: expected params"),
        (["--target", "latency=0.5"], "found latency"),
        (["--target-le", "5"], "has no flag --target-le (the closest is --target-level)"),
        (["--database.structure", "column"], "structure"),
        (["--database.granularity", "48"], "granularity must divide the 11008 channels"),
    ],
)
def test_a_plan_of_settings_that_cannot_be_used_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], told: str
) -> None:
    llama_2_7b().save_pretrained(tmp_path)
    try:
        code = main(["plan", str(tmp_path), *flags])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("recipe", "config", "size", "steps"),
    [
        ("llama-2-7b", llama_2_7b, "3.50 B", "2,385"),
        ("llama-3.1-8b", llama_3_1_8b, "4.94 B", "1,060"),
        ("qwen-2.5-14b-instruct", qwen_2_5_14b, "9.17 B", "1,192"),
    ],
)
def test_every_recipe_is_priced(
    recipe: str,
    config: Callable[[], PreTrainedConfig],
    size: str,
    steps: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Steps are 10 B tokens over the global batch and context of Table 5."""
    config().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--config", str(RECIPES / f"{recipe}.yaml")]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^at level 5 of 10, head +{size}, ", printed, re.MULTILINE)
    assert re.search(rf"^pruned to level 5 +{size}, trained on [\d,]+ tokens in {steps} steps, ", printed, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.long
def test_a_recipe_is_priced_stage_by_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 B tokens are 2,385 steps of 1,024 x 4,096; 8 operations a weight and token with activations computed again."""
    llama_2_7b().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--config", str(RECIPES / "llama-2-7b.yaml")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"at level 5 of 10, head +3.50 B", printed)
    for level in (5, 6):
        assert re.search(rf"^pruned to level {level} .*, trained on 10,003,415,040 tokens", printed, re.MULTILINE)
    assert printed.count(" in 2,385 steps, ") == 2
    assert "2.8e+20 operations" in printed


def test_sharded_training_is_priced_by_hand() -> None:
    """Of 10^9 weights, 2 GB are gathered forwards and 2 GB backwards, and 4 GB of gradients are reduced."""
    sharded = GradualConfig("M", "D", "O", training=TrainingConfig(fsdp=True))
    found, alone = (plan_training(10**9, 10**9, 10**6, each) for each in (sharded, GradualConfig("M", "D", "O")))
    assert (found.communication_bytes, alone.communication_bytes) == (8 * 10**9, 0)


def test_training_is_priced_by_hand() -> None:
    found = plan_training(10**9, 10**9, 10**6, GradualConfig("M", "D", "O"))
    assert found.work == Work(forward=2e15, training=6e15)  # all activations kept, and a teacher of the same size
    kept = plan_training(10**9, 10**9, 10**6, GradualConfig("M", "D", "O", distillation=DistillationConfig(top_k=64)))
    assert kept.work == found.work
    assert kept.disk_bytes - found.disk_bytes == 10**6 * 64 * 6


def test_a_search_of_8b_is_counted_by_hand() -> None:
    """At level 5 of 10 in bfloat16: half of every unit, 4 of 8 KV heads with 16 of 32 query heads and 7168 channels."""
    config, search = llama_3_1_8b(), SearchConfig()
    at = planned(config)
    counted = count_memory(at.parameters, config, at.grid, at.uniform, search, RefitConfig(), 2048, torch.bfloat16)
    consumers = 32 * 4096 * (16 * 128 + 7168)
    embeddings = 2 * 128256 * 4096
    blocks = 32 * (4096 * 128 * (16 + 2 * 4 + 16) + 3 * 4096 * 7168 + 2 * 4096)
    assert counted.dense == 2 * at.parameters
    assert counted.narrow == 2 * blocks
    assert counted.ends == 2 * (embeddings + 4096)
    # In bfloat16 hidden states in front of the blocks, in float32 the mean row of the embedding for each token.
    assert counted.targets == (2 + 4) * 8192 * 4096
    assert counted.block == 2 * (4096 * 128 * (32 + 2 * 8 + 32) + 3 * 4096 * 14336 + 2 * 4096)
    assert counted.states == 2 * 32 * 8192 * 4096
    updates = 32 * 32 * ((4096 + 16 * 128) + 2 * (4096 + 4 * 128) + 2 * (4096 + 7168))  # of rank 32 in 32 blocks
    # Float32 weights, gradients and two moments; the consumers' bfloat16 is not there meanwhile.
    assert 14 * consumers + 16 * updates < counted.refit < 16 * (consumers + updates)
    assert counted.search == counted.visiting < 5e9 < counted.resident < 18e9
    trained = replace(search, stages=(SelectionStage(2, 1024, 1024), SelectionStage(1, 2048, 2048)))
    one = count_memory(at.parameters, config, at.grid, at.uniform, trained, RefitConfig(), 2048, torch.bfloat16)
    assert one.training > 14 * consumers
    assert one.survivors == 2 * 12 * consumers
    assert one.states == 0


def test_the_guards_answers_of_8b_are_counted_by_hand() -> None:
    """Eight at a time, of whole models, with keys and values of 8 heads of 128 in 32 blocks for each token."""
    config, at = llama_3_1_8b(), planned(llama_3_1_8b())
    refit = RefitConfig(tokens=0)
    of = at.parameters, config, at.grid, at.uniform, SearchConfig(), refit, 2048, torch.bfloat16
    counted, without = count_memory(*of, GuardConfig(chat="chats.jsonl")), count_memory(*of, GuardConfig())
    reading = 8 * 512 * 2 * (4 * 4096 + 3 * 14336)  # of all prompts, what a block's forward pass takes
    assert counted.answers == reading + 8 * (512 + 128) * 2 * 32 * 8 * 128 * 2 + 4 * 4 * 8 * 128256
    assert without.answers == 0
    assert counted.resident - without.resident >= counted.narrow - counted.block
    assert counted.visiting == counted.block + counted.dense + counted.targets + counted.answers
    assert allowance(without, 16 << 30).resident is False
    with pytest.raises(UsageError, match=r"--memory: expected .* found 17\.18 GB; leave --guard\.chat out"):
        allowance(counted, 16 << 30)


@pytest.mark.parametrize(
    ("config", "length", "trains", "fits"),
    [
        (llama_2_7b, 4096, "all", True),
        (llama_3_1_8b, 8192, "all", True),
        (qwen_2_5_14b, 8192, "all", False),  # 16 bytes for each of 7.0e9 weights
        (qwen_2_5_14b, 8192, "consumers", True),
    ],
)
def test_candidates_of_the_papers_recipes_are_trained_within_80_gb(
    config: Callable[[], PreTrainedConfig], length: int, trains: Literal["all", "consumers"], fits: bool
) -> None:
    """At level 5 of 10; tests/test_memory.py holds the count against the bytes of a smaller model."""
    model, tokens = config(), (10_000, 50_000, 100_000, 200_000)
    stages = tuple(
        replace(stage, training_tokens=each) for stage, each in zip(SearchConfig().stages, tokens, strict=True)
    )
    at, search = planned(model), SearchConfig(stages=stages, trains=trains)
    counted = count_memory(
        at.parameters, model, at.grid, at.uniform, search, RefitConfig(tokens=0), length, torch.bfloat16
    )
    if fits:
        allowance(counted, 78 << 30)
        return
    with pytest.raises(UsageError, match=r"take --search\.trains consumers"):
        allowance(counted, 78 << 30)


def llama_3_1_70b() -> PreTrainedConfig:
    config: Any = llama_3_1_8b()
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8192, 28672, 80
    config.num_attention_heads = 64
    return config


@pytest.mark.parametrize("config", [llama_3_1_8b, qwen_2_5_14b, llama_3_1_70b])
def test_a_search_without_training_fits_24_gb_with_its_blocks_in_host_memory(
    config: Callable[[], PreTrainedConfig],
) -> None:
    """With 2 GB in reserve; tests/test_memory.py holds the count against the bytes of a smaller model."""
    model = config()
    at = planned(model)
    sizes = at.parameters, model, at.grid, at.uniform
    counted = count_memory(*sizes, SearchConfig(), RefitConfig(tokens=0), 2048, torch.bfloat16)
    allowed = allowance(counted, 22 << 30)
    assert allowed.resident == (config is llama_3_1_8b)
    assert counted.visiting < 0.92 * (12 << 30)
    trained = replace(SearchConfig(), stages=(SelectionStage(1, 1024, 1024),))
    counted = count_memory(*sizes, trained, RefitConfig(tokens=0), 2048, torch.bfloat16)
    with pytest.raises(UsageError, match=r"--search\.stages without training_tokens"):
        allowance(counted, 22 << 30)


def test_the_config_keeps_its_precision_when_a_model_is_built_in_another() -> None:
    config = llama_3_1_8b()
    config.dtype = torch.bfloat16
    assert skeleton(config, torch.float32).dtype == torch.float32
    assert config.dtype == torch.bfloat16
