"""The command line: one subcommand a stage. The dataclasses of config.py are its flags and its YAML."""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, Namespace, set_parsing_settings

from darwinlm.config.checks import expect_level
from darwinlm.config.evaluation import METHODS, UNTRAINED, CompareConfig, EvaluateConfig, SpeedConfig
from darwinlm.config.run import DEMO, ExportConfig, RunConfig
from darwinlm.config.training import GradualConfig, GradualStage, TrainConfig
from darwinlm.types import DarwinError, UsageError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PROG = "darwinlm"
DESCRIPTION = "Compress a large language model: a smaller dense model by one command (DarwinLM, arXiv 2502.07780)."
STAGES = {
    "compress": "everything, from a model and text to a smaller model; stops and resumes anywhere",
    "database": "only measure the model and build its database of levels",
    "search": "the database, then the search for the best genome",
    "demo": "the same as compress, on a real model and corpus that come as packages",
}
TRAIN = "a pruned model on text, alone or with the dense model as its teacher; stops and resumes anywhere"
GRADUAL = "a recipe: a model pruned and trained, in one stage or several; stops and resumes anywhere"
PLAN = "what a run on a model takes, from its config alone: parameters, time, memory and disk"
EXPORT = "a run's model, or a model directory, in another form"
EVALUATE = "any model by one protocol: perplexity, KL, tasks, what it writes, and speed beside the dense one"
COMPARE = "ways to choose what is removed, each at several sizes over one database; stops and resumes anywhere"
UNTIL: dict[str, Literal["database", "search"]] = {"database": "database", "search": "search"}


PRESETS = Path(__file__).parent / "presets"


