"""The command line: a row of `COMMANDS` for each subcommand, whose flags are the fields of its settings."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, get_args

from jsonargparse import ActionYesNo, ArgumentParser, Namespace, set_parsing_settings

from darwinlm.config.checks import is_utf8
from darwinlm.config.evaluation import CompareConfig, EvaluateConfig, SpeedConfig
from darwinlm.config.files import check_known, read_plain
from darwinlm.config.frontier import FrontierConfig
from darwinlm.config.run import DEMO, ExportConfig, RunConfig
from darwinlm.config.training import GradualConfig, PlanConfig, TrainConfig
from darwinlm.rivals.methods import DEFAULT_METHODS, METHODS
from darwinlm.runtime.progress import reporting, say
from darwinlm.types import DarwinError, FileType, UsageError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PROG = "darwinlm"
INTERRUPTED = "interrupted; the same command goes on from here"
DESCRIPTION = "Compress a large language model: a smaller dense model by one command (DarwinLM, arXiv 2502.07780)."
FOLDER = Path(__file__).parent
PRESETS, RECIPES = FOLDER / "presets", FOLDER / "recipes"  # settings that come with darwinlm
DENSE_MODEL = "a hub id, a directory, a .gguf file, or smollm2-135m"
SIZES = ("--target", "--target-level")
ALWAYS_SHOWN = ("help", "help_all", "config", "preset", "data", "out")
PLAN_DEVICE = "cpu (this machine, measured) or GPUs by name and number, such as h100, rtx4090 or h100:8"
CONFIG_HELP = "a YAML file of settings; flags win over it"


@dataclass(frozen=True)
class Flag:
    """A flag that is no field of the settings, with what the parser takes for it."""

    name: str
    parser_arguments: Mapping[str, Any]

    @property
    def argument(self) -> str:
        """Its name in Python and in files of settings."""
        return self.name.lstrip("-").replace("-", "_")


def _switch(name: str, default: bool, help_text: str) -> Flag:
    """A flag `--NAME` with its opposite, `--no-NAME`."""
    shown = f"{help_text} (default: {'yes' if default else 'no'})"
    return Flag(f"--{name}", {"action": ActionYesNo(no_prefix="no-"), "default": default, "help": shown})


KEEP_ATTENTION = _switch("keep-attention", False, "let no block lose all of its attention, which vLLM wants")
FIT_DATA = _switch("fit-data", False, "scale the stages' tokens down to the text, where it is too little")
QUIET = Flag("--quiet", {"action": "store_true", "help": "tell nothing on standard error but why it failed"})
LOG_FILE = Flag("--log-file", {"type": str | None, "help": "append what is told and measured to a file, as JSON lines"})
REPORTING = (QUIET, LOG_FILE)  # which every command has
CHAT_TEMPLATE = Flag(
    "--chat-template",
    {"action": "store_true", "help": "ask tasks through the chat template, examples as turns"},
)
VERIFY = _switch("verify", True, "load an hf export in a fresh process without darwinlm and compare its logits")


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        settings: classes whose fields are its flags; an instance of each is what `function` is called with.
        function: `module:name` under `darwinlm.commands`, imported once the command runs, for torch is slow to import.
        positional: the argument without a flag, and its help.
        fixed: settings that are no flags of this command.
        defaults: defaults that differ from those of the settings.
        flags: further flags. Those that are no field of the settings are keyword arguments of `function`.
        arguments: further keyword arguments of `function`.
        shown: settings that `--help` shows; `--help-all` shows all. Nothing here: all are shown.
        presets: the folder of the settings that `--preset` names, if there are any.
        recipe: whether `--config` reads settings from a file.
        renamed: settings by the names that their flags have instead.
    """

    name: str
    summary: str
    settings: tuple[type, ...]
    function: str
    positional: tuple[str, str] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[Flag, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    presets: Path | None = None
    recipe: bool = True
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> tuple[str, ...]:
        """The names of its own arguments, some of which may be fields of the settings."""
        return (*(flag.argument for flag in (*self.flags, *REPORTING)), *(self.positional or ())[:1])


def _compression(name: str, summary: str, until: str = "report", **others: Any) -> Command:
    """A command that runs the stages of a run up to `until`."""
    settings: dict[str, Any] = {
        "positional": ("model", DENSE_MODEL),
        "flags": (VERIFY, KEEP_ATTENTION, FIT_DATA),
        "arguments": {"until": until},
        "shown": ("target", "target_level", "seed", "device", "dtype", "genome", "fit_data"),
        "presets": PRESETS,
    }
    return Command(name, summary, (RunConfig,), "compress:run", **settings | others)


DEMO_DEFAULTS = {key: value for key, value in dataclasses.asdict(DEMO).items() if key not in ("model", "data")}
COMMANDS = (
    _compression("compress", "everything, from a model and text to a smaller model; stops and resumes anywhere"),
    _compression("database", "only measure the model and build its database of levels", until="database"),
    _compression("search", "the database, then the search for the best genome", until="search"),
    _compression(
        "demo",
        "the same as compress, on a real model and corpus that come as packages",
        positional=None,
        fixed={"model": DEMO.model, "data": DEMO.data},
        defaults=DEMO_DEFAULTS,
    ),
    Command(
        "train",
        "a pruned model on text, alone or with the dense model as its teacher; stops and resumes anywhere",
        (TrainConfig,),
        "train:train",
        positional=("model", "a run directory, an export, or a dense model as for compress"),
        flags=(VERIFY,),
        shown=("tokens", "teacher", "seed", "device", "cache"),
    ),
    Command(
        "gradual",
        "a recipe: a model pruned and trained, in one stage or several; stops and resumes anywhere",
        (GradualConfig,),
        "gradual:gradual",
        flags=(VERIFY,),
        presets=RECIPES,
        shown=("model", "stages", "seed", "device", "cache"),
    ),
    Command(
        "plan",
        "what a run on a model takes on a machine, from its config alone: parameters, time, memory and disk",
        (GradualConfig, PlanConfig),
        "plan.show:plan_command",
        positional=("model", "a hub id, a directory or a file with a config, or smollm2-135m"),
        fixed={"verify": True},
        defaults={"data": "-", "out": "-"},  # which a plan does not read
        flags=(
            Flag("--target", {"type": str | None, "help": "one pruning to this size, as for compress: memory=3GB"}),
            Flag("--target-level", {"type": float | None, "help": "one pruning to this uniform level"}),
            Flag("--device", {"type": str, "default": "auto", "help": PLAN_DEVICE}),
        ),
        shown=("target", "target_level", "stages", "device"),
        presets=RECIPES,
    ),
    Command(
        "export",
        "a run's model, or a model directory, in another form",
        (ExportConfig,),
        "export:export_command",
        positional=("source", "a run directory, an export or a dense model directory"),
        flags=(
            Flag(
                "--out",
                {"type": str, "required": True, "help": "a new directory, or for gguf a file named *.gguf"},
            ),
            VERIFY,
        ),
        recipe=False,
    ),
    Command(
        "evaluate",
        "any model by one protocol: perplexity, KL, tasks, what it writes, and speed beside the dense one",
        (EvaluateConfig, SpeedConfig),
        "evaluate:evaluate",
        positional=("model", "a run or training directory, an export, or a dense model"),
        flags=(
            Flag("--speed", {"action": "store_true", "help": "time prefill and decoding; needs --against"}),
            Flag("--generation", {"action": "store_true", "help": "what greedy continuations repeat, and get right"}),
            Flag("--draft", {"action": "store_true", "help": "what the model is worth as the draft of the dense one"}),
            CHAT_TEMPLATE,
        ),
    ),
    Command(
        "frontier",
        "a model at each of several sizes over one database, to choose a size; stops and resumes anywhere",
        (FrontierConfig,),
        "frontier:frontier",
        positional=("model", DENSE_MODEL),
        flags=(
            Flag(
                "--targets",
                {
                    "type": str,
                    "nargs": "+",
                    "metavar": "TARGET",
                    "default": [],
                    "help": "sizes, each as for compress --target; if none are given, --sizes of them",
                },
            ),
            Flag(
                "--formats",
                {
                    "nargs": "+",
                    "metavar": "TYPE",
                    "choices": list(get_args(FileType)),
                    "default": [],
                    "help": "types of GGUF files in which every size and the dense model are judged as well",
                },
            ),
            Flag("--from", {"type": float, "default": 0.95, "help": "the share that the largest model keeps"}),
            Flag("--to", {"type": float, "default": 0.4, "help": "the share that the smallest model keeps"}),
            KEEP_ATTENTION,
            FIT_DATA,
            CHAT_TEMPLATE,
        ),
        renamed={"from": "largest", "to": "smallest"},
        shown=(
            "targets",
            "sizes",
            "from",
            "to",
            "formats",
            "seed",
            "device",
            "dtype",
            "memory",
            "tasks",
            "tasks_data",
            "limit",
        ),
    ),
    Command(
        "compare",
        "ways to choose what is removed, each at several sizes over one database; stops and resumes anywhere",
        (CompareConfig,),
        "compare:compare",
        positional=("model", DENSE_MODEL),
        flags=(
            Flag(
                "--methods",
                {
                    "nargs": "+",
                    "metavar": "METHOD",
                    "choices": list(METHODS),
                    "default": list(DEFAULT_METHODS),
                    "help": "what each method removes: "
                    + "; ".join(f"{name}, {method.summary}" for name, method in METHODS.items()),
                },
            ),
            Flag(
                "--targets",
                {
                    "type": str,
                    "nargs": "+",
                    "metavar": "TARGET",
                    "default": list(CompareConfig.targets),
                    "help": "shares of the dense model's parameters that are kept",
                },
            ),
            CHAT_TEMPLATE,
        ),
        shown=("methods", "targets", "seed", "device", "dtype", "tasks", "tasks_data", "limit"),
    ),
)


class _HelpAll(argparse._HelpAction):
    def __call__(self, parser: Any, *others: Any) -> None:
        parser.shown = ()
        super().__call__(parser, *others)


class Parser(ArgumentParser):
    """A parser of flags with dashes for fields with underscores, whose errors are one sentence.

    Attributes:
        shown: the settings that `--help` shows beside positional arguments; all of them if there are none here.
    """

    shown: tuple[str, ...] = ()

    def __init__(self, **settings: Any):
        super().__init__(print_config="--print-config", allow_abbrev=False, **settings)

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> Any:
        """Add a class as in the parent; lists of dataclasses get a default that `--print-config` can write."""
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            if isinstance(action.default, tuple) and any(map(dataclasses.is_dataclass, action.default)):
                action.default = [dataclasses.asdict(item) for item in action.default]
        return added

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument as in the parent, with dashes for underscores in its flag."""
        return super().add_argument(*(a.replace("_", "-") if a.startswith("--") else a for a in args), **kwargs)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help, without the settings that are not shown."""
        hidden = [a for a in self._actions if self.shown and a.option_strings and a.dest not in self.shown]
        texts, groups = [action.help for action in hidden], self._action_groups
        for action in hidden:
            action.help = argparse.SUPPRESS
        self._action_groups = [g for g in groups if any(a.help != argparse.SUPPRESS for a in g._group_actions)]
        try:
            return super().format_help(*args, **kwargs)
        finally:
            self._action_groups = groups
            for action, text in zip(hidden, texts, strict=True):
                action.help = text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2 and one sentence on standard error."""
        parser: ArgumentParser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        prog = prog if prog.startswith(PROG) else PROG  # the parser of a list's item has another
        missing = re.search(r"required: (\w+)\.", message)  # of the command; the parser above it says so
        if missing:
            prog, message = f"{PROG} {missing[1]}", re.sub(r"(\w+)\.(\w+)", _as_typed, message)
        unknown = re.search(r"unrecognized arguments: (--[\w.-]+)", message)
        if unknown:
            message = f"{prog} has no flag {unknown[1]}{_closest(unknown[1], parser)}"
        message = re.sub(r'Parser key "([^"]+)":', lambda key: f"--{key[1].replace('_', '-')}:", message)
        message = _in_words(" ".join(message.split()))
        everything = "--help" if prog == PROG else "--help-all"
        sys.exit(_fail(f"{message}; {prog} {everything} lists what there is", 2))


NOUNS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
    "tuple": "a list such as [a,b]", "NoneType": "null",
}  # fmt: skip


def _in_words(message: str) -> str:
    """A message on a setting's value without the names of Python's types."""
    said = re.fullmatch(
        r"(--[\w.-]+): ((?:Expected a|Does not validate|Not a valid subclass) .*?) ?(?:Got|Given) value: (.*?)"
        r"(?: Subclass types .*)?",
        message,
    )
    if said is None:
        return message
    flag, expected, found = said.groups()
    nouns = []
    for choices, name in re.findall(r"Expected a (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>)", expected):
        nouns.append(_either(re.findall(r"'([^']*)'", choices)) if choices else NOUNS.get(name, name))
    return f"{flag}: expected {_either(nouns) or 'a mapping of settings'}, found {found}"


def _either(words: Sequence[str]) -> str:
    """Words with commas and an "or" between them."""
    *others, last = words or [""]
    return f"{', '.join(others)} or {last}" if others else last


def _closest(flag: str, parser: ArgumentParser) -> str:
    """The flag that was probably meant, if one is close, as the end of a clause."""
    close = get_close_matches(flag, parser._option_string_actions, n=1)
    return f" (the closest is {close[0]})" if close else ""


def _as_typed(key: re.Match[str]) -> str:
    """How `command.setting` is written on the command line."""
    command, name = key.groups()
    return name.upper() if name in ("model", "source") and command != "gradual" else f"--{name.replace('_', '-')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 if done, 1 if it failed, 2 for arguments that cannot be used, 130 if interrupted.

    Raises:
        SystemExit: from the parser, after `--help` (0) or for arguments that it cannot read (2).
    """
    try:
        code = _outcome(arguments)
    except Exception as error:
        if not _among_others():
            raise
        if isinstance(error, BrokenPipeError):  # as the program ends alone
            code = 128 + signal.SIGPIPE
        else:
            traceback.print_exc()
            code = 1
    if code and _among_others():
        from darwinlm.runtime.parallel import leave

        leave(code)
    return code


def _outcome(arguments: Sequence[str] | None) -> int:
    try:
        arguments = _files_first(_encoded(sys.argv[1:] if arguments is None else arguments))
        parser = _parser(arguments)
        values = parser.instantiate(parser.parse_args(arguments))
        _run(next(command for command in COMMANDS if command.name == values.command), values[values.command])
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        raise
    except (DarwinError, OSError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, 130)
    return 0


def _among_others() -> bool:
    """Whether this is one of several processes. It does not wait for torch to be loaded to say so."""
    if "darwinlm.runtime.parallel" not in sys.modules:
        return False
    from darwinlm.runtime.parallel import connected

    return connected()


def _encoded(arguments: Sequence[str]) -> Sequence[str]:
    """The arguments, if files of settings can hold them."""
    for argument in arguments:
        if not is_utf8(argument):
            raise UsageError(f"expected arguments in UTF-8, found {argument!a}; rename what it names")
    return arguments


def _files_first(arguments: Sequence[str]) -> list[str]:
    """The command, then the files of `--preset` and `--config`, then the rest: later wins, and flags win over files."""
    of_flag: dict[str, list[str]] = {"--preset": [], "--config": []}
    rest: list[str] = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        flag = next((flag for flag in of_flag if flag in (argument.partition("=")[0], before)), None)
        (rest if flag is None else of_flag[flag]).append(argument)
    names = [f"{name.removeprefix('--preset=')}.yaml" for name in of_flag["--preset"]]
    files = [folder / name for name in names for folder in (PRESETS, RECIPES)]
    given = [f"--config={path}" for path in files if path.is_file()] + of_flag["--config"]
    typed = {argument.partition("=")[0] for argument in rest}
    configs = [argument.removeprefix("--config=") for argument in of_flag["--config"] if argument != "--config"]
    _check_files(configs, rest)
    # A size that is typed replaces that of a file, which may be given in the other way.
    replaced = [other for flag, other in (SIZES, SIZES[::-1]) if given and flag in typed and other not in typed]
    return [*rest[:1], *of_flag["--preset"], *given, *(f"{other}=null" for other in replaced), *rest[1:]]


def _check_files(paths: Sequence[str], arguments: Sequence[str]) -> None:
    """Raise `UsageError` if a file of settings holds anything but those of the command: the parser would import it."""
    for command in [command for command in COMMANDS if command.recipe and command.name in arguments][:1]:
        for path in paths:
            plain = read_plain(Path(path), "--config")
            check_known(path, plain, *command.settings, others=("preset", *command.own))


def _parser(arguments: Sequence[str]) -> ArgumentParser:
    parser = Parser(prog=PROG, description=DESCRIPTION, version=version("darwinlm"))
    commands = parser.add_subcommands(required=True, dest="command")
    for command in COMMANDS:
        # Flags are slow to add, so only those of a command that is named are.
        of_command = _command_parser(command) if command.name in arguments else Parser(description=command.summary)
        commands.add_subcommand(command.name, of_command, help=command.summary)
    return parser


def _command_parser(command: Command) -> Parser:
    epilog = "--help-all shows every setting." if command.shown else None
    parser = Parser(description=command.summary, epilog=epilog)
    parser.add_argument("--help-all", action=_HelpAll, help="show every setting and exit")
    if command.positional:
        name, help_text = command.positional
        parser.add_argument(name, type=str, help=help_text)
    if command.presets:
        names = sorted(path.stem for path in command.presets.glob("*.yaml"))
        parser.add_argument("--preset", choices=names, help="settings that come with darwinlm; --config wins over it")
    if command.recipe:
        parser.add_argument("--config", action="config", help=CONFIG_HELP)
    for flag in (*command.flags, *REPORTING):
        parser.add_argument(flag.name, **flag.parser_arguments)
    separate = {*command.own, *command.fixed, *command.renamed.values()}
    for settings in command.settings:
        names = {each.name for each in dataclasses.fields(settings)}
        parser.add_class_arguments(settings, skip=separate & names)
    parser.set_defaults(dict(command.defaults))
    parser.shown = (*ALWAYS_SHOWN, *command.shown) if command.shown else ()
    return parser


def _run(command: Command, values: Namespace) -> None:
    """Call the function of a command with its settings, and with the values that are no field of them."""
    given = vars(values) | dict(command.fixed)
    quiet, file = (given.pop(flag.argument) for flag in REPORTING)
    with reporting(quiet, _log_file(file)):
        say(f"{command.name}: loading torch and transformers")
        _call(command, given)


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Let an interruption end the program where it is: modules that are being loaded may swallow an exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _end(_signal: int, _frame: FrameType | None) -> NoReturn:
    os._exit(_fail(INTERRUPTED, 130))


def _log_file(name: str | None) -> Path | None:
    """The file that is to be appended to. Raises `UsageError` if it cannot be."""
    if name is None:
        return None
    try:
        with Path(name).open("a", encoding="utf-8"):
            return Path(name).absolute()
    except OSError as error:
        raise UsageError(f"--log-file: cannot write to {name}: {error.strerror}; name another file") from None


def _call(command: Command, given: dict[str, Any]) -> None:
    module, _, name = command.function.partition(":")
    # torch and transformers come with it, which nobody should wait for to read --help.
    with _ending_at_once():
        function: Callable[..., object] = getattr(import_module(f"darwinlm.commands.{module}"), name)
    given |= {setting: given.pop(flag) for flag, setting in command.renamed.items()}
    if given.get("target") is not None and given.get("target_level") == command.defaults.get("target_level"):
        given["target_level"] = None  # the size that the demo has by default gives way to another
    settings = [_settings(kind, given) for kind in command.settings]
    fields = {each.name for kind in command.settings for each in dataclasses.fields(kind)}
    others = {name: given[name] for name in command.own if name in given and name not in fields}
    function(*settings, **others, **command.arguments)


def _settings(kind: type, given: Mapping[str, Any]) -> Any:
    """An instance of `kind` from what was given; lists of single values are tuples in it."""
    values = {each.name: given[each.name] for each in dataclasses.fields(kind) if each.name in given}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _fail(message: str, code: int) -> int:
    print(f"darwinlm: {' '.join(message.split())}", file=sys.stderr)
    return code
