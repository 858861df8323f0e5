"""What the page asks of the tables: filters, ready views, and SQL that a person wrote."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any

import duckdb
import numpy as np
from numpy.typing import NDArray

from storage.errors import ConfigError

SQL_LIMIT_S = 20.0
_TABLE_ROWS = 500
_MOST_IMAGES = 5_000_000  # rows of SQL that are looked at; a cross join has more
_KEPT = 16
_LAYERS = ("model", "label", "person", "other")
_ORDER = {
    "": "i.n",
    "best": "s.best DESC NULLS LAST, i.n",
    "worst": "s.best ASC NULLS LAST, i.n",
    "boxes": "coalesce(s.boxes, 0) DESC, i.n",
    "disagreement": "d.disagreement DESC NULLS LAST, i.n",
    "agreement": "i.agreement ASC NULLS LAST, i.n",
    "twins": "t.leader, i.n",
}
_BY_SHOWN = frozenset({"best", "worst", "boxes", "empty"})  # orders and views about what is shown
# s: the boxes of the layer that is shown, by image; no row where there are none.
_SHOWN = (
    " LEFT JOIN (SELECT n, count(*) AS boxes, max(score) AS best FROM boxes WHERE layer = ?"
    " GROUP BY n) s USING (n)"
)
# Ready views: conditions on images, and the order that makes them worth reading.
VIEWS: Mapping[str, tuple[str, str]] = {
    "": ("TRUE", ""),
    "twins": ("t.leader IS NOT NULL", "twins"),
    "disagreement": ("d.disagreement IS NOT NULL", "disagreement"),
    "agreement": ("i.agreement < 0.5", "agreement"),
    "people": ("i.sha256 IN (SELECT sha256 FROM answered)", ""),
    "changed": (
        "EXISTS (SELECT 1 FROM boxes p WHERE p.n = i.n AND p.layer = 'person'"
        " AND p.decision <> 'kept')", "",
    ),
    "warnings": ("i.warning IS NOT NULL", ""),
    "failed": ("i.status <> 'ok'", ""),
    "empty": ("i.status = 'ok' AND coalesce(s.boxes, 0) = 0", ""),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Filter:
    """One view of the grid; empty fields do not filter.

    Attributes:
        view: a name from ``VIEWS``.
        text: a part of the image's id; letters in either case.
        status: of the image.
        layer, class_, low, high, decision, who: of one box that the image must have.
        order: a name from ``_ORDER``; empty: the view's own, else listing order.
        shown: the layer whose boxes and scores count for the order and for ``empty``; '' where
            neither asks for them.
        sql: a SELECT with a column ``n`` or ``image_id``; the other fields are then unused.
    """

    view: str = ""
    text: str = ""
    status: str = ""
    layer: str = ""
    class_: str = ""
    low: float = 0.0
    high: float = 1.0
    decision: str = ""
    who: str = ""
    order: str = ""
    shown: str = ""
    sql: str = ""

    @staticmethod
    def parse(given: Mapping[str, str]) -> Filter:
        """Read query parameters. Raises ConfigError for a value that is none."""
        told: dict[str, Any] = {}
        for part in fields(Filter):
            value = given.get(part.name.rstrip("_"), "")
            if value == "":
                continue
            if part.name in ("low", "high"):
                try:
                    told[part.name] = float(value)
                except ValueError as exc:
                    raise ConfigError(f"{part.name}: {value!r} is not a number") from exc
            else:
                told[part.name] = value
        made = Filter(**told)
        _one_of("view", made.view, VIEWS)
        _one_of("order", made.order, _ORDER)
        if made.layer:
            _one_of("layer", made.layer, _LAYERS)
        if made.shown:
            _one_of("shown", made.shown, _LAYERS)
        # One question whatever is shown, where that makes no difference: it is asked once.
        return made if made.looks_at_boxes and not made.sql else replace(made, shown="")

    @property
    def looks_at_boxes(self) -> bool:
        """Return whether the boxes that are shown make a difference to what is found."""
        return not _BY_SHOWN.isdisjoint({self.view, self.order or VIEWS[self.view][1]})

    def statement(self) -> tuple[str, list[Any]]:
        """Return the SELECT of the images' numbers, with its parameters."""
        condition, order = VIEWS[self.view]
        wanted, parameters, shown = [condition], list[Any](), ""
        if self.looks_at_boxes:
            shown, parameters = _SHOWN, [self.shown or "model"]
        if self.text:
            wanted.append("contains(lower(i.image_id), lower(?))")
            parameters.append(self.text)
        if self.status:
            wanted.append("i.status = ?")
            parameters.append(self.status)
        box, values = self._box()
        if box:
            wanted.append(f"i.n IN (SELECT b.n FROM boxes b WHERE {' AND '.join(box)})")  # noqa: S608 - our own words; values are parameters
            parameters += values
        return (
            "SELECT i.n FROM images i LEFT JOIN twins t USING (n)"  # noqa: S608 - as above
            f" LEFT JOIN disagreement d USING (n){shown}"
            f" WHERE {' AND '.join(wanted)} ORDER BY {_ORDER[self.order or order]}",
            parameters,
        )

    def _box(self) -> tuple[list[str], list[Any]]:
        told: list[tuple[str, Any]] = [
            (f"b.{column} = ?", value)
            for column, value in (
                ("class", self.class_), ("decision", self.decision), ("who", self.who),
            )
            if value
        ]  # fmt: skip
        if self.low > 0:
            told.append(("b.score >= ?", self.low))
        if self.high < 1:
            told.append(("b.score <= ?", self.high))
        if told or self.layer:
            layer = self.layer or ("label" if self.decision else "person" if self.who else "model")
            told.append(("b.layer = ?", layer))
        return [part for part, _ in told], [value for _, value in told]


