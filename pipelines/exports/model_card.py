"""The model card of a checkpoint, in the format that Hugging Face reads: `labelfleet card`.

Everything comes from the checkpoint's own description; what it does not say is said to be unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from storage.errors import CheckpointError
from storage.objects.protocols import StorageOptions
from storage.urls import shown_url
from workers.checkpoints.cache import fetch_checkpoint
from workers.checkpoints.file import Checkpoint, read_checkpoint
from workers.checkpoints.lineage import Ancestor, ancestors_in, is_non_commercial
from workers.models.resolve import in_words

# Hugging Face's identifiers of licences that people write in other ways, too.
_SPDX = {
    "apache-2.0": "apache-2.0", "apache 2.0": "apache-2.0", "mit": "mit", "bsd-3-clause":
    "bsd-3-clause", "bsd-2-clause": "bsd-2-clause", "cc-by-4.0": "cc-by-4.0", "cc0-1.0": "cc0-1.0",
    "cc-by-sa-4.0": "cc-by-sa-4.0", "cc-by-nc-4.0": "cc-by-nc-4.0", "gpl-3.0": "gpl-3.0",
    "agpl-3.0": "agpl-3.0", "lgpl-3.0": "lgpl-3.0", "cc-by-nc-sa-4.0": "cc-by-nc-sa-4.0",
}  # fmt: skip
# Fields of a training that name files and folders.
_PLACES = frozenset({"annotations", "images", "labels", "checkpoint", "arch", "teacher"})
_IS_LOCAL = re.compile(r"(file:|/|~|\.{1,2}/|[A-Za-z]:[\\/])")
_METRICS = (("map_", "mAP"), ("map50", "mAP50"), ("map75", "mAP75"), ("ar", "AR"))


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a checkpoint says about itself, as far as a card tells it.

    ``measured``: figures under COCO's names by set, measured since it was written.
    """

    checkpoint: Checkpoint
    name: str
    licence: str
    ancestors: tuple[Ancestor, ...]
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def training(self) -> Mapping[str, Any]:
        """Its trainer's record; empty where there is none."""
        return self.checkpoint.training or {}

    @property
    def non_commercial(self) -> bool:
        """Whether its licence, or an ancestor's, forbids commercial use."""
        return any(
            is_non_commercial(x) for x in (self.licence, *(a.licence for a in self.ancestors))
        )

    def metrics(self) -> dict[str, dict[str, float]]:
        """Return the figures on each set that it was measured on, under COCO's names."""
        sets = {"val": self.training.get("val"), **(self.training.get("test") or {})}
        found = {
            name: {shown: float(s[key]) for key, shown in _METRICS if _is_number(s.get(key))}
            for name, s in sets.items()
            if isinstance(s, Mapping)
        }
        return {**found, **{name: dict(figures) for name, figures in self.measured.items()}}

    def data(self) -> list[dict[str, Any]]:
        """Return the versions of its training data, with their digests."""
        found = self.training.get("sources")
        return [dict(d) for d in found if isinstance(d, Mapping)] if isinstance(found, list) else []

    def to_fields(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name,
            "sha256": self.checkpoint.sha256,
            "architecture": self.checkpoint.name,
            "classes": list(self.checkpoint.classes or ()),
            "licence": self.licence,
            "non_commercial": self.non_commercial,
            "lineage": [one.to_fields() for one in self.ancestors],
            "metrics": self.metrics(),
            "data": self.data(),
        }  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_card_facts(url: str, options: StorageOptions) -> CardFacts:
    """Read a checkpoint's description. Raises CheckpointError where it has none."""
    checkpoint = read_checkpoint(fetch_checkpoint(url, options))
    if checkpoint.training is None or checkpoint.classes is None:
        raise CheckpointError(
            f"{checkpoint.path.name} does not describe itself",
            hint="cards are made of checkpoints that `labelfleet train` or `round` wrote",
        )
    name = re.sub(r"\.(safetensors|pth|pt|ckpt)$", "", url.rsplit("/", 1)[-1])
    licence = checkpoint.licence or "unstated"
    provenance = checkpoint.provenance
    return CardFacts(checkpoint, name, licence, ancestors_in(provenance))


