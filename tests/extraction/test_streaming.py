"""The plan of a run over shards, held against what sets and dictionaries say."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sppfeat.extraction import streaming
from sppfeat.extraction.matching import BloomFilter, RowSet, locate, repeats
from sppfeat.extraction.streaming import StreamingPlan
from sppfeat.images import NO_FINGERPRINT, Fingerprint, Item
from sppfeat.store import Status, name_digests, row_names

NAMES = [f"{letter}.jpg" for letter in "abcdefghijklmnopqrstuvwx"]


@dataclass
class Shard:
    """The rows of a shard, as lists."""

    held: list[str]
    status: list[int]
    files: list[Fingerprint]

    def __len__(self) -> int:
        return len(self.held)

    @property
    def complete(self) -> bool:
        return Status.PENDING not in self.status

    def digests(self) -> np.ndarray:
        return name_digests(self.held)

    def states(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        files = np.array(self.files, np.int64).reshape(-1, 2)
        return np.array(self.status, np.uint8), files[:, 0], files[:, 1]

    def names(self, rows: np.ndarray) -> list[str]:
        return [self.held[row] for row in rows]


@dataclass
class Files:
    """Files by name; `looked_at` counts how often each was."""

    now: dict[str, Fingerprint]
    looked_at: list[str] = field(default_factory=list)

    def item(self, name: str) -> Item:
        files = self

        class Known(Item):
            def fingerprint(self) -> Fingerprint:
                files.looked_at.append(self.name)
                return files.now.get(self.name, NO_FINGERPRINT)

        return Known("/r", name)


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Shard], Files, list[str], int]:
    """Shards with different names, files, what is listed (repeats included), and the size of new shards."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(0, len(NAMES)))]
    cuts = sorted(draw(st.lists(st.integers(0, len(names)), max_size=3)))
    shards = []
    for first, last in zip([0, *cuts], [*cuts, len(names)], strict=True):
        held = list(names[first:last])
        status = draw(st.lists(st.sampled_from([0, 1, 2]), min_size=len(held), max_size=len(held)))
        shards.append(Shard(held, status, [Fingerprint(1, 1)] * len(held)))
    now = {n: draw(st.sampled_from([Fingerprint(1, 1), Fingerprint(2, 2)])) for n in NAMES if draw(st.booleans())}
    listed = draw(st.lists(st.sampled_from(NAMES), max_size=40))
    return shards, Files(now), listed, draw(st.integers(1, 10))


