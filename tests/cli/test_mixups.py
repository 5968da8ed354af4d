"""What a new user mistypes or mixes up: one line that says what is there and what to type."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MakeStore
from PIL import Image
from typer.main import get_command
from voc_xml import xml

from sppfeat import extract_folder
from sppfeat.backbones.backbone import load_trunk
from sppfeat.detection import Detecting, read_annotations
from sppfeat.errors import MOST_COMPARED, StoreError, UsageError, near_path, nearest_names, unknown_name
from sppfeat.matrix import read_data
from sppfeat.recipe import Recipe
from sppfeat.transfer import read_voc_labels
from sppfeat_cli import main
from sppfeat_cli.app import COMMANDS, SECTIONS, build
from sppfeat_cli.detect import _about_windows
from sppfeat_cli.output import byte_count

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Run the command line within this process and folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sppfeat", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def told(call: Call, words: str) -> str:
    """The one line that a wrong command ends in, without the program's name."""
    code, out, errors = call(*words.split())
    assert code in (1, 2) and out == "" and errors.count("\n") == 1, (code, out, errors)
    return errors.removeprefix("sppfeat: ").removesuffix("\n")


FIRST = "expected a store, found a folder of images; first: sppfeat extract images -o feats.h5"


@pytest.mark.parametrize(
    "words",
    [
        "inspect images",
        "export images -o f.csv",
        "index images -o g",
        "index images --add-to g",
        "index f.h5 -o g2 --whiten --whitening-from images",
        "evaluate transfer images",
        "evaluate retrieval images --relevant folder",
        "train svm images -o svm.h5",
        "merge out images",
        "duplicates images",
    ],
)
def test_images_where_a_store_belongs(
    words: str, call: Call, make_images: Callable[..., Path], make_store: MakeStore, tmp_path: Path
) -> None:
    make_images(2, "images/below")
    make_store(np.random.default_rng(0).normal(size=(6, 8)), "f.h5")
    assert told(call, words) == f"images: {FIRST}"


