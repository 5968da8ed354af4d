"""`sppfeat inspect`: show what a file of sppfeat holds."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sppfeat.recipe import short_sha
from sppfeat_cli import options
from sppfeat_cli.output import convergence_document, counted, human_bytes, print_json, printable

if TYPE_CHECKING:
    from sppfeat.store import Store


def register(app: typer.Typer) -> None:
    app.command(epilog="Example: sppfeat inspect feats.h5 --verify")(inspect)


def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="Store, model, vocabulary, file of windows, or gallery.", show_default=False
        ),
    ],
    failures: Annotated[bool, typer.Option("--failures", help="List failed images, with reasons.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check every row; the exit code is 1 if one is damaged.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what a store, model, vocabulary, file of windows or gallery holds: recipe, counts, failures."""
    from sppfeat.errors import UsageError
    from sppfeat.files import DETECTOR, GALLERY, NOUNS, STORE, SVM, VOCABULARY, WINDOWS, format_of
    from sppfeat.store import count_lost, open_store, split_row_name, store_bytes, verify_store

    kind = format_of(file)
    if failures and kind not in (None, STORE, WINDOWS):
        raise UsageError(f"{file}: --failures is for stores and files of windows, found {NOUNS[str(kind)]}")
    if verify and kind not in (None, STORE, GALLERY):
        raise UsageError(f"{file}: --verify is for stores and galleries, found {NOUNS[str(kind)]}")
    if kind == GALLERY:
        _inspect_gallery(file, verify, as_json)
        return
    if kind == SVM:
        _inspect_svm(file, as_json)
        return
    if kind == DETECTOR:
        _inspect_detector(file, as_json)
        return
    if kind == VOCABULARY:
        _inspect_vocabulary(file, as_json)
        return
    if kind == WINDOWS:
        _inspect_windows(file, failures, as_json)
        return

    store = open_store(file)
    problems = verify_store(store) if verify else []
    lost = count_lost(store)
    about: dict[str, Any] = {
        "file": file,
        "format": "store",
        "images": len(store),
        **store.counts(),
        "dim": store.dim,
        "dtype": store.recipe.dtype,
        "bytes": store_bytes(store),
        **_folder_document(store),
        "source_root": store.source_root,
        "files": None if lost is None else {"checked": lost.checked, "lost": lost.lost, "changed": lost.changed},
        "weights_sha256": store.weights_sha256,
        "recipe_hash": store.recipe_hash,
        "recipe": dataclasses.asdict(store.recipe),
        "parts": [dataclasses.asdict(part) for part in store.recipe.parts(store.dim)],
        "versions": store.versions,
    }
    if as_json:
        print_json(
            about
            | ({"failures": store.errors()} if failures else {})
            | ({"verified": not problems, "problems": problems} if verify else {})
        )
    elif failures:
        for name, reason in store.failures():
            typer.echo(f"{printable(name)}: {printable(reason)}")
    else:
        # Of a store in a bucket, the manifest is enough.
        of_windows = len(store) > 0 and store.url is None and split_row_name(store.names[0])[1] is not None
        files = "not checked: no such folder on this machine" if lost is None else str(lost)
        typer.echo(_text(about, "window" if of_windows else "image", files))
    if verify and not as_json:
        for problem in problems:
            print(f"sppfeat: {printable(file)}: {printable(problem)}", file=sys.stderr)
        if not problems:
            typer.echo(f"verified: all {about['done']} described rows match their checksums")
    if problems:
        raise typer.Exit(1)


def _folder_document(store: "Store") -> dict[str, Any]:
    """What only a folder of shards has: shards, those under work, and the part that it is."""
    from sppfeat.store import building_progress

    if store.manifest is None:
        return {}
    building = building_progress(store)
    return {
        "shards": len(store.manifest.shards),
        "building": {"shards": building.shards, "images": building.new, "pending": building.pending},
        "unfinished": store.unfinished,
        "part": store.manifest.part,
    }


def _inspect_svm(file: str, as_json: bool) -> None:
    from sppfeat.transfer import open_classifier

    model = open_classifier(file)
    about: dict[str, Any] = {
        "file": file,
        "format": "svm",
        "classes": model.classes,
        "images": model.images,
        "dim": model.svm.weights.shape[1],
        "C": float(model.svm.costs[0]),
        "positive_weight": model.positive_weight,
        **convergence_document(model.convergence),
        "weights_sha256": model.weights_sha256,
        "recipe": dataclasses.asdict(model.recipe),
    }
    if as_json:
        print_json(about)
        return
    lines = [
        f"{printable(file)}: SVM of {counted(len(model.classes), 'class')} ({_first(model.classes)}), "
        f"trained on {counted(model.images, 'image')}",
        f"  C = {about['C']:g}, positive weight {model.positive_weight:g}, {about['dim']} values",
        *(f"  warning: {printable(text)}" for text in model.convergence.warnings()),
        f"  weights: sha256 {printable(short_sha(model.weights_sha256))}",
        *_recipe_lines(about["recipe"]),
    ]
    typer.echo("\n".join(lines))


