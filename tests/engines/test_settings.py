"""Process-wide settings hold while work is running, and are then restored, in whatever order it ends."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from sppfeat import RunOptions
from sppfeat.backbones.backbone import Backbone
from sppfeat.engines.torch_settings import exact_convolutions
from sppfeat.extraction.pipeline import Describer
from sppfeat.settings import WhileAny, quiet_pillow

OPTIONS = RunOptions(device="cpu", engine="torch", num_workers=1)


def settings() -> tuple[object, ...]:
    cudnn: Any = torch.backends.cudnn
    exact = (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) if hasattr(cudnn, "conv") else cudnn.allow_tf32
    return exact, cudnn.enabled, cudnn.benchmark, list(warnings.filters)


@pytest.fixture(params=["untouched", "tf32", "ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    cudnn: Any = torch.backends.cudnn
    if request.param == "untouched" or not hasattr(cudnn, "conv"):
        yield request.param
        return
    before = [(place, place.fp32_precision) for place in (cudnn, cudnn.conv, cudnn.rnn)]
    for place, _ in before:
        place.fp32_precision = request.param
    yield request.param
    for place, value in before:
        place.fp32_precision = value


def test_descriptions_that_overlap_leave_the_settings_as_they_were(
    make_images: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    paths = [str(path) for path in sorted(make_images(6).iterdir())]
    during: list[bool] = []
    feature_maps = Backbone.feature_maps

    def watched(self: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
        cudnn: Any = torch.backends.cudnn
        during.append(cudnn.conv.fp32_precision == "ieee" if hasattr(cudnn, "conv") else not cudnn.allow_tf32)
        return feature_maps(self, images)

    monkeypatch.setattr(Backbone, "feature_maps", watched)
    describers = [Describer(TINY, OPTIONS) for _ in range(2)]  # these load modules that set warnings for good
    before = settings()
    first, second = (describer.describe(paths) for describer in describers)
    assert next(first).error is None and next(second).error is None
    first.close()  # type: ignore[attr-defined]
    assert len(list(second)) == len(paths) - 1
    assert settings() == before
    assert during and all(during)


def test_a_setting_lasts_from_the_first_in_to_the_last_out() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def setting() -> Iterator[None]:
        events.append("set")
        yield
        events.append("restored")

    held = WhileAny(setting)
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with held:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with held:
        thread.start()
        inside.wait()
    assert events == ["set"]
    leave.set()
    thread.join()
    with held:
        pass
    assert events == ["set", "restored"] * 2


def test_others_may_change_the_warnings_meanwhile() -> None:
    before = list(warnings.filters)
    with quiet_pillow, warnings.catch_warnings():
        warnings.simplefilter("ignore")
    assert warnings.filters == before
    with contextlib.ExitStack() as theirs:
        theirs.enter_context(warnings.catch_warnings())
        with quiet_pillow:
            warnings.warn_explicit("Corrupt EXIF data", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
            theirs.close()
    assert warnings.filters == before


def test_the_older_setting_is_used_where_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldCudnn:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends, "cudnn", OldCudnn)
    with exact_convolutions:
        assert OldCudnn.allow_tf32 is False
    assert OldCudnn.allow_tf32 is True