def test_one_thing_where_another_belongs(
    call: Call, make_images: Callable[..., Path], make_store: MakeStore, tmp_path: Path
) -> None:
    pytest.importorskip("faiss")
    make_images(2, "my images")
    store = make_store(np.random.default_rng(0).normal(size=(6, 8)))
    store.path.rename(tmp_path / "feats.h5")
    assert call("index", "feats.h5", "-o", "g", "--quiet")[0] == 0
    (tmp_path / "one.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()

    def line(*words: str) -> str:
        code, _, errors = call(*words)
        assert code == 1
        return errors.removeprefix("sppfeat: ").removesuffix("\n")

    assert line("search", "my images", "one.jpg") == (
        "my images: expected a gallery, found a folder of images; first: sppfeat extract 'my images' -o feats.h5, "
        "then: sppfeat index feats.h5 -o gallery/"
    )
    assert line("search", "feats.h5", "one.jpg") == (
        "feats.h5: expected a gallery, found a store; first: sppfeat index feats.h5 -o gallery/"
    )
    assert line("serve", "feats.h5").endswith("found a store; first: sppfeat index feats.h5 -o gallery/")
    assert line("inspect", "one.jpg") == (
        "one.jpg: expected a store, found an image; first: sppfeat extract one.jpg -o feats.h5"
    )
    assert line("export", "g", "-o", "x.csv") == (
        "g: expected a store, found a gallery; give the store that it was built from, which `sppfeat inspect g` names"
    )
    assert line("inspect", "empty") == "empty: expected a store, found a folder without manifest.json"
    assert line("predict", "feats.h5", ".") == (
        "feats.h5: expected an SVM, found a store; `sppfeat train svm` makes one"
    )
    assert line("detect", "g", ".") == "g: expected a detector, found a folder; `sppfeat train detector` makes one"
    code, _, errors = call("extract", "feats.h5", "-o", "new.h5")
    assert code == 2 and errors.endswith("or a text list (.lst, .txt), found a store\n")


def test_a_large_folder_is_not_walked_for_a_message(
    call: Call, make_images: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sppfeat.images.instead._LOOKED_AT", 3)
    (tmp_path / "large/a/b").mkdir(parents=True)
    for number in range(4):
        (tmp_path / f"large/a/{number}.dat").touch()
    shutil.move(make_images(1), tmp_path / "large/a/b/images")
    assert told(call, "inspect large") == "large: expected a store, found a folder without manifest.json"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "evaluate feats.h5",
            "evaluate what? transfer, retrieval, detection or all, such as: sppfeat evaluate transfer feats.h5",
        ),
        (
            "evaluate --protocol split feats.h5",
            "evaluate what? transfer, retrieval, detection or all, such as: "
            "sppfeat evaluate transfer --protocol split feats.h5",
        ),
        ("train feats.h5", "train what? svm, detector or vocabulary, such as: sppfeat train svm feats.h5 -o FILE"),
        ("train f.h5 -o m.h5", "train what? svm, detector or vocabulary, such as: sppfeat train svm f.h5 -o m.h5"),
        ("train svmm f.h5", "unknown command 'svmm': did you mean svm?"),
        (
            "train detector.h5",
            "train what? svm, detector or vocabulary, such as: sppfeat train svm detector.h5 -o FILE",
        ),
        ("extrcat photos", "unknown command 'extrcat': did you mean extract?"),
        ("photos", "unknown command 'photos': `sppfeat --help` lists all commands"),
        ("--versio", "unknown option '--versio' of sppfeat: did you mean --version?"),
        ("extract . -o f.h5 --scale 224", "unknown option '--scale' of sppfeat extract: did you mean --scales?"),
        (
            "evaluate transfer f.h5 --lable x",
            "unknown option '--lable' of sppfeat evaluate transfer: did you mean --labels?",
        ),
        ("index f.h5 --memroy 4GB", "unknown option '--memroy' of sppfeat index: did you mean --memory?"),
        (
            "extract . -o f.h5 -z",
            "unknown option '-z' of sppfeat extract: sppfeat extract SOURCE... -o FILE|DIR [OPTIONS]; "
            "`sppfeat extract --help` lists all options",
        ),
        (
            "evaluate knn feats.h5",
            "evaluate what? transfer, retrieval, detection or all, such as: sppfeat evaluate transfer feats.h5",
        ),
        (
            "evaluate knn",
            "evaluate what? transfer, retrieval, detection or all, such as: sppfeat evaluate transfer STORE...",
        ),
        (
            "evaluate knn --protocol split",
            "evaluate what? transfer, retrieval, detection or all, such as: "
            "sppfeat evaluate transfer STORE... --protocol split",
        ),
        ("train knn -o m.h5", "train what? svm, detector or vocabulary, such as: sppfeat train svm STORE -o m.h5"),
        *(
            (
                f"train f.h5 {given}",
                f"train what? svm, detector or vocabulary, such as: sppfeat train svm f.h5 {given}",
            )
            for given in ("--output m.h5", "--output=m.h5", "-om.h5")
        ),
        ("extract . -o f.h5 --no-resum", "unknown option '--no-resum' of sppfeat extract: did you mean --no-resume?"),
    ],
)
def test_commands_and_options_that_do_not_exist(words: str, line: str, call: Call) -> None:
    assert told(call, words) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("search", "missing GALLERY: sppfeat search GALLERY QUERY... [OPTIONS]"),
        ("search g", "missing QUERY...: sppfeat search GALLERY QUERY... [OPTIONS]"),
        ("extract photos", "missing -o FILE|DIR: sppfeat extract SOURCE... -o FILE|DIR [OPTIONS]"),
        ("train svm f.h5", "missing -o FILE: sppfeat train svm STORE -o FILE [OPTIONS]"),
        ("search g q -k ten", "expected a whole number for -k N, found 'ten'"),
        ("search g q -k=1.5", "expected a whole number for -k N, found '=1.5'"),
        ("search g q -k 3 -k ten", "expected a whole number for -k N, found 'ten'"),
        ("extract . -o f.h5 -jx", "expected a whole number for -j N, found 'x'"),
        ("extract . -o f.h5 -b 8 --batch-size -", "expected a whole number for -b N, found '-'"),
        ("detect d.h5 . --nms integer", "expected a number for --nms IOU, found 'integer'"),
        ("detect d.h5 . --nms half", "expected a number for --nms IOU, found 'half'"),
        ("extract . -o", "option '-o' requires an argument: sppfeat extract SOURCE... -o FILE|DIR [OPTIONS]"),
        ("merge all part --json=3", "option '--json' does not take a value: sppfeat merge OUTPUT PART... [OPTIONS]"),
        ("--version=3", "option '--version' does not take a value: sppfeat [OPTIONS]"),
        ("evaluate --help=3", "option '--help' does not take a value: sppfeat evaluate [OPTIONS]"),
        ("evaluate all . recipes.toml -o results", ".: expected a TOML file, found a folder"),
        ("inspect a b", "got unexpected extra argument (b): sppfeat inspect FILE [OPTIONS]"),
        ("models a b c", "got unexpected extra arguments (b c): sppfeat models [BACKBONE] [OPTIONS]"),
    ],
)
def test_arguments_that_are_missing_or_of_another_kind(words: str, line: str, call: Call) -> None:
    assert told(call, words) == line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("extract . -o f.h5 -j 0", "--num-workers must be"),
        ("extract . -o f.h5 --levels 0", "--levels must be"),
        (
            "evaluate transfer f.h5 --classifier knn --device cuda",
            "--classifier knn: expected device auto or cpu",
        ),
        ("extract . -o f.h5 --max-aspect 0.5", "--max-aspect must be"),
    ],
)
def test_what_is_wrong_is_named_by_its_option(words: str, line: str, call: Call, tmp_path: Path) -> None:
    assert told(call, words).startswith(line)


