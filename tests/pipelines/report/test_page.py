"""The report: counts that add up, pictures of the right pixels, nothing loaded, nothing run."""

from __future__ import annotations

import base64
import io
import re
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation.result import ClassResult, Evaluation
from pipelines.report.gallery import draw
from pipelines.report.pace import newest_pace
from pipelines.report.page import write_report
from pipelines.report.scan import error_kind, scan
from storage.errors import LabelfleetError
from storage.records import AnnotationRow, Detections
from storage.runs.image_bytes import fetch_images
from storage.runs.ledger import LedgerEntry, LedgerWriter
from storage.runs.listing import Listing
from storage.runs.manifest import Manifest
from storage.shards.reading import read_shard
from storage.shards.selecting import list_source, tar_shards
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.samples.synthetic_run import (
    boxes,
    image_shard,
    list_shards,
    make_run,
    row,
    tar_shard,
)

HOSTILE = "<script>document.title='ran'</script>\"'><img src=x onerror=document.title='ran'>.jpg"


def jpeg(color: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "JPEG", quality=95)
    return out.getvalue()


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def images(self) -> list[np.ndarray]:
        sources = [a["src"] or "" for tag, a in self.tags if tag == "img"]
        assert all(s.startswith("data:image/jpeg;base64,") for s in sources)
        raw = [base64.b64decode(s.split(",", 1)[1]) for s in sources]
        return [np.asarray(Image.open(io.BytesIO(r)).convert("RGB")) for r in raw]


def page_of(manifest: Manifest, **options: object) -> Page:
    url = write_report(manifest, **options)  # type: ignore[arg-type]
    assert url == f"{manifest.url}/report/index.html"
    return Page(manifest.store.get("report/index.html").decode())


def found(*scores: float) -> Detections:
    n = len(scores)
    return boxes([(5, 5, 40, 40)] * n, sorted(scores, reverse=True), [i % 3 for i in range(n)])


COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


@pytest.fixture(params=["tar", "tar.gz", "images"])
def manifest(request: pytest.FixtureRequest) -> Manifest:
    """Three one-coloured images and one that failed, with its source, in each kind of shard."""
    source = MemoryStore()
    names = ["red.jpg", "green.jpg", "blue.jpg"]
    if request.param == "images":
        for name, color in zip(names, COLORS, strict=True):
            source.put(name, jpeg(color))
        source.put("zzz.jpg", b"")
        shard = image_shard("red.jpg")
        listed = list(source.list())
        shard = type(shard)(shard.shard_id, "images", tuple(listed))
    else:
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w:gz" if request.param == "tar.gz" else "w") as out:
            for name, raw in [*zip(names, map(jpeg, COLORS), strict=True), ("zzz.jpg", b"")]:
                member = tarfile.TarInfo(name)
                member.size = len(raw)
                out.addfile(member, io.BytesIO(raw))
        source.put(f"a.{request.param}", tar.getvalue())
        (shard,) = tar_shards(list_source(source))
    scores = {"red.jpg": [0.5, 0.5, 0.06], "green.jpg": [0.99], "blue.jpg": [0.1]}
    rows = []
    for record in read_shard(source, shard, max_image_bytes=10**6):
        name = record.image_id.rsplit("/", 1)[-1]
        where = {"offset": record.offset, "nbytes": record.nbytes}
        if name == "zzz.jpg":
            rows.append(
                row(
                    record.image_id,
                    shard.shard_id,
                    status="undecodable",
                    error="empty: 0 bytes",
                    **where,
                )
            )  # type: ignore[arg-type]
        else:
            rows.append(
                row(record.image_id, shard.shard_id, found(*scores[name]), size=(64, 48), **where)
            )  # type: ignore[arg-type]
    return make_run(MemoryStore(), {shard: rows}, source=source.url)


def test_pictures_show_the_images_they_name(manifest: Manifest) -> None:
    page = page_of(manifest)
    names = [a["alt"] for tag, a in page.tags if tag == "img"]
    # Least certain first, then most certain, then the one without a box to be certain of.
    assert [re.split(r"[/ ]", str(n))[-4] for n in names] == ["red.jpg", "green.jpg", "blue.jpg"]
    for picture, color in zip(page.images(), COLORS, strict=True):
        assert picture.shape == (240, 320, 3)
        np.testing.assert_allclose(picture[220, 300], color, atol=12)


