"""Building blocks of config sections: the strict base, and value types with their checks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from pipelines.config.messages import expected, mismatch
from storage.urls import has_credentials

Auto = Literal["auto"]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(BaseModel):
    """Base of every section: frozen, and strict about names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, value: Any, given: ValidationInfo) -> Any:
        """Refuse booleans: YAML reads `yes` and `on` as true, which pydantic would take for 1."""
        field = cls.model_fields[str(given.field_name)]
        if isinstance(value, bool) and "true or false" not in expected(field):
            raise ValueError(mismatch(field, value))
        return value


def _url(url: str) -> str:
    if not url.strip():
        raise ValueError("a URL or path is expected, not an empty text")
    if has_credentials(url):
        raise ValueError("a URL with credentials in it; use environment, profile or instance role")
    return url


def _place(url: str) -> str:
    if re.match(r"https?://", url, re.IGNORECASE) and "?" in url:
        raise ValueError("a folder at a web address has no query (what follows the `?`)")
    return _url(url)


def _webhook(url: SecretStr) -> SecretStr:
    _url(url.get_secret_value())
    if not re.match(r"https?://", url.get_secret_value(), re.IGNORECASE):
        raise ValueError("a web address is expected: https://…")
    return url


def _run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError("up to 100 letters, digits, `.`, `_` and `-` are expected, no spaces")
    return name


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("64 hex digits in lower case are expected, as sha256sum prints them")
    return text


def _of_home(path: Path) -> Path:
    """Put the home folder in place of a leading ``~``, as the shell does."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path raises where ~name is a file's


LocalPath = Annotated[Path, AfterValidator(_of_home)]
Url = Annotated[str, "a URL or path", AfterValidator(_url)]
Place = Annotated[str, "a URL or path", AfterValidator(_place)]
Webhook = Annotated[SecretStr, "a web address", AfterValidator(_webhook)]  # its path is secret
Name = Annotated[str, "a name", AfterValidator(_run_name)]
Digest = Annotated[str, "64 hex digits", AfterValidator(_digest)]