def test_an_empty_argument_is_refused(call: Call) -> None:
    """As "$FOLDER" is, where it is not set."""
    usage = "sppfeat extract SOURCE... -o FILE|DIR [OPTIONS]"
    for words in (("extract", "", "-o", "f.h5"), ("extract", ".", "-o", "")):
        assert call(*words) == (2, "", f"sppfeat: expected no empty argument, found one: {usage}\n")


def test_the_nearest_store_or_gallery_is_named(call: Call, tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    (tmp_path / "feats.h5").touch()
    line = "galery: expected a gallery, found no such folder; did you mean gallery/?"
    assert told(call, "search galery x.jpg") == line
    assert told(call, "inspect feats.h6") == "feats.h6: expected a store, found no such file; did you mean feats.h5?"


def test_help_names_arguments_as_they_are_declared(call: Call) -> None:
    code, out, _ = call("search", "--help")
    assert code == 0 and out.startswith("Usage: sppfeat search [OPTIONS] GALLERY QUERY...\n")
    assert "\n  GALLERY   Gallery made by" in out and "\n  QUERY...  Images, folders" in out


def test_names_are_ranked_by_what_was_typed() -> None:
    options = ["--cluster", "--fuse", "--scales", "--shard-rows"]
    assert nearest_names("--scale", options) == ["--scales"]
    objects = [f"obj{number}_t{take}" for number in range(20) for take in (1, 2)]
    assert nearest_names("obj1", objects)[:2] == ["obj1_t1", "obj1_t2"]
    # A prefix, then a part, then few letters, swapped ones included; case does not matter.
    assert nearest_names("abcd", ["xxxx", "abce", "xabcd", "ABCDE"]) == ["ABCDE", "xabcd", "abce"]
    assert nearest_names("resnet81", ["resnet34", "resnet18"]) == ["resnet18", "resnet34"]
    assert nearest_names("abacus", ["zebra", "ox"]) == [] and nearest_names("", ["a"]) == []
    many = [f"{number:06}.jpg" for number in range(200_000)]
    assert nearest_names("000123", many)[0] == "000123.jpg"
    assert unknown_name("class", "obj1", objects).startswith("unknown class 'obj1': did you mean obj1_t1, obj1_t2, ")
    assert unknown_name("x", "q", [str(n) for n in range(9)]).endswith("expected one of 9 names, such as 0, 1, 2, 3, 4")


def test_a_missing_path_is_answered_with_the_nearest_name(call: Call, tmp_path: Path) -> None:
    (tmp_path / "photos" / "people").mkdir(parents=True)
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / ".query.lock").touch()
    assert call("extract", "photo/", "-o", "f.h5") == (
        2,
        "",
        "sppfeat: photo/: no such file or folder; did you mean photos/?\n",
    )
    line = "sppfeat: photos/cats.jpg: no such file or folder; did you mean photos/cat.jpg?\n"
    assert call("extract", "photos/cats.jpg", "-o", "f.h5")[2] == line
    with pytest.raises(UsageError, match=r"peeple: no such file or folder; did you mean photos/people/\?$"):
        extract_folder("photos/peeple", "f.h5")
    # Nothing near, a hidden file, no such folder, and a folder of too many names.
    assert [near_path(path) for path in ("zebra", "query", "nowhere/cat.jpg", "")] == [""] * 4
    many = tmp_path / "many"
    many.mkdir()
    for number in range(MOST_COMPARED + 1):
        (many / f"{number}.jpg").touch()
    assert near_path(many / "1.jpeg") == ""


def test_a_threshold_in_percent_is_answered_with_the_fraction(make_store: MakeStore, call: Call) -> None:
    make_store(np.eye(4), "f.h5")
    line = "sppfeat: --threshold must be above 0 and at most 1, a cosine similarity, found 95; did you mean 0.95?\n"
    assert call("duplicates", "f.h5", "--threshold", "95") == (2, "", line)
    assert call("duplicates", "f.h5", "--threshold", "1.5")[2].endswith("similarity, found 1.5\n")


