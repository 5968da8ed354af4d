"""`sppfeat train vocabulary`: learn the visual words of backbone sift-bow."""

from typing import Annotated

import typer

from sppfeat_cli import options
from sppfeat_cli.output import counted, options_document, print_json, printable
from sppfeat_cli.progress import Progress

_VOCABULARY = options.Defaults("sppfeat.vocabulary:VocabularyOptions")


def register(train: typer.Typer) -> None:
    train.command(epilog="Example: sppfeat train vocabulary photos/ -o vocab.h5 --words 400")(vocabulary)


def vocabulary(
    sources: options.Sources,
    output: options.Output,
    words: Annotated[int, typer.Option(metavar="N", help="Number of words.")] = _VOCABULARY.words,
    max_images: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of images to learn from; of more, a random sample.")
    ] = _VOCABULARY.images,
    seed: options.Seed = _VOCABULARY.seed,
    num_workers: options.NumWorkers = None,
    root: options.Root = None,
    image_column: options.ImageColumn = None,
    name_column: options.NameColumn = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Learn a vocabulary of visual words from images: the centers of k-means over dense SIFT descriptors.

    It is for `sppfeat extract --backbone sift-bow --vocabulary`. An image that cannot be read is reported and left
    out, and the exit code is 3.
    """
    options.check_sources(sources)

    from sppfeat.images import Columns
    from sppfeat.vocabulary import VocabularyOptions, learn_vocabulary

    chosen = VocabularyOptions(words=words, images=max_images, seed=seed)
    with Progress(quiet=quiet, verb="to learn from", can_finish_early=False) as progress:
        done = learn_vocabulary(
            sources,
            output,
            chosen,
            workers=num_workers,
            root=root,
            columns=Columns(image_column, name_column),
            overwrite=overwrite,
            observer=progress,
        )
    learned = done.vocabulary
    if as_json:
        print_json(
            {
                "vocabulary": done.file,
                "words": learned.words,
                "images": learned.images,
                "descriptors": learned.descriptors,
                "objective": learned.objective,
                "failed": done.failed,
                "seconds": round(done.seconds, 3),
                "options": options_document(chosen),
                "weights_sha256": learned.sha256,
                "versions": learned.versions,
            }
        )
    elif not quiet:
        failed = f", {len(done.failed)} failed" if done.failed else ""
        typer.echo(
            f"{printable(done.file)}: {counted(learned.words, 'word')} from "
            f"{counted(learned.descriptors, 'descriptor')} of {counted(learned.images, 'image')}{failed}; "
            f"mean squared distance {learned.objective:.0f}; {done.seconds:.1f} s"
        )
    if done.failed:
        raise typer.Exit(3)
