"""What is compared: recipes from a TOML file, and data sets from folders or another TOML file."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sppfeat.errors import UsageError, one_line, unknown_name
from sppfeat.files import os_reason
from sppfeat.images import find_voc
from sppfeat.recipe import Recipe
from sppfeat.recipes import named_recipe
from sppfeat.retrieval import RetrievalOptions
from sppfeat.transfer import TEST_PARTS, TransferOptions

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class DataSet:
    """Images, and how descriptors of them are evaluated.

    path: of a classification task, or of the gallery; queries: of the searched images, else None. voc: whether path is
    a VOC folder. options: of the protocol.
    """

    name: str
    path: Path
    queries: Path | None
    voc: bool
    options: TransferOptions | RetrievalOptions

    @property
    def parts(self) -> dict[str, Path]:
        """The folders that are described, by the names of their stores."""
        if self.queries is not None:
            return {"gallery": self.path, "queries": self.queries}
        return {"images": self.path / "JPEGImages" if self.voc else self.path}


def read_recipes(path: str | os.PathLike[str]) -> dict[str, Recipe]:
    """Recipes by name: a table for each, with fields of `Recipe`, and `recipe`, the name of one to start from.

    Raises UsageError, naming the table and the key.
    """
    recipes = {}
    for name, fields in _tables(path).items():
        known = {"recipe"} | {field.name for field in dataclasses.fields(Recipe)}
        _check_keys(f"{os.fspath(path)}: [{name}]", fields, known)
        try:
            values = {key: _plain(one) for key, one in fields.items() if key != "recipe"}
            recipes[name] = named_recipe(fields["recipe"], **values) if "recipe" in fields else Recipe(**values)
        except UsageError as error:
            raise UsageError(f"{os.fspath(path)}: [{name}]: {error}") from None
    return recipes


def read_data(sources: Sequence[str | os.PathLike[str]]) -> list[DataSet]:
    """Data sets from folders and TOML files. Raises UsageError.

    A folder is evaluated by its layout: VOC's lists (`voc2007`), parts named train and test or val (`split`), else its
    folders as classes (`random`). A TOML file has a table for each data set: `path`, relative to the file, with the
    fields of `TransferOptions`; or `gallery` and `queries` with those of `RetrievalOptions`.
    """
    found: list[DataSet] = []
    for source in map(Path, sources):
        if source.suffix == ".toml":
            found += [_described(source, name, fields) for name, fields in _tables(source).items()]
        else:
            found.append(_of_layout(source.name or source.resolve().name, source))
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"expected data sets of different names, found {min(twice)!r} twice")
    return found


def _described(file: Path, name: str, fields: dict[str, Any]) -> DataSet:
    what = f"{file}: [{name}]"
    searched = "gallery" in fields or "queries" in fields
    places = ("gallery", "queries") if searched else ("path",)
    for place in places:
        if not isinstance(fields.get(place), str):
            raise UsageError(f"{what}: expected {' and '.join(places)}, found no {place}")
    given: dict[str, Any] = {key: _plain(one) for key, one in fields.items() if key not in places}
    kind = RetrievalOptions if searched else TransferOptions
    # A projection is an object of its own, which a table of plain values cannot name.
    _check_keys(what, given, {field.name for field in dataclasses.fields(kind)} - {"projection"})
    folders = [file.parent / fields[place] for place in places]
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"{what}: expected a folder, found none at {folder}")
    try:
        if searched:
            return DataSet(name, folders[0], folders[1], False, RetrievalOptions(**given))
        layout = _of_layout(name, folders[0])
        protocol = {} if isinstance(layout.options, RetrievalOptions) else {"protocol": layout.options.protocol}
        return dataclasses.replace(layout, options=TransferOptions(**protocol | given))
    except (UsageError, TypeError) as error:
        raise UsageError(f"{what}: {one_line(error)}") from None


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _of_layout(name: str, folder: Path) -> DataSet:
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder or a TOML file of data sets, found neither")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{folder}: expected a name of letters, digits, '.', '_' and '-', found {name!r}")
    if (voc := find_voc(folder)) is not None:
        return DataSet(name, voc, None, True, TransferOptions(protocol="voc2007"))
    split = (folder / "train").is_dir() and any((folder / part).is_dir() for part in TEST_PARTS)
    return DataSet(name, folder, None, False, TransferOptions(protocol="split" if split else "random"))


def _tables(path: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    where = os.fspath(path)
    if os.path.isdir(where):
        raise UsageError(f"{where}: expected a TOML file, found a folder")
    try:
        found = tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{where}: could not be read: {os_reason(error)}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: expected a TOML file, found: {one_line(error)}") from None
    for name, fields in found.items():
        if not isinstance(fields, dict) or not _NAME.fullmatch(name):
            raise UsageError(f"{where}: expected tables [NAME] of letters, digits, '.', '_' and '-', found {name!r}")
    if not found:
        raise UsageError(f"{where}: expected tables [NAME], found none")
    return found


def _check_keys(what: str, fields: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(fields.keys() - known):
        raise UsageError(f"{what}: {unknown_name('key', unknown[0], sorted(known))}")
