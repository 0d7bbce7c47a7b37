"""The command line of a script, built from its class, and the errors that it ends with."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from utils import InputError, check, is_lack_of_memory, is_mendable, leave_processes, reason_of

logger = logging.getLogger(__name__)

TYPE_WORDS = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    Path: "path",
    type(None): "null",
}
GENERAL_OPTIONS = {
    "config": ("--config FILE", "YAML file with options; those after it on the command line win."),
    "print_config": ("--print_config", "Print all options as such a file and exit."),
    "debug": ("--debug", "Log more, with the traceback of an error."),
    "help": ("-h, --help", "Show this help and exit."),
}
HELP_COLUMN = 26


@dataclass(frozen=True)
class _Given:
    """An option that the user gave.

    Args:
        name: Its name; that of a part of a dataclass is dotted.
        value: Text, or what the YAML file holds; None where nothing follows the option.
        file: Where it stands; None means on the command line.
    """

    name: str
    value: Any
    file: Path | None = None

    @property
    def label(self) -> str:
        """The option as messages call it."""
        return f"{self.name} in {self.file}" if self.file else f"--{self.name}"

    def is_default(self, options: dict[str, Any]) -> bool:
        """Whether it stands in a file as it would be without it, as in one that ``--print_config`` wrote."""
        default = getattr(options.get(self.name), "default", None)
        return self.file is not None and str(self.value) == str(default)


def parse_command_line(
    cls: type,
    *callables: Callable | str,
    argv: list[str] | None,
    skip: Iterable[str] = (),
    registries: Mapping[str, Iterable[str]] | None = None,
) -> tuple[list[dict[str, Any]], set[str]]:
    """Options from the signatures of a class and of what takes the arguments of one run; help from their docstrings.

    ``--config FILE`` reads options from a YAML file, ``--print_config`` prints one to start from, and ``--debug`` logs
    more. What cannot be used ends in one line and exit status 2.

    Args:
        cls: Class whose constructor takes the options.
        callables: Names of its methods, or functions, that take further options; one that several of them take is
            one option.
        argv: Words of the command line; None takes those of the process.
        skip: Arguments that are no options.
        registries: {option: names that it takes}, for the help.

    Returns:
        Keyword arguments for the constructor and for each of the callables, and the names of the options that the user
        gave, on the command line or, other than the default, in a file (``augmentation`` for any part of it).
    """
    from jsonargparse import ArgumentError

    words = list(sys.argv[1:] if argv is None else argv)
    parser, names = _build_parser(cls, callables, set(skip))
    options = _options_of(parser)
    if {"-h", "--help"} & set(words):
        print(_format_help(parser.prog, _first_line(cls), options, registries or {}))
        raise SystemExit(0)
    if "--debug" in words:
        logger.setLevel(logging.DEBUG)
    words = list(_join_paths((word for word in words if word != "--debug"), options))
    given: list[_Given] = []
    try:
        for option in _read_given(words, options):
            _check_given(option, options)
            is_again = any((option.name, option.file) == (other.name, other.file) for other in given)
            check(
                not is_again or not _takes_paths(option.name, options),
                f"{option.label} is given twice; put all paths behind one",
            )
            given.append(option)
        parsed = parser.parse_args(words)
    except (InputError, ArgumentError) as error:
        print(f"{parser.prog}: {_one_line(str(error), given, options)}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        values = vars(parser.instantiate_classes(parsed))
    except ValueError as error:  # jsonargparse wraps what a dataclass says of its values
        raise _innermost(error) from None
    told = [option.name for option in given if not option.is_default(options)]
    given_names = _top_names(told) - set(GENERAL_OPTIONS)
    return [{name: values[name] for name in wanted} for wanted in names], given_names


def _innermost(error: BaseException) -> BaseException:
    """What an error was raised from in the end."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return error


def _top_names(names: Iterable[str]) -> set[str]:
    """Names of options, without the part that follows the name of a dataclass."""
    return {name.partition(".")[0] for name in names}


