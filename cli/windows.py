"""`sppfeat windows`: proposals of windows, found once and kept in a file."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sppfeat_cli.output import counted, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.windows import Proposals


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat windows photos/ -o windows.h5")(windows)


def windows(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Folders, images, text lists, or -.", show_default=False),
    ],
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="FILE", help="The file to write or resume.", show_default=False)
    ],
    method: Annotated[
        str, typer.Option(metavar="NAME", help="selective-search | selective-search-quality (more windows, slower)")
    ] = "selective-search",
    max_windows: Annotated[int, typer.Option(help="Most windows of an image.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the ranks, by which the most are chosen.")] = 0,
    num_workers: Annotated[
        int | None, typer.Option("-j", "--num-workers", help="Processes.", show_default="one a core")
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Names are relative to this.", show_default="the folder of all sources"),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with a file that is there.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew, replacing the file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors (and the JSON).")] = False,
) -> None:
    """Propose windows that may hold objects, for `extract --windows`, `train detector` and `detect`.

    Run the same command again to resume: unchanged images keep their windows.
    """
    from sppfeat.windows import ProposalOptions, propose_folder

    options = ProposalOptions(method=method, max_windows=max_windows, seed=seed)
    with Progress(quiet=quiet, all_listed_by=f"`sppfeat inspect {output} --failures`") as progress:
        done = propose_folder(
            sources,
            output,
            options,
            workers=num_workers,
            root=root,
            resume=resume,
            overwrite=overwrite,
            observer=progress,
            stop=progress.stop.is_set,
        )
    if as_json:
        print_json(dataclasses.asdict(done))
    elif not quiet:
        typer.echo(_summary(done))
    if done.pending:
        left = counted(done.pending, "image")
        print(f"sppfeat: interrupted, {left} left; the same command resumes", file=sys.stderr)
        raise typer.Exit(130)
    if done.failed:
        raise typer.Exit(3)


def _summary(done: "Proposals") -> str:
    parts = [f"{done.proposed} searched"]
    for count, word in (
        (done.reused, "reused"),
        (done.failed, "failed"),
        (done.empty, "without a window"),
        (done.pending, "left"),
    ):
        if count:
            parts.append(f"{count} {word}")
    images = f"{counted(done.images, 'image')} ({', '.join(parts)})"
    return f"{printable(done.file)}: {images}, {counted(done.windows, 'window')}; {done.seconds:.1f} s"
