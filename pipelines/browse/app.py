"""The page and what it asks for, over HTTP on loopback.

Every answer needs the token that the command printed (then kept in a cookie that scripts cannot
read) and the address of this server as ``Host``, so that no other page, and no name that resolves
to loopback, gets anything. Nothing is loaded from anywhere else: the content security policy says
so to the browser.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from pipelines.browse.chosen import MOST, send_to_review
from pipelines.browse.index import Sources, layers_of
from pipelines.browse.pictures import LARGE_PX, THUMB_PX, Pictures
from pipelines.browse.questions import VIEWS, Answered, Filter, Questions
from pipelines.display.palette import color_of
from storage.errors import ConfigError, LabelfleetError
from storage.records import ImageRef
from storage.runs.manifest import distinct_names

COOKIE = "labelfleet_browse"
_PAGE = 500  # images a request
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ASSETS = {
    "app.js": "text/javascript", "grid.js": "text/javascript", "style.css": "text/css",
}  # fmt: skip


class Browser:
    """The routes of one run's page."""

    def __init__(self, sources: Sources, questions: Questions, pictures: Pictures) -> None:
        self._sources, self._questions, self._pictures = sources, questions, pictures
        self._sending = threading.Lock()

    def routes(self) -> list[Route]:
        """Return what the page may ask for."""
        return [
            Route("/", self.page),
            Route("/favicon.ico", lambda _request: Response(status_code=204)),
            Route("/assets/{name}", self.asset),
            Route("/api/about", self.about),
            Route("/api/images", self.images),
            Route("/api/image/{n:int}", self.image),
            Route("/thumb/{n:int}.jpg", self.thumb),
            Route("/image/{n:int}.jpg", self.large),
            Route("/api/review", self.review, methods=["POST"]),
        ]

    def page(self, _request: Request) -> Response:
        """Return the page itself."""
        return Response(_asset("index.html"), media_type="text/html")

    def asset(self, request: Request) -> Response:
        """Return a script or the style sheet."""
        name = request.path_params["name"]
        if name not in _ASSETS:
            return _problem("not found", 404)
        return Response(_asset(name), media_type=_ASSETS[name])

    def about(self, _request: Request) -> Response:
        """Return what there is to filter by."""
        ask, run = self._questions.rows, self._sources.run
        names = [category.name for category in run.record.identity.categories]
        people = ask("SELECT DISTINCT who FROM boxes WHERE who IS NOT NULL ORDER BY 1", [])
        status = ask("SELECT status, count(*) AS images FROM images GROUP BY 1 ORDER BY 2 DESC", [])
        with self._questions.cursor() as cursor:
            layers = layers_of(cursor)
        version, other = self._sources.version, self._sources.other
        shown = distinct_names([run] if other is None else [run, other])
        return JSONResponse(
            {
                "name": shown[0],
                "version": None if version is None else version.version,
                "other": None if other is None else shown[1],
                "classes": [{"name": n, "colour": color_of(i)} for i, n in enumerate(names)],
                "people": [row["who"] for row in people],
                "status": status,
                "layers": layers,
                "views": [view for view in VIEWS if view],
                "most_sent": MOST,
            }
        )

    def images(self, request: Request) -> Response:
        """Return one stretch of a view: its images, with their boxes, and how many there are."""
        query = request.query_params
        found = self._questions.ask(Filter.parse(query))
        first, count = _whole(query, "offset"), min(_whole(query, "limit", 60), _PAGE)
        some = [int(n) for n in found.numbers[first : first + count]]
        rows = self._rows(some, _layer_shown(query))
        self._pictures.expect([row["shard_id"] for row in rows])
        return JSONResponse({"total": len(found.numbers), "images": rows, **_table(found)})

    def image(self, request: Request) -> Response:
        """Return all that is known of one image."""
        n = request.path_params["n"]
        found = self._questions.rows(
            "SELECT i.*, d.source, d.accepted, d.ignored, d.rejected, d.annotator, t.leader,"
            " x.disagreement FROM images i LEFT JOIN decided d USING (n)"
            " LEFT JOIN twins t USING (n) LEFT JOIN disagreement x USING (n) WHERE i.n = ?",
            [n],
        )
        if not found:
            return _problem("not found", 404)
        row = found[0]
        row["boxes"] = self._questions.rows(
            "SELECT * EXCLUDE (n) FROM boxes WHERE n = ? ORDER BY layer, score DESC NULLS FIRST",
            [n],
        )
        row["answers"] = self._questions.rows(
            "SELECT who, skipped FROM answered WHERE sha256 = ?", [row["sha256"]]
        )
        for unsafe in ("phash", "leader"):  # whole numbers beyond what JavaScript can hold
            row[unsafe] = None if row[unsafe] is None else str(row[unsafe])
        return JSONResponse(row)

    def thumb(self, request: Request) -> Response:
        """Return a small picture."""
        return self._picture(request.path_params["n"], THUMB_PX)

    def large(self, request: Request) -> Response:
        """Return a large picture."""
        return self._picture(request.path_params["n"], LARGE_PX)

    async def review(self, request: Request) -> Response:
        """Put images into the review queue: the one thing that is ever written."""
        if request.headers.get("x-labelfleet") != "browse":  # no form of another page can set it
            return _problem("this is asked for by the page alone", 403)
        try:
            told = await request.json()
        except ValueError:
            told = None
        numbers = told.get("images") if isinstance(told, dict) else None
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
            return _problem("images: a list of numbers", 400)
        if not 0 < len(numbers) <= MOST:
            return _problem(f"between 1 and {MOST:,} images at once", 400)
        from starlette.concurrency import run_in_threadpool

        return await run_in_threadpool(self._send, numbers)

    def _send(self, numbers: list[int]) -> Response:
        found = self._questions.rows(
            "SELECT * FROM images WHERE n IN (SELECT unnest(?))", [numbers]
        )
        place = {row["n"]: row for row in found}
        rows = [place[n] for n in dict.fromkeys(numbers) if n in place]
        with self._sending:
            return JSONResponse(asdict(send_to_review(self._sources.run, rows)))

    def _picture(self, n: int, longest_px: int) -> Response:
        found = self._questions.rows(
            'SELECT image_id, shard_id, "offset", nbytes, sha256 FROM images WHERE n = ?', [n]
        )
        if not found:
            return _problem("not found", 404)
        body = self._pictures.jpeg(ImageRef(**found[0]), longest_px)
        kept = {"cache-control": "private, max-age=3600"}
        return Response(body, media_type="image/jpeg", headers=kept)

    def _rows(self, numbers: list[int], layer: str) -> list[dict[str, Any]]:
        rows = self._questions.rows(
            "SELECT n, image_id, shard_id, width, height, status, error, warning"
            " FROM images WHERE n IN (SELECT unnest(?))",
            [numbers],
        )
        boxes = self._questions.rows(
            "SELECT n, class, score, decision, x1, y1, x2, y2 FROM boxes"
            " WHERE layer = ? AND n IN (SELECT unnest(?))",
            [layer, numbers],
        )
        by_number = {row["n"]: {**row, "drawn": []} for row in rows}
        for box in boxes:
            by_number[box.pop("n")]["drawn"].append(box)
        return [by_number[n] for n in numbers if n in by_number]


