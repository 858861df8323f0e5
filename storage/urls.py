"""URLs of stores and objects: parse, normalise, compare, and render as text that is safe to
show."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from storage.errors import ConfigError, StorageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_HALF_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
# User and password before an '@'; a secret may hold a '/', while `host:9000/a@b` has a port.
# Azure's container@account.dfs.core.windows.net is neither.
_AZURE_HOST = r"[a-z0-9$-]+@[a-z0-9]+\.(dfs|blob)\.core\.(windows\.net|usgovcloudapi\.net)(?=/|$)"
_CREDENTIALS = re.compile(
    rf"(?!(abfss?|az)://{_AZURE_HOST})"
    r"[a-z0-9+.-]+://([^/@]*@|[^/@:]*:(?!\d+(/|$))[^@]*@)",
    re.IGNORECASE,
)
_PATH_SAFE = "/~!$&'()*+,;=:@"
_S3_ALIASES = frozenset({"s3", "s3a", "s3n"})
_CLOUDS = {"gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed URL.

    Attributes:
        scheme: ``file``, ``s3``, ``gs``, ``az``, ``memory``, or one that fsspec serves.
        authority: the bucket, host or name; '' for files.
        path: for files the absolute path (undecodable bytes as surrogates); otherwise what
            follows the authority's '/', without a trailing '/'.
    """

    scheme: str
    authority: str
    path: str

    @property
    def url(self) -> str:
        """The canonical URL of this location."""
        if self.scheme == "file":
            raw = self.path.encode("utf-8", "surrogateescape")
            return "file://" + quote_from_bytes(raw, safe=_PATH_SAFE)
        return f"{self.scheme}://{self.authority}" + (f"/{self.path}" if self.path else "")


def parse_url(url: str) -> Location:
    """Split a URL or plain path.

    Percent-escapes are decoded in file:// URLs only; S3 keys are taken literally.

    Raises:
        ConfigError: empty, a foreign host in file://, no bucket, or credentials in the URL.
    """
    if not url or "\0" in url:
        raise ConfigError("a URL cannot be empty or contain a NUL")
    found = _SCHEME.match(url)
    if found is None:
        return _parse_path(url)
    scheme, rest = found[1].lower(), found[2]
    if scheme in ("file", "local"):
        return _parse_file_url(url, rest)
    authority, _, path = rest.partition("/")
    if "::" not in url and has_credentials(url):
        raise ConfigError(
            f"credentials do not belong in a URL ({shown_url(url)})",
            hint="leave them out; they come from the environment or the profile of this machine",
        )
    if scheme in _S3_ALIASES:
        return _parse_s3(authority, path)
    if scheme in _CLOUDS:
        return Location(_CLOUDS[scheme], authority, path.rstrip("/"))
    return Location(scheme, authority, path if "?" in path else path.rstrip("/"))


def _parse_path(url: str) -> Location:
    if url[:5].lower() == "file:":
        return _parse_file_url(url, url[5:])
    half = _HALF_SCHEME.match(url)
    if half is not None:
        raise ConfigError(
            f"{readable(url)} has one slash after '{half[1]}:'",
            hint=f"write {half[1]}://…, or ./{readable(url)} if it really is a folder",
        )
    # Path.expanduser raises for a folder that is called ~name.
    return Location("file", "", _absolute(os.path.expanduser(url)))  # noqa: PTH111


def _parse_file_url(url: str, rest: str) -> Location:
    path = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
    if not path.startswith("/"):
        raise ConfigError(
            f"{readable(url)} does not name an absolute path",
            hint="a file URL has three slashes: file:///folder; or write a plain path",
        )
    raw = unquote_to_bytes(path.encode("utf-8", "surrogateescape"))
    if b"\0" in raw:
        raise ConfigError(f"{readable(url)} has a NUL in it")
    return Location("file", "", _absolute(raw.decode("utf-8", "surrogateescape")))


def _parse_s3(bucket: str, path: str) -> Location:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        raise ConfigError(
            f"'{readable(bucket)}' is not the name of an S3 bucket",
            hint="write s3://bucket/prefix",
        )
    return Location("s3", bucket, path.rstrip("/"))


def _absolute(path: str) -> str:
    # 'link/..' is the parent of what the link points at: only the file system can resolve it.
    plain = os.path.realpath(path) if ".." in path.split("/") else str(Path(path).absolute())
    return "/" + plain.lstrip("/")


def normalise_url(url: str) -> str:
    """Return the canonical form of a URL: a plain path becomes an absolute file:// URL, trailing
    slashes are removed. Idempotent. Raises ConfigError as ``parse_url`` does."""
    return parse_url(url).url


def split_url(url: str) -> tuple[str, str]:
    """Return the URL of a single object as (URL of the store that holds it, its key there).

    Raises:
        ConfigError: the URL names a bucket or a folder, not an object.
    """
    place = parse_url(url)
    before_query, mark, query = place.path.partition("?")
    if place.scheme not in ("http", "https"):
        before_query, mark, query = place.path, "", ""
    root, _, name = before_query.rpartition("/")
    if not name or url.endswith("/"):
        raise ConfigError(
            f"{shown_url(url)} names a bucket or a folder, not an object",
            hint="give the whole URL, with the object's name at its end",
        )
    root = root or ("/" if place.scheme == "file" else "")
    return Location(place.scheme, place.authority, root).url, name + mark + query


