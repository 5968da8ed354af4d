"""Printing of results, and reading of option values, for all commands."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer

from sppfeat.errors import ReportError, SppFeatError, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from sppfeat.store import Store
    from sppfeat.svm import Convergence
    from sppfeat.training import Epoch


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on standard output, in ASCII, since names and paths may hold bytes in no encoding.

    JSON has neither NaN nor infinity: see `finite`. Raises SppFeatError if one is left.
    """
    try:
        text = json.dumps(document, indent=2, allow_nan=False)
    except ValueError:
        raise SppFeatError("JSON: expected finite numbers, found NaN or infinity") from None
    typer.echo(text, file=_json_stream)


def print_json_list(key: str, items: Iterator[Any], rest: Callable[[], Mapping[str, Any]]) -> None:
    """Print one JSON document whose first key holds a list, item by item, so that it need not be in memory.

    rest: what follows, asked for after the last item. Nothing is printed before the first item is there.
    """
    before = f"{{\n  {json.dumps(key)}: [\n"
    for item in items:
        typer.echo(f"{before}{_indented(item)}", nl=False, file=_json_stream)
        before = ",\n"
    if before != ",\n":
        typer.echo(before, nl=False, file=_json_stream)
    more = json.dumps(rest(), indent=2, allow_nan=False)
    typer.echo(f"\n  ],{more.removeprefix('{')}", file=_json_stream)


def _indented(item: Any) -> str:
    try:
        return "    " + json.dumps(item, indent=2, allow_nan=False).replace("\n", "\n    ")
    except ValueError:
        raise SppFeatError("JSON: expected finite numbers, found NaN or infinity") from None


def tell_lost(store: "Store") -> None:
    """Say on standard error how many images of a store no longer exist or have changed, if any."""
    from sppfeat.store import count_lost

    found = count_lost(store)
    if found is not None and not found.as_described:
        if not found.changed:
            hint = "`sppfeat extract --prune` removes their rows"
        elif not found.lost:
            hint = "`sppfeat extract` describes them again"
        else:
            hint = "`sppfeat extract --prune` removes the rows of the first and describes the others again"
        print(f"note: {printable(store.place)}: {found}; {hint}", file=sys.stderr)


def finite(value: float) -> float | None:
    """A number for a JSON document; None (null there) for NaN and infinity."""
    return value if math.isfinite(value) else None


def options_document(options: "DataclassInstance") -> dict[str, Any]:
    """The fields of a dataclass of options, or of a recipe, by name, for a JSON document."""
    return {name: _plain(value) for name, value in dataclasses.asdict(options).items()}


