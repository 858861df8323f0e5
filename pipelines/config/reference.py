"""docs/configuration.md, generated from the models themselves so that it cannot drift.

``python -m pipelines.config.reference`` prints the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.config.messages import expected, section_in
from pipelines.config.run_config import RunConfig

_INTRODUCTION = """\
# Configuration

<!-- Generated: edit pipelines/config/run_config.py, then
     python -m pipelines.config.reference > docs/configuration.md -->

A run is described by one YAML file, at a path or any URL: `labelfleet run cells.yaml`. The smallest
config:

```yaml
name: blood-cells
source: {url: s3://plates/shards/}
output: s3://plates/labels/blood-cells
model: {checkpoint: s3://plates/models/cells.pth}
```

- A key that is not listed here is an error that names the nearest valid key. All problems of a file
  are reported at once, one per line.
- `--set key.sub=value` overrides a field; the value is read as YAML:
  `--set model.score_floor=0.1 --set 'model.classes=[RBC, WBC]' --set workers.count=auto`.
- A relative path starts at the folder in which the command runs, not at the config's folder; `~` is
  your home folder. On a cluster, every node must be able to reach it.
- Keep secrets out of this file. Storage credentials come from boto3's own chain (environment,
  profile, instance role), Label Studio's token from `LABEL_STUDIO_API_KEY`. A URL that contains a
  password is refused.
- `labelfleet plan cells.yaml` checks a config and says what a run would do; it changes nothing.
- `source.url`, the classes and every field that moves a box are fixed when the run is created.
  The same config continues the run. A different model or threshold needs another `output`; the run
  refuses it and names the fields.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    return "\n".join([_INTRODUCTION, *sections(RunConfig, "## The run")])


def sections(
    model: type[BaseModel], heading: str, elsewhere: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Yield lines of Markdown: a table of the model's fields, and one for each section in it.

    Args:
        elsewhere: links to the tables of sections that another page has, by dotted name.
    """
    yield from _section(model, "", (heading, ""), elsewhere or {})


def _section(
    model: type[BaseModel], prefix: str, titled: tuple[str, str], elsewhere: Mapping[str, str]
) -> Iterator[str]:
    heading, about = titled
    yield f"{heading}\n"
    if about:
        yield f"{about}\n"
    yield "| field | takes | default | |"
    yield "|---|---|---|---|"
    inner = []
    for name, field in model.model_fields.items():
        section, path = section_in(field.annotation), f"{prefix}{name}"
        yield _row(name, field, section, elsewhere.get(path, f"#{path.replace('.', '')}"))
        if section is not None and path not in elsewhere:
            inner.append((name, section))
    yield ""
    for name, section in inner:
        about = (section.__doc__ or "").strip()
        yield from _section(section, f"{prefix}{name}.", (f"## `{prefix}{name}`", about), elsewhere)


def _row(name: str, field: FieldInfo, section: type[BaseModel] | None, link: str) -> str:
    takes = expected(field)
    if section is not None:
        whole = expected(FieldInfo(annotation=section))
        takes = takes.replace(whole, f"[a section]({link})")
    cells = [f"`{name}`", takes, _default(field, section), field.description or ""]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return "**required**"
    value: Any = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if section is not None and isinstance(value, section):
        return "its own defaults"
    if value == () or value == {}:
        return "`[]`" if value == () else "`{}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
