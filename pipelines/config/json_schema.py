"""JSON Schemas of the YAML files, generated from the models: editors complete and check by them."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema_text(model: type[BaseModel], title: str) -> str:
    """Return the schema of a config as JSON text."""
    fields: dict[str, Any] = model.model_json_schema()
    whole = {"$schema": DRAFT, **fields, "title": title}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
