"""Where a run's review goes, as it was last said: ``review/settings.json``, without secrets.

``labelfleet run`` writes it from the config's ``review:`` section, ``review push`` from its
options; ``push``, ``pull`` and ``status`` then need only the run.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Protocol

from storage.errors import ConfigError, ObjectNotFound
from storage.objects.protocols import SupportsGet, SupportsPut

SETTINGS_KEY = "review/settings.json"


@dataclass(frozen=True, slots=True)
class ReviewSettings:
    """Where people look.

    Attributes:
        url: of Label Studio.
        project: its title there.
        audit_blind: audit images are shown without boxes.
    """

    url: str = "http://localhost:8080"
    project: str = ""
    audit_blind: bool = False


class SupportsSettings(SupportsGet, SupportsPut, Protocol):
    """What keeping settings needs of a store."""


def read_settings(store: SupportsGet) -> ReviewSettings | None:
    """The settings, or None where nobody gave any. Raises ConfigError when they are damaged."""
    try:
        fields = json.loads(store.get(SETTINGS_KEY))
        return ReviewSettings(**fields)
    except ObjectNotFound:
        return None
    except (ValueError, TypeError) as exc:
        raise ConfigError(
            f"{SETTINGS_KEY} cannot be read: {exc}", hint="delete it; give --url and --project"
        ) from exc


def write_settings(store: SupportsSettings, settings: ReviewSettings) -> None:
    """Keep the settings, if they are others than those that are there."""
    if read_settings(store) != settings:
        store.put(SETTINGS_KEY, json.dumps(asdict(settings), indent=2).encode())
