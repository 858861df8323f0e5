"""Seeded nights over one source: folders vanish and return, pages of tars are zeroed, lists are
packed through outages, drivers stop midway; every promise is checked after each night.

``python -m tests.chaos.nights --seeds 200`` (part of `make chaos`) prints a line a schedule and a
summary, and exits 1 if a promise was broken. Without Ray: the real engine, listing and readers
in this process, over a folder. After each night:

- every image that no zeroed byte touched has exactly one live row, with its own sha256;
- a member that zeros cost its row is told of in the footer of its tar;
- a listing that lacks too much is refused, and changes nothing; what comes back takes its old rows;
- an outage in the middle of a list costs no image: the same call packs what is left, once;
- ``verify --source`` finds no difference.
"""

from __future__ import annotations

import argparse
import hashlib
import http.server
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipelines.config.run_config import RunConfig
from pipelines.config.source import check_drop
from pipelines.ingest.ingest import ingest
from pipelines.runs.gc import collect_garbage
from pipelines.runs.verify import verify_run
from storage.errors import LabelfleetError, SourceError, StorageUnavailable
from storage.objects.protocols import StorageOptions
from storage.runs.annotations import read_footer
from storage.runs.listing import Listing
from storage.runs.live_rows import live_rows
from storage.runs.manifest import Manifest, annotation_key
from storage.stores.local import LocalStore
from tests.support.samples.labelled_run import CLASSES, label, png
from tests.support.samples.synthetic_run import record
from tests.support.samples.tar_samples import tar_of
from tests.support.samples.zeroed_tars import is_a_shorter_archive, spans_of

