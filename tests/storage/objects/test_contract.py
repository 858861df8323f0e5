"""What every object store promises: one suite, run by all of them."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import (
    AlreadyExists,
    LabelfleetError,
    ObjectChanged,
    ObjectNotFound,
    ShortRead,
    StorageError,
)
from storage.objects.preflight import check_output
from storage.objects.protocols import ObjectStore, StorageOptions
from storage.records import StoredObject
from storage.s3 import quick_reads
from storage.stores.memory import MemoryStore
from storage.stores.open import open_store
from tests.support.faulty import FaultyStore
from tests.support.poured import Poured
from tests.support.servers.s3 import S3Server

WRITERS = 12
MIB = 1 << 20
# '-' and '.' sort before '/', '0' after it; U+FFFF sorts before the emoji in UTF-8, not in UTF-16.
TREE = ["a-b", "a.txt", "a/b", "a/c/d", "a0", "ab/x", "b", "z/\uffff", "z/😀", "~", "é"]
ODD_NAMES = ["sp ace", "quo'te\"s", "q?x#y%20z+w&=", "new\nline", "tab\there", "<xml>&amp;", "b\\c"]
REFUSED = ["", "/", "a/", "..", "../a", "a/../b", "a/./b", "./a", "a/..", "nul\0byte"]


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [o.key for o in store.list(prefix)]


def race(count: int, attempt: Callable[[int], str]) -> list[str | LabelfleetError]:
    """Run ``attempt(0…)`` at the same moment in as many threads; etags and errors, by number."""
    barrier = threading.Barrier(count)

    def one(number: int) -> str | LabelfleetError:
        barrier.wait()
        try:
            return attempt(number)
        except LabelfleetError as exc:
            return exc

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def winners(outcomes: Sequence[str | LabelfleetError]) -> list[int]:
    return [n for n, outcome in enumerate(outcomes) if isinstance(outcome, str)]


def body_of(writer: int) -> bytes:
    """Large enough to be written in pieces, every piece tells whose it is."""
    return (b"writer %04d " % writer) * 20_000


class StoreContract:
    """Subclasses give the fixture ``store``: empty, and used by this test alone."""

    rounds = 3
    odd_names: Sequence[str] = ODD_NAMES
    tree: Sequence[str] = TREE

    def test_what_is_written_is_read_back(self, store: ObjectStore, tmp_path: Path) -> None:
        spool = tmp_path / "spool"
        spool.write_bytes(b"from a file" * 1000)
        etags = {
            "created": store.create("created", b"one"),
            "deep/er/put": store.put("deep/er/put", b"two"),
            "from-file": store.create("from-file", spool),
            "put-file": store.put("put-file", spool),
            "empty": store.put("empty", b""),
        }
        bodies = {k: store.get(k) for k in etags}
        assert bodies == {
            "created": b"one",
            "deep/er/put": b"two",
            "from-file": b"from a file" * 1000,
            "put-file": b"from a file" * 1000,
            "empty": b"",
        }
        heads = {k: store.head(k) for k in etags}
        assert heads == {k: StoredObject(k, len(bodies[k]), etags[k]) for k in etags}
        assert {o.key: o for o in store.list()} == heads

    def test_a_body_may_be_made_while_it_is_written(self, store: ObjectStore) -> None:
        body = Poured([b"first, ", b"", bytes(MIB), b"last"])
        whole = b"".join(body.pieces)
        etags = {
            "created": store.create("created", body),
            "deep/er/put": store.put("deep/er/put", body),
            "nothing": store.put("nothing", Poured([])),
        }
        etags["created"] = store.replace("created", body, if_match=etags["created"])
        for key, written in (("created", whole), ("deep/er/put", whole), ("nothing", b"")):
            assert store.get(key, if_match=etags[key]) == written
        with pytest.raises(AlreadyExists, match="created"):
            store.create("created", Poured([b"late"]))
        assert store.get("created") == whole

    def test_a_body_that_breaks_off_leaves_what_was_there(self, store: ObjectStore) -> None:
        kept = store.put("kept", b"old")
        broken = Poured([bytes(MIB)], error=StorageError("the body's own trouble"))
        for write in (
            lambda: store.create("part", broken),
            lambda: store.put("part", broken),
            lambda: store.put("kept", broken),
            lambda: store.replace("kept", broken, if_match=kept),
        ):
            with pytest.raises(StorageError, match="the body's own trouble"):
                write()
        assert keys(store) == ["kept"]
        assert store.get("kept", if_match=kept) == b"old"
        assert list(store.leftovers()) == []

    def test_the_store_says_when_an_object_was_written(self, store: ObjectStore) -> None:
        before_s = time.time()
        store.put("key", b"1")
        (listed,) = store.list()
        for said in (listed.modified_at, store.head("key").modified_at):
            assert said is not None
            # S3 cuts the seconds off; all of these stores have this machine's clock.
            assert int(before_s) <= said <= time.time()

    def test_nothing_is_left_over_by_writers_that_lived(self, store: ObjectStore) -> None:
        store.put("a/key", b"1")
        store.create("a/other", b"2")
        assert list(store.leftovers()) == []

    def test_create_is_refused_where_something_is(self, store: ObjectStore) -> None:
        etag = store.create("run/part", b"first")
        with pytest.raises(AlreadyExists, match="run/part"):
            store.create("run/part", b"second")
        assert store.get("run/part", if_match=etag) == b"first"
        store.delete("run/part")
        store.create("run/part", b"third")
        assert store.get("run/part") == b"third"

    def test_put_overwrites(self, store: ObjectStore) -> None:
        first = store.put("key", b"long first content")
        second = store.put("key", b"second")
        assert first != second
        assert store.get("key", if_match=second) == b"second"

    def test_replace_needs_the_version_it_names(self, store: ObjectStore) -> None:
        first = store.put("key", b"1")
        second = store.replace("key", b"2", if_match=first)
        with pytest.raises(ObjectChanged):
            store.replace("key", b"3", if_match=first)
        assert store.get("key", if_match=second) == b"2"
        for missing in ("never", "no/folder/either"):
            with pytest.raises(ObjectChanged):
                store.replace(missing, b"3", if_match=first)
        assert keys(store) == ["key"]

    def test_versions_of_one_size_differ(self, store: ObjectStore) -> None:
        """A lock's counter changes its content, not its size, many times within a clock tick."""
        etags = [store.put("lock", b"%04d" % 0)]
        for count in range(1, 30):
            etags.append(store.replace("lock", b"%04d" % count, if_match=etags[-1]))
        assert len(set(etags)) == len(etags)

    def test_reads_check_the_version(self, store: ObjectStore) -> None:
        old = store.put("key", b"old content")
        new = store.put("key", b"new content!")
        with pytest.raises(ObjectChanged):
            store.get("key", if_match=old)
        with pytest.raises(ObjectChanged):
            store.get_range("key", 0, 3, if_match=old)
        with pytest.raises(ObjectChanged), store.stream("key", if_match=old) as source:
            source.read()
        assert store.get_range("key", 4, 3, if_match=new) == b"con"
        with store.stream("key", if_match=new) as source:
            assert source.read() == b"new content!"

    def test_ranges_are_slices(self, store: ObjectStore) -> None:
        content = bytes(range(256)) * 5
        store.put("key", content)
        for offset, nbytes in [(0, 1280), (0, 1), (1279, 1), (500, 300), (7, 0), (1280, 0)]:
            assert store.get_range("key", offset, nbytes) == content[offset : offset + nbytes]
        for offset, nbytes in [(0, 1281), (1280, 1), (5000, 1), (1000, 300), (1281, 0)]:
            with pytest.raises(ShortRead):
                store.get_range("key", offset, nbytes)
        for offset, nbytes in [(-1, 5), (5, -1)]:
            with pytest.raises(ValueError):
                store.get_range("key", offset, nbytes)

    def test_streams_give_every_byte_once(self, store: ObjectStore) -> None:
        content = b"".join(i.to_bytes(4, "big") for i in range(3 * MIB // 4 + 1))
        store.put("large", content)
        pieces = []
        with store.stream("large") as source:
            for size in [1, 3, 1000, 2 * MIB, 17]:
                pieces.append(source.read(size))
                assert len(pieces[-1]) == size
            buffer = bytearray(10)
            assert source.readinto(buffer) == 10  # type: ignore[attr-defined] # BufferedReader has it
            pieces += [bytes(buffer), source.read()]
            assert source.read() == b""
        assert b"".join(pieces) == content

    def test_a_stream_may_be_left_early(self, store: ObjectStore) -> None:
        store.put("large", bytes(2 * MIB))
        for _ in range(40):
            with store.stream("large") as source:
                assert source.read(10) == bytes(10)

    def test_an_error_inside_a_stream_stays_the_callers(self, store: ObjectStore) -> None:
        store.put("key", b"content")
        full = OSError(28, "the caller's own disk")
        with pytest.raises(OSError, match="the caller's own disk"), store.stream("key"):
            raise full

    def test_what_is_not_there(self, store: ObjectStore) -> None:
        store.put("folder/key", b"1")
        for key in ("missing", "folder", "no/such/folder", "folder/key/below"):
            with pytest.raises(ObjectNotFound):
                store.head(key)
            with pytest.raises(ObjectNotFound):
                store.get(key)
            with pytest.raises(ObjectNotFound):
                store.get_range(key, 0, 1)
            with pytest.raises(ObjectNotFound), store.stream(key) as source:
                source.read()
            store.delete(key)
        assert keys(store) == ["folder/key"]

    def test_listings_are_ordered_by_key(self, store: ObjectStore) -> None:
        for key in reversed(self.tree):
            store.put(key, key.encode())
        assert keys(store) == self.tree
        for prefix in ("a", "a/", "a/c", "a-", "z/", "b", "nothing", "a/b/", "é"):
            assert keys(store, prefix) == [k for k in self.tree if k.startswith(prefix)], prefix
        assert [o.nbytes for o in store.list()] == [len(k.encode()) for k in self.tree]

    def test_odd_names_are_just_text(self, store: ObjectStore) -> None:
        for name in self.odd_names:
            store.put(f"odd/{name}", name.encode())
        assert set(keys(store)) == {f"odd/{name}" for name in self.odd_names}
        for name in self.odd_names:
            assert store.get(f"odd/{name}") == name.encode()
            store.delete(f"odd/{name}")
        assert keys(store) == []

    def test_keys_that_could_leave_the_root_are_refused(self, store: ObjectStore) -> None:
        for key in REFUSED:
            verbs: list[Callable[[], object]] = [
                lambda key=key: store.head(key),
                lambda key=key: store.get(key),
                lambda key=key: store.get_range(key, 0, 1),
                lambda key=key: store.create(key, b"x"),
                lambda key=key: store.put(key, b"x"),
                lambda key=key: store.replace(key, b"x", if_match="e"),
                lambda key=key: store.delete(key),
            ]
            for verb in verbs:
                with pytest.raises(StorageError):
                    verb()
            with pytest.raises(StorageError), store.stream(key):
                pass

    def test_a_pickled_store_is_the_same_store(self, store: ObjectStore) -> None:
        store.put("before", b"1")  # connections are open now
        copy: ObjectStore = pickle.loads(pickle.dumps(store))
        assert copy.url == store.url
        copy.put("after", b"2")
        assert keys(store) == ["after", "before"]

    def test_one_store_serves_many_threads(self, store: ObjectStore) -> None:
        def use(number: int) -> bool:
            key = f"{number % 7}/{number}"
            store.put(key, body_of(number))
            with store.stream(key) as source:
                streamed = source.read()
            return streamed == store.get(key) == body_of(number)

        with ThreadPoolExecutor(WRITERS) as pool:
            assert all(pool.map(use, range(4 * WRITERS)))
        assert len(keys(store)) == 4 * WRITERS

    def test_one_of_many_creators_wins(self, store: ObjectStore) -> None:
        for number in range(self.rounds):
            key = f"annotations/{number}.parquet"
            outcomes = race(WRITERS, lambda n, key=key: store.create(key, body_of(n)))  # type: ignore[misc]
            (winner,) = winners(outcomes)
            assert sum(isinstance(o, AlreadyExists) for o in outcomes) == WRITERS - 1
            assert store.get(key, if_match=str(outcomes[winner])) == body_of(winner)

    def test_one_of_many_replacers_wins(self, store: ObjectStore) -> None:
        etag = store.put("lock", b"nobody")
        for number in range(self.rounds):
            # S3's etag is a digest: content that came back would make an old version valid.
            bodies = [body_of(number * WRITERS + n) for n in range(WRITERS)]
            outcomes = race(
                WRITERS,
                lambda n, b=bodies, e=etag: store.replace("lock", b[n], if_match=e),  # type: ignore[misc]
            )
            (winner,) = winners(outcomes)
            assert sum(isinstance(o, ObjectChanged) for o in outcomes) == WRITERS - 1
            etag = str(outcomes[winner])
            assert store.get("lock", if_match=etag) == bodies[winner]

    def test_readers_see_the_old_or_the_new_object(self, store: ObjectStore) -> None:
        store.put("key", body_of(0))
        done = threading.Event()
        seen: list[bytes] = []

        def read() -> None:
            while not done.is_set():
                seen.append(store.get("key"))

        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read)
            for number in range(20):
                store.put("key", body_of(number))
            done.set()
            reader.result()
        assert set(seen) <= {body_of(n) for n in range(20)}

    def test_it_can_hold_a_run(self, store: ObjectStore) -> None:
        assert store.atomic_create
        check_output(store)
        assert keys(store) == []

    def test_nothing_secret_is_shown(self, store: ObjectStore) -> None:
        assert "labelfleet-test" not in store.url + repr(store) + repr(pickle.dumps(store))


class TestMemory(StoreContract):
    rounds = 20

    @pytest.fixture
    def store(self) -> ObjectStore:
        return open_store(f"memory://{uuid.uuid4().hex}/some/prefix")

    def test_stores_of_one_name_share_objects(self) -> None:
        name = uuid.uuid4().hex
        open_store(f"memory://{name}/a").put("b/c", b"1")
        assert keys(open_store(f"memory://{name}/a/b")) == ["c"]
        assert keys(open_store(f"memory://{name}/a/")) == ["b/c"]
        assert keys(open_store(f"memory://{name}-other/a")) == []


class TestFaultyWithoutFaults(StoreContract):
    @pytest.fixture
    def store(self) -> ObjectStore:
        return FaultyStore(MemoryStore(uuid.uuid4().hex))


class TestLocal(StoreContract):
    rounds = 20

    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        (tmp_path / "some folder").mkdir()
        return open_store(str(tmp_path / "some folder"))


_RACER = """
import pickle, sys
from storage.errors import AlreadyExists
store, body = pickle.loads(sys.stdin.buffer.read())
print("ready", flush=True)
while not list(store.list("go")):
    pass
for n in range({rounds}):
    try:
        store.create(f"race/{{n}}", body)
        print(n, flush=True)
    except AlreadyExists:
        pass
"""


@pytest.mark.slow
def test_one_of_many_processes_wins_on_files(tmp_path: Path) -> None:
    """Threads share a process's descriptors; workers do not."""
    store, rounds = open_store(str(tmp_path)), 40
    racers = []
    for number in range(4):
        racer = subprocess.Popen(
            [sys.executable, "-c", _RACER.format(rounds=rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[3],
        )
        assert racer.stdin is not None
        assert racer.stdout is not None
        racer.stdin.write(pickle.dumps((store, body_of(number))))
        racer.stdin.close()
        racers.append(racer)
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == b"ready\n"
    store.put("go", b"")
    won = [racer.stdout.read().decode().split() if racer.stdout else [] for racer in racers]
    assert [racer.wait() for racer in racers] == [0] * len(racers)
    assert sorted(int(n) for ns in won for n in ns) == list(range(rounds))
    for number, rounds_won in enumerate(won):
        for n in rounds_won:
            assert store.get(f"race/{n}") == body_of(number)


@pytest.mark.slow
class TestMoto(StoreContract):
    # moto's URL routes end at a newline.
    odd_names: Sequence[str] = [n for n in ODD_NAMES if "\n" not in n]

    @pytest.fixture
    def store(self, moto_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
        monkeypatch.setattr(quick_reads, "in_main_thread", lambda: False)
        return _in_use(moto_s3.fresh_store("some/prefix"))

    def test_a_prefix_ends_at_a_slash(self, moto_s3: S3Server) -> None:
        _prefixes_end_at_a_slash(moto_s3)

    def test_folder_markers_are_left_out(self, moto_s3: S3Server) -> None:
        bucket = moto_s3.fresh_bucket()
        for key in ("run/", "run/folder/", "run/folder/key"):
            moto_s3.client().put_object(Bucket=bucket, Key=key, Body=b"")
        assert keys(open_store(f"s3://{bucket}/run", moto_s3.options)) == ["folder/key"]


@pytest.mark.slow
class TestWeed(StoreContract):
    rounds = 6  # SeaweedFS makes conditional writers of one key wait a second for each other
    # A backslash is a slash to SeaweedFS.
    odd_names: Sequence[str] = [n for n in ODD_NAMES if "\\" not in n]

    @pytest.fixture
    def store(self, weed_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
        monkeypatch.setattr(quick_reads, "in_main_thread", lambda: False)
        return _in_use(weed_s3.fresh_store("some/prefix"))

    def test_a_prefix_ends_at_a_slash(self, weed_s3: S3Server) -> None:
        _prefixes_end_at_a_slash(weed_s3)

    def test_order_holds_over_many_pages(self, weed_s3: S3Server) -> None:
        store = weed_s3.fresh_store()
        names = [
            f"{folder}{n:04d}" for folder in ("a", "a/", "a-b/", "a/c/", "") for n in range(450)
        ]
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(lambda name: store.put(name, b""), names))
        assert keys(store) == sorted(names, key=str.encode)
        assert keys(store, "a/") == sorted((n for n in names if n[:2] == "a/"), key=str.encode)


def _in_use(store: ObjectStore) -> ObjectStore:
    """Return the store after a read of a known version: the next ones go through obstore."""
    assert store.get("first", if_match=store.put("first", b"1")) == b"1"
    store.delete("first")
    return store


def _prefixes_end_at_a_slash(server: S3Server) -> None:
    bucket, options = server.fresh_bucket(), server.options
    open_store(f"s3://{bucket}/run", options).put("key", b"1")
    open_store(f"s3://{bucket}/runner", options).put("key", b"2")
    whole = open_store(f"s3://{bucket}/", options)
    assert keys(open_store(f"s3://{bucket}/run/", options)) == ["key"]
    assert keys(whole) == ["run/key", "runner/key"]
    assert keys(whole, "run") == ["run/key", "runner/key"]


def test_opening_touches_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "not" / "yet"))
    open_store("s3://no-such-bucket/at/all", StorageOptions(endpoint_url="http://127.0.0.1:9"))
    assert list(tmp_path.iterdir()) == []
    store.put("a/b", b"1")
    assert keys(store) == ["a/b"]
