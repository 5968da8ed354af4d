"""Commands and groups of them: their help, and one line for each that is mistyped or lacks something."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

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
        except _NoSuchOption as error:
            if ctx.parent is not None:  # a group within has no options but --help: they are of a command left out
                raise UsageError(self._which(ctx, given)) from None
            raise UsageError(_no_option(error)) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            nearest = nearest_names(args[0], self.commands)
            if nearest and not _path_like(args[0]):
                raise UsageError(f"unknown command {args[0]!r}: did you mean {one_of(nearest)}?")
            raise UsageError(self._which(ctx, args))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _HelpWanted:
            raise
        except _NoSuchOption as error:
            raise UsageError(_no_option(error)) from None
        except _Unusable as error:
            raise UsageError(_unusable(error)) from None

    def _which(self, ctx: Any, args: list[str]) -> str:
        """What to say where a command was left out."""
        place = _path(ctx)
        if ctx.parent is None:
            return f"unknown command {args[0]!r}: `{place} --help` lists all commands"
        names = self.list_commands(ctx)
        first = self.commands[names[0]]
        lacking = [one for one in _required(first) if one.split()[0] not in args]
        # A first word that is no path may be anything: a classifier, a protocol. The command shown must run.
        kept = args if _path_like(args[0]) else args[1:] or _arguments(first)
        command = shlex.join([*place.split(), names[0], *kept])
        return f"{ctx.info_name} what? {one_of(names)}, such as: {' '.join([command, *lacking])}"


def _path_like(word: str) -> bool:
    return word.startswith("-") or bool({".", os.sep} & set(word)) or os.path.exists(word)


def _no_option(error: Any) -> str:
    """The message for an option that a command does not have."""
    known = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
    nearest = nearest_names(error.option_name, [name for name in known if name.startswith("--")])
    place = _path(error.ctx)
    usage = f"{_usage(error.ctx)}; " if _arguments(error.ctx.command) else ""
    hint = f"did you mean {one_of(nearest)}?" if nearest else f"{usage}`{place} --help` lists all options"
    return f"unknown option {error.option_name!r} of {place}: {hint}"


def _unusable(error: Any) -> str:
    """The message for an argument or option that is missing, has no value or one of another kind."""
    message = error.format_message().rstrip(".").replace("argument(s)", "arguments")
    parameter = getattr(error, "param", None)
    if parameter is not None:
        kinds = [text for kind, text in _KINDS.items() if kind in message]
        if isinstance(error, _exceptions.MissingParameter):
            message = f"missing {_shown(parameter)}"
        elif kinds:
            return f"expected {kinds[0]} for {_shown(parameter)}{_found(parameter)}"
    usage = f": {_usage(error.ctx)}" if error.ctx is not None else ""
    return f"{message[:1].lower()}{message[1:]}{usage}"


# What the messages of typer and click, new and old, say of values that are not numbers.
_KINDS: Final = {"integer": "a whole number", "number": "a number", "float": "a number"}


def _found(parameter: Any) -> str:
    """`, found 'ten'`, from the command line; empty where it does not show the value by itself, as in -kten."""
    for at, word in enumerate(sys.argv):
        name, equals, value = word.partition("=")
        if name in parameter.opts and (equals or at + 1 < len(sys.argv)):
            return f", found {value if equals else sys.argv[at + 1]!r}"
    return ""


def _usage(ctx: Any) -> str:
    """What a command cannot do without, on one line."""
    return " ".join([_path(ctx), *_arguments(ctx.command), *_required(ctx.command), "[OPTIONS]"])


def _arguments(command: Any) -> list[str]:
    """The arguments of a command as its help names them, such as QUERY..."""
    return [one.metavar for one in command.params if one.param_type_name == "argument"]


def _required(command: Any) -> list[str]:
    """The options that a command cannot do without, such as `-o FILE`."""
    return [_shown(one) for one in command.params if one.param_type_name == "option" and one.required]


def _shown(parameter: Any) -> str:
    return parameter.metavar if parameter.param_type_name == "argument" else f"{parameter.opts[0]} {parameter.metavar}"


def _path(ctx: Any) -> str:
    """`sppfeat evaluate transfer`, whatever file was started."""
    return " ".join(["sppfeat", *ctx.command_path.split()[1:]])
