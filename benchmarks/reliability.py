"""How often darwinlm is wrong without a word: killed at random, with damaged files, and given malformed inputs.

    python benchmarks/reliability.py kills|damages|inputs|all [--count N] [--minutes M] [--seed S] [--out DIR]

Every case follows from the seed and its number alone. Cases that are done are kept in DIR/cases.jsonl, and the same
command goes on after them. A case runs in a fork of this process, on a tiny model, and ends in one of these ways:

    same       it did its work, and the result is the one without the damage, to the last bit
    refused    one sentence, exit code 1 or 2
    accepted   (inputs) it did its work
    different  it did its work, and the result is another one, without a word
    traceback  anything else was printed, or another exit code
    hang       it took more than a minute, or more than 8 GB

The exit code is 1 if a case was different, a traceback or a hang, and the command that repeats it is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from random import Random, SystemRandom
from tempfile import TemporaryDirectory
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # whose tiny models and settings these are
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import yaml
from forked import attempt

import runs
import tiny
from darwinlm.commands.run_directory import Run, load
from darwinlm.config.run import RunConfig
from darwinlm.export.gguf import export_gguf
from darwinlm.types import DarwinError

GOOD = ("same", "refused", "accepted")


@dataclass(frozen=True)
class Outcome:
    """How a case ended: in which way, by which exit code, what it printed, and what it was about."""

    way: str
    code: int
    printed: str
    about: str


class Base:
    """A model, a text and a finished run, which every case copies, and what commands give with them."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.model, self.text, self.run = (directory / name for name in ("model", "text.jsonl", "run"))
        self.config = runs.short(self.model, self.text, self.run)
        if not (directory / "ready").exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            tiny.write_checkpoint(self.model, "qwen2")
            tiny.write_text(self.text)
            # In a fork: a process that has differentiated cannot fork any more.
            began = time.monotonic()
            assert attempt(lambda: runs.call(*runs.command(self.config)), directory / "log")[0] == "done"
            seconds = time.monotonic() - began
            assert attempt(self._gguf, directory / "log")[0] == "done"
            (directory / "ready").write_text(f"{seconds}")
        self.seconds = float((directory / "ready").read_text())  # of a run
        self.expected: dict[str, object] = {}

    def _gguf(self) -> int:
        export_gguf(self.model, self.directory / "model.gguf", "f32", verify=False)
        return 0

    def command(self, name: str, run: Path, work: Path) -> tuple[Callable[[], int], Callable[[], object]]:
        """A command that reads a run, and the result that it has then."""
        config = replace(self.config, out=str(run))
        if name == "resume":
            return partial(runs.call, *runs.command(config)), partial(result_of, run)
        if name == "export":
            file = work / "out.gguf"
            command = partial(runs.call, "export", str(run), "--format", "gguf", "--no-verify", "--out", str(file))
            return command, partial(digest, file)
        if name == "evaluate":
            file = work / "out.json"
            arguments = ("--data", str(self.text), "--tokens", "256", "--window", "32", "--out", str(file))
            figures = lambda: json.loads(file.read_text())["models"][0]["texts"][str(self.text)]  # noqa: E731
            return partial(runs.call, "evaluate", str(run), *arguments), figures
        if name == "genome":
            other = replace(
                config, out=str(work / "other"), genome=str(run / "search" / "result.json"), target_level=None
            )
            command = partial(runs.call, *runs.command(other, name="search"))
            return command, lambda: json.loads((work / "other/search/result.json").read_text())["levels"]
        file = work / "loaded"

        def read() -> int:
            try:
                weights = load(run).state_dict()
                table = [(row["model"], row["kl"]) for row in Run(run).table]
                file.write_text(f"{Run(run).genome} {table} {[tensor.sum().item() for tensor in weights.values()]}")
            except DarwinError as error:
                print(f"darwinlm: {error}", file=sys.stderr)
                return 1
            return 0

        return read, lambda: file.read_text()


COMMANDS = ("resume", "export", "evaluate", "genome", "load")
# What may be lost at the same time, so that resuming reads what was made before it.
LOST = (
    ("table.json",),
    ("model", "model.json"),
    ("refit", "model"),
    ("search/result.json", "model"),
    ("search", "model"),
)


def digest(file: Path) -> str:
    """The SHA-256 of a file."""
    return sha256(file.read_bytes()).hexdigest()


