"""Commands and groups of them: their help, and one line for each that is mistyped or lacks something."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from sppfeat.errors import UsageError, nearest_names, one_of

# Older versions of typer have them from click, newer ones copies of their own.
_exceptions = sys.modules[typer.BadParameter.__module__]
_Unusable: type[Exception] = _exceptions.UsageError
_NoSuchOption: type[Exception] = _exceptions.NoSuchOption
_HelpWanted: Any = getattr(_exceptions, "NoArgsIsHelpError", ())  # click before 8.2 prints help without raising


class Commands(typer.Typer):
    """A Typer app whose commands are `Command`s."""

    def command(self, *args: Any, **options: Any) -> Any:
        return super().command(*args, cls=Command, **options)


class Command(TyperCommand):
    """A command whose help names its arguments as they are declared, in every version of typer."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "" in args:  # such as "$FOLDER" where FOLDER is not set
            raise UsageError(f"expected no empty argument, found one: {_usage(ctx)}")
        try:
            return super().parse_args(ctx, args)
        except _NoSuchOption as error:
            raise UsageError(_no_option(error, ctx)) from None
        except _Unusable as error:
            raise UsageError(_unusable(error, ctx)) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            error.args = (_by_option(self, str(error)),)
            raise

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [self.options_metavar or "", *_arguments(self)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                kind, (shown, text) = parameter.param_type_name, record
                rows[kind].append((parameter.metavar or shown if kind == "argument" else shown, text))
        for kind, listed in rows.items():
            if listed:
                with formatter.section(f"{kind.title()}s"):
                    formatter.write_dl(listed)


class Group(TyperGroup):
    """A group of commands.

    sections: the titles of its help, each with its commands in order; none: all commands under one title.
    """

    sections: ClassVar[Mapping[str, Sequence[str]]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        ordered = [name for names in self.sections.values() for name in names]
        return sorted(self.commands, key=ordered.index) if ordered else list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        names = self.list_commands(ctx)
        width = max(map(len, names))
        for title, members in (self.sections or {"Commands": names}).items():
            with formatter.section(title):
                rows = [(name, self.commands[name]) for name in members if name in self.commands]
                formatter.write_dl([(f"{name:<{width}}", command.get_short_help_str(200)) for name, command in rows])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except _HelpWanted:
            raise
        except _NoSuchOption as error:
            if ctx.parent is not None:  # a group within has no options but --help: they are of a command left out
                raise UsageError(self._which(ctx, given)) from None
            raise UsageError(_no_option(error, ctx)) from None
        except _Unusable as error:
            raise UsageError(_unusable(error, ctx)) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            nearest = nearest_names(args[0], self.commands)
            if nearest and not _path_like(args[0]):
                raise UsageError(f"unknown command {args[0]!r}: did you mean {one_of(nearest)}?")
            raise UsageError(self._which(ctx, args))
        return super().resolve_command(ctx, args)

    def _which(self, ctx: Any, args: list[str]) -> str:
        """What to say where a command was left out."""
        place = _path(ctx)
        if ctx.parent is None:
            return f"unknown command {args[0]!r}: `{place} --help` lists all commands"
        names = self.list_commands(ctx)
        first = self.commands[names[0]]
        # A first word that is no path may be anything: a classifier, a protocol. The command shown must run.
        kept = args if _path_like(args[0]) else args[1:]
        if not _positional(first, kept):
            kept = [*_arguments(first), *kept]
        lacking = [_shown(one) for one in _required(first) if not any(map(_gives(one), args))]
        command = shlex.join([*place.split(), names[0], *kept])
        return f"{ctx.info_name} what? {one_of(names)}, such as: {' '.join([command, *lacking])}"


def _gives(option: Any) -> Callable[[str], bool]:
    """Whether a word names an option, as in `-o`, `-oFILE`, `--output` and `--output=FILE`."""
    short = tuple(name for name in option.opts if not name.startswith("--"))
    return lambda word: word.partition("=")[0] in option.opts or (bool(short) and word.startswith(short))


def _positional(command: Any, words: Sequence[str]) -> list[str]:
    """The words that are neither options of a command nor their values."""
    takes_value = {name for one in _options(command) if not one.is_flag for name in one.opts}
    before = ["", *words]
    return [word for word, last in zip(words, before, strict=False) if word[:1] != "-" and last not in takes_value]


def _by_option(command: Any, message: str) -> str:
    """The library's message about a field, `num_workers must be ...`, by its option: `--num-workers must be ...`."""
    first, space, rest = message.partition(" ")
    field = first.rstrip(":")
    wanted = {f"{dashes}{field.replace('_', '-')}" for dashes in ("-", "--")}
    names = [name for one in _options(command) for name in one.opts if name in wanted]
    return f"{names[0]}{first[len(field) :]}{space}{rest}" if names else message


def _path_like(word: str) -> bool:
    return word.startswith("-") or bool({".", os.sep} & set(word)) or os.path.exists(word)


def _no_option(error: Any, ctx: Any) -> str:
    """The message for an option that a command does not have."""
    known = [name for one in ctx.command.get_params(ctx) for name in (*one.opts, *one.secondary_opts)]
    nearest = nearest_names(error.option_name, [name for name in known if name.startswith("--")])
    place = _path(ctx)
    usage = f"{_usage(ctx)}; " if _arguments(ctx.command) else ""
    hint = f"did you mean {one_of(nearest)}?" if nearest else f"{usage}`{place} --help` lists all options"
    return f"unknown option {error.option_name!r} of {place}: {hint}"


def _unusable(error: Any, ctx: Any) -> str:
    """The message for an argument or option that is missing, has no value or one of another kind."""
    parameter = getattr(error, "param", None)
    if parameter is not None and isinstance(error, _exceptions.MissingParameter):
        return f"missing {_shown(parameter)}: {_usage(ctx)}"
    if parameter is not None and (wrong := _wrong_number(error)) is not None:
        return f"expected {wrong[0]} for {_shown(parameter)}, found {wrong[1]!r}"
    message = error.format_message().rstrip(".")
    if " " in message.partition("argument(s) (")[2]:
        message = message.replace("argument(s)", "arguments")
    message = message.replace("argument(s)", "argument")
    return f"{message[:1].lower()}{message[1:]}: {_usage(ctx)}"


def _wrong_number(error: Any) -> tuple[str, str] | None:
    """Which number was expected, and what was found, as pydantic tells newer versions of typer, or click older ones."""
    if hasattr(error.__cause__, "errors"):
        told = error.__cause__.errors()[0]
        found, kind = str(told["input"]), told["type"].partition("_")[0]
    else:
        quoted, _, kind = error.message.rpartition(" is not a valid ")
        found, kind = quoted[1:-1], kind.rstrip(".")
    names = {"int": "a whole number", "integer": "a whole number", "float": "a number"}
    return (names[kind], found) if kind in names else None


def _usage(ctx: Any) -> str:
    """What a command cannot do without, on one line."""
    required = [_shown(one) for one in _required(ctx.command)]
    return " ".join([_path(ctx), *_arguments(ctx.command), *required, "[OPTIONS]"])


def _arguments(command: Any) -> list[str]:
    """The arguments of a command as its help names them, such as QUERY..."""
    return [one.metavar for one in command.params if one.param_type_name == "argument"]


def _options(command: Any) -> list[Any]:
    return [one for one in command.params if one.param_type_name == "option"]


def _required(command: Any) -> list[Any]:
    """The options that a command cannot do without."""
    return [one for one in _options(command) if one.required]


def _shown(parameter: Any) -> str:
    """`QUERY...` or `-o FILE`."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    return " ".join(filter(None, (parameter.opts[0], parameter.metavar)))


def _path(ctx: Any) -> str:
    """`sppfeat evaluate transfer`, whatever file was started."""
    return " ".join(["sppfeat", *ctx.command_path.split()[1:]])
