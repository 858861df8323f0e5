"""The data card: README.md next to each export, readable without labelfleet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.labels.versions import LabelVersion

CARD = "README.md"

_CONTENTS = {
    "coco": "`annotations.json` is COCO detection JSON; `images/` holds what was copied or linked. "
    "Ignore boxes are annotations with `iscrowd: 1` (unless left out) and the list `ignore`.",
    "yolo": "`labels/<stem>.txt` holds `class cx cy w h` a box as shares of the image, "
    "`ignore/<stem>.txt` the ignore boxes in the same form, `names.jsonl` which image each file "
    "is, `data.yaml` the classes.",
    "hf": "`data/*.parquet` has the features `image`, `image_id`, `width`, `height`, `source`, "
    '`annotator`, `labelled_at`, `objects` and `ignored`: `load_dataset("parquet", '
    'data_files="data/*.parquet")`.',
}


def data_card(
    lineage: LabelVersion,
    format: str,
    policy: str,
    counts: Mapping[str, Any],
    by_class: Mapping[str, int],
) -> str:
    """README.md.

    Args:
        lineage: the version.
        format: of the export.
        policy: the version's policy.yaml.
        counts: the export's own counts, by name.
        by_class: labels by class name.
    """
    run = lineage.run
    facts = {
        "Run": run["name"],
        "Label version": lineage.version,
        "Decided": lineage.created_at,
        "Model (sha256 of its weights)": run["model_sha256"],
        "Licence of the model": run["licence"],
        "Configuration": run["config_hash"],
        "Policy": lineage.policy,
        "Answers of people": f"settled by {lineage.settling}, from {len(lineage.answers)} runs",
    }
    parts = [
        _front_matter(format),
        f"# {_cell(run['name'])}, label version {lineage.version}\n\n{_CONTENTS[format]}\n",
        "Boxes are in pixels of the upright image. An image without a box was looked at: it shows "
        "background. Ignore boxes are neither objects nor background.\n",
        _table("Origin", facts),
        _table("Counts of this export", counts),
        _table("Labels by class", by_class),
        _table("Counts of the label version", lineage.counts),
        f"## Policy\n\n```yaml\n{policy.strip()}\n```\n",
    ]
    if lineage.guarantee:
        parts.append(f"## Guarantee\n\n{lineage.guarantee}\n")
    return "\n".join(part for part in parts if part)


def _front_matter(format: str) -> str:
    if format != "hf":
        return ""
    return "---\nconfigs:\n- config_name: default\n  data_files: data/*.parquet\n---\n"


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines, ""])


def _cell(value: Any) -> str:
    """Escape text so that it stays within its cell and is not read as markup."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    text = " ".join(text.split())
    for sign in "\\`|<>[]*_":
        text = text.replace(sign, f"\\{sign}")
    return text