def result_of(run: Path) -> object:
    """What must be equal in two runs: history, genome, exported files, and figures but for speeds."""
    model = {file.name: digest(file) for file in sorted((run / "model").iterdir()) if file.name != "README.md"}
    table = [(row["model"], row["parameters"], row["perplexity"], row["kl"]) for row in Run(run).table]
    return runs.history(run), json.loads((run / "search/result.json").read_text())["levels"], model, table


def damage(base: Base, rng: Random, work: Path) -> Outcome:
    """A file of a finished run is flipped, cut, emptied, deleted or swapped, and a command reads it."""
    run, name = work / "run", rng.choice(COMMANDS)
    shutil.copytree(base.run, run)
    lost = rng.choice(LOST) if name == "resume" else ()
    for path in (*lost, "report.md") if name == "resume" else ():
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink(missing_ok=True)
    what = f"{name} {lost}"
    if what not in base.expected:
        clean = work / "clean"
        shutil.copytree(run, clean / "run")
        command, result = base.command(name, clean / "run", clean)
        assert attempt(command, work / "log")[0] == "done"
        base.expected[what] = result()
    files = sorted(file for file in run.rglob("*") if file.is_file() and file.name not in (".lock", "README.md"))
    file = rng.choice(files)
    how = rng.choice(("flip", "flip", "flip", "cut", "empty", "delete", "swap"))
    about = f"{name} after {how} of {file.relative_to(run)}" + (f", {', '.join(lost)} lost" if lost else "")
    data = bytearray(file.read_bytes())
    if how == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[: rng.randrange(len(data) or 1)])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "delete":
        file.unlink()
    elif how == "swap":
        other = rng.choice([each for each in files if each.suffix == file.suffix])
        about += f" with {other.relative_to(run)}"
        theirs = other.read_bytes()
        other.write_bytes(data)
        file.write_bytes(theirs)
    command, result = base.command(name, run, work)
    way, code, printed = attempt(command, work / "log")
    if way == "done":
        way = "same" if result() == base.expected[what] else "different"
    return Outcome(way, code, printed, about)


def kill(base: Base, rng: Random, work: Path) -> Outcome:
    """A run is killed at random moments until it comes to its end, which must be that of one that never was."""
    config, kills = replace(base.config, out=str(work / "run")), 0
    command = partial(runs.call, *runs.command(config))
    while True:
        way, code, printed = attempt(command, work / "log", rng.uniform(0.02, base.seconds) if kills < 4 else None)
        if way != "killed":
            break
        kills += 1
    if way == "done":
        left = [path.name for path in Path(config.out).rglob("*.partial")]
        way = "same" if result_of(Path(config.out)) == result_of(base.run) and not left else "different"
    return Outcome(way, code, printed, f"{kills} kills")


NONSENSE: tuple[Any, ...] = (
    None, True, -1, 0, 2.5, 10**12, 10**30, float("nan"), "", "x", "\u0000", [], {}, [1], "1e9", "../..",
)  # fmt: skip


FLAGS = (
    "calibration.tokens", "calibration.sequence-length", "calibration.batch-size", "database.levels", "device", "data",
    "database.granularity", "search.offspring", "search.stages", "seed", "target", "target-level", "refit.tokens",
    "evaluation.speed-tokens", "latency.context",
)  # fmt: skip


