"""Names from untrusted files: those that `path_to_name` writes are sound, others are not."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppfeat.files.names import unsafe_name
from sppfeat.images import name_to_path, path_to_name

BAD = ["", "/etc/passwd", "../a.jpg", "a/../../b.jpg", "a\0b.jpg", r"a\x41.jpg", r"\x2e\x2e/a.jpg", r"a\b.jpg", "a\\"]


@pytest.mark.parametrize("name", [*BAD, "a\ud800.jpg"])
def test_names_that_lead_elsewhere_have_a_reason(name: str) -> None:
    assert unsafe_name(name)


@given(st.lists(st.binary(min_size=1).filter(lambda part: not {b"/"[0], 0} & set(part)), min_size=1, max_size=3))
def test_what_we_write_is_sound_and_comes_back(parts: list[bytes]) -> None:
    relative = os.fsdecode(b"/".join(parts))
    if ".." in relative.split("/"):
        return
    name = path_to_name(relative)
    assert unsafe_name(name) is None
    assert name_to_path("/images", name) == f"/images/{relative}"


@pytest.mark.parametrize("name", [r"a\x41.jpg", r"\x2e\x2e/a.jpg"])
def test_escapes_of_ordinary_letters_stand_for_themselves(name: str) -> None:
    assert name_to_path("/images", name) == f"/images/{name}"