def test_counts(manifest: Manifest) -> None:
    text = " ".join(page_of(manifest).text.split())
    assert "4 images 3 labelled 1 not readable" in text
    assert "3 boxes ≥ 0.25" in text
    assert "All 5 boxes down to the run's floor of 0.05" in text
    assert "undecodable empty: # bytes" in text


def test_warnings_are_counted_by_kind() -> None:
    shard = image_shard("a.jpg", "b.jpg")
    rows = [
        row("a.jpg", shard.shard_id, warning="trailing bytes: 7; premature end: 8"),
        row("b.jpg", shard.shard_id, warning="trailing bytes: 9"),
    ]
    text = " ".join(page_of(make_run(MemoryStore(), {shard: rows})).text.split())
    assert "1 premature end a.jpg 2 trailing bytes a.jpg" in text


def test_nothing_is_loaded_and_nothing_runs(manifest: Manifest) -> None:
    page = page_of(manifest)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,"))
    policy = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert len(policy) == 1
    assert str(policy[0]).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    html = manifest.store.get("report/index.html").decode()
    assert "url(" not in html
    assert "@import" not in html


@pytest.mark.slow
def test_the_page_is_the_same_for_the_same_seed(manifest: Manifest) -> None:
    def written(seed: int) -> bytes:
        write_report(manifest, seed=seed, now=0.0)
        return manifest.store.get("report/index.html")

    assert written(1) == written(1)


def test_names_are_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    shard = tar_shard("javascript:alert(1).tar")
    rows = [
        row(f"a.tar/{HOSTILE}", shard.shard_id, found(0.9)),
        row("x.tar/1", shard.shard_id, status="undecodable", error=HOSTILE),
    ]
    bad = tar_shard(f"{HOSTILE}.tar")
    manifest = make_run(
        MemoryStore(), {shard: rows}, unlabelled=[bad], classes=(HOSTILE, "</style>", "{{7*7}}")
    )
    manifest.set_aside(bad, [HOSTILE], "i")
    c = ClassResult(HOSTILE, 1, 0.5, 0.5, 0.5, 0.5, 1, 1)
    e = Evaluation(
        run="r", truth=HOSTILE, map_=0.5, map50=0.5, map75=None, ar=0.5, ap_small=None,
        ap_medium=None, ap_large=None, ar_small=None, ar_medium=None, ar_large=None,
        classes=(c,), images=1, statuses={"ok": 1}, missing=0,
        rows_without_truth=0, ignored=0, outside=0, without_area=0,
        size_differs=(HOSTILE,), n_size_differs=1,
        unknown_to_run=(HOSTILE,), unknown_to_truth=(),
    )  # fmt: skip
    page = page_of(manifest, evaluation=e)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags
    assert tags.count("style") == 1
    assert not any("onerror" in a for _, a in page.tags)
    assert page.text.count("<script>document.title='ran'</script>") >= 6
    assert "{{7*7}}" in page.text


def test_a_source_out_of_reach_leaves_a_page_without_pictures() -> None:
    shard = tar_shard("a.tar")
    rows = [row("a.tar/1.jpg", shard.shard_id, found(0.9))]
    manifest = make_run(MemoryStore(), {shard: rows}, source="memory://gone")
    page = page_of(manifest)
    assert page.images() == []
    assert "No pictures: none of the images could be read again" in page.text
    assert "does not exist" in page.text


def test_an_image_that_changed_since_is_a_tile_that_says_so() -> None:
    source = MemoryStore()
    source.put("a.jpg", jpeg((9, 9, 9)))
    source.put("b.jpg", jpeg((99, 9, 9)))
    listed = list(source.list())
    shard = type(tar_shard("x"))("0" * 16, "images", tuple(listed))
    rows = [row(o.key, shard.shard_id, found(0.9), size=(64, 48), nbytes=o.nbytes) for o in listed]
    manifest = make_run(MemoryStore(), {shard: rows}, source=source.url)
    source.put("b.jpg", jpeg((9, 9, 99)))
    page = page_of(manifest)
    assert len(page.images()) == 1
    assert "is not the version" in page.text


def test_an_empty_run_and_one_in_flight_have_a_page() -> None:
    manifest = make_run(MemoryStore(), {}, unlabelled=[tar_shard("a.tar"), tar_shard("b.tar")])
    assert "2 of 2 shards are not labelled yet" in page_of(manifest).text


