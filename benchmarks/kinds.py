"""What a model loses on text of a kind that nobody calibrated, searched or refitted on.

    python benchmarks/kinds.py OUT [--settings articles novels articles/articles/articles=1,novels=1] [--novels DEB]
    python benchmarks/kinds.py OUT --smallest             # the least of everything, to see that it works

A setting names the data of calibration, search and refit, with slashes between them, or one for all three: kinds of
`kinds_text.py`, mixtures of them (`articles=2,code=1`) or anything else that `--data` takes. For each setting and kind:
KL from the dense model in nats a token and perplexity on held-out text, and how often the last word of a held-out
passage of 60 words is predicted, all its tokens (LAMBADA's measure), before the refit and after it.

`OUT/results.json` has every figure; a setting that is in it is not measured again, and an interrupted one goes on:
databases, sensitivities, history and refit are kept by what made them. In brackets: KL beside that of a run on the kind
itself, which the goal of 1.5 is about.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kinds_text import KINDS, write_kinds
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from darwinlm.config.run import DatabaseConfig, RefitConfig, RunConfig, SearchConfig
from darwinlm.data.corpus import is_held_out, read_corpus
from darwinlm.data.documents import read_documents
from darwinlm.data.packing import bos_of
from darwinlm.database.calibrate import calibrate
from darwinlm.database.stitch import Stitcher
from darwinlm.database.store import Database, add_unit
from darwinlm.evaluation.quality import perplexity_and_kl
from darwinlm.genome import level_grid
from darwinlm.model.checkpoint import Checkpoint, find_checkpoint
from darwinlm.model.size import parameter_count
from darwinlm.report import tables
from darwinlm.runtime.device import resolve_device
from darwinlm.runtime.files import read_json, write_json
from darwinlm.runtime.progress import say
from darwinlm.search.costs import parameter_costs
from darwinlm.search.evolution import evolve
from darwinlm.search.fitness import Fitness
from darwinlm.search.sensitivity import find_starts
from darwinlm.search.uniform import uniform
from darwinlm.training.refit import refit, set_refitted
from darwinlm.types import Genome, SelectionStage

WORDS = 60  # of a passage whose last one is predicted
DENSE = "dense"


@dataclass(frozen=True)
class Sizes:
    """How much text each stage takes, in tokens, and how long the search is."""

    length: int = 512
    calibration: int = 32_768
    refit: int = 32_768
    held_out: int = 7_680  # Python 3.12 has no more of its topics
    passages: int = 200
    levels: int = 10
    generations: int = 10
    offspring: int = 16
    stages: tuple[SelectionStage, ...] = SearchConfig().stages


SMALLEST = Sizes(64, 512, 256, 512, 8, 4, 1, 2, (SelectionStage(1, 128),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--settings", nargs="+", default=[*KINDS, ",".join(KINDS)])
    parser.add_argument("--target", default="params=0.8")
    parser.add_argument("--novels", type=Path, help="the package of the novels, or where it was unpacked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smallest", action="store_true")
    arguments = parser.parse_args()
    sizes = SMALLEST if arguments.smallest else Sizes()
    bench = Bench(arguments, sizes)
    settings = arguments.settings[:2] if arguments.smallest else arguments.settings
    for setting in settings:
        bench.add(setting)
    print(table(bench.results))


class Bench:
    """The dense model, held-out text of each kind, and the results so far."""

    def __init__(self, arguments: argparse.Namespace, sizes: Sizes):
        self.out, self.seed, self.sizes, self.target = arguments.out, arguments.seed, sizes, arguments.target
        self.files = write_kinds(self.out / "kinds", arguments.novels)
        self.checkpoint: Checkpoint = find_checkpoint(arguments.model, self.out)
        wide = max(unit.structures for unit in self.checkpoint.units) >= 1024
        self.grid = level_grid(self.checkpoint.units, sizes.levels, 32 if wide else 8)
        self.device = resolve_device("auto")
        self.dense = self.checkpoint.load(torch.float32, self.device)
        made_from = {"model": arguments.model, "target": arguments.target, "seed": arguments.seed, "sizes": str(sizes)}
        self.file = self.out / "results.json"
        found = read_json(self.file, "made_from", "results") if self.file.exists() else {"made_from": made_from}
        if found["made_from"] != made_from:
            raise SystemExit(f"{self.file} is of {found['made_from']}, not of {made_from}: choose another OUT")
        self.made_from, self.results = made_from, found.get("results", {})
        self.held_out = {kind: self.corpus(kind).draw_held_out(sizes.held_out) for kind in KINDS}
        self.passages = {kind: passages(self.files[kind], self.checkpoint.tokenizer, sizes.passages) for kind in KINDS}
        self.of_dense: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
        if DENSE not in self.results:
            self.keep(DENSE, {"after": self.measured(self.dense)})

    def keep(self, setting: str, found: Mapping[str, Any]) -> None:
        """Add a setting's figures to the file."""
        self.results[setting] = found
        write_json(self.file, {"made_from": self.made_from, "results": self.results})

    def corpus(self, data: str) -> Any:
        """A corpus of kinds, or of whatever else `--data` takes."""
        named = re.sub(r"(?<![\w.])(" + "|".join(KINDS) + r")(?=[=,]|$)", lambda m: str(self.files[m[1]]), data)
        return read_corpus(named, self.checkpoint.tokenizer, self.sizes.length, self.seed)

    def add(self, setting: str) -> None:
        """Calibrate, search and refit as a setting says, and measure the model before and after the refit."""
        if setting in self.results:
            return
        say(f"kinds: {setting}")
        datas = setting.split("/") if setting.count("/") == 2 else [setting] * 3
        calibration, search, refitting = datas
        began, seconds = time.monotonic(), {}
        stitcher = self.stitcher(calibration)
        seconds["database"] = time.monotonic() - began
        genome = self.searched(stitcher, calibration, search)
        seconds["search"] = time.monotonic() - began - seconds["database"]
        model = stitcher.stitch(genome)
        before = self.measured(model)
        began = time.monotonic()
        name = f"{slug(setting)}.safetensors"
        needed = {"calibration": self.sizes.calibration, "search": self.search_tokens, "refit": self.sizes.refit}
        tokens = self.corpus(refitting).draw(**needed)["refit"]
        settings, file = RefitConfig(tokens=self.sizes.refit), self.out / "refits" / name
        set_refitted(model, refit(stitcher, genome, tokens, settings, file, {"data": datas}))
        seconds["refit"] = time.monotonic() - began
        found = {"data": datas, "genome": genome.levels, "before refit": before, "after": self.measured(model)}
        self.keep(setting, found | {"seconds": seconds, "parameters": parameter_count(model)})

    @property
    def search_tokens(self) -> int:
        """The tokens that the search scores on."""
        return max(stage.fitness_tokens for stage in self.sizes.stages)

    def stitcher(self, data: str) -> Stitcher:
        """Candidates over the database that was calibrated on some data, which is built if there is none."""
        directory = self.out / "databases" / slug(data)
        database = Database(directory, self.grid, {"data": data, "seed": self.seed})
        tokens = self.corpus(data).draw(calibration=self.sizes.calibration)["calibration"]
        units = calibrate(self.checkpoint, tokens, batch_size=8, device=self.device, finished=database.finished())
        for unit in units:
            add_unit(database, unit, DatabaseConfig(levels=self.sizes.levels), torch.float32)
        return Stitcher(self.dense, self.checkpoint.family, database)

    def searched(self, stitcher: Stitcher, calibration: str, data: str) -> Genome:
        """The genome of a search on some data, of the target's size."""
        sizes, state = self.sizes, self.out / "searches" / f"{slug(calibration)}-by-{slug(data)}"
        config = SearchConfig(generations=sizes.generations, offspring=sizes.offspring, stages=sizes.stages)
        database = DatabaseConfig(levels=sizes.levels)
        wanted = RunConfig("M", "D", "O", target=self.target, seed=self.seed, database=database)
        dense_parameters = parameter_count(self.dense)
        costs = parameter_costs(self.grid, dense_parameters)
        uniform_genome, budget = uniform(self.grid, costs, wanted, dense_parameters)
        tokens = self.corpus(data).draw(calibration=sizes.calibration, search=self.search_tokens)["search"]
        fitness = Fitness(stitcher, tokens, tokens[:1], config, bos_of(self.checkpoint.tokenizer))
        starts = find_starts(uniform_genome, budget, fitness, config, self.seed, state)
        return evolve(starts, budget, fitness, config, self.seed, state / "history.jsonl", fitness.length).best

    def measured(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """KL, perplexity and the share of last words that are predicted, by kind."""
        models = {DENSE: self.dense, "model": model} if model is not self.dense else {"model": model}
        found = {}
        for kind in KINDS:
            quality = perplexity_and_kl(models, self.held_out[kind], self.of_dense[kind])["model"]
            right = [predicted(model, *passage) for passage in self.passages[kind]]
            shares = {"last word": sum(right) / len(right) if right else float("nan"), "passages": len(right)}
            found[kind] = {"kl": quality.kl, "perplexity": quality.perplexity, **shares}
        return found


def slug(data: str) -> str:
    """A name for files."""
    return re.sub(r"[^\w=.]+", "-", data)


def passages(file: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[tuple[list[int], list[int]]]:
    """The tokens of passages of held-out documents, without their last word, and those of that word."""
    found = []
    for document in filter(is_held_out, read_documents(str(file))):
        words = list(re.finditer(r"\S+", document))
        for last in range(WORDS - 1, len(words), WORDS):
            begin = words[last - WORDS + 1].start()
            parts = (document[begin : words[at].end()] for at in (last - 1, last))
            before, whole = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
            if whole[: len(before)] == before:  # else the word changes the tokens before it
                found.append((before, whole[len(before) :]))
            if len(found) == count:
                return found
    return found


@torch.inference_mode()
def predicted(model: Any, before: Sequence[int], word: Sequence[int]) -> bool:
    """Whether every token of a word is the likeliest after those before it."""
    ids = torch.tensor([[*before, *word]], device=model.device)
    likeliest = model(ids, logits_to_keep=len(word) + 1).logits[0, :-1].argmax(-1)
    return likeliest.tolist() == list(word)


def table(results: Mapping[str, Any]) -> str:
    """Every setting's KL and share of last words after the refit, and KL beside that of the kind's own setting."""
    rows = []
    for setting, found in results.items():
        cells = []
        for kind in KINDS:
            here, own = found["after"][kind], results.get(kind, {}).get("after", {}).get(kind, {}).get("kl")
            ratio = f" ({here['kl'] / own:.2f}x)" if own and setting != DENSE else ""
            cells.append(f"{here['kl']:.3f}{ratio}, {here['last word']:.0%}")
        rows.append([setting, *cells])
    return tables.markdown(["setting", *(f"{kind}: KL, last words" for kind in KINDS)], rows)


if __name__ == "__main__":
    main()
