"""The options of commands that train SVMs."""

from typing import Annotated

import typer

from sppfeat.errors import UsageError, unknown_name
from sppfeat_cli.output import integers, numbers

LabelsFile = Annotated[
    str | None, typer.Option(metavar="CSV", help="Columns name,label[,split].", show_default="parent folders")
]
Costs = Annotated[
    str | None,
    typer.Option("--c", metavar="C,...", help="One C, or several to choose from.", show_default="see --c-grid"),
]
CostGrid = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What C is chosen from: decades (6 from 0.01 to 1000) | vissl (VISSL's 11 in that range)",
        show_default="decades",
    ),
]
PositiveWeight = Annotated[float, typer.Option(help="Weight of a class's own images against the rest.")]
Levels = Annotated[
    str | None,
    typer.Option(metavar="N,...", help="Use only these levels of the stored pyramid.", show_default="all of them"),
]


def costs(c: str | None, grid: str | None) -> tuple[float, ...]:
    """The costs that the two options name."""
    from sppfeat.svm import COST_GRIDS

    if c is not None and grid is not None:
        raise UsageError("--c and --c-grid: expected one of them, found both")
    if c is not None:
        return numbers("c", c)
    if (grid or "decades") not in COST_GRIDS:
        raise UsageError(unknown_name("c_grid", str(grid), COST_GRIDS))
    return COST_GRIDS[grid or "decades"]


def levels(text: str | None) -> tuple[int, ...] | None:
    """The levels that the option names."""
    return integers("levels", text) if text is not None else None