@given(situations(), st.booleans(), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_a_plan_says_what_sets_say(
    situation: tuple[list[Shard], Files, list[str], int], retry: bool, batch: int
) -> None:
    shards, files, listed, shard_rows = situation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "BATCH_ROWS", batch)
        plan = StreamingPlan(
            shards,
            [files.item(name) for name in listed],
            shard_rows=shard_rows,
            retry_failed=retry,
            covers=lambda _: True,
            exists=files.now.__contains__,
        )
        jobs = list(plan.jobs())

    place = {name: (s, r) for s, shard in enumerate(shards) for r, name in enumerate(shard.held)}
    todo, redo, changed = set(), set(), set()
    gone = reused = failed = 0
    for name in dict.fromkeys(listed):
        if name not in place:
            todo.add(name)
            continue
        s, r = place[name]
        file, state = files.now.get(name, NO_FINGERPRINT), shards[s].status[r]
        if state == Status.PENDING:
            todo.add(name)
        elif state == Status.DONE and file == NO_FINGERPRINT:
            gone += 1
        elif state == Status.DONE and file == Fingerprint(1, 1):
            reused += 1
        elif state == Status.FAILED and file == Fingerprint(1, 1) and not retry:
            failed += 1
        else:
            todo.add(name)
            redo.add(place[name])
            if state == Status.DONE:
                changed.add(place[name])
    unlisted = place.keys() - set(listed)
    gone += sum(shards[place[name][0]].status[place[name][1]] != Status.PENDING for name in unlisted)
    lost = {place[n] for n in unlisted if n not in files.now and not shards[place[n][0]].status[place[n][1]]}

    assert sorted(name for job in jobs for one in job.todo for name in row_names(one.item)) == sorted(todo)
    for job in jobs:
        for item, rows in job.todo:
            if not job.new:
                assert [place[name] for name in row_names(item)] == [(job.shard, row) for row in rows]
        if job.new:
            assert [row for one in job.todo for row in one.rows] == list(range(job.rows))
    new = [job for job in jobs if job.new]
    assert [job.rows for job in new[:-1]] == [shard_rows] * (len(new) - 1) and all(
        0 < j.rows <= shard_rows for j in new
    )
    assert [job.shard for job in new] == list(range(len(shards), len(shards) + len(new)))
    assert {(job.shard, row) for job in jobs for row in job.redo} == redo
    assert {(job.shard, row) for job in jobs for row in job.changed} == changed
    assert {(job.shard, row) for job in jobs for row in job.lost} == lost
    counts = plan.listed
    assert (counts.images, counts.repeated) == (len(listed), len(listed) - len(set(listed)))
    assert (counts.reused, counts.failed_before, counts.gone, counts.todo) == (reused, failed, gone, len(todo))
    pending = {name for name, (s, r) in place.items() if not shards[s].status[r]}
    assert not set(files.looked_at) - (place.keys() - pending), "only files of done and failed rows are looked at"


def test_windows_of_an_image_are_looked_at_once_and_may_be_in_two_shards() -> None:
    boxes = np.array([[0, 0, n, n] for n in range(1, 8)], np.float64)
    files = Files({"a.jpg": Fingerprint(3, 3)})
    item = files.item("a.jpg")
    whole = Item(item.root, item.name, boxes)
    shard = Shard(row_names(whole)[2:5], [1, 0, 1], [Fingerprint(3, 3)] * 3)

    class Windowed(type(item)):  # type: ignore[misc]
        pass

    windowed = Windowed(item.root, item.name, boxes)
    plan = StreamingPlan([shard], [windowed], shard_rows=3)
    jobs = list(plan.jobs())
    assert [(job.new, job.rows) for job in jobs] == [(True, 3), (True, 1), (False, 1)]
    assert [names for job in jobs for one in job.todo for names in row_names(one.item)] == [
        row_names(whole)[n] for n in (0, 1, 5, 6, 3)
    ]
    assert plan.listed.reused == 2 and files.looked_at == ["a.jpg"]


def test_digests_and_their_sets() -> None:
    names = [f"{n}.jpg" for n in range(2000)]
    digests = name_digests(names)
    assert len({bytes(digest) for digest in digests}) == 2000
    again = digests[[3, 1, 3, 2, 1, 3]]
    assert repeats(again).tolist() == [False, False, True, False, True, True]

    @dataclass
    class Held:
        rows: np.ndarray

        def digests(self) -> np.ndarray:
            return self.rows

    order = np.random.default_rng(0).permutation(2000)
    shards = [Held(digests[order[:700]]), Held(digests[order[700:710]]), Held(digests[order[710:1500]])]
    found = locate(digests, shards, [2, 0, 1])
    for shard, row, digest in zip(found.shard, found.row, digests, strict=True):
        assert shard < 0 or (shards[shard].rows[row] == digest).all()
    assert (found.shard < 0).nonzero()[0].tolist() == sorted(order[1500:])
    known = BloomFilter()
    known.add(digests[:1000])
    assert known.may_hold(digests[:1000]).all() and not known.may_hold(digests[1000:]).all()
    rows = RowSet(21)
    assert not rows.add(np.array([0, 7, 8, 20])).any()
    assert rows.add(np.array([8, 9])).tolist() == [True, False]
    assert rows.missing().tolist() == [n for n in range(21) if n not in (0, 7, 8, 9, 20)]
