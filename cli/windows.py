"""`sppfeat windows`: propose windows of images."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import counted, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.windows import Proposals

_PROPOSALS = options.Defaults("sppfeat.windows:ProposalOptions")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat windows photos/ -o windows.h5")(windows)


def windows(
    sources: options.Sources,
    output: options.Output,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Method: selective-search, or selective-search-quality (more windows, several times slower).",
        ),
    ] = _PROPOSALS.method,
    max_windows: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of windows per image.")
    ] = _PROPOSALS.max_windows,
    base_k: Annotated[
        int,
        typer.Option(
            metavar="K",
            help="Scale of the finest segmentation of the image, from 1 to 10000; a smaller one finds more and smaller "
            "windows. Files of earlier versions have 150.",
        ),
    ] = _PROPOSALS.base_k,
    seed: options.Seed = _PROPOSALS.seed,
    num_workers: options.NumWorkers = RunOptions.num_workers,
    root: options.Root = None,
    resume: options.Resume = True,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Propose windows that may hold objects, for `extract --windows`, `train detector` and `detect`.

    Run the same command again to resume: unchanged images keep their windows.
    """
    RunOptions(num_workers=num_workers)
    options.check_sources(sources)

    from sppfeat.windows import ProposalOptions, propose_folder

    chosen = ProposalOptions(method=method, max_windows=max_windows, seed=seed, base_k=base_k)
    options.check_proposals(None)
    with Progress(quiet=quiet, all_listed_by=f"`sppfeat inspect {output} --failures`") as progress:
        done = propose_folder(
            sources,
            output,
            chosen,
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
        (done.empty, "without windows"),
        (done.pending, "left"),
    ):
        if count:
            parts.append(f"{count} {word}")
    images = f"{counted(done.images, 'image')} ({', '.join(parts)})"
    return f"{printable(done.file)}: {images}, {counted(done.windows, 'window')}; {done.seconds:.1f} s"