def model_card(facts: CardFacts) -> str:
    """Return the card: YAML front matter and Markdown."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(_sections(facts)) + "\n"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    spdx = _SPDX.get(facts.licence.strip().lower())
    front: dict[str, Any] = {"license": spdx or ("unknown" if _unstated(facts) else "other")}
    if spdx is None and not _unstated(facts):
        front["license_name"] = "non-commercial" if facts.non_commercial else _slug(facts.licence)
    front |= {
        "library_name": "labelfleet",
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "yolo-nas", *(["non-commercial"] * facts.non_commercial)],
    }
    if names := [_last(str(d["source"])) for d in facts.data() if d.get("source")]:
        front["datasets"] = names
    figures = facts.metrics()
    if figures:
        front["metrics"] = ["mAP"]
        front["model-index"] = [{"name": facts.name, "results": [*_results(figures)]}]
    return front


def _results(figures: Mapping[str, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    for name, values in figures.items():
        yield {
            "task": {"type": "object-detection"},
            "dataset": {"name": name, "type": "custom"},
            "metrics": [
                {"type": shown, "value": round(value, 4), "name": f"{shown}, COCO"}
                for shown, value in values.items()
            ],
        }


def _unstated(facts: CardFacts) -> bool:
    return facts.licence.strip().lower() in ("", "unstated", "none", "unknown")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")[:60] or "other"


def _sections(facts: CardFacts) -> Iterator[str]:
    checkpoint = facts.checkpoint
    classes = checkpoint.classes or ()
    yield f"# {_plain(facts.name)}"
    if facts.non_commercial:
        yield (
            "> **Not for commercial use.** Its licence, or that of weights that it derives from, "
            "forbids it; see *Lineage*."
        )
    arch = "scaled by its own `arch_params`" if checkpoint.arch_params else "unscaled"
    shown = ", ".join(classes[:40])
    more = f" and {len(classes) - 40} more" if len(classes) > 40 else ""
    prepared = "unknown" if checkpoint.preprocessing is None else in_words(checkpoint.preprocessing)
    yield _table(
        ("architecture", f"{checkpoint.name or 'YOLO-NAS'}, {arch}"),
        ("classes", f"{len(classes)}: {shown}{more}"),
        ("input", prepared),
        ("licence", facts.licence),
        ("sha256", f"`{checkpoint.sha256}`"),
    )
    yield from _lineage(facts)
    yield from _figures(facts)
    yield from _made(facts)
    yield (
        "## Use\n\n```yaml\nname: my-run\nsource: {url: s3://bucket/images}\noutput: "
        f"s3://bucket/labels\nmodel: {{checkpoint: {checkpoint.path.name}}}\n```\n\n"
        "`labelfleet run my-run.yaml` needs no more: the file says how images are prepared. "
        "super-gradients loads its weights strictly into a network of this architecture."
    )


def _lineage(facts: CardFacts) -> Iterator[str]:
    if not facts.ancestors:
        yield "## Lineage\n\nTrained from random first weights on labels that no model made."
        return
    lines = [
        f"| {_plain(a.role)} | {_plain(a.name)} | {_plain(a.licence)} | `{a.sha256[:16]}` |"
        for a in facts.ancestors
    ]
    head = "| role | what | licence | sha256 |\n|---|---|---|---|\n"
    yield "## Lineage\n\n" + head + "\n".join(lines)


def _figures(facts: CardFacts) -> Iterator[str]:
    figures = facts.metrics()
    if not figures:
        return
    shown = [name for _, name in _METRICS]
    head = f"| set | {' | '.join(shown)} |\n|---|{'---|' * len(shown)}\n"
    lines = [
        f"| {_plain(name)} | "
        + " | ".join(f"{values[m]:.3f}" if m in values else "–" for m in shown)
        + " |"
        for name, values in figures.items()
    ]
    said = "\n\n`val` chose the step that was kept, before the weights were rounded to fp16."
    yield "## Figures\n\n" + head + "\n".join(lines) + said


def _made(facts: CardFacts) -> Iterator[str]:
    training = facts.training
    if data := facts.data():
        shown = ("source", "images", "objects", "share", "digest")
        lines = ["| " + " | ".join(_cell(d.get(key)) for key in shown) + " |" for d in data]
        head = f"| {' | '.join(shown)} |\n|{'---|' * len(shown)}\n"
        yield "## Data\n\n" + head + "\n".join(lines)
    known = [(k, training[k]) for k in ("step", "images", "objects") if k in training]
    if known:
        yield "## Training\n\n" + _table(*((k, f"{v:,}" if _is_number(v) else v) for k, v in known))
    if config := training.get("config"):
        recipe = yaml.safe_dump(_without_folders(config), sort_keys=False, allow_unicode=True)
        yield f"<details><summary>Recipe</summary>\n\n```yaml\n{recipe}```\n\n</details>"


def _without_folders(value: Any, key: str = "") -> Any:
    """Return a recipe whose paths on the machine that trained are names alone."""
    if isinstance(value, Mapping):
        return {name: _without_folders(one, str(name)) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(one, key) for one in value]
    if not isinstance(value, str) or not (key in _PLACES or _IS_LOCAL.match(value)):
        return value
    if "://" in value and not value.startswith("file:"):
        return shown_url(value)
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _last(place: str) -> str:
    """Return a source without the folders of the machine that it was on."""
    return "/".join(place.rstrip("/").split("/")[-2:])


def _cell(value: Any) -> str:
    return "–" if value is None else _plain(_last(value) if isinstance(value, str) else str(value))


def _table(*rows: tuple[str, Any]) -> str:
    head = "| | |\n|---|---|\n"
    return head + "\n".join(f"| {name} | {_plain(str(value))} |" for name, value in rows)


def _plain(text: str) -> str:
    """Escape text so that it stays within its cell and is not read as markup."""
    text = " ".join(text.split())
    return re.sub(r"([|<>\[\]\\*])", r"\\\1", text)