@dataclass(frozen=True, slots=True)
class Answered:
    """What a question found: images for the grid, or, for SQL without them, a table."""

    numbers: NDArray[np.int32]
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()


class Questions:
    """Asks the tables; keeps the last few results, so that scrolling does not ask again."""

    def __init__(self, database: duckdb.DuckDBPyConnection) -> None:
        self._database = database
        self._kept: OrderedDict[Filter, Answered] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, wanted: Filter) -> Answered:
        """Return the images of a view.

        Raises:
            ConfigError: the SQL is not one SELECT, fails, or takes longer than 20 s.
        """
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
                return self._kept[wanted]
        found = self._written(wanted.sql) if wanted.sql else self._filtered(wanted)
        with self._lock:
            self._kept[wanted] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    @contextmanager
    def cursor(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """Give a cursor of its own to a thread."""
        with self._database.cursor() as cursor:
            yield cursor

    def rows(self, statement: str, parameters: list[Any]) -> list[dict[str, Any]]:
        """Return a statement's rows as dictionaries. Raises ConfigError: a value is too big."""
        try:
            cursor = self._database.cursor().execute(statement, parameters)
        except duckdb.Error as exc:
            raise ConfigError(_first_line(exc)) from exc
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _filtered(self, wanted: Filter) -> Answered:
        statement, parameters = wanted.statement()
        return Answered(_numbers(self._database.cursor().execute(statement, parameters)))

    def _written(self, sql: str) -> Answered:
        """Run SQL of a person: one SELECT, on tables opened to be read, within its time."""
        try:
            statements = duckdb.extract_statements(sql)
        except duckdb.Error as exc:
            raise ConfigError(f"SQL: {_first_line(exc)}") from exc
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError("SQL: one SELECT is asked for", hint="such as SELECT n FROM images")
        cursor = self._database.cursor()
        timer = threading.Timer(SQL_LIMIT_S, cursor.interrupt)
        timer.start()
        try:
            cursor.execute(statements[0])
            names = [column[0] for column in cursor.description or ()]
            if "n" in names or "image_id" in names:
                return Answered(self._images(cursor, names))
            return Answered(np.zeros(0, np.int32), tuple(names), _plain(cursor))
        except duckdb.InterruptException as exc:
            raise ConfigError(f"SQL: not done after {SQL_LIMIT_S:.0f} s") from exc
        except duckdb.Error as exc:
            raise ConfigError(f"SQL: {_first_line(exc)}") from exc
        finally:
            timer.cancel()

    def _images(self, cursor: duckdb.DuckDBPyConnection, names: list[str]) -> NDArray[np.int32]:
        if "n" in names:
            at = names.index("n")
            found = [row[at] for row in cursor.fetchmany(_MOST_IMAGES)]
        else:
            at = names.index("image_id")
            ids = [str(row[at]) for row in cursor.fetchmany(_MOST_IMAGES)]
            known = self._database.cursor().execute(
                "SELECT image_id, n FROM images WHERE image_id IN (SELECT unnest(?))", [ids]
            )
            by_id = dict(known.fetchall())
            found = [by_id.get(one) for one in ids]
        total = self._database.cursor().execute("SELECT count(*) FROM images").fetchone()
        most = total[0] if total else 0
        kept = [n for n in dict.fromkeys(found) if isinstance(n, int) and 0 <= n < most]
        return np.array(kept, np.int32)


def _numbers(cursor: duckdb.DuckDBPyConnection) -> NDArray[np.int32]:
    return np.asarray(cursor.fetchnumpy()["n"], np.int32)


def _plain(cursor: duckdb.DuckDBPyConnection) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(map(_shown, row)) for row in cursor.fetchmany(_TABLE_ROWS))


def _shown(value: Any) -> Any:
    """Return a value as JSON can hold it, which has neither inf nor nan."""
    plain = isinstance(value, int | str | None) or (isinstance(value, float) and isfinite(value))
    return value if plain else str(value)


def _first_line(exc: Exception) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0][:300]


def _one_of(what: str, value: str, known: Any) -> None:
    if value not in known:
        raise ConfigError(f"{what}: {value!r} is none of {', '.join(filter(None, known))}")
