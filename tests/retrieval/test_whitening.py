"""PCA and whitening against a singular value decomposition, by all three routes; limits and damage."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import MakeStore
from reference import normalize, principal_components

from sppfeat import Recipe, UsageError
from sppfeat.retrieval import whitening
from sppfeat.retrieval.whitening import ProjectionOptions, learn_projection
from sppfeat.store.unit_vectors import to_units, unit_rows

FLOAT32 = Recipe(dtype="float32")


def spread(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Rows whose variances fall from direction to direction, around a mean that is not 0, of any length."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count, dim)) * 0.85 ** np.arange(dim) + generator.normal(size=dim)
    return np.asarray(rows @ np.linalg.qr(generator.normal(size=(dim, dim)))[0] * generator.uniform(0.5, 2, (count, 1)))


@pytest.mark.parametrize(
    ("count", "dim", "route"), [(20, 50, "gram"), (300, 30, "covariance"), (300, 40, "randomized")]
)
@pytest.mark.parametrize(("whiten", "power", "shrinkage"), [(False, 1, 0.1), (True, 1, 0), (True, 0.5, 0.3)])
def test_equals_a_singular_value_decomposition(
    make_store: MakeStore,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    dim: int,
    route: str,
    whiten: bool,
    power: float,
    shrinkage: float,
) -> None:
    if route == "randomized":
        monkeypatch.setattr(whitening, "EXACT_SIDE", 20)
        monkeypatch.setattr(whitening, "OVERSAMPLING", 10)
    monkeypatch.setattr(
        "sppfeat.store.unit_vectors.BLOCK_BYTES", 4 * dim * 7
    )  # blocks of 7 rows, and a last one that is shorter
    monkeypatch.setattr(whitening, "BLOCK_BYTES", 4 * count * 7)
    values = spread(count, dim)
    store = make_store(values, recipe=FLOAT32)
    options = ProjectionOptions(dims=8, whiten=whiten, power=power, shrinkage=shrinkage)
    found = learn_projection(unit_rows(store), options)
    assert found.route == route and found.rows == count
    mean, eigenvalues, vectors = principal_components(values, 8)
    every = principal_components(values, dim)[1]
    assert found.mean == pytest.approx(mean, abs=1e-6)
    assert found.eigenvalues == pytest.approx(eigenvalues, rel=1e-3)
    assert found.kept == pytest.approx(eigenvalues.sum() / every.sum(), rel=1e-4) and found.kept < 1
    scales = ((1 - shrinkage) * eigenvalues + shrinkage * eigenvalues.mean()) ** (-power / 2) if whiten else 1
    units = np.array([normalize(row, "l2") for row in values])
    expected = np.array([normalize(row, "l2") for row in (units - mean) @ vectors * scales])
    ours = unit_rows(store, found).take(slice(0, count))
    # Up to the sign of each component, which cosines do not show.
    assert ours @ ours.T == pytest.approx(expected @ expected.T, abs=2e-3)
    assert np.abs(ours) == pytest.approx(np.abs(expected), abs=5e-3)


def test_whitened_rows_have_equal_variances(make_store: MakeStore) -> None:
    store = make_store(spread(400, 20), recipe=FLOAT32)
    found = learn_projection(unit_rows(store), ProjectionOptions(dims=6, whiten=True, shrinkage=0))
    units = to_units(store.descriptors) - found.mean
    assert (units @ found.matrix).var(0) == pytest.approx(np.ones(6), rel=1e-3)


def test_no_more_components_than_the_rows_have(make_store: MakeStore) -> None:
    few = learn_projection(unit_rows(make_store(spread(5, 30), recipe=FLOAT32)), ProjectionOptions(dims=512))
    assert few.dim == 4 and few.kept == pytest.approx(1)
    twice = np.repeat(spread(5, 30), 4, 0)  # 20 rows, 5 of them different
    assert learn_projection(unit_rows(make_store(twice, recipe=FLOAT32)), ProjectionOptions(dims=512)).dim == 4


def test_whitening_from_few_rows_is_told_with_both_numbers(make_store: MakeStore) -> None:
    """As is a projection onto more components than there are."""
    store = make_store(spread(60, 30), recipe=FLOAT32)

    def notes(dims: int, **options: bool) -> list[str]:
        return learn_projection(unit_rows(store), ProjectionOptions(dims=dims, **options)).notes(dims)  # type: ignore[arg-type]

    assert notes(20, whiten=True) == notes(30) == notes(21) == []
    assert [note[:81] for note in notes(21, whiten=True)] == [
        "whiten: learned from 60 rows for 21 components, expected at least 63: the weakest"
    ]
    both = notes(512, whiten=True)
    assert both[0] == "project: 512 components asked, 30 kept: 60 rows of 30 values have no more"
    assert both[1].startswith("whiten: learned from 60 rows for 30 components, expected at least 90: ")


def test_rows_that_cannot_be_projected(make_store: MakeStore) -> None:
    with pytest.raises(UsageError, match=r"expected at least 2 described images to project, found 1"):
        learn_projection(unit_rows(make_store(np.ones((1, 4)))))
    with pytest.raises(UsageError, match="its 3 descriptors are all equal"):
        learn_projection(unit_rows(make_store(np.ones((3, 4)))))
    for change in ({"dims": 0}, {"power": 1.5}, {"shrinkage": -0.1}, {"power": float("nan")}):
        with pytest.raises(UsageError, match="must be"):
            ProjectionOptions(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1, 1e4, 1e30])
def test_units_at_any_length(scale: float) -> None:
    rows = np.array([[3, 4], [0, 0], [-1, 0]], np.float32) * np.float32(scale)
    assert to_units(rows) == pytest.approx(np.array([[0.6, 0.8], [0, 0], [-1, 0]]), rel=1e-6)