Event = Literal[
    "half gone", "one gone", "zeroed page", "outage in a list", "new", "stopped",
    "garbage collected",
]  # fmt: skip
_WEIGHTS: dict[Event, float] = {
    "half gone": 3, "one gone": 2, "zeroed page": 3, "outage in a list": 2, "new": 1, "stopped": 2,
    "garbage collected": 1,
}  # fmt: skip
NIGHTS = 5
_FOLDERS, _LOOSE, _TARS, _MEMBERS = 2, 6, 3, 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What a seed does on each night; ``returns``: whether what half vanished comes back."""

    seed: int
    nights: tuple[tuple[Event, ...], ...]
    returns: bool


def plan(seed: int) -> Plan:
    """Return the plan of a seed."""
    rng = random.Random(seed)
    events, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    nights = tuple(
        tuple(dict.fromkeys(rng.choices(events, weights, k=rng.randint(1, 3))))
        for _ in range(NIGHTS)
    )
    return Plan(seed, nights, returns=rng.random() < 0.7)


@dataclass
class Nights:
    """One source, one run, and what is true of both.

    Attributes:
        tars: the archives as they were written, and the zeroed bytes of those that are damaged.
        away: keys that are not in the source now, with the folder where they wait.
    """

    folder: Path
    plan: Plan
    met: Counter[str] = field(default_factory=Counter)
    tars: dict[str, tuple[bytes, tuple[int, int] | None]] = field(default_factory=dict)
    away: list[str] = field(default_factory=list)
    _made: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.plan.seed + 1_000_000)
        self.source = LocalStore(str(self.folder / "in"))
        self.output = LocalStore(str(self.folder / "out"))
        for number in range(_FOLDERS):
            for _ in range(_LOOSE):
                self._new_image(f"loose{number}")
        for _ in range(_TARS):
            self._new_tar()
        fields = {"name": "n", "output": "/out", "model": {"checkpoint": "m.pth"}}
        fields |= {"source": {"url": "/in", "shard_size": 4}}
        self._config = RunConfig.model_validate(fields)

    # -- the source

    def _new_image(self, folder: str) -> None:
        self._made += 1
        self.source.put(f"{folder}/{self._made:04}.png", png(self._made))

    def _new_tar(self) -> None:
        members = []
        for _ in range(_MEMBERS):
            self._made += 1
            members.append((f"{self._made:04}.png", png(self._made)))
        archive = tar_of(*members)
        key = f"tars/{self._made:04}.tar"
        self.source.put(key, archive)
        self.tars[key] = (archive, None)

    def _take_away(self, keys: list[str]) -> None:
        for key in keys:
            there = self.folder / "away" / key
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(self.folder / "in" / key, there)  # its time goes with it
        self.away += keys

    def _bring_back(self) -> None:
        for key in self.away:
            shutil.move(self.folder / "away" / key, self.folder / "in" / key)
        self.away = []

    def _zero_a_page(self) -> None:
        whole = [
            key
            for key, (archive, zeroed) in self.tars.items()
            if not zeroed and key not in self.away and len(spans_of(archive)) >= _MEMBERS
        ]  # of fewer members none might be left: then it is no tar, and the shard is set aside
        if not whole:
            return
        key = self.rng.choice(sorted(whole))
        archive = self.tars[key][0]
        length = self.rng.choice([512, 4096])
        begin = self.rng.randrange(0, len(archive), length)
        end = min(len(archive), begin + length)
        self.tars[key] = (archive, (begin, end))
        self.source.put(key, archive[:begin] + bytes(end - begin) + archive[end:])
        self.met["zeroed page"] += 1

    # -- nights

    def run(self) -> Iterator[str]:
        """Yield every promise that is not kept."""
        self.label()
        yield from self.check("at first")
        for number, events in enumerate(self.plan.nights, 1):
            for broken in self.night(events):
                yield f"night {number} ({', '.join(events)}): {broken}"

    def night(self, events: tuple[Event, ...]) -> Iterator[str]:
        """What happens before the run of a night, the run, and what it broke."""
        if self.away:
            yield from self._after_a_loss()
        for event in events:
            match event:
                case "new":
                    self._new_image("loose0")
                    self._new_tar()
                case "zeroed page":
                    self._zero_a_page()
                case "outage in a list":
                    yield from self._packed_through_an_outage()
                case "stopped":
                    self.label(only=1)
                    self.met["stopped"] += 1
                case "one gone":
                    self._one_gone()
                case "garbage collected":
                    collect_garbage(self.label(), older_than_s=0)
                    self.met["garbage collected"] += 1
        self.label()
        yield from self.check("labelled")
        if "half gone" in events:
            yield from self._half_gone()

    def _one_gone(self) -> None:
        """One image is missing, where neither its folder nor a tenth of everything goes with it."""
        self.label()  # what is new counts too, once it is listed
        there = self._loose("loose0")
        if len(there) > 1 and len(list(self.source.list())) >= 10:
            self._take_away([self.rng.choice(there)])
            self.met["one gone"] += 1

    def _loose(self, folder: str) -> list[str]:
        return sorted(o.key for o in self.source.list(f"{folder}/"))

    def _half_gone(self) -> Iterator[str]:
        """A folder as a whole, or half of everything, is missing: refused, nothing changed."""
        everything = sorted(o.key for o in self.source.list())
        folders = sorted({key.partition("/")[0] for key in everything})
        if len(everything) < 2:
            return  # an earlier night took the rest, and its loss was accepted
        if self.rng.random() < 0.5:
            name = self.rng.choice(folders)
            gone = [key for key in everything if key.startswith(f"{name}/")]
        else:
            gone = self.rng.sample(everything, len(everything) // 2)
        before = {o.key: o.etag for o in self.output.list()}
        self._take_away(gone)
        self.met["half gone"] += 1
        try:
            self.label()
        except SourceError as exc:
            if "--accept-drop" not in (exc.hint or ""):
                yield f"the refusal does not name --accept-drop: {exc}"
        else:
            yield f"{len(gone)} of {len(everything)} objects vanished, and the listing was taken"
        manifest = Manifest.open(self.output.url)
        collect_garbage(manifest)
        lost = [o for o in before if o not in {o.key for o in self.output.list()}]
        if lost:
            yield f"after a refused listing, gone from the run: {lost[:3]}"

    def _after_a_loss(self) -> Iterator[str]:
        """What vanished comes back as it was, and takes its old rows; or its loss is accepted."""
        if not self.plan.returns:
            self.label(accept=True)
            yield from self.check("accepted")
            self.met["accepted"] += 1
            for key in self.away:
                self.tars.pop(key, None)
            self.away = []
            return
        self._bring_back()
        self.met["back"] += 1
        before = {o.key for o in self.output.list("annotations/")}
        self.label()
        more = {o.key for o in self.output.list("annotations/")} - before
        if more and not self.met["garbage collected"]:
            yield f"what came back was labelled again: {sorted(more)[:3]}"
        yield from self.check("back")

    def _packed_through_an_outage(self) -> Iterator[str]:
        """A list whose server fails in the middle: the same call, until all of it is packed."""
        count = self.rng.randint(20, 60)
        self._made += count
        names = [f"{self._made - n:04}.png" for n in range(count)]
        bodies = {f"/{name}": png(int(name[:4])) for name in names}
        dest = self.folder / f"packed{self._made}"
        with flaky_server(bodies, self.rng) as (address, heal):
            (self.folder / "list.txt").write_text("\n".join(f"{address}/{n}" for n in names))
            for attempt in range(8):
                try:
                    done = ingest(
                        str(self.folder / "list.txt"), str(dest), images_per_shard=10,
                        options=StorageOptions(attempts=1),
                    )  # fmt: skip
                    if done.exit_code == 0:
                        break
                except StorageUnavailable:
                    self.met["outage in a list"] += 1
                heal(attempt)
            else:
                yield "a list was not packed after eight calls"
                return
        for path in sorted(dest.glob("*.tar")):
            key = f"tars/packed{self._made}-{path.name}"
            self.source.put(key, path.read_bytes())
            self.tars[key] = (path.read_bytes(), None)
        packed = Counter(
            body for key, (archive, _) in self.tars.items() if f"packed{self._made}-" in key
            for _, _, _, body in spans_of(archive)
        )  # fmt: skip
        if packed != Counter(bodies.values()):
            yield f"{count} images in the list, {packed.total()} packed, {len(packed)} of them once"

    def label(self, *, only: int | None = None, accept: bool = False) -> Manifest:
        """Label as one driver does in one night; ``only``: stop after this many shards."""
        allowed = (lambda drop: None) if accept else partial(check_drop, self._config)
        return label(
            self.source, self.output, shard_size=4, only=only, check_drop=allowed,
            record_=record(CLASSES, self.source.url),
        )  # fmt: skip

    # -- promises

    def check(self, when: str) -> Iterator[str]:
        """Compare the run with what is in the source."""
        manifest = Manifest.open(self.output.url)
        rows = list(live_rows(manifest))
        found = {row.image_id: row.sha256 for row in rows}
        if len(found) != len(rows):
            yield f"{when}: an image has two rows"
        expected = {key: sha(self.source.get(key)) for key in self._loose("loose0")}
        expected |= {key: sha(self.source.get(key)) for key in self._loose("loose1")}
        told = self._damage_told(manifest)
        for key, (archive, zeroed) in self.tars.items():
            if key in self.away:
                continue
            begin, end = zeroed or (0, 0)
            spans = spans_of(archive)
            for name, start, stop, body in spans:
                if not zeroed or stop <= begin or start >= end:
                    expected[f"{key}/{name}"] = sha(body)
            names = {f"{key}/{name}" for name, *_ in spans}
            here = {image_id for image_id in found if image_id.startswith(f"{key}/")}
            damaged = archive[:begin] + bytes(end - begin) + archive[end:]
            if (
                here != names
                and not is_a_shorter_archive(damaged, spans, begin)
                and key not in told
            ):
                yield f"{when}: zeros in {key} cost {sorted(names - here)}, and nothing says so"
        wrong = {i for i, digest in expected.items() if found.get(i) != digest}
        if wrong:
            yield f"{when}: {len(wrong)} images without their row, such as {min(wrong)}"
        of_damaged = tuple(f"{key}/" for key, (_, zeroed) in self.tars.items() if zeroed)
        if extra := [i for i in found if i not in expected and not i.startswith(of_damaged)]:
            yield f"{when}: {len(extra)} rows of nothing, such as {min(extra)}"
        checked = verify_run(manifest, source=self.source, readers=2)
        if not checked.clean:
            yield f"{when}: verify: {checked.differences[0].key}: {checked.differences[0].what}"

    def _damage_told(self, manifest: Manifest) -> set[str]:
        """Keys of the tars whose footer says that they are damaged."""
        told = set()
        for shard in Listing(manifest.store).live_shards():
            if shard.kind == "tar":
                listed = manifest.store.head(annotation_key(shard.shard_id))
                if read_footer(manifest.store, listed).source_truncated:
                    told.add(shard.key)
        return told


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


@contextmanager
def flaky_server(bodies: dict[str, bytes], rng: random.Random) -> Iterator[tuple[str, Any]]:
    """Serve bodies; a random part of the paths answers 503 or 429, or hangs up, until healed.

    Yields:
        The address, and ``heal(attempt)``: the outage gets smaller, and ends with the fourth call.
    """
    paths = list(bodies)
    first = rng.randrange(len(paths))
    down = set(paths[first:] if rng.random() < 0.7 else rng.sample(paths, len(paths) // 3))

    class Server(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Keep the output clean."""

        def do_GET(self) -> None:
            if self.path in down and int(self.path[1:5]) % 3 == 0:
                self.close_connection = True
                return
            body = b"" if self.path in down else bodies[self.path]
            self.send_response(200 if body else (503, 429)[int(self.path[1:5]) % 2])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def heal(attempt: int) -> None:
        for path in list(down)[: len(down) // 2 if attempt < 3 else len(down)]:
            down.discard(path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", heal
        finally:
            server.shutdown()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one schedule went; ``broken``: the promises that were not kept."""

    seed: int
    met: Counter[str]
    seconds: float
    broken: tuple[str, ...]

    def line(self) -> str:
        """For the log."""
        met = ", ".join(f"{kind} ×{n}" for kind, n in sorted(self.met.items())) or "nothing"
        verdict = "ok" if not self.broken else "BROKEN: " + "; ".join(self.broken)
        return f"seed {self.seed:3}  {self.seconds:5.1f} s  {verdict}  [{met}]"


def run_schedule(seed: int) -> Verdict:
    """All nights of a seed, in a folder of their own."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nights-") as folder:
        nights = Nights(Path(folder), plan(seed))
        broken: list[str] = []
        try:
            broken.extend(nights.run())
        except (LabelfleetError, OSError) as exc:
            broken.append(f"{type(exc).__name__}: {exc}")
    return Verdict(seed, nights.met, time.monotonic() - began_s, tuple(broken))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many schedules")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    arguments = parser.parse_args()
    verdicts = []
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        verdicts.append(run_schedule(seed))
        print(verdicts[-1].line(), flush=True)
    met = sum((verdict.met for verdict in verdicts), Counter[str]())
    broken = [verdict.seed for verdict in verdicts if verdict.broken]
    print(f"{len(verdicts)} schedules of {NIGHTS} nights: {dict(met.most_common())}")
    print(f"promises broken: {f'by seeds {broken}' if broken else 'none'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