def _build_parser(cls: type, callables: Iterable[Callable | str], skip: set[Any]) -> tuple[Any, list[set[str]]]:
    """jsonargparse's parser, and the names of the options that the class and each of the callables take."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")  # brings --print_config
    names = [_top_names(parser.add_class_arguments(cls, skip=skip))]
    for call in callables:
        taken = skip.union(*names)
        if isinstance(call, str):
            added = parser.add_method_arguments(cls, call, skip=taken)
            signature = inspect.signature(getattr(cls, call))
        else:
            added = parser.add_function_arguments(call, skip=taken)
            signature = inspect.signature(call)
        names.append(_top_names(added) | (set(signature.parameters) & (taken - skip)))
    return parser, names


def _type_of(action: Any) -> Any:
    """The annotation that an option was made from."""
    return getattr(action, "_typehint", None) or getattr(action, "basetype", None)


def _optional_dataclasses(hint: Any) -> list[Any]:
    """The dataclasses in a union, such as ``Augmentation | None``."""
    return [kind for kind in get_args(hint) if get_origin(hint) in (Union, UnionType) and is_dataclass(kind)]


def _options_of(parser: Any) -> dict[str, Any]:
    """jsonargparse's action for each option by its name; the parts of a dataclass follow it, as ``augmentation.zoom``.

    Of an optional dataclass jsonargparse's parser knows no parts, so they come from a parser of its own.
    """
    from jsonargparse import ArgumentParser

    options = {}
    for action in parser._actions:
        name = action.dest
        if name in GENERAL_OPTIONS or name.endswith(".help"):
            continue
        options[name] = action
        for kind in _optional_dataclasses(_type_of(action)):
            parts = ArgumentParser(add_help=False)
            parts.add_class_arguments(kind, name, default=action.default)
            options |= {part: value for part, value in _options_of(parts).items() if part != name}
    return options


# ---- what the user gave


def _join_paths(words: Iterable[str], options: dict[str, Any]) -> Iterator[str]:
    """The words of the command line, with the several that may follow an option of paths as one list."""
    paths: list[str] | None = None
    for word in [*words, "--"]:
        if paths is not None and not word.startswith("--"):
            paths.append(word)
            continue
        if paths:
            yield _as_list(paths)
        name, is_joined, value = word.removeprefix("--").partition("=")
        paths = [] if _takes_paths(name, options) else None
        if paths is not None and is_joined:
            paths, word = [value], f"--{name}"
        if word != "--":
            yield word


def _takes_paths(name: str, options: dict[str, Any]) -> bool:
    """Whether an option takes several paths."""
    kind = _type_of(options[name]) if name in options else None
    return list[Path] in (kind, *get_args(kind))


def _as_list(paths: list[str]) -> str:
    """Paths as one list; null, and what is written as a list already, stay."""
    is_list = paths[0].startswith("[") and not Path(paths[0]).exists()
    return paths[0] if len(paths) == 1 and (is_list or paths[0] == "null") else json.dumps(paths)


def _read_given(words: Sequence[str], options: dict[str, Any]) -> Iterator[_Given]:
    """The options on the command line and in the files of ``--config``."""
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        if not re.match(r"--\w[^\s=]*(=|$)", word):
            continue
        name, is_joined, joined = word.removeprefix("--").partition("=")
        value = joined if is_joined else None if following.startswith("--") else following
        yield from _split(_Given(name, value), options)
        if name == "config" and value is not None:
            yield from _read_file(Path(value), options)


def _read_file(path: Path, options: dict[str, Any]) -> Iterator[_Given]:
    """The options in a YAML file, and in one that it names itself as its config."""
    from jsonargparse import get_loader

    try:
        content = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config: {error.strerror}: {path}") from error
    except Exception as error:  # whatever PyYAML raises
        raise InputError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    check(isinstance(content, dict) and bool(content), f"{path} must hold lines like 'name: value'")
    for name, value in content.items():
        if name == "config":
            yield from _read_file(path.parent / str(value), options)
        else:
            yield from _split(_Given(str(name), value, path), options)


def _split(given: _Given, options: dict[str, Any]) -> Iterator[_Given]:
    """A dataclass's value as its parts; anything else as it is. A trailing + of jsonargparse means to append."""
    from jsonargparse import get_loader

    given = replace(given, name=given.name.removesuffix("+"))
    value = given.value
    if any(name.startswith(f"{given.name}.") for name in options):
        with suppress(Exception):
            value = get_loader("yaml")(value) if isinstance(value, str) else value
        if isinstance(value, dict) and value:
            for part, part_value in value.items():
                yield from _split(_Given(f"{given.name}.{part}", part_value, given.file), options)
            return
    yield given


