"""What `sppfeat models --all` says of the families of networks."""

from __future__ import annotations

import json

import pytest

from sppfeat.backbones.families import Family, family_examples, look_at, survey_families


def test_every_family_has_a_small_example() -> None:
    examples = family_examples()
    assert len(examples) > 100 and examples["torchvision:alexnet"] == "torchvision:alexnet"
    assert examples["timm:vision_transformer"] == "timm:test_vit" and examples["timm:pvt_v2"] == "timm:pvt_v2_b0"


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("timm:test_resnet", ("layer4", 96, 32, "traced", None, 1)),
        ("timm:test_vit", ("norm", 64, 16, "hooks", None, 16)),
        ("timm:convit_tiny", ("norm", 192, 16, "hooks", 224, 16)),
        ("torchvision:regnet_y_400mf", ("trunk_output", 440, 32, "traced", None, 1)),
    ],
)
def test_a_family_is_looked_at_by_its_example(example: str, expected: tuple[object, ...]) -> None:
    found = look_at("family", example)
    assert (found.layer, found.channels, found.stride, found.how, found.side, found.multiple) == expected
    assert found.problem is None


def test_why_a_family_does_not_work_is_told() -> None:
    found = look_at("timm:crossvit", "timm:crossvit_tiny_240")
    assert found.problem == "has no layer with a feature map but patch_embed.0.proj"


def test_the_survey_is_shown_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    from sppfeat_cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    examples = {
        "timm:resnet": "timm:test_resnet",
        "timm:crossvit": "timm:crossvit_tiny_240",
        "timm:pit": "timm:pit_ti_224",
    }
    monkeypatch.setattr("sppfeat.backbones.families.family_examples", lambda: examples)
    steps: list[tuple[int, int]] = []
    first = survey_families(lambda at, count: steps.append((at, count)))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
    monkeypatch.setattr(
        "sppfeat.backbones.families.look_at", lambda name, example: Family(name, example, problem="again")
    )
    assert survey_families() == first
    monkeypatch.setattr("sys.argv", ["sppfeat", "models", "--all"])
    with pytest.raises(SystemExit) as caught:
        main()
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code in (0, None) and lines[-1] == "2 of 3 families work"
    assert lines[1].split() == ["timm:resnet", "test_resnet", "layer4", "96", "32", "any", "size"]
    assert "has no layer with a feature map" in lines[2] and lines[3].endswith("224 x 224 only")
    monkeypatch.setattr("sys.argv", ["sppfeat", "models", "--all", "--json"])
    with pytest.raises(SystemExit):
        main()
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["families"]] == list(examples)