def test_an_unstated_licence_is_said_aloud() -> None:
    manifest = make_run(MemoryStore(), {})
    assert "licence is unstated" not in page_of(manifest).text
    unstated = Manifest(manifest.store, manifest.record)
    object.__setattr__(unstated.record.identity, "licence", "unstated")
    assert "licence is unstated" in page_of(unstated).text


def test_what_the_listing_left_out_is_counted_on_the_page() -> None:
    manifest = make_run(MemoryStore(), {})
    assert "Left out of the source" not in page_of(manifest).text
    manifest.note_left_out({".txt": 1234, "no suffix": 3, ".<b>": 1})
    text = page_of(manifest).text
    assert "Left out of the source" in text
    for shown in ("1,234", ".txt", "no suffix", ".<b>"):
        assert shown in text


def test_tables_are_capped_and_say_so() -> None:
    shard = tar_shard("a.tar")
    rows = [
        row(f"a.tar/{i}.jpg", shard.shard_id, status="undecodable", error=f"bad byte {i}")
        for i in range(70)
    ]
    text = page_of(make_run(MemoryStore(), {shard: rows})).text
    assert "The first 50 of them" in text
    assert "and 20 more" in text
    assert "bad byte #" in text


def test_least_and_most_certain_and_none_twice() -> None:
    shard = tar_shard("a.tar")
    scores = np.linspace(0.26, 0.99, 40)
    rows = [row(f"a.tar/{i:02}", shard.shard_id, found(float(s))) for i, s in enumerate(scores)]
    rows += [row(f"a.tar/e{i}", shard.shard_id) for i in range(40)]
    manifest = make_run(MemoryStore(), {shard: rows})
    groups = scan(manifest, sample=12, seed=3).gallery(12)
    shown = [p.row.image_id for g in groups.values() for p in g]
    assert len(shown) == len(set(shown)) == 12
    by_doubt = sorted(range(40), key=lambda i: abs(scores[i] - 0.5))
    assert {p.row.image_id for p in groups["least"]} == {f"a.tar/{i:02}" for i in by_doubt[:4]}
    assert {p.row.image_id for p in groups["most"]} == {f"a.tar/{i}" for i in range(36, 40)}
    other = scan(manifest, sample=12, seed=4).gallery(12)
    assert [p.row.image_id for p in other["random"]] != [p.row.image_id for p in groups["random"]]


def test_the_random_images_do_not_depend_on_how_rows_are_sharded() -> None:
    ids = [f"{i:03}.jpg" for i in range(200)]

    def drawn(n_shards: int) -> list[str]:
        shards = [image_shard(*ids[k::n_shards]) for k in range(n_shards)]
        manifest = make_run(
            MemoryStore(),
            {s: [row(o.key, s.shard_id) for o in s.objects] for s in shards},
        )
        return [p.row.image_id for p in scan(manifest, sample=9, seed=0).gallery(9)["random"]]

    assert drawn(1) == drawn(7)


def test_histograms_add_up() -> None:
    rng = np.random.default_rng(0)
    shards = [tar_shard(f"{k}.tar") for k in range(3)]
    labelled: dict = {}
    scores: list[float] = []
    for shard in shards:
        labelled[shard] = []
        for i in range(700):
            mine = rng.uniform(0.05, 1, rng.integers(0, 4)).astype(np.float32).tolist()
            scores += mine
            labelled[shard].append(row(f"{shard.key}/{i}", shard.shard_id, found(*mine)))
    result = scan(make_run(MemoryStore(), labelled), sample=0, seed=0)
    assert result.detections == len(scores) == result.by_class_and_score.sum()
    expected = np.histogram(scores, bins=20, range=(0, 1))[0]
    np.testing.assert_array_equal(result.by_class_and_score.sum(axis=0), expected)
    assert result.shown_detections == sum(s >= 0.25 for s in scores)
    assert result.by_boxes.sum() == 2100 == result.images


def test_tombstoned_rows_are_not_in_the_report() -> None:
    shard = image_shard("a.jpg", "b.jpg")
    manifest = make_run(
        MemoryStore(), {shard: [row(k, shard.shard_id, found(0.9)) for k in ("a.jpg", "b.jpg")]}
    )
    list_shards(manifest.store, [image_shard("a.jpg")])
    assert scan(manifest, sample=3, seed=0).images == 1


def entry(at: float, worker: str, images: int, **note: object) -> LedgerEntry:
    seconds = {"infer": 3.0, "decode": 1.0}
    return LedgerEntry(
        "shard", at, "0" * 16, {"ok": images}, 0, seconds, {"worker": worker, **note}
    )