def overlaps(url_a: str, url_b: str) -> bool:
    """Return whether two locations are the same or one contains the other.

    Files are compared as the file system resolves them (symbolic links, '..'); everything
    else by scheme, bucket and path. Needs neither permissions nor the network.
    """
    a, b = _resolved(parse_url(url_a)), _resolved(parse_url(url_b))
    if a.scheme != b.scheme or not _same_bucket(a, b):
        return False
    inner, outer = sorted((_folder(a.path), _folder(b.path)), key=len, reverse=True)
    return inner.startswith(outer)


def _same_bucket(a: Location, b: Location) -> bool:
    """Return whether two authorities are, or may be, one: Azure's account may be left out, and is
    then the environment's."""
    if a.scheme != "az":
        return a.authority == b.authority
    (box_a, _, host_a), (box_b, _, host_b) = (
        place.authority.lower().partition("@") for place in (a, b)
    )
    accounts = {host.partition(".")[0] for host in (host_a, host_b)}
    return box_a == box_b and (len(accounts) == 1 or "" in accounts)


def _resolved(place: Location) -> Location:
    return Location("file", "", os.path.realpath(place.path)) if place.scheme == "file" else place


def _folder(path: str) -> str:
    return path.rstrip("/") + "/" if path.strip("/") else ""


def check_key(key: str) -> str:
    """Return the key if it can name an object in every store.

    Raises:
        StorageError: empty, a trailing '/', a NUL, or a '.' or '..' between slashes: stores
            that are file systems underneath would leave their root.
    """
    if not key or key.endswith("/") or "\0" in key:
        raise StorageError(f"'{readable(key)}' cannot be the key of an object")
    if not {".", ".."}.isdisjoint(key.split("/")):
        raise StorageError(
            f"'{readable(key)}' has a '.' or '..' between slashes; such keys are refused",
            hint="rename the object",
        )
    return key


def has_credentials(url: str) -> bool:
    """Return whether a URL names a user or a password."""
    return _CREDENTIALS.match(url) is not None


def readable(text: str) -> str:
    """Return printable text on one line: control characters and undecodable bytes become
    escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown_url(url: str) -> str:
    """Return a URL for messages, without user, password and query, which may be secrets."""
    found = _SCHEME.match(url)
    if found is None:
        return readable(url)
    scheme, rest = found[1], found[2]
    named = _CREDENTIALS.match(url)
    if named is not None:
        rest = f"…@{url[named.end() :]}"
    if scheme.lower() in ("http", "https"):
        rest = re.sub(r"[?#].*", "?…", rest, flags=re.DOTALL)
    return readable(f"{scheme}://{rest}")


def distinct_ends(urls: Sequence[str]) -> list[str]:
    """Return the shortest end of each URL's path that none of the other URLs ends with.

    ``s3://a/june/run`` and ``s3://a/july/run`` give ``june/run`` and ``july/run``. A URL without
    such an end is given whole, as ``shown_url`` has it; those that differ only in what that leaves
    out, such as a query, are numbered.
    """
    shown = [shown_url(url) for url in urls]
    parts = [url.rstrip("/").split("/") for url in shown]
    return numbered(
        [
            _distinct_end(url, own, [p for p in parts if p is not own])
            for url, own in zip(shown, parts, strict=True)
        ]
    )


def numbered(names: Sequence[str]) -> list[str]:
    """Return names that all differ: of equal ones the second is followed by `` (2)``, and so on."""
    taken, used, following = set(names), set[str](), dict[str, int]()
    found = []
    for name in names:
        new, n = name, following.get(name, 2)
        while new in used or (new != name and new in taken):
            new = f"{name} ({n})"
            n += 1
        following[name] = n
        used.add(new)
        found.append(new)
    return found


def _distinct_end(url: str, own: Sequence[str], others: Sequence[Sequence[str]]) -> str:
    for n in range(1, len(own) - 1):  # without the scheme
        if all(other[-n:] != own[-n:] for other in others):
            return "/".join(own[-n:])
    return url


_WEB = re.compile(r"""https?://[^\s'"<>]*""", re.IGNORECASE)
# Bounded and without backtracking: a line may hold a name of 64 KiB crafted to take long. Longer
# passwords are not recognised.
_NAMED = re.compile(
    r"""(?<![a-z0-9+.-])([a-z0-9+.-]*+://)[^\s/@'":]{0,1024}+:[^\s@'"]{0,1024}+@""", re.IGNORECASE
)


def unsigned(text: str) -> str:
    """Return the text with the query and user removed from every URL: they may be secrets.

    Our own messages contain none; driver messages, which ``--debug`` shows, often do.
    """
    return _NAMED.sub(r"\1…@", _WEB.sub(_without_query, text))


def _without_query(url: re.Match[str]) -> str:
    plain, mark, _ = url[0].partition("?")
    return f"{plain}?…" if mark else plain
