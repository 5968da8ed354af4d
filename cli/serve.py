"""`sppfeat serve`: a local page over a gallery."""

from typing import Annotated

import typer

from sppfeat.recipe import RunOptions
from sppfeat_cli import options
from sppfeat_cli.output import printable

_SERVE = options.Defaults("sppfeat.serve:ServeOptions")


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat serve gallery/ --open")(serve)


def serve(
    gallery: Annotated[str, typer.Argument(metavar="GALLERY", help="Gallery to search.", show_default=False)],
    detector: Annotated[
        str | None, typer.Option(metavar="FILE", help="Detector for the image shown.", show_default=False)
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(metavar="FILE", help="Classifier for the image shown.", show_default=False)
    ] = None,
    images: options.Images = None,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = _SERVE.host,
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0: any free one.")] = _SERVE.port,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What every request must carry.",
            show_default="none; a new one where others can connect",
        ),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    weights: options.GalleryWeights = None,
    device: options.Device = RunOptions.device,
    quiet: options.Quiet = False,
) -> None:
    """Open a page over a gallery, to search with images and parts of images and see where and why they were found.

    Only this machine can connect, unless --host says otherwise. Ctrl-C ends it.
    """
    from sppfeat.serve import ServeOptions, open_in_browser, serve_gallery

    served = ServeOptions(host=host, port=port, token=token, images=images)

    def ready(address: str) -> None:
        if not quiet:
            typer.echo(f"{printable(gallery)}: {address}  (Ctrl-C ends it)")
            if served.everywhere:
                typer.echo("other machines can connect: there, use this machine's name or address instead of localhost")
        if open_page:
            open_in_browser(address)

    serve_gallery(
        gallery,
        served,
        RunOptions(device=device),
        detector=detector,
        classifier=classifier,
        weights=weights,
        ready=ready,
    )
