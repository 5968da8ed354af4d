"""Weights that cannot be downloaded: one error at once, and weights that are in the cache are still used."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from huggingface_hub import constants

from sppfeat.backbones.backbone import load_backbone
from sppfeat.backbones.downloads import hub_if_reachable
from sppfeat.errors import BackboneError
from sppfeat.recipe import Recipe


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine without a network: what was connected to."""
    calls: list[Any] = []

    def refuse(address: Any, *arguments: Any, **options: Any) -> None:
        calls.append(address)
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return calls


def test_timm_without_a_network_is_told_at_once(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def waited(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s for another try")

    monkeypatch.setattr("time.sleep", waited)
    with pytest.raises(BackboneError) as caught:
        load_backbone(Recipe(backbone="timm:cait_xxs24_224"))
    assert str(caught.value) == (
        "backbone timm:cait_xxs24_224: its pretrained weights could not be downloaded (huggingface.co cannot be "
        "reached); without a network, give a file of them with --weights FILE"
    )
    assert asked == [("huggingface.co", 443)] and constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("endpoint", "port"), [("http://mirror", 80), ("https://mirror", 443), ("http://mirror:8080", 8080)]
)
def test_a_mirror_is_asked_at_its_own_port(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, endpoint: str, port: int
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with hub_if_reachable() as host:
        assert host == "mirror" and asked == [("mirror", port)]


def test_the_hub_is_left_alone_where_it_may_be_reached(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_if_reachable() as host:
        assert host == "huggingface.co" and constants.HF_HUB_OFFLINE is True
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    with hub_if_reachable() as host:
        assert host is None and constants.HF_HUB_OFFLINE is False
    assert len(asked) == 1
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("sppfeat.backbones.downloads._answers", lambda host, port: True)
    with hub_if_reachable() as host:
        assert host is None and constants.HF_HUB_OFFLINE is False