def test_pace_spreads_a_shard_over_the_time_it_took() -> None:
    store = MemoryStore()
    writer = LedgerWriter(store, "1")
    writer.write(LedgerEntry("start", 100.0, note={"workers": 2}))
    for at, worker, n in [(110, "a", 100), (120, "a", 50), (120, "b", 40)]:
        writer.write(entry(at, worker, n))
    writer.write(entry(115, "b", 999, won=False))
    writer.flush()
    pace = newest_pace(make_run(store, {}), bins=4)
    assert pace is not None
    assert (pace.images, pace.seconds, pace.workers) == (190, 20, 2)
    # Five seconds a bin: worker a does 10/s, then 5/s; worker b 2/s all along.
    np.testing.assert_allclose(pace.images_per_s, [12, 12, 7, 7])
    assert (pace.images_per_s * np.diff(pace.edges_s)).sum() == pytest.approx(190)
    assert pace.stages == {"decode": 3.0, "infer": 9.0}
    assert pace.limit is not None
    assert pace.limit.startswith("Model-bound: ")


def test_pace_tells_start_up_from_work() -> None:
    store = MemoryStore()
    writer = LedgerWriter(store, "1")
    writer.write(LedgerEntry("start", 100.0, note={"workers": 1}))
    for at in (130, 160):
        writer.write(LedgerEntry("beat", at, note={"alive": 0}))
    writer.write(entry(170, "a", 50))
    writer.write(LedgerEntry("beat", 171, note={"alive": 0}))
    writer.flush()
    pace = newest_pace(make_run(store, {}), bins=7)
    assert pace is not None
    assert (pace.startup_s, pace.mean_images_per_s) == (60, 5)
    np.testing.assert_allclose(pace.images_per_s, [0, 0, 0, 0, 0, 0, 5])
    assert "starting the workers (60 of 70 s)" in str(pace.limit)


def test_no_ledger_no_pace() -> None:
    assert newest_pace(make_run(MemoryStore(), {})) is None


def test_error_kinds_are_free_of_names_and_numbers() -> None:
    a = error_kind("'a.jpg' has 30000x30000 pixels; this run takes up to 178,956,970")
    b = error_kind("'b c.png' has 20000x40000 pixels; this run takes up to 178,956,970")
    assert a == b


def test_boxes_are_drawn_where_they_are() -> None:
    gray = np.full((480, 640, 3), 128, np.uint8)
    picture = draw(gray, boxes([(100, 200, 300, 400)], [0.9], [0]), ["RBC"])
    changed = np.argwhere((picture != 128).any(axis=2))
    below_label = changed[changed[:, 0] >= 205]
    np.testing.assert_allclose(below_label.max(axis=0), [400, 300], atol=3)
    assert abs(below_label[:, 1].min() - 100) <= 3
    assert (draw(gray, boxes([(1, 1, 9, 9)], [0.2], [0]), ["RBC"]) == 128).all()


def test_a_large_image_is_shown_small_and_a_label_stays_inside() -> None:
    large = np.zeros((900, 3000, 3), np.uint8)
    picture = draw(large, boxes([(2900, 0, 3000, 100)], [0.9], [0]), ["a name that is long, ü"])
    assert picture.shape == (192, 640, 3)
    assert (picture[:, :600] != 0).any()  # the label was moved in from the right border


def test_fetched_bytes_are_the_images(manifest: Manifest) -> None:
    rows = [r for r in rows_of(manifest) if r.status == "ok"]
    source = open_store(manifest.record.source["url"])
    fetched = fetch_images(manifest, source, rows)
    for one, color in zip(rows, order(rows), strict=True):
        raw = fetched[one.image_id]
        assert not isinstance(raw, LabelfleetError)
        decoded = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR_RGB)
        np.testing.assert_allclose(decoded[20, 20], color, atol=6)


def rows_of(manifest: Manifest) -> Iterator[AnnotationRow]:
    from storage.runs.live_rows import live_rows

    assert Listing(manifest.store).count() == 1
    return live_rows(manifest)


def order(rows: list[AnnotationRow]) -> list[tuple[int, int, int]]:
    by_name = dict(zip(("red.jpg", "green.jpg", "blue.jpg"), COLORS, strict=True))
    return [by_name[r.image_id.rsplit("/", 1)[-1]] for r in rows]
