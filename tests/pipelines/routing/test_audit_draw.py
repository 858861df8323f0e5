"""The audit's draw: bottom of a hash order, shared out without loss."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from pipelines.routing.audit_draw import StratumDraw, allocate, random_key


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), unique=True), st.integers(0, 5), st.integers(0, 3))
def test_the_draw_is_the_head_of_the_hash_order(ids: list[str], capacity: int, seed: int) -> None:
    draw: StratumDraw[str] = StratumDraw(capacity)
    for image_id in ids:
        key = random_key(seed, image_id)
        if draw.count(key):
            draw.take(key, image_id, image_id)
    assert draw.images == len(ids)
    assert draw.first(capacity) == sorted(ids, key=lambda i: random_key(seed, i))[:capacity]


sizes = st.dictionaries(st.text(max_size=3), st.integers(0, 50), max_size=4)


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(0, 60), sizes)
def test_shares_add_up_and_never_exceed_what_is_there(
    n: int, new: int, old: dict[str, int]
) -> None:
    for_new, shares = allocate(n, new, old)
    assert for_new == min(n, new)
    assert set(shares) == set(old)
    assert all(0 <= shares[name] <= old[name] for name in old)
    assert for_new + sum(shares.values()) == min(n, new + sum(old.values()))


def test_the_key_is_the_same_on_every_machine() -> None:
    assert random_key(0, "a.tar/0.jpg") == random_key(0, "a.tar/0.jpg")
    assert random_key(0, "a") != random_key(1, "a")
    assert random_key(1, "1a") != random_key(11, "a")
    assert 0 <= random_key(3, "bad\udcff") < 2**64
