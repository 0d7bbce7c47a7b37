"""Options, configuration files, help, and how a script ends."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from data import command_line
from data.command_line import parse_command_line, run_main
from utils import InputError, UserError


class Machine:
    """Makes things.

    Args:
        size: Three numbers (z, y, x).
        name: What it is called.
        model: Not for the command line.
    """

    def __init__(self, size: tuple[int, int, int] | None = (1, 2, 3), name: str = "m", model: object = None) -> None:
        self.size = size

    def run(self, steps: int = 5) -> None:
        """Runs it.

        Args:
            steps: How often.
        """


def paint(steps: int = 5, name: str = "m", colour: str = "red") -> None:
    """Paints it.

    Args:
        steps: How often.
        name: What it is called.
        colour: In which colour.
    """


@dataclass(frozen=True)
class Wheels:
    """What it rolls on.

    Args:
        number: How many.
        colours: Of each one.
    """

    number: int = 4
    colours: Sequence[str] = ("red", "blue")


@dataclass(frozen=True)
class Engine:
    """What drives it.

    Args:
        power: In kilowatts.
        cooled: Whether by ``water``.
    """

    power: float = 9.5
    cooled: bool = True


class Car:
    """Drives about.

    Args:
        wheels: On what it rolls.
        engine: By what it is driven; null takes none.
        spare: A second engine.
        fuel: What it takes.
        manual: Where it is described.
    """

    def __init__(
        self,
        wheels: Wheels = Wheels(3),
        engine: Engine | None = Engine(20.0),
        spare: Engine | None = None,
        fuel: Literal["oil", "gas"] = "oil",
        manual: str | Path | None = None,
    ) -> None: ...


def parse(*argv: str) -> list[dict]:
    return parse_command_line(Machine, "run", argv=list(argv), skip=["model"])[0]


def parse_car(*argv: str) -> tuple[dict, set[str]]:
    [options], given = parse_command_line(Car, argv=list(argv))
    return options, given


def failure(capsys: pytest.CaptureFixture, call: Callable, *argv: str) -> str:
    """The one line that a wrong command line ends in."""
    with pytest.raises(SystemExit) as exit_info:
        call(*argv)
    out, err = capsys.readouterr()
    assert (exit_info.value.code, out, err.count("\n")) == (2, "", 1)
    return err.strip().partition(": ")[2]


def help_of(capsys: pytest.CaptureFixture, call: Callable) -> str:
    with pytest.raises(SystemExit) as exit_info:
        call("--help")
    assert exit_info.value.code == 0
    return capsys.readouterr().out


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_options_are_split_between_constructor_and_method():
    assert parse("--name", "a", "--steps", "9") == [{"size": (1, 2, 3), "name": "a"}, {"steps": 9}]


def test_options_default_to_the_signatures():
    assert parse() == [{"size": (1, 2, 3), "name": "m"}, {"steps": 5}]


def test_class_alone_gives_one_set_of_options():
    [options], _ = parse_command_line(Machine, argv=["--name", "a"], skip=["model"])
    assert options == {"size": (1, 2, 3), "name": "a"}


def test_function_gives_options_like_a_method():
    (_, options), _ = parse_command_line(Machine, paint, argv=["--colour", "blue"], skip=["model"])
    assert options == {"steps": 5, "name": "m", "colour": "blue"}


def test_option_that_several_take_is_one_option():
    argv = ["--steps", "9", "--name", "a"]
    assert parse_command_line(Machine, "run", paint, argv=argv, skip=["model"])[0] == [
        {"size": (1, 2, 3), "name": "a"},
        {"steps": 9},
        {"steps": 9, "name": "a", "colour": "red"},
    ]


def test_skipped_argument_of_a_function_is_no_option():
    (_, options), _ = parse_command_line(Machine, paint, argv=[], skip=["model", "colour"])
    assert options == {"steps": 5, "name": "m"}


def test_list_option_is_written_in_brackets():
    assert parse("--size", "[96,96,96]")[0]["size"] == (96, 96, 96)


def test_null_option_is_none():
    assert parse("--size", "null")[0]["size"] is None


def test_config_file_gives_options(tmp_path):
    (tmp_path / "a.yaml").write_text("size: [4, 5, 6]\nsteps: 2\n")
    assert parse("--config", str(tmp_path / "a.yaml")) == [{"size": (4, 5, 6), "name": "m"}, {"steps": 2}]


def test_option_after_the_config_file_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 2\n")
    assert parse("--config", str(tmp_path / "a.yaml"), "--steps", "3")[1] == {"steps": 3}


def test_printed_config_starts_a_config_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse("--steps", "7", "--print_config")
    (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "a.yaml"))[1] == {"steps": 7}


def test_config_file_names_another_one_beside_it(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 2\nconfig: b.yaml\n")
    (tmp_path / "b.yaml").write_text("name: b\n")
    command_line = ["--config", str(tmp_path / "a.yaml")]
    (options, run_options), given = parse_command_line(Machine, "run", argv=command_line, skip=["model"])
    assert (options["name"], run_options["steps"], given) == ("b", 2, {"name", "steps"})


def test_parts_of_a_dataclass_change_alone():
    options, _ = parse_car("--wheels.number", "6", "--engine.cooled", "false", "--spare.power=1")
    assert options["wheels"] == Wheels(6, ["red", "blue"])
    assert (options["engine"], options["spare"]) == (Engine(20.0, False), Engine(1.0, True))


def test_null_takes_no_dataclass():
    assert parse_car("--engine", "null")[0]["engine"] is None


def test_printed_config_holds_all_options_and_no_other(capsys):
    with pytest.raises(SystemExit):
        parse_car("--engine.power", "7", "--debug", "--print_config")
    expected = {"wheels", "engine", "spare", "fuel", "manual"}
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line[0].isalpha()} == expected


@pytest.mark.parametrize(
    ("argv", "nearest"),
    [
        (["--wheals", "3"], "wheels"),
        (["--fuell=oil"], "fuel"),
        (["--engine.pover", "3"], "engine.power"),
        (["--engin.power", "3"], "engine.power"),
        (["--engine_power", "3"], "engine.power"),
        (["--wheels.numbr", "3"], "wheels.number"),
        (["--colours", "[red]"], "wheels.colours"),  # the part's name alone
        (["--fue", "oil"], "fuel"),  # argparse would take an abbreviation
        (["--man", "a.txt"], "manual"),
        (["--engine.help"], "help"),
        (["--confg", "a.yaml"], "config"),
    ],
)
def test_misspelt_option_is_told_with_the_nearest_one(argv, nearest, capsys):
    name = argv[0].partition("=")[0]
    expected = f"there is no option {name}; did you mean --{nearest}? (--help lists all)"
    assert failure(capsys, parse_car, *argv) == expected


def test_misspelt_part_in_braces_is_told(capsys):
    assert "no option --engine.pover; did you mean --engine.power?" in failure(capsys, parse_car, "--engine={pover: 1}")


def test_option_like_no_other_is_told_alone(capsys):
    assert failure(capsys, parse_car, "--xyz", "1") == "there is no option --xyz (--help lists all)"


@pytest.mark.parametrize(
    ("text", "name", "nearest"),
    [
        ("wheals: 3\n", "wheals", "wheels"),
        ("engine:\n  pover: 3\n", "engine.pover", "engine.power"),
        ("wheels: {numbr: 3}\n", "wheels.numbr", "wheels.number"),
        ("fue: oil\n", "fue", "fuel"),
    ],
)
def test_misspelt_key_of_a_config_file_is_told(text, name, nearest, tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    expected = f"there is no option {name} in {path}; did you mean {nearest}? (--help lists all)"
    assert failure(capsys, parse_car, "--config", str(path)) == expected


@pytest.mark.parametrize("name", ["debug", "help", "print_config"])
def test_general_option_is_no_key_of_a_config_file(name, tmp_path, capsys):
    (tmp_path / "a.yaml").write_text(f"{name}: true\n")
    assert f"there is no option {name} in" in failure(capsys, parse_car, f"--config={tmp_path / 'a.yaml'}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--wheels.number", "abc"], "--wheels.number must be a whole number, not 'abc'"),
        (["--engine.power=abc"], "--engine.power must be a number, not 'abc'"),
        (["--engine.cooled", "2"], "--engine.cooled must be true or false, not '2'"),
        (["--engine", "abc"], "--engine must be '{power: ...}' or null, not 'abc'"),
        (["--fuel", "coal"], "--fuel must be one of {oil,gas}, not 'coal'"),
        (["--fuel"], "--fuel needs a value: {oil,gas}"),
        (["--fuel", "--manual", "a"], "--fuel needs a value: {oil,gas}"),
        (["--config"], "--config needs a value: path"),
    ],
)
def test_value_of_a_wrong_type_is_told_in_one_line(argv, message, capsys):
    assert failure(capsys, parse_car, *argv) == message


@pytest.mark.parametrize("value", ["[1,2]", "96", "[1,2,a]"])
def test_wrong_list_is_told_with_how_to_write_one(value, capsys):
    words = "a list of 3 whole numbers or null"
    assert (
        failure(capsys, parse, "--size", value) == f"--size must be {words}, not '{value}'; write lists like '[1,2,3]'"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: abc\n", "steps in {} must be a whole number, not 'abc'"),
        (
            "size: [1, 2]\n",
            "size in {} must be a list of 3 whole numbers or null, not [1, 2]; write lists like '[1,2,3]'",
        ),
        ("steps: null\n", "steps in {} needs a value: whole number"),
        ("# steps: 3\n", "{} must hold lines like 'name: value'"),
        ("just words\n", "{} must hold lines like 'name: value'"),
    ],
)
def test_wrong_config_file_is_told_in_one_line(text, message, tmp_path, capsys):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert failure(capsys, parse, "--config", str(path), "--steps", "3") == message.format(path)


def test_file_that_is_no_yaml_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("steps: [\n")
    assert failure(capsys, parse, "--config", str(tmp_path / "a.yaml")).startswith(f"{tmp_path / 'a.yaml'} is no YAML")


def test_missing_config_file_is_told_in_one_line(capsys):
    assert failure(capsys, parse, "--config", "none.yaml") == "--config: No such file or directory: none.yaml"


@pytest.mark.parametrize("argv", [["stray"], ["-steps", "3"], ["--model", "a"], ["--print_config=all"]])
def test_what_is_no_option_ends_in_one_line(argv, capsys):
    assert failure(capsys, parse, *argv)


def test_option_before_and_after_its_value_in_a_file_are_both_checked(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("steps: 3\n")
    assert failure(capsys, parse, f"--config={tmp_path / 'a.yaml'}", "--steps", "x").startswith("--steps must be")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], set()),
        (["--fuel", "oil"], {"fuel"}),  # the default, but given
        (["--engine.power", "3", "--engine.cooled=true"], {"engine"}),
        (["--wheels.number", "3"], {"wheels"}),
        (["--engine", "null"], {"engine"}),
        (["--wheels.colours+", "green"], {"wheels"}),
        (["--debug", "--manual", "a.txt"], {"manual"}),
    ],
)
def test_given_options_are_told(argv, expected):
    assert parse_car(*argv)[1] == expected


def test_options_given_in_a_file_are_told(tmp_path):
    (tmp_path / "a.yaml").write_text("engine: {power: 3}\nspare:\n")
    assert parse_car("--config", str(tmp_path / "a.yaml"), "--fuel", "gas")[1] == {"engine", "fuel"}


@pytest.mark.parametrize(("argv", "level"), [(["--debug"], logging.DEBUG), ([], logging.NOTSET)])
def test_debug_option_turns_debugging_on(argv, level):
    try:
        parse(*argv)
        assert command_line.logger.level == level
    finally:
        command_line.logger.setLevel(logging.NOTSET)


class Train:
    """Joins wagons."""

    def __init__(self, wagons: list[Path] | None = None, color: str = "red") -> None: ...


def test_paths_given_twice_are_refused_and_not_dropped(capsys):
    def parse_train(*argv: str) -> list[dict]:
        return parse_command_line(Train, argv=list(argv))[0]

    assert parse_train("--wagons", "a", "b") == [{"wagons": [Path("a"), Path("b")], "color": "red"}]
    message = failure(capsys, parse_train, "--wagons", "a", "--wagons", "b")
    assert "--wagons is given twice; put all paths behind one" in message


def test_one_path_in_a_file_is_told_to_be_a_list(tmp_path, capsys):
    path = tmp_path / "f.yaml"
    path.write_text("wagons: a.nii\n")
    message = failure(capsys, lambda *argv: parse_command_line(Train, argv=list(argv)), "--config", str(path))
    assert f"wagons in {path} must be a list of paths: [a.nii]" in message


def test_one_path_in_a_file_is_taken_where_one_may_stand_alone(tmp_path):
    class Ship:
        """Carries goods."""

        def __init__(self, holds: str | Path | list[Path] = "a") -> None: ...

    path = tmp_path / "f.yaml"
    path.write_text("holds: b\n")
    [options], given = parse_command_line(Ship, argv=["--config", str(path)])
    assert (str(options["holds"]), given) == ("b", {"holds"})


def test_defaults_in_a_file_are_not_given(tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("wagons: null\ncolor: red\n")
    assert parse_command_line(Train, argv=["--config", str(path)])[1] == set()
    path.write_text("color: blue\n")
    assert parse_command_line(Train, argv=["--config", str(path)])[1] == {"color"}
    assert parse_command_line(Train, argv=["--color", "red"])[1] == {"color"}


def test_help_tells_what_the_docstrings_tell(capsys):
    text = help_of(capsys, parse)
    assert all(words in text for words in ("Makes things.", "Three numbers (z, y, x).", "How often.", "'[64,256,256]'"))


@pytest.mark.parametrize("columns", [20, 80, 120, 300])
def test_help_tells_each_option_once_with_type_and_default(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(capsys, parse_car)
    for words in (
        "--wheels On what it rolls. ('{number: ...}', parts below)",
        "--engine By what it is driven; null takes none. ('{power: ...}' or null, parts below)",
        "--spare A second engine. ('{power: ...}' or null, default null, parts below)",
        "--fuel What it takes. ({oil,gas}, default oil)",
        "--manual Where it is described. (path or null, default null)",
        "parts of --wheels: What it rolls on.",
        "--wheels.number How many. (whole number, default 3)",
        '--wheels.colours Of each one. (list of texts, default ["red","blue"])',
        "parts of --engine: What drives it.",
        "--engine.power In kilowatts. (number, default 20.0)",
        "--engine.cooled Whether by water. (true or false, default true)",
        "--spare.power In kilowatts. (number, default 9.5)",
    ):
        assert one_line(text).count(words) == 1, words
    assert max(map(len, text.splitlines())) <= min(max(columns, 80), 120)


@pytest.mark.parametrize("script", ["preprocess", "train", "validate", "infer"])
def test_help_of_the_scripts_is_for_people(script, capsys):
    main = importlib.import_module(script).main
    text = help_of(capsys, lambda *argv: main(list(argv)))
    assert not re.search(
        r"Optional\[|Sequence\[|Union\[|Literal\[|tuple\[|<class|type:|Path|``|None\)|True|False", text
    )
    assert len(re.findall(r"^usage: .* \[options\]$", text, re.MULTILINE)) == 1
    names = re.findall(r"^  --(\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names)) >= 10
    assert names[-3:] == ["config", "print_config", "debug"]


def test_help_of_the_training_lists_the_parts_of_the_augmentation_and_tells_nothing_twice(capsys):
    main = importlib.import_module("train").main
    text = one_line(help_of(capsys, lambda *argv: main(list(argv))))
    assert "--augmentation.zoom Largest change of size along each axis. (number, default 0.1)" in text
    sentences = re.findall(r"[A-Z][^.]{25,}\.(?= )", text)
    assert len(sentences) == len(set(sentences)) > 20
    assert text.count("Trains a network on a processed data set") == 1


@pytest.mark.parametrize("argv", [["--nmae", "a"], ["--steps", "many"], ["--size", "[1,2]"], ["--model", "a"]])
def test_wrong_option_ends_with_exit_status_2(argv):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    assert exit_info.value.code == 2


@pytest.fixture
def logging_untouched() -> None:
    """Undoes what run_main sets up."""
    yield
    logging.captureWarnings(False)


def raise_(error: BaseException) -> int:
    raise error


@pytest.mark.usefixtures("logging_untouched")
class TestRunMain:
    @pytest.mark.parametrize("status", [0, 1])
    def test_returns_the_status_of_the_work(self, status):
        assert run_main(lambda argv: status, None) == status

    @pytest.mark.parametrize("error", [InputError, FileNotFoundError, OSError, ImportError, UserError])
    def test_mistake_of_the_user_gives_status_1_and_one_line(self, error, caplog):
        assert run_main(lambda argv: raise_(error("lungs must be given")), None) == 1
        assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
            ("ERROR", "lungs must be given")
        ]

    @pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, TypeError])
    def test_bug_that_looks_like_a_mistake_keeps_its_traceback(self, error):
        with pytest.raises(error, match="operands"):
            run_main(lambda argv: raise_(error("operands could not be broadcast")), None)

    def test_import_that_fails_for_want_of_a_name_is_a_bug(self):
        def work(argv: list[str] | None) -> int:
            from utils import no_such_thing  # noqa: F401

            return 0

        with pytest.raises(ImportError, match="cannot import name"):
            run_main(work, None)

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
    def test_lack_of_memory_is_one_line(self, error, caplog):
        assert run_main(lambda argv: raise_(error), None) == 1
        assert [record.getMessage() for record in caplog.records] == [
            "it does not fit into memory; end other programs, or use smaller sizes"
        ]

    def test_debug_shows_the_traceback_of_a_mistake(self, caplog, monkeypatch):
        monkeypatch.setattr(command_line.logger, "level", logging.NOTSET)

        def work(argv: list[str] | None) -> int:
            parse_command_line(Machine, argv=argv, skip=["model"])
            raise InputError("lungs must be given")

        assert run_main(work, []) == 1
        assert "Traceback" not in caplog.text
        assert run_main(work, ["--debug"]) == 1
        assert "Traceback" in caplog.text and "lungs must be given" in caplog.text
        command_line.logger.setLevel(logging.NOTSET)

    def test_interruption_gives_status_130(self):
        assert run_main(lambda argv: raise_(KeyboardInterrupt()), None) == 130

    def test_mistake_of_ours_keeps_its_traceback(self):
        with pytest.raises(ZeroDivisionError):
            run_main(lambda argv: 1 // 0, None)
