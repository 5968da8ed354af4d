"""The Typer app: commands parse, make one library call, and print."""

import logging
import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Annotated, Final, NoReturn

import typer

from sppfeat import __version__
from sppfeat.errors import SppFeatError, SppFeatWarning, UsageError
from sppfeat_cli.commands import Commands, Group
from sppfeat_cli.output import printable, results_alone

# The sections of the help, in the order in which a newcomer needs them.
SECTIONS: Final = {
    "Describe images": ("extract", "models"),
    "Evaluate": ("evaluate",),
    "Search": ("index", "search", "duplicates", "serve"),
    "Detect objects": ("windows", "detect"),
    "Train and classify": ("train", "predict", "tune"),
    "Files": ("inspect", "export", "merge"),
}
COMMANDS: Final = tuple(name for names in SECTIONS.values() for name in names)


class _Main(Group):
    sections = SECTIONS


def build(named: str | None = None) -> typer.Typer:
    """The app, with the command named alone, where it is one: importing and building all takes a tenth of a second."""
    app = Commands(
        name="sppfeat",
        cls=_Main,
        help="Fixed-length image descriptors by spatial pyramid pooling, from folders of images of any size.",
        epilog="Example: sppfeat extract photos/ -o feats.h5",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for command in (named,) if named in COMMANDS else COMMANDS:
        import_module(f"sppfeat_cli.{command}").register(app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sppfeat {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _interrupt(number: int, frame: object) -> NoReturn:
    # Printed here because typer exits silently on the exception; os.write because the handler may interrupt a print.
    os.write(2, b"sppfeat: interrupted\n")
    raise KeyboardInterrupt


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **options: object) -> None:
    # Our warnings are for users; those of libraries are for programmers.
    if issubclass(category, SppFeatWarning):
        print(f"sppfeat: warning: {printable(str(message))}", file=sys.stderr)


def run() -> None:
    """Run the command named by the arguments, and exit with its exit code."""
    # Both signals end the program, until work is under way that can finish its images in flight (see `Progress`).
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.showwarning = _show_warning
    if sys.stderr is not None and sys.stderr.isatty() and "--quiet" not in sys.argv:
        # What the library waits for; whoever looks at a log has the results.
        logging.getLogger("sppfeat").setLevel(logging.INFO)
        handler = logging.StreamHandler(sys.stderr)
        handler.format = lambda record: printable(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("sppfeat").addHandler(handler)
    try:
        with results_alone(as_json="--json" in sys.argv):
            build(next(iter(sys.argv[1:]), None))()
    except SppFeatError as error:
        print(f"sppfeat: {printable(str(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
