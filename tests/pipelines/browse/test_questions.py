"""What the page finds: filters and views against a look at every row, and SQL within its bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.browse import index
from pipelines.browse.index import build_index, find_sources, interruptible, open_index
from pipelines.browse.questions import VIEWS, Filter, Questions
from storage.errors import ConfigError
from storage.review.answers import read_answers
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest
from storage.stores.open import open_store
from tests.support.samples.synthetic_run import boxes, image_shard, make_run, row


def ids(questions: Questions, wanted: Filter) -> list[str]:
    found = [int(n) for n in questions.ask(wanted).numbers]
    rows = questions.rows("SELECT n, image_id FROM images", [])
    names = {one["n"]: one["image_id"] for one in rows}
    return [names[n] for n in found]


def test_all_images_in_listing_order_with_their_boxes(run: Manifest, questions: Questions) -> None:
    rows = list(live_rows(run))
    assert ids(questions, Filter()) == [one.image_id for one in rows]
    drawn = questions.rows("SELECT count(*) AS boxes FROM boxes WHERE layer = 'model'", [])
    assert drawn == [{"boxes": sum(len(one.detections) for one in rows)}]


FILTERS: dict[str, tuple[Filter, Callable[[Any], bool]]] = {
    "status": (Filter(status="undecodable"), lambda r: r.status == "undecodable"),
    "text": (Filter(text="TARS/0"), lambda r: "tars/0" in r.image_id),
    "class": (Filter(class_="dark"), lambda r: 0 in r.detections.category_ids),
    "score": (Filter(low=0.5), lambda r: (r.detections.scores >= 0.5).any()),
    "both": (
        Filter(class_="dark", high=0.49, text="loose"),
        lambda r: "loose" in r.image_id
        and ((r.detections.category_ids == 0) & (r.detections.scores <= 0.49)).any(),
    ),
    "failed": (Filter(view="failed"), lambda r: r.status != "ok"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_finds_what_a_look_at_every_row_finds(
    name: str, run: Manifest, questions: Questions
) -> None:
    wanted, holds = FILTERS[name]
    expected = [one.image_id for one in live_rows(run) if holds(one)]
    assert ids(questions, wanted) == expected


def test_people_and_what_they_changed(run: Manifest, questions: Questions) -> None:
    answered = {answer.image_id for answer in read_answers(run.store)}
    assert set(ids(questions, Filter(view="people"))) == answered
    changed = {a.image_id for a in read_answers(run.store) if a.boxes}
    assert set(ids(questions, Filter(view="changed"))) == changed
    assert set(ids(questions, Filter(who="ann"))) == changed
    assert set(ids(questions, Filter(decision="human"))) == changed


def test_two_runs_of_one_model_do_not_disagree(questions: Questions) -> None:
    both = questions.rows("SELECT layer, count(*) AS n FROM boxes GROUP BY 1", [])
    counts = {one["layer"]: one["n"] for one in both}
    assert counts["model"] == counts["other"] > 0
    assert ids(questions, Filter(view="disagreement")) == []


def test_a_run_alone_disagrees_with_nothing(run: Manifest, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    database = open_index(build_index(find_sources(run, None, None), tmp_path / "alone"))
    assert ids(Questions(database), Filter(view="disagreement")) == []


def test_a_box_that_the_other_run_lacks_is_a_disagreement(tmp_path: Path) -> None:
    shard = image_shard("a.png", "b.png", "c.png")
    box, far = (10, 10, 50, 50), (100, 100, 150, 150)

    def made(name: str, *found: list[tuple[int, int, int, int]]) -> Manifest:
        rows = [
            replace(row(key, shard.shard_id, boxes(xyxy, [0.8] * len(xyxy), [0] * len(xyxy))),
                    sha256=key[0] * 64)
            for key, xyxy in zip(("a.png", "b.png", "c.png"), found, strict=True)
        ]  # fmt: skip
        return make_run(open_store(str(tmp_path / name)), {shard: rows})

    one, two = made("one", [box], [box], []), made("two", [box], [box, far], [])
    (tmp_path / "i").mkdir()
    database = open_index(build_index(find_sources(one, None, two), tmp_path / "i"))
    assert ids(Questions(database), Filter(view="disagreement")) == ["b.png"]


def test_runs_of_more_images_than_are_compared_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_COMPARED_AT_ONCE", 2)
    names = [f"{n}.png" for n in range(5)]
    runs = []
    for which, right in (("one", [1, 2, 3, 4, 5]), ("two", [5, 2, 9, 4, 8])):
        shard = image_shard(*names)
        rows = [
            replace(row(name, shard.shard_id, boxes([[0, 0, n, n]], [n / 10], [0])),
                    sha256=f"{at:064}")
            for at, (name, n) in enumerate(zip(names, right, strict=True))
        ]  # fmt: skip
        runs.append(make_run(open_store(str(tmp_path / which)), {shard: rows}))
    database = open_index(build_index(find_sources(runs[0], None, runs[1]), tmp_path))
    # The others have the same box twice; of 1, whose score is below 0.3, the other run's counts.
    assert ids(Questions(database), Filter(view="disagreement")) == ["2.png", "4.png", "0.png"]


@pytest.mark.slow
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_and_order_can_be_asked_for(view: str, questions: Questions) -> None:
    for order in ("", "best", "worst", "boxes", "disagreement", "agreement", "twins"):
        questions.ask(Filter(view=view, order=order))


@pytest.fixture
def twins(tmp_path: Path) -> Questions:
    """Hashes: 0 and 1 differ in three bits of one band each, 2 stands alone, 3 and 4 are equal."""
    hashes = [0x0123456789ABCDEF, 0x0123456789ABCDEF ^ 0b111, 0xFEDCBA9876543210, 77, 77]
    keys = [f"{i}.png" for i in range(len(hashes))]
    shard = image_shard(*keys)
    rows = [_hashed(key, shard.shard_id, h) for key, h in zip(keys, hashes, strict=True)]
    run = make_run(open_store(str(tmp_path / "twins")), {shard: rows})
    (tmp_path / "i").mkdir()
    return Questions(open_index(build_index(find_sources(run, None, None), tmp_path / "i")))


def _hashed(key: str, shard_id: str, phash: int) -> Any:
    return replace(row(key, shard_id, boxes([(1, 1, 9, 9)], [0.9], [0])), phash=phash)


def test_near_duplicates_stand_beside_each_other(twins: Questions) -> None:
    found = ids(twins, Filter(view="twins"))
    assert sorted(found) == ["0.png", "1.png", "3.png", "4.png"]
    assert abs(found.index("0.png") - found.index("1.png")) == 1
    assert abs(found.index("3.png") - found.index("4.png")) == 1


def test_orders_and_empty_go_by_the_boxes_that_are_shown(questions: Questions) -> None:
    orders = set()
    for layer in ("", "model", "label", "person"):
        counted = questions.rows(
            "SELECT i.n, i.status, count(b.n) AS boxes, max(b.score) AS best FROM images i"
            " LEFT JOIN boxes b ON b.n = i.n AND b.layer = ? GROUP BY ALL ORDER BY i.n",
            [layer or "model"],
        )
        scored = [one for one in counted if one["best"] is not None]
        none = [one["n"] for one in counted if one["best"] is None]
        expected = {
            "boxes": [one["n"] for one in sorted(counted, key=lambda one: -one["boxes"])],
            "best": [one["n"] for one in sorted(scored, key=lambda one: -one["best"])] + none,
            "worst": [one["n"] for one in sorted(scored, key=lambda one: one["best"])] + none,
        }
        for order, numbers in expected.items():
            found = questions.ask(Filter.parse({"order": order, "shown": layer})).numbers
            assert found.tolist() == numbers, (layer, order)
        orders.add(tuple(expected["boxes"]))
        empty = questions.ask(Filter.parse({"view": "empty", "shown": layer})).numbers
        assert empty.tolist() == [
            one["n"] for one in counted if one["status"] == "ok" and not one["boxes"]
        ]
    assert len(orders) > 1  # the layers differ, so that another one's order would be seen


def test_what_is_shown_makes_one_question_where_it_makes_no_difference() -> None:
    assert Filter.parse({"shown": "label", "text": "a"}) == Filter.parse({"text": "a"})
    assert Filter.parse({"shown": "label", "order": "boxes"}).shown == "label"
    with pytest.raises(ConfigError, match="shown"):
        Filter.parse({"shown": "x"})


def test_sql_with_numbers_or_ids_fills_the_grid_in_its_own_order(questions: Questions) -> None:
    by_number = Filter(sql="SELECT n FROM images ORDER BY image_id DESC")
    by_id = Filter(sql="SELECT image_id FROM images ORDER BY image_id DESC")
    everything = sorted(ids(questions, Filter()), reverse=True)
    assert ids(questions, by_number) == ids(questions, by_id) == everything
    assert ids(questions, Filter(sql="SELECT 99999 AS n UNION SELECT -1")) == []


def test_sql_without_images_is_a_table(questions: Questions) -> None:
    found = questions.ask(Filter(sql="SELECT status, count(*) AS many FROM images GROUP BY 1"))
    assert found.columns == ("status", "many")
    assert dict(found.rows)["undecodable"] == 1


def test_a_tables_values_are_what_json_can_hold(questions: Questions) -> None:
    sql = "SELECT 'inf'::DOUBLE AS a, 'nan'::FLOAT AS b, 0.5::DOUBLE AS c, 2 AS d, NULL AS e"
    assert questions.ask(Filter(sql=sql)).rows == (("inf", "nan", 0.5, 2, None),)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM images",
        "SELECT 1; SELECT 2",
        "COPY images TO '/tmp/stolen.csv'",
        "SELECT n FROM read_csv('/etc/passwd')",
        "SELECT n FROM '/etc/passwd'",
        "SELECT n FROM read_text('/etc/passwd')",
        "ATTACH '/tmp/other.db'",
        "INSTALL httpfs",
        "SET enable_external_access = true",
        "PRAGMA database_list",
        "SELECT getenv('HOME') AS n",
        "SELECT",
        "",
    ],
)
def test_sql_reads_the_tables_and_nothing_else(sql: str, questions: Questions) -> None:
    if not sql:
        with pytest.raises(ConfigError):
            questions.ask(Filter(sql=" "))
        return
    with pytest.raises(ConfigError):
        questions.ask(Filter(sql=sql))


def test_sql_that_does_not_end_is_ended(
    questions: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.browse.questions.SQL_LIMIT_S", 0.5)
    endless = "SELECT count(*) AS n FROM range(10000000000) a, range(1000) b WHERE a.range % 7 = 8"
    with pytest.raises(ConfigError, match="not done"):
        questions.ask(Filter(sql=endless))
    assert len(questions.ask(Filter()).numbers)  # the page lives on


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"view": "all"}, "view"),
        ({"low": "x"}, "low"),
        ({"order": "n; DROP TABLE images"}, "order"),
        ({"layer": "model' OR 1=1"}, "layer"),
    ],
)
def test_a_value_that_is_none_is_an_error(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Filter.parse(given)


def test_quotes_in_a_filter_are_only_text(questions: Questions) -> None:
    assert ids(questions, Filter(text="' OR 1=1 --", class_='"; DROP TABLE images; --')) == []


def test_an_interrupt_while_the_index_is_made_is_one() -> None:
    """DuckDB's own error for Ctrl-C would be taken for a bug of ours."""
    with pytest.raises(KeyboardInterrupt), interruptible():
        raise RuntimeError("Query interrupted")
    with pytest.raises(RuntimeError, match="another"), interruptible():
        raise RuntimeError("another")