def _check_given(given: _Given, options: dict[str, Any]) -> None:
    """Refuses an option that does not exist, and one without a value."""
    known, dashes = ([*options, *GENERAL_OPTIONS], "--") if given.file is None else ([*options], "")
    if given.name not in known:
        nearest = _nearest(given.name, known)
        advice = f"; did you mean {dashes}{nearest}?" if nearest else ""
        raise InputError(f"there is no option {given.label}{advice} (--help lists all)")
    if given.file is not None and isinstance(given.value, str) and _takes_paths(given.name, options):
        takes_one = {Path, str} & {*get_args(_type_of(options[given.name]))}
        check(bool(takes_one), f"{given.label} must be a list of paths: [{given.value}]")
    if given.value is None and given.name != "print_config":
        hint = _type_of(options.get(given.name)) or Path  # of --config
        is_null = given.file is not None and type(None) in get_args(hint)
        check(is_null, f"{given.label} needs a value: {_type_words(hint)}")


def _nearest(name: str, known: Sequence[str]) -> str | None:
    """The name that a misspelt one probably stands for; also one that it abbreviates or forgets to qualify."""

    def likeness(other: str) -> tuple[float, float]:
        """Of the best part of both names, then of the whole names."""
        whole = SequenceMatcher(None, name, other).ratio()
        leaf = SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return max(whole, leaf, 0.9 * other.startswith(name)), whole

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= 0.6 else None


def _one_line(message: str, given: Sequence[_Given], options: dict[str, Any]) -> str:
    """An error message of jsonargparse as a person reads it; one of ours stays."""
    name = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    faulty = [option for option in given if option.name == name in options]
    if not faulty:
        return " ".join(re.sub(r'Parser key "([^"]+)"', r"--\1", message).split())
    # Of an option that stands in a file and on the command line, the one whose value the message tells.
    option = max(faulty, key=lambda option: str(option.value) in message)
    words = _type_words(_type_of(options[name]))
    article = "one of " if words.startswith("{") else "a " if re.match("whole|number|list", words) else ""
    example = "; write lists like '[1,2,3]'" if "list" in words else ""
    return f"{option.label} must be {article}{words}, not {option.value!r}{example}"


# ---- help