def malformed(base: Base, rng: Random, work: Path) -> Outcome:
    """One of a command's inputs is nonsense in one place."""
    model, text = work / "model", work / "text.jsonl"
    shutil.copytree(base.model, model)
    shutil.copy(base.text, text)
    shutil.copy(base.directory / "model.gguf", work / "model.gguf")
    config: RunConfig = replace(base.config, model=str(model), data=str(text), out=str(work / "run"))
    kind = rng.choice(("config", "tokenizer", "weights", "gguf", "text", "settings", "flag", "bytes", "genome"))
    until, flags, about = "database", (), kind
    if kind in ("config", "tokenizer"):
        file = model / ("config.json" if kind == "config" else rng.choice(("tokenizer.json", "tokenizer_config.json")))
        content = json.loads(file.read_text())
        about = f"{file.name}: {_spoil(content, rng)}"
        file.write_text(json.dumps(content))
    elif kind in ("weights", "gguf", "bytes"):
        names = {"weights": "model/model.safetensors", "gguf": "model.gguf"}
        file = work / names.get(kind, rng.choice(("model/config.json", "model/tokenizer.json", "text.jsonl")))
        data = bytearray(file.read_bytes())
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(min(len(data), rng.choice((64, 4096, len(data)))))] = rng.randrange(256)
        file.write_bytes(data)
        config = replace(config, model=str(file)) if kind == "gguf" else config
        about = f"bytes of {file.name}"
    elif kind == "text":
        lines = text.read_bytes().splitlines(keepends=True)[:40]
        bad = (
            b'{"text": "\\ud800"}\n',
            b"\xff\xfe\n",
            b'{"text": ' + b"[" * 10**5 + b"\n",
            b"null\n",
            b'{"text": 5}\n',
            b"\0\n",
        )
        spoilt = [rng.choice(bad) if rng.random() < 0.3 else line for line in lines]
        suffix = rng.choice((".jsonl", ".txt", ".parquet"))
        text.with_suffix(suffix).write_bytes(b"".join(rng.choice((spoilt, [spoilt[0]], [b"word " * 10**6], []))))
        config, about = replace(config, data=str(text.with_suffix(suffix))), f"text as {suffix}"
    elif kind == "settings":
        plain = json.loads(json.dumps(asdict(config)))
        for name in ("model", "data", "out"):
            del plain[name]
        about = f"settings: {_spoil(plain, rng)}"
        (work / "settings.yaml").write_text(yaml.safe_dump(plain))
        flags = ("--config", str(work / "settings.yaml"))
    elif kind == "flag":
        name = rng.choice(FLAGS)
        flags = (f"--{name}", str(rng.choice((*NONSENSE, "params=nan", "params=0", "latency=1ms", "a,", "cuda:99"))))
        about, until = " ".join(flags), rng.choice(("database", "search"))
    else:
        result = json.loads((base.run / "search/result.json").read_text())
        about, until = f"genome: {_spoil(result, rng)}", "search"
        (work / "genome.json").write_text(json.dumps(result))
        flags = ("--genome", str(work / "genome.json"))
    command = runs.command(config, *flags, name=until)
    way, code, printed = attempt(partial(runs.call, *command), work / "log")
    return Outcome("accepted" if way == "done" else way, code, printed, about)


def _spoil(content: Any, rng: Random) -> str:
    """Put nonsense somewhere into JSON, or take something out; returns where."""
    places = list(_places(content))
    holder, key = rng.choice(places)
    if rng.random() < 0.2:
        del holder[key]
        return f"{key} is missing"
    holder[key] = rng.choice(NONSENSE)
    return f"{key} is {holder[key]!r}"


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    keys = list(content) if isinstance(content, dict) else list(range(min(len(content), 3)))
    for key in keys:
        yield content, key
        if isinstance(content[key], dict | list):
            yield from _places(content[key])


KINDS: dict[str, Callable[[Base, Random, Path], Outcome]] = {"kills": kill, "damages": damage, "inputs": malformed}


@contextmanager
def recorded(file: Path) -> Iterator[tuple[dict[str, dict[str, Any]], Callable[[dict[str, Any]], None]]]:
    """The cases that a file has, and how to add one."""
    lines = file.read_text().splitlines() if file.exists() else []
    with file.open("a") as opened:

        def add(case: dict[str, Any]) -> None:
            opened.write(json.dumps(case) + "\n")
            opened.flush()

        yield {case["case"]: case for case in map(json.loads, lines)}, add


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--count", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=10**9, help="for each kind")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(10**9))
    parser.add_argument("--only", type=int, help="the number of one case, which is run and shown")
    parser.add_argument("--out", type=Path, default=Path("runs/reliability"))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    base, bad = Base(arguments.out.absolute() / "base"), 0
    for kind in KINDS if arguments.kind == "all" else [arguments.kind]:
        end, counts = time.monotonic() + 60 * arguments.minutes, Counter[str]()
        numbers = range(arguments.count) if arguments.only is None else [arguments.only]
        with recorded(arguments.out / "cases.jsonl") as (done, add):
            for number in numbers:
                if time.monotonic() > end:
                    break
                name = f"{kind} {arguments.seed} {number}"
                case = done.get(name) if arguments.only is None else None
                if case is None:
                    with TemporaryDirectory(prefix="reliability-") as work:
                        outcome = KINDS[kind](base, Random(name), Path(work))
                    printed = re.sub(r"/tmp/reliability-\w+", "WORK", outcome.printed)[-2000:]
                    case = {"case": name, **asdict(outcome), "printed": printed}
                    add(case)
                counts[case["way"]] += 1
                if case["way"] not in GOOD or arguments.only is not None:
                    bad += case["way"] not in GOOD
                    again = f"python benchmarks/reliability.py {kind} --seed {arguments.seed} --only {number}"
                    print(f"{case['way']}: {case['about']}\n{case['printed']}\n  {again}", flush=True)
        print(f"{kind}: {sum(counts.values())} cases: {dict(counts)}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
