"""`sppfeat duplicates`: find near-duplicates."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import after_results, command_line, counted, print_json, printable
from sppfeat_cli.progress import Progress

if TYPE_CHECKING:
    from sppfeat.retrieval import Crops, Duplicates

_DUPLICATES = options.Defaults("sppfeat.retrieval:find_duplicates")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat duplicates feats.h5 --csv dups.csv --html dups.html")(duplicates)


def duplicates(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Store made by `sppfeat extract`.", show_default=False)],
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Minimum cosine similarity of duplicates, whose images are then not compared.",
            show_default="copies of one image, by their pixels",
        ),
    ] = None,
    keep: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Image to keep in each group: largest (most pixels), sharpest (reads the images of groups) or oldest.",
        ),
    ] = _DUPLICATES.keep,
    csv: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Also write a CSV file that says which images to keep and remove.", show_default=False
        ),
    ] = None,
    parts: Annotated[
        bool,
        typer.Option(
            "--parts", help="Also find images that show a part of another: describes all of them again, smaller."
        ),
    ] = False,
    part_threshold: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Minimum score of parts, whose images are then not compared; about 0.9 for unrelated images.",
            show_default="parts, by their pixels",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Weights file of the store, if it has moved; for --parts.", show_default=False
        ),
    ] = None,
    device: options.Device = RunOptions.device,
    engine: options.Engine = RunOptions.engine,
    batch_size: options.BatchSize = RunOptions.batch_size,
    num_workers: options.NumWorkers = RunOptions.num_workers,
    html: options.Html = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Find groups of near-duplicates, the largest first: every two images of a group are copies of one image.

    Copies may differ in size, quality and color; shots of one scene and mirrored images are others. The images are
    read for this, where their descriptors are near enough. With --threshold, descriptors alone decide: every two images
    of a group reach it. All pairs are compared, also of a million images. The first image of a group is the one to
    keep; scores are cosine similarities to it. Nothing is deleted. Parts are looked for in the 20 images nearest to
    each, and confirmed by their pixels. Images that cannot be compared, or described again, are reported, and the exit
    code is then 3.
    """
    run = RunOptions(device=device, engine=engine, batch_size=batch_size, num_workers=num_workers)
    from sppfeat.report import check_page
    from sppfeat.retrieval import (
        check_crops,
        check_duplicates_csv,
        find_crops,
        find_duplicates,
        write_duplicates_csv,
        write_duplicates_page,
    )
    from sppfeat.store import open_store

    page = check_page(html, overwrite=overwrite) if html is not None else None
    table = check_duplicates_csv(csv, overwrite=overwrite) if csv is not None else None
    opened = open_store(store)
    if parts:
        check_crops(opened, part_threshold)
    crops = None
    with Progress(quiet=quiet) as progress:
        found = find_duplicates(opened, threshold, keep=keep, progress=progress.part)
        if parts:
            progress.close()
            without = {one.name for group in found.groups for one in group[1:]}.union(found.left_out)
            crops = find_crops(
                opened, part_threshold, without=without, run_options=run, weights=weights, progress=progress.part
            )
    if as_json:
        print_json(_document(found, crops))
    else:
        typer.echo(_text(found, crops))
    for name, reason in crops.failed.items() if crops is not None else ():
        print(f"failed: {printable(name)}: {printable(reason)}", file=sys.stderr)
    if not quiet:
        for note in [*found.notes, *(crops.notes if crops is not None else ())]:
            print(f"note: {printable(note)}", file=sys.stderr)
    # Files come after the groups, which their failure does not affect.
    if table is not None:
        with after_results(table, quiet=quiet):
            write_duplicates_csv(table, found, crops)
    if page is not None:
        with after_results(page, quiet=quiet):
            write_duplicates_page(page, found, crops, command=command_line())
    if found.not_compared or (crops is not None and crops.failed):
        raise typer.Exit(3)


def _document(found: "Duplicates", crops: "Crops | None") -> dict[str, Any]:
    return {
        "store": found.store,
        "threshold": found.threshold,
        "compared": found.compared,
        "keep": found.keep,
        "images": found.images,
        "pairs": found.pairs,
        "groups": [
            [
                {"name": one.name, "score": one.score, "size": list(one.size), "bytes": one.file_size, "path": one.path}
                for one in group
            ]
            for group in found.groups
        ],
        "unreadable": [{"name": name, "error": reason} for name, reason in found.unreadable.items()],
        "not_compared": [{"name": name, "error": reason} for name, reason in found.not_compared.items()],
        "notes": found.notes,
        "parts": None if crops is None else _parts_document(crops),
    }


def _parts_document(crops: "Crops") -> dict[str, Any]:
    return {
        "threshold": crops.threshold,
        "compared": crops.compared,
        "images": crops.images,
        "found": [
            {
                "part": one.part.name,
                "whole": one.whole.name,
                "score": one.score,
                "box": one.box,
                "similarity": one.part.score,
                "part_path": one.part.path,
                "whole_path": one.whole.path,
            }
            for one in crops.found
        ],
        "failed": [{"name": name, "error": reason} for name, reason in crops.failed.items()],
        "notes": crops.notes,
    }


def _text(found: "Duplicates", crops: "Crops | None") -> str:
    lines = []
    for number, group in enumerate(found.groups, 1):
        lines.append(f"group {number}: {len(group)} images")
        for one in group:
            width, height = one.size
            # Rows of windows differ by name; their path is that of the image.
            shown = one.name if one.box or not one.path else one.path
            lines.append(f"  {one.score:7.4f}  {width} x {height}  {printable(shown)}")
    how = "of copies" if found.compared else f"at {found.threshold:g}"
    lines.append(
        f"{counted(len(found.groups), 'group')} {how} in {counted(found.images, 'image')}; "
        f"{found.spare} removable (keeps the {found.keep} of each group)"
    )
    if crops is not None:
        for crop in crops.found:
            box = ",".join(f"{edge:.0f}" for edge in crop.box)
            whole = printable(crop.whole.path or crop.whole.name)
            lines.append(f"{crop.score:7.4f}  {printable(crop.part.path or crop.part.name)}: part of {whole} at {box}")
        at = "" if crops.compared else f" at {crops.threshold:g}"
        lines.append(f"{counted(len(crops.found), 'part')}{at} in {counted(crops.images, 'image')}")
    return "\n".join(lines)
