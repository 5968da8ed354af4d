"""The options that several commands share: each declared once, with one name, one help text and one meaning."""

import inspect
import os
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.errors import UsageError, near_path, one_of, require_extra, unknown_name
from sppfeat.recipe import ENGINES
from sppfeat_cli.output import integers, numbers

if TYPE_CHECKING:
    from sppfeat.retrieval import ProjectionOptions


class Defaults:
    """The library's defaults by name: fields of a class of options, or parameters of a function, or fields of what a
    function returns. Each is looked up when a command runs or shows its help, because most rooms import NumPy.
    """

    def __init__(self, place: str) -> None:
        self._place = place

    def __getattr__(self, name: str) -> Any:
        return _Default(self._place, name)


class _Default:
    def __init__(self, place: str, name: str) -> None:
        self._place, self._name = place, name

    def __call__(self) -> Any:
        room, _, name = self._place.partition(":")
        holder = getattr(import_module(room), name)
        if not isinstance(holder, type):
            parameters = inspect.signature(holder).parameters
            if self._name in parameters:
                return parameters[self._name].default
            holder = holder()
        value = getattr(holder, self._name)
        return ",".join(map(str, value)) if isinstance(value, tuple) else value

    def __str__(self) -> str:
        return str(self())

    def __bool__(self) -> bool:
        return bool(self())


# Sources, output, and what is printed.

_SOURCES = (
    "Folders, images, archives (tar, zip, parquet; train-{00..99}.tar names many), URLs (s3, gs, hf, http), text lists "
    "(.txt, one path or URL per line), or - for a list on standard input"
)
Sources = Annotated[list[str], typer.Argument(metavar="SOURCE...", help=f"{_SOURCES}.", show_default=False)]
SourcesOrStores = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help=f"{_SOURCES}, or stores.", show_default=False)
]
Output = Annotated[str, typer.Option("-o", "--output", metavar="FILE", help="Output file.", show_default=False)]
OutputFolder = Annotated[
    str | None, typer.Option("-o", "--output", metavar="DIR", help="Output folder.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Resume an existing output file.")]
Root = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", help="Folder that names are relative to.", show_default="the deepest that holds all sources"
    ),
]
ImageColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of images in parquet files.", show_default="`image`, or the only one"),
]
NameColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of names in parquet files.", show_default="path of the image"),
]
Html = Annotated[str | None, typer.Option(metavar="FILE", help="Also write an HTML page.", show_default=False)]
Report = Annotated[str | None, typer.Option(metavar="FILE", help="Also write an HTML report.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print results as one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress, notes or summary.")]

# How fast, and chance.

_DEVICES = "auto, cpu, cuda or cuda:N"
Device = Annotated[str, typer.Option(metavar="NAME", help=f"Device: {_DEVICES}.")]
Devices = Annotated[
    str, typer.Option(metavar="NAME", help="Device: auto, cpu, cuda, cuda:N, or several GPUs as cuda:N,M,...")
]
IndexDevice = Annotated[str, typer.Option(metavar="NAME", help="Device that builds the index: cpu, cuda or cuda:N.")]
SearchDevice = Annotated[
    str, typer.Option(metavar="NAME", help=f"Device: {_DEVICES}; the index uses a GPU only if one is named.")
]
Engine = Annotated[str, typer.Option(metavar="NAME", help=f"Inference engine: {one_of(ENGINES)}.")]
BatchSize = Annotated[
    int | None,
    typer.Option("-b", "--batch-size", metavar="N", help="Maximum batch size.", show_default="by device"),
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        "-j", "--num-workers", metavar="N", help="Number of worker threads or processes.", show_default="one per core"
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Random seed.")]

# The recipe.

Backbone = Annotated[
    str,
    typer.Option(
        metavar="NAME[+NAME]",
        help="efficientnet_lite0|1|2, torchvision:NAME, timm:NAME or sift-bow, see `sppfeat models`; several are "
        "joined by +, and NAME@PIXELS has a scale of its own.",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Weights file (.safetensors or .pth), `pretrained` or `random`; one for each backbone, joined by +.",
    ),
]
VocabularyFile = Annotated[
    str | None,
    typer.Option(
        "--vocabulary",
        metavar="FILE",
        help="Vocabulary of backbone sift-bow, made by `sppfeat train vocabulary`.",
        show_default=False,
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME]",
        help="Layers whose outputs are pooled, see `sppfeat models NAME`; those of each backbone are joined by +.",
        show_default="by backbone",
    ),
]
Scales = Annotated[
    str, typer.Option("--scales", metavar="PIXELS,...", help="Short sides of the resized image, or `native`.")
]
Levels = Annotated[
    str, typer.Option("--levels", metavar="N,...", help="Pyramid levels; level n is a grid of n x n bins.")
]
StoredLevels = Annotated[
    str | None,
    typer.Option("--levels", metavar="N,...", help="Levels of the stored pyramid to use.", show_default="all"),
]
StoredParts = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="NAME,...",
        help="Backbones or layers whose parts of the descriptor to use.",
        show_default="all",
    ),
]

