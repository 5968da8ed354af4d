"""Groups of commands: their help in sections, and one line for each mistyped command or option."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import typer
from typer.core import TyperGroup

from sppfeat.errors import UsageError, nearest_names, one_of

# Older versions of typer have it from click, newer ones a copy of their own.
_NoSuchOption: type[Exception] = sys.modules[typer.BadParameter.__module__].NoSuchOption


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
            if nearest and not {".", os.sep} & set(args[0]):  # else a file
                raise UsageError(f"unknown command {args[0]!r}: did you mean {one_of(nearest)}?")
            raise UsageError(self._which(ctx, args))
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _NoSuchOption as error:
            raise UsageError(_no_option(error)) from None

    def _which(self, ctx: Any, args: list[str]) -> str:
        """What to say where a command was left out."""
        place = _path(ctx)
        if ctx.parent is None:
            return f"unknown command {args[0]!r}: `{place} --help` lists all commands"
        names = self.list_commands(ctx)
        first = self.commands[names[0]]
        lacking = [
            f"{parameter.opts[0]} {parameter.metavar}"
            for parameter in first.params
            if parameter.param_type_name == "option" and parameter.required and not set(parameter.opts) & set(args)
        ]
        command = shlex.join([*place.split(), names[0], *args])
        return f"{ctx.info_name} what? {one_of(names)}, such as: {' '.join([command, *lacking])}"


def _no_option(error: Any) -> str:
    """The message for an option that a command does not have."""
    known = [name for parameter in error.ctx.command.get_params(error.ctx) for name in parameter.opts]
    nearest = nearest_names(error.option_name, [name for name in known if name.startswith("--")])
    place = _path(error.ctx)
    hint = f"did you mean {one_of(nearest)}?" if nearest else f"`{place} --help` lists all options"
    return f"unknown option {error.option_name!r} of {place}: {hint}"


def _path(ctx: Any) -> str:
    """`sppfeat evaluate transfer`, whatever file was started."""
    return " ".join(["sppfeat", *ctx.command_path.split()[1:]])
