"""`sppfeat merge`: join stores of disjoint images into one folder of shards."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from sppfeat_cli import options
from sppfeat_cli.output import counted, print_json, printable

if TYPE_CHECKING:
    from sppfeat.store import Merged


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat merge feats/ part-*/")(merge)


def merge(
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Folder of shards to create, or to add to.", show_default=False)
    ],
    parts: Annotated[
        list[str], typer.Argument(metavar="PART...", help="Finished stores of other images.", show_default=False)
    ],
    as_json: options.AsJson = False,
) -> None:
    """Join parts into one store, without copying shards on the same file system; the parts stay as they are.

    All parts need the same recipe, weights and image folder, and no image may be in two of them. The same command can
    be run again after an interruption, or with more parts.
    """
    from sppfeat.store import merge_stores

    merged = merge_stores(output, parts)
    if as_json:
        print_json(dataclasses.asdict(merged))
    else:
        typer.echo(_text(merged))


def _text(merged: "Merged") -> str:
    lines = [
        f"{printable(merged.store)}: {counted(merged.images, 'image')} in {counted(merged.shards, 'shard')}; "
        f"added {merged.linked + merged.copied}, {merged.copied} of them copied",
    ]
    if merged.failed:
        lines.append(f"  done {merged.done}, failed {merged.failed}")
    if merged.missing:
        shown = ", ".join(map(str, merged.missing[:8])) + ", ..." * (len(merged.missing) > 8)
        lines.append(f"  not merged yet: {counted(len(merged.missing), 'part')} of {merged.of} ({shown})")
    return "\n".join(lines)