def _type_words(hint: Any) -> str:
    """An annotation as a person reads it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin in (Union, UnionType):
        said = {str: Path in parts, Path: list[Path] in parts}  # by another part of the union
        return " or ".join(_type_words(part) for part in parts if not said.get(part))
    if is_dataclass(hint):
        return f"'{{{fields(hint)[0].name}: ...}}'"
    if hint == list[Path]:
        return "one or more paths"
    if origin and issubclass(origin, Iterable):
        count = f"{len(parts)} " if origin is tuple and Ellipsis not in parts else ""
        return f"list of {count}{_type_words(parts[0])}" + "s" * (parts[0] in (int, float, str, Path))
    return TYPE_WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _default_words(default: Any) -> str:
    """A default as the user would write it."""
    return default if isinstance(default, str) else json.dumps(default, separators=(",", ":"), default=str)


def _first_line(documented: Any) -> str:
    """The first line of a docstring."""
    return (documented.__doc__ or "").strip().split("\n")[0]


def _option_help(name: str, options: dict[str, Any], registries: Mapping[str, Iterable[str]]) -> str:
    """What an option does, its type or the names that it takes, and its default."""
    action = options[name]
    text = f"{action.container.title.removesuffix('.')}." if hasattr(action, "basetype") else action.help or ""
    hint = Literal[*registries[name]] if name in registries else _type_of(action)
    notes = [_type_words(hint)] if hint else []
    if any(other.startswith(f"{name}.") for other in options):
        notes.append("parts below" if action.default else "default null, parts below")
    else:
        notes.append("required" if action.required else f"default {_default_words(action.default)}")
    return f"{text} ({', '.join(notes)})".strip()


def _format_help(prog: str, description: str, options: dict[str, Any], registries: Mapping[str, Iterable[str]]) -> str:
    """The text of ``--help``: the options, a group for the parts of each dataclass, and what all scripts have."""
    groups: dict[str, list[tuple[str, str]]] = {"": []}
    for name in options:
        groups.setdefault(name.rpartition(".")[0], []).append((f"--{name}", _option_help(name, options, registries)))
    width = min(max(shutil.get_terminal_size().columns - 2, 60), 120)
    lines = [f"usage: {prog} [options]", "", *_wrap(description, width)]
    for parent, entries in groups.items():
        hint = _type_of(options.get(parent))
        kind = next(iter(_optional_dataclasses(hint)), hint)
        lines += ["", *_wrap(f"parts of --{parent}: {_first_line(kind)}" if parent else "options:", width)]
        lines += [line for entry in entries for line in _format_entry(*entry, width)]
    lines += ["", "general options:"]
    lines += [line for entry in GENERAL_OPTIONS.values() for line in _format_entry(*entry, width)]
    lines += ["", *_wrap("Lists are written in quotes: '[64,256,256]'; null stands for Python's None.", width)]
    return "\n".join(lines)


def _format_entry(option: str, text: str, width: int) -> list[str]:
    """An option and its help beside it, or below it where the option is long."""
    start, lines = f"  {option}  ", _wrap(text, width - HELP_COLUMN)
    if len(start) > HELP_COLUMN:
        lines = ["", *lines]
    rest = [" " * HELP_COLUMN + line for line in lines[1:]]
    return [(start.ljust(HELP_COLUMN) + lines[0]).rstrip(), *rest]


def _wrap(text: str, width: int) -> list[str]:
    """The lines of a docstring's text; no option is broken at a hyphen."""
    return textwrap.wrap(text.replace("``", ""), width, break_long_words=False, break_on_hyphens=False)


def refuse_options(names: Iterable[str], why: str) -> None:
    """Raises InputError where a user gave options that would be ignored."""
    if given := ", ".join(f"--{name}" for name in sorted(names)):
        raise InputError(f"{given} would be ignored: {why}")


def _hide_mendable(thrown: threading.ExceptHookArgs) -> None:
    """What a user can mend is raised again where its thread is waited for, such as TensorBoard's writer."""
    if thrown.exc_value is None or not is_mendable(thrown.exc_value):
        threading.__excepthook__(thrown)


def run_main(work: Callable[[list[str] | None], int], argv: list[str] | None) -> int:
    """Runs a script's work and returns its exit status.

    What the user can mend (InputError, UserError, OSError, a missing optional package, a lack of memory) ends in one
    clear line; with ``--debug`` its traceback stands above. Anything else is a bug and keeps its traceback.
    """
    first = os.environ.get("RANK", "0") == "0"  # of those that torchrun started; what it says is said once
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")  # to stderr
    logging.captureWarnings(True)
    logger.setLevel(logging.NOTSET)  # until parse_command_line meets --debug
    threading.excepthook = _hide_mendable
    try:
        status = work(argv)
        leave_processes()
        return status
    except KeyboardInterrupt as error:
        if first:
            logger.error("%s", error if str(error) else "interrupted; what is already written is complete")
        return getattr(error, "status", 130)
    except Exception as error:
        if not is_mendable(error):
            raise
        logger.debug("traceback", exc_info=True)
        logger.error("%s", reason_of(error) if is_lack_of_memory(error) else error)
        return 1
