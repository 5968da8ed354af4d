"""`sppfeat models`: list backbones and their layers."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError
from sppfeat_cli import options
from sppfeat_cli.output import print_json
from sppfeat_cli.progress import new_bar

if TYPE_CHECKING:
    from sppfeat.backbones import Layer


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
    from sppfeat.backbones.backbone import describe_backbones, layers_and_default

    if backbone is not None:
        layers, default = layers_and_default(backbone)
        if as_json:
            print_json(
                {
                    "backbone": backbone,
                    "layers": [_layer_document(layer, default) for layer in layers],
                }
            )
            return
        width = max(len(layer.name) for layer in layers)
        typer.echo(f"{'layer':<{width}}  channels  stride")
        for layer in layers:
            mark = "  (default)" if layer.name == default else ""
            typer.echo(f"{layer.name:<{width}}  {layer.channels:>8}  {layer.stride:>6}{mark}")
        return
    found = describe_backbones()
    if as_json:
        print_json(
            {
                "backbones": [
                    {
                        "name": x.name,
                        "layers": [_layer_document(layer, x.layer) for layer in x.layers],
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


def _layer_document(layer: "Layer", default: str | None) -> dict[str, Any]:
    return {
        "name": layer.name,
        "channels": layer.channels,
        "stride": layer.stride,
        "default": layer.name == default,
    }


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
    rows = [("family", "tried", "layer", "channels", "stride", "images")]
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