_CALIBRATED = "calibrated, the probability that a detection is correct"
_SHARES = "probabilities, shares of a softmax over the classes and the background"
_UNCALIBRATED = "SVM scores, not calibrated; a detector that is trained again has probabilities"


def _inspect_detector(file: str, as_json: bool) -> None:
    from sppfeat.detection import open_detector

    model = open_detector(file)
    about: dict[str, Any] = {
        "file": file,
        "format": "detector",
        "classes": model.classes,
        "dim": model.weights.shape[1],
        "box_regression": model.box_weights is not None,
        "calibrated": model.probable,
        "windows": dataclasses.asdict(model.proposals),
        "training": model.training,
        "weights_sha256": model.weights_sha256,
        "recipe": dataclasses.asdict(model.recipe),
        "versions": model.versions,
    }
    if as_json:
        print_json(about)
        return
    training = model.training
    how = f"  trained on {training.get('images', 0)} images, {sum(training.get('positives', {}).values())} objects"
    scores = _CALIBRATED if model.calibration is not None else _UNCALIBRATED
    if model.background is not None:
        tuned = "its network was tuned with it" if training.get("best") else "fitted to the network as it is"
        how, scores = f"{how}; {tuned}", _SHARES
    else:
        how += (
            f" and {sum(training.get('hard', []))} hard negatives in {len(training.get('hard', []))} passes; C = "
            f"{training.get('c', 0):g}, positive weight {training.get('positive_weight', 0):g}"
        )
    lines = [
        f"{printable(file)}: detector of {counted(len(model.classes), 'class')} ({_first(model.classes)}), "
        f"{about['dim']} values",
        how,
        f"  box regression: {'yes' if about['box_regression'] else 'no'}; windows: {model.proposals.method}, base k "
        f"{model.proposals.base_k}, at most {model.proposals.max_windows} per image",
        f"  scores: {scores}",
        f"  weights: sha256 {printable(short_sha(model.weights_sha256))}",
        *_recipe_lines(about["recipe"]),
    ]
    typer.echo("\n".join(lines))


def _inspect_vocabulary(file: str, as_json: bool) -> None:
    from sppfeat.backbones import open_vocabulary

    found = open_vocabulary(file)
    about: dict[str, Any] = {
        "file": file,
        "format": "vocabulary",
        "words": found.words,
        "dim": found.centers.shape[1],
        "images": found.images,
        "descriptors": found.descriptors,
        "seed": found.seed,
        "objective": found.objective,
        "weights_sha256": found.sha256,
        "versions": found.versions,
    }
    if as_json:
        print_json(about)
        return
    lines = [
        f"{printable(file)}: vocabulary of {counted(found.words, 'word')}, {about['dim']} values each",
        f"  learned from {counted(found.descriptors, 'SIFT descriptor')} of {counted(found.images, 'image')}, "
        f"seed {found.seed}; mean squared distance {found.objective:.0f}",
        f"  weights: sha256 {printable(found.sha256[:16])}",
        "  made with: " + _versions(found.versions),
    ]
    typer.echo("\n".join(lines))


def _inspect_windows(file: str, failures: bool, as_json: bool) -> None:
    from sppfeat.windows import open_windows

    found = open_windows(file)
    empty = sum(not len(windows) for windows in found.values()) - len(found.errors)
    about: dict[str, Any] = {
        "file": file,
        "format": "windows",
        "images": len(found),
        "windows": found.count,
        "failed": len(found.errors),
        "empty": empty,
        **dataclasses.asdict(found.options),
        "source_root": found.source_root,
        "versions": found.versions,
    }
    if as_json:
        print_json(about | ({"failures": found.errors} if failures else {}))
        return
    if failures:
        for name, reason in found.errors.items():
            typer.echo(f"{printable(name)}: {printable(reason)}")
        return
    lines = [
        f"{printable(file)}: {counted(found.count, 'window')} of {counted(len(found), 'image')}, "
        f"{human_bytes(found.path.stat().st_size)}",
        f"  {found.options.method}, base k {found.options.base_k}, at most {found.options.max_windows} per image, seed "
        f"{found.options.seed}",
        f"  failed {len(found.errors)}, without windows {empty}",
        f"  images below: {printable(found.source_root)}",
        "  made with: " + _versions(found.versions),
        *(f"  failed: {printable(name)}: {printable(reason)}" for name, reason in list(found.errors.items())[:20]),
    ]
    typer.echo("\n".join(lines))


def _recipe_lines(recipe: dict[str, Any]) -> list[str]:
    lines = ["  recipe:"]
    for name, value in recipe.items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        lines.append(f"    {name:<14} {printable(str(shown))}")
    return lines


def _first(classes: list[str]) -> str:
    return ", ".join(map(printable, classes[:8])) + ", ..." * (len(classes) > 8)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{printable(name)} {printable(number)}" for name, number in versions.items())