def test_help_has_its_commands_in_sections(call: Call) -> None:
    code, shown, _ = call("--help")
    assert code == 0
    places = [shown.index(f"\n{title}:\n") for title in SECTIONS]
    assert places == sorted(places) and "\nCommands:" not in shown
    for title, names in SECTIONS.items():
        section = shown.split(f"\n{title}:\n")[1].split("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines() if line[2] != " "] == list(names)
    assert {*COMMANDS} == get_command(build()).commands.keys()  # type: ignore[attr-defined]
    assert "..." not in shown.split("Describe images:")[1]  # no sentence is cut short


@pytest.mark.parametrize("words", ["index f.h5 -o g", "train detector voc -o det.h5 --windows w.csv"])
@pytest.mark.parametrize(
    ("size", "line"),
    [
        ("lots", "--memory: expected a size such as 800MB or 4GB, found 'lots'"),
        ("4 apples", "--memory: expected a size such as 800MB or 4GB, found '4 apples'"),
        ("4", "--memory: expected a size such as 800MB or 4GB, found '4', a number of bytes: 4GB?"),
    ],
)
def test_memory_is_a_size_in_every_command(words: str, size: str, line: str, call: Call) -> None:
    code, out, errors = call(*words.split(), "--memory", size)
    assert (code, out, errors) == (2, "", f"sppfeat: {line}\n")


def test_sizes() -> None:
    same = ("4GB", "4gb", "4 GB", "4G", "4000MB", "4000000000", "4000000000B")
    assert {byte_count("memory", text) for text in same} == {4_000_000_000}
    assert byte_count("memory", "1GiB") == 1 << 30 and byte_count("memory", "100B") == 100


def test_evaluation_notes_what_a_projection_became(call: Call, make_store: MakeStore) -> None:
    names = [f"{number % 3}/{number}.jpg" for number in range(12)]
    make_store(np.random.default_rng(0).normal(size=(12, 8)), "f.h5", names=names)
    code, shown, errors = call("evaluate", "retrieval", "f.h5", "--whiten")
    assert code == 0 and "mAP" in shown
    assert errors.splitlines()[0] == "note: project: 512 components asked, 8 kept: 12 rows of 8 values have no more"
    assert errors.splitlines()[1].startswith(
        "note: whiten: learned from 12 rows for 8 components, expected at least 24"
    )


@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "timm:test_resnet", "timm:test_vit"])
def test_the_default_layer_is_marked(backbone: str, call: Call) -> None:
    """It is that of a store made without --layer."""
    layer = load_trunk(Recipe(backbone=backbone, weights="random")).recipe.layer
    code, shown, _ = call("models", backbone)
    assert code == 0
    assert [line.split()[0] for line in shown.splitlines() if line.endswith("  (default)")] == [layer]
    document = json.loads(call("models", backbone, "--json")[1])
    assert [one["name"] for one in document["layers"] if one["default"]] == [layer]


def test_voc_folders_are_accepted_alike(tmp_path: Path) -> None:
    """The folder, with or without a slash, its VOCdevkit, and what holds that; each by every reader."""
    voc = tmp_path / "unpacked/VOCdevkit/VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    Image.new("RGB", (120, 90)).save(voc / "JPEGImages/1.jpg")
    (voc / "Annotations/1.xml").write_text(xml(("cat", 31, 21, 90, 70), size=(120, 90)))
    for part in ("trainval", "test"):
        number = "1" if part == "test" else "2"
        (voc / f"ImageSets/Main/{part}.txt").write_text("1\n")
        (voc / f"ImageSets/Main/cat_{part}.txt").write_text(f"{number} 1\n")
    for given in (voc, voc.parent, voc.parent.parent):
        for text in (str(given), f"{given}/"):
            assert list(read_annotations(text, split="test").images) == ["1.jpg"]
            assert read_voc_labels(text).classes == ["cat"]
            (data,) = read_data([text])
            assert data.voc and data.path == voc
    expected = "expected a VOC folder such as VOC2007, with ImageSets/Main, JPEGImages and Annotations, or the folder "
    for wrong, found in ((tmp_path / "gone", "no such folder"), (voc / "JPEGImages", "no ImageSets/Main in it")):
        line = f"{wrong}: {expected}that holds it, found {found}"
        with pytest.raises(UsageError, match=re.escape(line)):
            read_voc_labels(wrong)
        with pytest.raises(UsageError, match=re.escape(line)):
            read_annotations(str(wrong))
    shutil.copytree(voc, voc.parent / "VOC2012")
    with pytest.raises(UsageError, match="VOCdevkit: expected one VOC folder in it, found VOC2007, VOC2012: give one"):
        read_voc_labels(voc.parent)
    shutil.rmtree(voc / "JPEGImages")
    with pytest.raises(UsageError, match="VOC2007: expected a VOC folder with JPEGImages, found none in it"):
        read_annotations(str(voc))