# Tuning.

FromLayer = Annotated[
    str | None,
    typer.Option("--from", metavar="LAYER", help="First layer that is tuned.", show_default="the first of all"),
]
Epochs = Annotated[
    int,
    typer.Option(metavar="N", help="Passes over the images; of detectors, 0 fits a softmax to the network as it is."),
]
LearningRate = Annotated[float, typer.Option(metavar="R", help="Highest learning rate of the network.")]
HeadRate = Annotated[float, typer.Option(metavar="X", help="How many times as fast as the network its head learns.")]
Optimizer = Annotated[str, typer.Option(metavar="NAME", help="Optimizer: adamw or sgd (momentum 0.9).")]
Schedule = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="How the learning rate falls: cosine or steps (to a tenth after three quarters)."
    ),
]
WeightDecay = Annotated[float, typer.Option(metavar="X", help="Weight decay.")]
Precision = Annotated[
    str, typer.Option(metavar="NAME", help="Precision of the arithmetic on a GPU: float32 or bfloat16.")
]
HeldOut = Annotated[float, typer.Option(metavar="X", help="Share of the images that the best epoch is chosen by.")]
CheckpointMinutes = Annotated[
    float, typer.Option(metavar="N", help="Minutes between checkpoints: as much as a lost job loses.")
]

# SVMs.

Labels = Annotated[
    str | None,
    typer.Option(metavar="CSV", help="Labels, in columns name,label[,split].", show_default="parent folders"),
]
Costs = Annotated[
    str | None,
    typer.Option("--c", metavar="C,...", help="Cost C, or several to choose from.", show_default="see --c-grid"),
]
CostGrid = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Costs to choose from: decades (6 from 0.01 to 1000) or vissl (VISSL's 11 in that range).",
        show_default="decades",
    ),
]
PositiveWeight = Annotated[float, typer.Option(metavar="X", help="Weight of positives relative to negatives.")]

# Retrieval.

Neighbors = Annotated[int, typer.Option("-k", metavar="N", help="Number of neighbors per query.")]
Rerank = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Order the nearest images again: none; bins (by how the query can be aligned with them); or by how near "
        "they are to each other: expand, reciprocal or diffuse.",
    ),
]
Candidates = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Number of nearest images that --rerank orders again, or in which --parts looks.",
        show_default="400; 10000 for parts of a large gallery",
    ),
]
Neighborhood = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Neighbors of each image that expand, reciprocal and diffuse use.",
        show_default="3 for expand, else 20",
    ),
]
Alpha = Annotated[
    float, typer.Option(metavar="X", help="Exponent of the similarity that weights each neighbor in --rerank expand.")
]
GalleryWeights = Annotated[
    str | None, typer.Option(metavar="FILE", help="Weights file of the gallery, if it has moved.", show_default=False)
]
BinDim = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Values of a bin: its N principal components instead of all channels; smaller, and less exact.",
        show_default="all channels",
    ),
]
Project = Annotated[
    int | None,
    typer.Option(metavar="N", help="Project onto N principal components.", show_default="512 with --whiten"),
]
Whiten = Annotated[bool, typer.Option("--whiten", help="Whiten the components.")]
WhitenPower = Annotated[float, typer.Option(metavar="X", help="Strength of whitening, from 0 (PCA only) to 1 (full).")]
Shrinkage = Annotated[
    float,
    typer.Option(metavar="X", help="Shrinkage of variances towards their mean before whitening, from 0 to 1."),
]
WhiteningFrom = Annotated[
    str | None,
    typer.Option(metavar="STORE", help="Learn the projection from this store.", show_default="the gallery's store"),
]

# Detection.