def _inspect_gallery(path: str, verify: bool, as_json: bool) -> None:
    from msgspec import to_builtins

    from sppfeat.retrieval import describe_gallery, open_gallery, verify_gallery

    # FAISS is needed only to check the index.
    check = verify_gallery(open_gallery(path)) if verify else None
    problems = [] if check is None else check.problems
    found, recipe = describe_gallery(path)
    about = {
        "file": path,
        "format": "gallery",
        "images": found.rows,
        "bytes": sum(entry.bytes for entry in found.entries),
        **{
            key: to_builtins(getattr(found, key))
            for key in ("dim", "index", "projection", "bins", "sources", "weights_sha256")
        },
        "recipe": dataclasses.asdict(recipe),
        "map": found.files.map is not None,
        "versions": found.versions,
    }
    if as_json:
        verdict = {} if check is None else {"verified": not problems, **dataclasses.asdict(check)}
        print_json(about | verdict)
    else:
        typer.echo(_gallery_text(about))
        for problem in problems:
            print(f"sppfeat: {printable(path)}: {printable(problem)}", file=sys.stderr)
        if check is not None:
            for text in check.passed_over:
                print(f"note: {printable(path)}: not compared: {printable(text)}", file=sys.stderr)
            if not problems:
                rows = "all" if check.compared == found.rows else f"{check.compared} of {found.rows}"
                ours = f", and {rows} rows those of their stores" if check.compared else ""
                typer.echo(f"verified: all files match their checksums{ours}")
    if problems:
        raise typer.Exit(1)


def _gallery_text(about: dict[str, Any]) -> str:
    index, projection = about["index"], about["projection"]
    effort = "".join(f", {name} {value}" for name, value in index["effort"].items())
    lines = [
        f"{about['file']}: gallery of {counted(about['images'], 'image')}, {human_bytes(about['bytes'])}",
        f"  index: {index['factory']}{effort} ({index['why']})",
    ]
    if index["recall@10"] is not None:
        lines.append(f"  recall of the 10 true neighbors when built: {100 * index['recall@10']:.1f} %")
    if projection is not None:
        how = f", whitened (power {projection['power']:g})" if projection["power"] else ""
        lines.append(
            f"  projection: {about['dim']} onto {projection['dim']} values{how}, {100 * projection['kept']:.1f} % of "
            f"the variance of {projection['rows']} images of {projection['learned_from']}"
        )
    if (bins := about["bins"]) is not None:
        lines.append(f"  bins: {bins['dim']} values each, {human_bytes(bins['bytes'])} an image")
    if about["map"]:
        lines.append("  map: of all images, for `sppfeat serve`")
    for source in about["sources"]:
        lines.append(f"  from {source['store']}: {counted(source['rows'], 'image')} below {source['source_root']}")
    lines += [f"  weights: sha256 {short_sha(about['weights_sha256'])}", *_recipe_lines(about["recipe"])]
    lines.append("  made with: " + _versions(about["versions"]))
    # The texts of a gallery of unknown origin may hold anything, terminal commands included.
    return "\n".join(map(printable, lines))


def _text(about: dict[str, Any], unit: str, files: str) -> str:
    lines = [
        f"{printable(about['file'])}: store of {counted(about['images'], unit)}, {human_bytes(about['bytes'])}",
        f"  done {about['done']}, failed {about['failed']}, pending {about['pending']}",
        *_folder_lines(about),
        f"  descriptors: {about['dim']} values, {about['dtype']}",
        *_part_lines(about["parts"]),
        f"  images below: {printable(about['source_root'])}",
        f"  files: {files}",
        f"  weights: sha256 {printable(short_sha(about['weights_sha256']))}",
        *_recipe_lines(about["recipe"]),
    ]
    lines.append("  made with: " + _versions(about["versions"]))
    if about["pending"] or about.get("building", {}).get("shards"):
        lines.append(f"  to describe pending {unit}s, run the same `sppfeat extract` again")
    if about["files"] is not None and about["files"]["lost"]:
        lines.append("  to remove the rows of images that no longer exist, run the same `sppfeat extract` with --prune")
    if about["files"] is not None and about["files"]["changed"]:
        lines.append("  to describe changed images again, run the same `sppfeat extract`")
    return "\n".join(lines)


def _part_lines(parts: list[dict[str, Any]]) -> list[str]:
    if len(parts) == 1:
        return []
    return [
        f"    {part['start']} to {part['end']}: {printable(part['backbone'])}, layer {printable(part['layer'])}"
        + ("" if part["scale"] is None else f", scale {part['scale']}")
        + f", {part['channels']} channels"
        for part in parts
    ]


def _folder_lines(about: dict[str, Any]) -> list[str]:
    if "shards" not in about:
        return []
    part = "" if about["part"] is None else f"; part {about['part'][0]} of {about['part'][1]}"
    lines = [f"  in {counted(about['shards'], 'shard')}{part}"]
    if (building := about["building"])["shards"]:
        lines.append(
            f"  under work: {counted(building['shards'], 'shard')}, {counted(building['images'], 'new image')}, "
            f"{building['pending']} pending"
        )
    if about.get("unfinished"):
        lines.append("  a run writes to it, or was interrupted")
    return lines
