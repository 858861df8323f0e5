"""Globs on keys: ``*`` and ``?`` within a level, ``**`` across levels, ``[a-z]`` and ``[!a-z]``.

A glob comes from the config, but the keys are untrusted: ``*a*b*c*.jpg`` as a plain regular
expression takes minutes for a key of a thousand letters. Of several stars within a level only the
last one needs to try more than its first match: what another finds later, the next one can skip.
"""

from __future__ import annotations

import re

from storage.errors import ConfigError

_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?[^]]+\]|.", re.DOTALL)
_ACROSS = {"**/": "(?:[^/]+/)*", "**": ".*"}


def compile_glob(pattern: str) -> re.Pattern[str]:
    """Return a glob as a regular expression for ``fullmatch``; without '/' it matches at any level.

    Raises ConfigError for a range that runs backwards.
    """
    anywhere = pattern if "/" in pattern else f"**/{pattern}"
    parts = _PARTS.findall(anywhere.removeprefix("/"))
    regex, at = "", 0
    while at < len(parts):
        if parts[at] != "*":
            regex += _one(parts[at])
            at += 1
            continue
        fixed, at = "", at + 1
        while at < len(parts) and parts[at] not in ("*", "/", *_ACROSS):
            fixed += _one(parts[at])
            at += 1
        another = at < len(parts) and parts[at] == "*"
        regex += f"(?>[^/]*?{fixed})" if another else f"[^/]*{fixed}"
    try:
        return re.compile(regex, re.DOTALL)
    except re.error as exc:
        raise ConfigError(
            f"{pattern!r} is not a valid glob: {exc.msg}", hint="a set looks like [a-z] or [!0-9]"
        ) from exc


def _one(part: str) -> str:
    if part in _ACROSS:
        return _ACROSS[part]
    if part == "?":
        return "[^/]"
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        members = part[1:-1].replace("\\", "\\\\").replace("[", "\\[")
        return f"(?!/)[{'^' + members[1:] if members.startswith('!') else members}]"
    return re.escape(part)