class Parser(ArgumentParser):
    """Flags with dashes, as the field writes them, for dataclass fields with underscores; errors are one sentence."""

    def __init__(self, **kwargs: Any):
        super().__init__(print_config="--print-config", **kwargs)

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:  # lists of dataclasses: as YAML has them, or --print-config cannot write them
            if isinstance(action.default, tuple) and any(map(dataclasses.is_dataclass, action.default)):
                action.default = [dataclasses.asdict(item) for item in action.default]
        return added

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        return super().add_argument(*(a.replace("_", "-") if a.startswith("--") else a for a in args), **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        prog = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        prog = prog if prog.startswith(PROG) else PROG  # the parser of a list's item has another
        missing = re.search(r"required: (\w+)\.", message)  # of the command; the parser above it tells
        if missing:
            prog, message = f"{PROG} {missing[1]}", re.sub(r"(\w+)\.(\w+)", _as_typed, message)
        message = re.sub(r'Parser key "([^"]+)":', lambda key: f"--{key[1].replace('_', '-')}:", message)
        sys.exit(_fail(f"{message}; {prog} --help lists what there is", 2))


def _as_typed(key: re.Match[str]) -> str:
    """How `command.setting` is written on the command line."""
    command, name = key.groups()
    return name.upper() if name in ("model", "source") and command != "gradual" else f"--{name.replace('_', '-')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 if done, 1 if it failed, 2 for arguments that cannot be used, 130 if interrupted.

    Raises:
        SystemExit: from the parser, after `--help` (0) or for arguments that it cannot read (2).
    """
    parser = _parser()
    try:
        settings = parser.instantiate(parser.parse_args(_files_first(sys.argv[1:] if arguments is None else arguments)))
        _run(settings.command, settings[settings.command])
    except UsageError as error:
        return _fail(str(error), 2)
    except (DarwinError, OSError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on from here", 130)
    return 0


def _files_first(arguments: Sequence[str]) -> list[str]:
    """The command, then the files of `--preset` and `--config`, then the rest: later wins, and flags win over files."""
    of_flag: dict[str, list[str]] = {"--preset": [], "--config": []}
    rest: list[str] = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        flag = next((flag for flag in of_flag if flag in (argument.partition("=")[0], before)), None)
        (rest if flag is None else of_flag[flag]).append(argument)
    presets = [PRESETS / f"{name.removeprefix('--preset=')}.yaml" for name in of_flag["--preset"]]
    given = [f"--config={path}" for path in presets if path.is_file()]
    return [*rest[:1], *of_flag["--preset"], *given, *of_flag["--config"], *rest[1:]]


def _parser() -> ArgumentParser:
    parser = Parser(prog=PROG, description=DESCRIPTION, version=version("darwinlm"))
    commands = parser.add_subcommands(required=True, dest="command")
    for name, help_text in STAGES.items():
        stage = Parser(description=help_text)
        given = {"model", "data"} if name == "demo" else {"model"}
        if name != "demo":
            stage.add_argument("model", type=str, help="a hub id, a directory, a .gguf file, or smollm2-135m")
        presets = sorted(path.stem for path in PRESETS.glob("*.yaml"))
        stage.add_argument("--preset", choices=presets, help="settings that come with darwinlm; --config wins over it")
        stage.add_argument("--config", action="config", help="a YAML file of settings; flags win over it")
        stage.add_class_arguments(RunConfig, skip={*given, "verify", "keep_attention"})
        _add_verify(stage)
        _add_switch(stage, "keep-attention", False, "let no block lose all of its attention, which vLLM wants")
        if name == "demo":
            stage.set_defaults({key: value for key, value in dataclasses.asdict(DEMO).items() if key not in given})
        commands.add_subcommand(name, stage, help=help_text)
    train = Parser(description=TRAIN)
    train.add_argument("model", type=str, help="a run directory, an export, or a dense model as for compress")
    train.add_argument("--config", action="config", help="a YAML file of settings; flags win over it")
    train.add_class_arguments(TrainConfig, skip={"model", "verify"})
    _add_verify(train)
    commands.add_subcommand("train", train, help=TRAIN)
    gradual = Parser(description=GRADUAL)
    gradual.add_argument("--config", action="config", help="a YAML file of settings, such as one of recipes/")
    gradual.add_class_arguments(GradualConfig, skip={"verify"})
    _add_verify(gradual)
    commands.add_subcommand("gradual", gradual, help=GRADUAL)
    plan = Parser(description=PLAN)
    plan.add_argument("model", type=str, help="a hub id, a directory or a file with a config, or smollm2-135m")
    plan.add_argument("--config", action="config", help="a YAML file of settings; flags win over it")
    plan.add_argument("--target-level", type=float | None, help="instead of stages: one pruning and no training")
    plan.add_class_arguments(GradualConfig, skip={"model", "verify"})
    plan.set_defaults(data="-", out="-")  # which it reads of no recipe
    commands.add_subcommand("plan", plan, help=PLAN)
    export = Parser(description=EXPORT)
    export.add_argument("source", type=str, help="a run directory, an export or a dense model directory")
    export.add_argument("--out", type=str, required=True, help="a new directory, or for gguf a file named *.gguf")
    export.add_class_arguments(ExportConfig, skip={"verify"})
    _add_verify(export)
    commands.add_subcommand("export", export, help=EXPORT)
    evaluate = Parser(description=EVALUATE)
    evaluate.add_argument("model", type=str, help="a run or training directory, an export, or a dense model")
    evaluate.add_argument("--config", action="config", help="a YAML file of settings; flags win over it")
    evaluate.add_argument("--speed", action="store_true", help="time prefill and decoding; needs --against")
    evaluate.add_argument("--generation", action="store_true", help="what greedy continuations repeat, and get right")
    evaluate.add_class_arguments(EvaluateConfig, skip={"model", "generation"})
    evaluate.add_class_arguments(SpeedConfig)
    commands.add_subcommand("evaluate", evaluate, help=EVALUATE)
    compare = Parser(description=COMPARE)
    compare.add_argument("model", type=str, help="a hub id, a directory, a .gguf file, or smollm2-135m")
    compare.add_argument("--config", action="config", help="a YAML file of settings; flags win over it")
    untrained = "by default those that train nothing, all but the last two"
    compare.add_argument("--methods", nargs="+", choices=METHODS, default=list(UNTRAINED), help=untrained)
    targets = "shares of the prunable parameters that are removed"
    compare.add_argument("--targets", type=float, nargs="+", default=list(CompareConfig.targets), help=targets)
    compare.add_class_arguments(CompareConfig, skip={"model", "methods", "targets"})
    commands.add_subcommand("compare", compare, help=COMPARE)
    return parser


def _add_verify(parser: ArgumentParser) -> None:
    _add_switch(parser, "verify", True, "load an hf export in a fresh process without darwinlm and compare its logits")


def _add_switch(parser: ArgumentParser, name: str, default: bool, help_text: str) -> None:
    told = f"{help_text} (default: {'yes' if default else 'no'})"
    parser.add_argument(f"--{name}", action=ActionYesNo(no_prefix="no-"), default=default, help=told)


def _run(command: str, fields: Namespace) -> None:
    # torch and transformers, which no one should wait for to read --help
    from darwinlm.commands import compress
    from darwinlm.commands.export import convert, export
    from darwinlm.commands.plan.show import show
    from darwinlm.commands.run_directory import explain_failures
    from darwinlm.runtime.files import check_new

    if command == "plan":
        recipe = _settings(GradualConfig, fields)
        if fields.target_level is not None:
            expect_level(fields.target_level, recipe.database.levels)
            recipe = dataclasses.replace(recipe, stages=(GradualStage(fields.target_level, 0),))
        show(recipe)
        return
    if command == "export":
        config = _settings(ExportConfig, fields)
        check_new(Path(fields.out), directory=config.format == "hf")  # before a model is stitched
        with explain_failures(f"the export to {fields.out}", "--no-verify needs half as much"):
            print(convert(export(Path(fields.source), fields.verify), Path(fields.out), config))
        return
    if command == "evaluate":
        _evaluate(fields)
        return
    if command == "compare":
        from darwinlm.commands.compare import compare

        compare(_settings(CompareConfig, fields, methods=tuple(fields.methods), targets=tuple(fields.targets)))
        return
    if command == "train":
        from darwinlm.commands.train import train

        train(_settings(TrainConfig, fields))
        return
    if command == "gradual":
        from darwinlm.commands.gradual import gradual

        gradual(_settings(GradualConfig, fields))
        return
    default = {"model": DEMO.model, "data": DEMO.data} if command == "demo" else {}
    compress.run(_settings(RunConfig, fields, **default), until=UNTIL.get(command, "report"))


def _settings(kind: Any, fields: Namespace, **others: Any) -> Any:
    """The settings of a command, a `kind`, with those that are no flags of it from `others`, or by their default."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(fields).items() if name in names} | others)


def _evaluate(fields: Namespace) -> None:
    from darwinlm.commands import evaluate
    from darwinlm.commands.run_directory import open_model

    config = _settings(EvaluateConfig, fields)
    timing = _settings(SpeedConfig, fields)
    if fields.speed and config.against is None:
        raise UsageError("--speed is beside the dense model: expected --against, found none; name it")
    with tempfile.TemporaryDirectory(prefix="darwinlm-evaluate-") as workspace:
        timed = open_model(fields.model, Path(workspace)).path if fields.speed else None
        cards = evaluate.evaluate_models(config) if config.asks_for_something or not fields.speed else []
        if timed is not None:
            found = evaluate.compare_speed(timed, str(config.against), timing, config.device, config.dtype)
            evaluate.save(cards, config, found)


def _fail(message: str, code: int) -> int:
    print(f"darwinlm: {' '.join(message.split())}", file=sys.stderr)
    return code
