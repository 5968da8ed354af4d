"""Nearest neighbors and logistic regression beside scikit-learn's, on one store, in one run.

    python benchmarks/classifiers.py FEATS.h5

FEATS.h5: a store with one folder per class. Half of each class is trained with. scikit-learn's logistic regression is
run with its own tolerance, and with smaller ones until its objective is as low as ours. Tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from sppfeat import open_store
from sppfeat.svm.logistic import LogisticProblem
from sppfeat.transfer.knn import knn_scores

COSTS = 1.0, 10.0, 100.0
TOLERANCES = 1e-4, 1e-5, 1e-6, 1e-7
EQUAL = 1e-5


def objective(weights: np.ndarray, biases: np.ndarray, rows: np.ndarray, labels: np.ndarray, c: float) -> float:
    scores = rows @ weights.T + biases
    most = scores.max(1)
    logs = np.log(np.exp(scores - most[:, None]).sum(1)) + most - scores[np.arange(len(labels)), labels]
    return float((weights**2).sum() / 2 + c * logs.sum())


def compare(name: str, rows: np.ndarray, labels: np.ndarray) -> None:
    classes = int(labels.max()) + 1
    exact = rows.astype(np.float64)
    for c in COSTS:
        began = time.perf_counter()
        problem = LogisticProblem(rows, np.arange(len(rows)))
        weights, biases = problem.weights(problem.solve(labels, classes, c=c))
        ours, reached = time.perf_counter() - began, objective(weights, biases, exact, labels, c)
        theirs = []
        for tolerance in TOLERANCES:
            began = time.perf_counter()
            other = LogisticRegression(C=c, tol=tolerance, max_iter=20_000).fit(rows, labels)
            spent = time.perf_counter() - began
            least = objective(other.coef_.astype(float), other.intercept_.astype(float), exact, labels, c)
            theirs.append((spent, least / reached - 1))
            if least <= reached * (1 + EQUAL):
                break
        (first, excess), (last, final) = theirs[0], theirs[-1]
        print(
            f"| {name} | {c:g} | {ours:.2f} | {first:.2f} | {excess:+.0e} | {last:.2f} | {final:+.0e} | "
            f"{last / ours:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    warnings.simplefilter("ignore")
    store = open_store(parser.parse_args().store)
    labels = np.unique([name.split("/")[-2] for name in store.names], return_inverse=True)[1]
    rows = np.array(store.descriptors, np.float32)
    last = rows[:, -rows.shape[1] // 50 :]
    last = np.ascontiguousarray(last / np.linalg.norm(last, axis=1, keepdims=True))
    generator = np.random.default_rng(0)
    many = np.repeat(last, 8, 0) + np.float32(0.02) * generator.standard_normal(
        (8 * len(last), last.shape[1]), np.float32
    )
    cases = (("all", rows, labels), ("level 1", last, labels), ("level 1, eight times", many, np.repeat(labels, 8)))
    print("| rows | C | ours, s | scikit-learn, s | above ours | at equal objective, s | above ours | times as fast |")
    print("|---|---|---|---|---|---|---|---|")
    for name, values, of in cases:
        compare(f"{name}: {len(values):,} x {values.shape[1]:,}", values, of)
    print("\n| rows | knn, ours, s | scikit-learn, s | times as fast |\n|---|---|---|---|")
    for name, values, of in cases:
        train, test = np.arange(0, len(values), 2), np.arange(1, len(values), 2)
        targets = np.where(of[train, None] == np.arange(of.max() + 1), 1, -1)
        began = time.perf_counter()
        found = knn_scores(values, train, test, targets).argmax(1)
        ours = time.perf_counter() - began
        began = time.perf_counter()
        other = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = other.fit(values[train], of[train]).predict(values[test])
        theirs = time.perf_counter() - began
        assert (found == expected).mean() > 0.999, (found == expected).mean()
        print(f"| {name}: {len(values):,} x {values.shape[1]:,} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
