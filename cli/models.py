"""`sppfeat models`: list backbones and their layers."""

import dataclasses
from typing import Annotated

import typer

from sppfeat.errors import UsageError
from sppfeat_cli import options
from sppfeat_cli.output import print_json
from sppfeat_cli.progress import new_bar


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat models torchvision:resnet50")(models)


def models(
    backbone: Annotated[
        str | None, typer.Argument(metavar="[BACKBONE]", help="Backbone whose layers to list.", show_default=False)
    ] = None,
    every: Annotated[
        bool,
        typer.Option(
            "--all", help="Say of each family of torchvision and timm whether it works, by one small network of each."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """List backbones, whether their weights are installed, and the layers that can be pooled."""
    if every:
        if backbone is not None:
            raise UsageError(f"--all lists every family: expected no backbone, found {backbone}")
        _families(as_json)
        return
    from sppfeat.backbones.backbone import describe_backbones, list_layers

    if backbone is not None:
        layers = list_layers(backbone)
        if as_json:
            print_json(
                {
                    "backbone": backbone,
                    "layers": [{"name": x.name, "channels": x.channels, "stride": x.stride} for x in layers],
                }
            )
            return
        width = max(len(layer.name) for layer in layers)
        typer.echo(f"{'layer':<{width}}  channels  stride")
        for layer in layers:
            typer.echo(f"{layer.name:<{width}}  {layer.channels:>8}  {layer.stride:>6}")
        return
    found = describe_backbones()
    if as_json:
        print_json(
            {
                "backbones": [
                    {
                        "name": x.name,
                        "layers": [
                            {"name": y.name, "channels": y.channels, "stride": y.stride, "default": y.name == x.layer}
                            for y in x.layers
                        ],
                        "weights_at_hand": x.weights_at_hand,
                        "install": x.install,
                    }
                    for x in found
                ]
            }
        )
        return
    for about in found:
        weights = "weights installed" if about.weights_at_hand else f"weights: {about.install}"
        typer.echo(f"{about.name}: {weights}")
        for layer in about.layers:
            mark = " (default)" if layer.name == about.layer else ""
            typer.echo(f"  {layer.name:<10} {layer.channels:>5} channels, stride {layer.stride}{mark}")
    typer.echo(
        "torchvision:NAME, timm:NAME: most networks of these libraries, see `sppfeat models --all`; weights are\n"
        "  downloaded, or read from the file given by --weights. `sppfeat models NAME` lists the layers of one.\n"
        "sift-bow: bags of visual words of SIFT, no network; its vocabulary is made by `sppfeat train vocabulary`."
    )


def _families(as_json: bool) -> None:
    from sppfeat.backbones.families import survey_families

    with new_bar(0, "family", leave=False) as shown:

        def done(at: int, count: int) -> None:
            shown.total = count
            shown.update(at - shown.n)

        families = survey_families(done)
    if as_json:
        print_json({"families": [dataclasses.asdict(family) for family in families]})
        return
    rows = [("family", "by", "layer", "channels", "stride", "images")]
    for one in families:
        if one.problem is not None:
            rows.append((one.name, one.example.partition(":")[2], "-", "-", "-", one.problem))
            continue
        images = "any size" if one.multiple == 1 else f"multiples of {one.multiple}"
        if one.side is not None:
            images = f"{one.side} x {one.side} only"
        rows.append((one.name, one.example.partition(":")[2], one.layer, str(one.channels), str(one.stride), images))
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    for row in rows:
        left, right = row[:3], row[3:5]
        texts = [text.ljust(width) for text, width in zip(left, widths[:3], strict=True)]
        texts += [text.rjust(width) for text, width in zip(right, widths[3:], strict=True)]
        typer.echo("  ".join([*texts, row[5]]))
    works = sum(one.problem is None for one in families)
    typer.echo(f"{works} of {len(families)} families work")