def test_a_store_of_windows_counts_windows(call: Call, make_store: MakeStore) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 8))
    make_store(rows, "w.h5", names=["a.jpg#0,0,9,9", "a.jpg#5,5,9,9"])
    make_store(rows, "f.h5", names=["a.jpg", "b.jpg"])
    assert "w.h5: store of 2 windows, " in call("inspect", "w.h5")[1]
    assert "f.h5: store of 2 images, " in call("inspect", "f.h5")[1]


def test_windows_of_other_options_are_kept_or_replaced(
    call: Call, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("cv2")
    make_images(3)
    assert call("windows", "images", "-o", "w.h5", "-j", "1")[0] == 0
    assert told(call, "windows images -o w.h5 --base-k 99 -j 1").endswith("; choose another output, or use --overwrite")
    assert told(call, "windows images -o w.h5 --no-resume -j 1").endswith("; choose another output, or use --overwrite")
    # Of the images asked for, not of all in the file.
    counts = [
        int(re.search(r"(\d+) windows;", call("windows", place, "-o", "w.h5", "-j", "1")[1])[1])  # type: ignore[index]
        for place in ("images/0000.png", "images/0001.png", "images/0002.png", "images")
    ]
    assert sum(counts[:3]) == counts[3] > counts[0] > 0
    whole = call("inspect", "w.h5")[1]
    assert whole.startswith(f"w.h5: {counts[3]} windows of 3 images, ")


def test_who_writes_a_page_says_where(call: Call, make_store: MakeStore) -> None:
    names = [f"{number % 2}/{number}.jpg" for number in range(20)]
    make_store(np.random.default_rng(0).normal(size=(20, 8)), "f.h5", names=names)
    words = ("evaluate", "transfer", "f.h5", "--c", "1", "--trials", "1", "--per-class", "4", "--report", "r.html")
    code, shown, errors = call(*words)
    assert (code, errors.splitlines()[-1]) == (0, "wrote r.html") and "wrote" not in shown and Path("r.html").exists()
    pytest.importorskip("faiss")
    assert call("index", "f.h5", "-o", "g", "--quiet")[0] == 0
    page = ("search", "g", "f.h5", "--html", "p.html", "--overwrite")
    assert call(*page)[2].splitlines()[-1] == "wrote p.html"
    assert "wrote" not in call(*page, "--quiet")[2] and Path("p.html").exists()


def test_detect_says_what_windows_cost() -> None:
    """And what images without windows would need."""
    done = Detecting(3, 3, 0, 0, {}, [], 30.0, "cpu", {"windows": 25.0, "decode": 1.0, "forward": 9.0})
    said = _about_windows(done, None, ["my images"])
    assert said is not None and said.endswith("for other runs: sppfeat windows 'my images' -o windows.h5")
    quick = replace(done, stages={"windows": 2.0, "decode": 0.1})
    busy = replace(done, stages={"windows": 25.0, "forward": 99.0})
    assert _about_windows(quick, None, ["x"]) is _about_windows(busy, None, ["x"]) is None
    assert _about_windows(done, "w.h5", ["x"]) is None
    assert _about_windows(replace(done, bare=2), "w.h5", ["x"]) == (
        "2 images have no windows in w.h5: sppfeat windows x -o windows.h5"
    )


def test_files_that_are_no_images(tmp_path: Path) -> None:
    """As a telephone writes them: their kinds are named; hidden files are not."""
    (folder := tmp_path / "phone").mkdir()
    for name in ("a.HEIC", "b.heic", "c.CR2", ".DS_Store", "README"):
        (folder / name).write_bytes(b"x")
    expected = "expected images, found files of other kinds alone (.cr2, .heic); convert them to JPEG or PNG"
    with pytest.raises(UsageError) as error:
        extract_folder(folder, tmp_path / "f.h5")
    assert str(error.value) == f"{folder}: {expected}"


@pytest.mark.parametrize("ending", [".npy", ".PARQUET"])
def test_a_store_under_the_name_of_an_export(make_images: Callable[..., Path], tmp_path: Path, ending: str) -> None:
    with pytest.raises(StoreError, match=r"expected a store, such as f.h5 or f/, found a name that ends with \.[np]"):
        extract_folder(make_images(1), tmp_path / f"f{ending}")
    assert not (tmp_path / f"f{ending}").exists()
