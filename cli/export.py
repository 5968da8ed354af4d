"""`sppfeat export`: write descriptors for other programs."""

import dataclasses
from typing import Annotated

import typer

from sppfeat.errors import one_of
from sppfeat.recipe import DTYPES
from sppfeat_cli import options
from sppfeat_cli.output import counted, print_json, printable
from sppfeat_cli.progress import Progress


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat export feats.h5 -o feats.parquet")(export)


def export(
    store: Annotated[str, typer.Argument(metavar="STORE", help="Store made by `sppfeat extract`.", show_default=False)],
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Output: .npy, .parquet, .zarr (a folder) or .csv.",
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Format: npy, parquet, zarr, csv or hloc (HDF5 with a global_descriptor per image).",
            show_default="by extension",
        ),
    ] = None,
    levels: options.StoredLevels = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Type of the stored values: {one_of(DTYPES)}.", show_default="the store's"),
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the descriptors of a store, with their names, to a file that other programs read.

    Images that could not be described are left out, and counted. The names of a .npy file are in .names.txt beside it,
    one per line, with line breaks in a name as \\x0a and \\x0d.
    """
    from sppfeat.store import export_store, open_store

    opened, chosen = open_store(store), options.stored_levels(levels)
    with Progress(quiet=quiet) as progress:
        done = export_store(
            opened, output, format=format, levels=chosen, dtype=dtype, overwrite=overwrite, progress=progress.part
        )
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    if quiet:
        return
    left_out = f", {done.failed} failed left out" if done.failed else ""
    names = f"; names in {printable(done.names)}" if done.names is not None else ""
    typer.echo(
        f"{printable(done.output)}: {counted(done.exported, 'descriptor')} of {done.dim} values, {done.dtype}"
        f"{left_out}{names}"
    )
