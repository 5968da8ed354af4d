"""`sppfeat models`: list backbones and their layers."""

from typing import Annotated

import typer

from sppfeat_cli import options
from sppfeat_cli.output import print_json


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat models torchvision:resnet50")(models)


def models(
    backbone: Annotated[
        str | None, typer.Argument(metavar="[BACKBONE]", help="Backbone whose layers to list.", show_default=False)
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """List backbones, whether their weights are installed, and the layers that can be pooled."""
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
        "torchvision:NAME, timm:NAME: most convolutional networks of these libraries; weights are downloaded,\n"
        "  or read from the file given by --weights. `sppfeat models NAME` lists the layers of any backbone."
    )