def convergence_document(found: "Convergence") -> dict[str, Any]:
    """The keys that say which SVMs did not converge."""
    return {
        "converged": not found.not_converged,
        "not_converged": [
            {"trial": one.trial, "class": one.label, "gap": finite(one.gap)} for one in found.not_converged
        ],
        "largest_gap": finite(found.largest_gap),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@contextlib.contextmanager
def after_results(page: str | os.PathLike[str], *, quiet: bool = False) -> Iterator[None]:
    """Write a page here: it comes after the results, which its failure does not affect. That is told, and the exit code
    is 1; else where it was written."""
    try:
        yield
    except ReportError as error:
        print(f"sppfeat: {printable(str(error))}", file=sys.stderr)
        raise typer.Exit(1) from None
    wrote(page, quiet=quiet)


def wrote(file: str | os.PathLike[str], *, quiet: bool = False) -> None:
    """Say on standard error where something was written besides the results."""
    if not quiet:
        print(f"wrote {printable(os.fspath(file))}", file=sys.stderr)


def command_line() -> str:
    """The command as it was given, for a page that says what made it; without users and passwords in URLs."""
    given = re.sub(r"(\w://)[^/@\s]+@", r"\1", shlex.join(["sppfeat", *sys.argv[1:]]))
    return printable(given)


def printable(text: str) -> str:
    """The text on one line, with control characters and stray bytes escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# The stream for JSON while `results_alone` reserves standard output for it.
_json_stream: TextIO | None = None


@contextlib.contextmanager
def results_alone(*, as_json: bool) -> Iterator[None]:
    """Reserve standard output for results: what libraries write to its descriptor goes to standard error.

    With `as_json` only `print_json` and `print_json_list` write to it. Failures to write to it (a full disk, say) are
    raised as SppFeatError, to tell them from those of other files; a closed pipe is left to typer.
    """
    global _json_stream
    stdout = sys.stdout
    moved = _moved(stdout)
    stream = cast(TextIO, _Guarded(moved))
    try:
        with contextlib.redirect_stdout(sys.stderr if as_json else stream):
            _json_stream = stream if as_json else None
            try:
                yield
            finally:
                stream.flush()
    finally:
        _json_stream = None
        if moved is not stdout:
            os.dup2(moved.fileno(), 1)


def _moved(stdout: TextIO) -> TextIO:
    """A stream to standard output by a descriptor of its own; descriptor 1 becomes standard error.

    A stream that is not that of descriptor 1, because a caller captures it, is returned as it is.
    """
    try:
        if stdout.fileno() != 1:
            return stdout
    except OSError:  # it has none
        return stdout
    stdout.flush()
    moved = os.fdopen(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3), "w", encoding=stdout.encoding, errors=stdout.errors)
    if stdout.isatty():
        moved.reconfigure(line_buffering=True)
    os.dup2(2, 1)
    return moved


class _Guarded:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failure: SppFeatError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._guard():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._guard():
            self._stream.flush()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        # Raise again after a first failure that was caught: typer suppresses errors of its own output.
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            # The rest of the buffer is written when Python ends, and would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._failure = SppFeatError(f"standard output: cannot be written: {error.strerror}")
            raise self._failure from None


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def integers(option: str, text: str) -> tuple[int, ...]:
    """`6,3,2,1` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{option}: expected whole numbers separated by commas, found {text!r}") from None


def numbers(option: str, text: str) -> tuple[float, ...]:
    """`0.5,0.5,0.5` as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--{option}: expected numbers separated by commas, found {text!r}") from None


def scales(text: str) -> tuple[int | str, ...]:
    """`224,native` as scales."""
    return tuple(int(part) if part.strip().isdecimal() else part.strip() for part in text.split(","))


def byte_count(option: str, text: str) -> int:
    """`4GB` as bytes; units are powers of 1000, as `human_bytes` prints them, or of 1024 if written GiB; bytes without.

    Raises UsageError for anything else, and for a number alone that is no sensible count of bytes.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*(?:([kKmMgGtT]?)(i?)([bB]?))\s*", text)
    if found is None or (found[3] and not found[2]):
        raise UsageError(f"--{option}: expected a size such as 800MB or 4GB, found {text!r}")
    count = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))
    if not found[2] and not found[4] and count < 1_000_000:
        raise UsageError(
            f"--{option}: expected a size such as 800MB or 4GB, found {text!r}, a number of bytes: {found[1]}GB?"
        )
    return count


def human_bytes(count: int) -> str:
    """`61.2 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def epochs_document(history: Sequence["Epoch"]) -> list[dict[str, Any]]:
    """The epochs of a network that was tuned, for JSON."""
    return [
        {"epoch": one.number, "loss": one.loss, "held_out": one.held_out, "seconds": one.seconds} for one in history
    ]


def end_learning(file: str | None, history: Sequence["Epoch"], diverged: str | None, *, overwrite: bool) -> None:
    """Say that a run was interrupted or diverged, if it was, and exit; file: its output, None until there is one."""
    if file is None:
        # Before epoch 0 there is no checkpoint, which --overwrite would delete.
        how = "without --overwrite, " if overwrite and history else ""
        where = f" in epoch {len(history)}" if history else ""
        print(f"sppfeat: interrupted{where}; {how}the same command resumes", file=sys.stderr)
        raise typer.Exit(130)
    if diverged is not None:
        print(f"sppfeat: diverged: {diverged}; the best weights before are kept", file=sys.stderr)
        raise typer.Exit(1)