def make_app(browser: Browser, *, token: str, hosts: frozenset[str]) -> Starlette:
    """Return the application.

    Args:
        browser: its routes.
        token: what a request has to know.
        hosts: ``Host`` headers that are answered, such as 127.0.0.1:8080.
    """

    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        response = _refusal(request, token, hosts) or await call_next(request)
        response.headers["content-security-policy"] = _POLICY
        response.headers["x-content-type-options"] = "nosniff"
        response.headers["referrer-policy"] = "no-referrer"
        response.headers["cross-origin-resource-policy"] = "same-origin"
        return response

    return Starlette(
        routes=browser.routes(),
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={LabelfleetError: _told},
    )


def _refusal(request: Request, token: str, hosts: frozenset[str]) -> Response | None:
    """Return the answer to those who may not ask, or who just brought the token; else None."""
    if request.headers.get("host") not in hosts:
        return _problem("another host's name", 403)
    brought = request.query_params.get("token", "")
    if brought and secrets.compare_digest(brought.encode(), token.encode()):
        response = RedirectResponse("/", 303)  # the token leaves the address, and the history
        response.set_cookie(_cookie(request), token, httponly=True, samesite="strict")
        return response
    known = request.cookies.get(_cookie(request), "")
    if not secrets.compare_digest(known.encode(), token.encode()):
        return _problem("open the address that `labelfleet browse` printed", 401)
    return None


def _cookie(request: Request) -> str:
    """Return the cookie's name: cookies do not tell ports apart, and two runs may be open."""
    return f"{COOKIE}_{request.url.port or 80}"


async def _told(_request: Request, exc: Exception) -> Response:
    message = exc.message if isinstance(exc, LabelfleetError) else str(exc)
    hint = getattr(exc, "hint", None)
    said = f"{message} ({hint})" if hint else message
    return _problem(said, 400 if isinstance(exc, ConfigError) else 404)


def _problem(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


def _asset(name: str) -> bytes:
    return (files("pipelines") / "assets/browse" / name).read_bytes()


def _whole(query: Mapping[str, str], name: str, default: int = 0) -> int:
    try:
        return max(0, int(query.get(name, default)))
    except ValueError as exc:
        raise ConfigError(f"{name}: {query[name]!r} is not a whole number") from exc


def _layer_shown(query: Mapping[str, str]) -> str:
    return query.get("shown") or "model"


def _table(found: Answered) -> dict[str, Any]:
    return {"columns": found.columns, "rows": found.rows} if found.columns else {}