DetectorFile = Annotated[
    str, typer.Argument(metavar="DETECTOR", help="Detector made by `sppfeat train detector`.", show_default=False)
]
VocRoot = Annotated[
    str | None,
    typer.Argument(
        metavar="[VOCROOT]",
        help="Folder in the VOC layout (JPEGImages, Annotations, ImageSets/Main).",
        show_default=False,
    ),
]
Images = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Folder of images, if they are not where the VOC layout or the gallery says.",
        show_default=False,
    ),
]
Annotations = Annotated[
    str | None,
    typer.Option(
        metavar="DIR|JSON",
        help="Annotations of --images: a folder of VOC XML files, or a COCO instances file.",
        show_default=False,
    ),
]
_WINDOWS = "a file made by `sppfeat windows`, or a .csv or .json file of name,x1,y1,x2,y2 in pixels"
Windows = Annotated[
    str | None,
    typer.Option(metavar="FILE", help=f"Windows of the images: {_WINDOWS}.", show_default="proposed automatically"),
]
DescribedWindows = Annotated[
    str | None,
    typer.Option("--windows", metavar="FILE", help=f"Windows to describe: {_WINDOWS}.", show_default="whole images"),
]
Nms = Annotated[
    float,
    typer.Option(
        metavar="IOU", help="Non-maximum suppression: overlap (IoU) above which the lower-scored detection is dropped."
    ),
]


Voting = Annotated[
    bool,
    typer.Option(
        "--voting/--no-voting",
        help="Move each detection to the mean, by score, of the boxes of its class that overlap it by more than half.",
    ),
]


def memory(default: str) -> Any:
    """`--memory` of a command, and what it bounds."""
    return typer.Option(
        metavar="SIZE", help="Memory limit, such as 512MB or 4GB; a number alone is in bytes.", show_default=default
    )


def split(default: str) -> Any:
    """`--split` of a VOC layout."""
    return typer.Option(metavar="NAME", help="Image list in ImageSets/Main.", show_default=default)


def costs(c: str | None, grid: str | None) -> tuple[float, ...]:
    """The costs that --c and --c-grid name."""
    from sppfeat.svm import COST_GRIDS

    if c is not None and grid is not None:
        raise UsageError("--c and --c-grid: expected one of them, found both")
    if c is not None:
        return numbers("c", c)
    if (grid or "decades") not in COST_GRIDS:
        raise UsageError(unknown_name("c_grid", str(grid), COST_GRIDS))
    return COST_GRIDS[grid or "decades"]


def stored_levels(text: str | None) -> tuple[int, ...] | None:
    """The levels that --levels names; None: all."""
    return integers("levels", text) if text is not None else None


def stored_parts(text: str | None) -> tuple[str, ...] | None:
    """The backbones and layers that --only names; None: all."""
    return tuple(text.split(",")) if text is not None else None


def shots(text: str | None) -> tuple[int, ...]:
    """The numbers of images per class that --shots names."""
    return integers("shots", text) if text is not None else ()


def projection_options(
    project: int | None, whiten: bool, power: float, shrinkage: float, whitening_from: str | None, seed: int = 0
) -> "ProjectionOptions | None":
    """What --project, --whiten and the options that go with them ask for; None: no projection."""
    from sppfeat.retrieval import DEFAULT_DIMS, ProjectionOptions

    if project is None and not whiten:
        if whitening_from is not None:
            raise UsageError("--whitening-from: expected --whiten or --project with it")
        return None
    dims = DEFAULT_DIMS if project is None else project
    return ProjectionOptions(dims=dims, whiten=whiten, power=power, shrinkage=shrinkage, seed=seed)


def check_sources(sources: Iterable[str]) -> None:
    """Raise UsageError for a file that does not exist, in the library's words but before it is imported."""
    for source in sources:
        if source != "-" and "://" not in source and "{" not in source and not os.path.lexists(source):
            raise UsageError(f"{source}: no such file or folder{near_path(source)}")


def check_proposals(windows: str | None) -> None:
    """Raise MissingExtraError if windows are to be proposed and OpenCV is not installed."""
    if windows is None:
        require_extra("cv2", "detect", "selective search")


def given(context: typer.Context) -> set[str]:
    """The fields of a recipe that the command line gives, as opposed to their defaults."""
    fields = {"scale_list": "scales", "level_list": "levels", "vocabulary": "weights"}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {fields.get(name, name) for name, source in sources.items() if source and source.name == "COMMANDLINE"}
