"""docs/configuration.md, generated from the models themselves so that it cannot drift.

``python -m pipelines.config.reference`` prints the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.config.messages import expected, section_in
from pipelines.config.run_config import RunConfig

_INTRODUCTION = """\
# Configuration

<!-- Generated: edit pipelines/config/run_config.py, then
     python -m pipelines.config.reference > docs/configuration.md -->

A run is one YAML file, a path or any URL: `labelfleet run cells.yaml`. The least that works:

```yaml
name: blood-cells
source: {url: s3://plates/shards/}
output: s3://plates/labels/blood-cells
model: {checkpoint: s3://plates/models/cells.pth}
```

- A key that is not listed here is an error, and the nearest valid one is named. All problems of
  a file are reported at once, one a line.
- `--set key.sub=value` overrides a field; the value is read as YAML:
  `--set model.score_floor=0.1 --set 'model.classes=[RBC, WBC]' --set workers.count=auto`.
- A plain path is meant from the folder the command is started in, not from that of the file; `~`
  is your home folder. On a cluster, every node must reach what it names.
- Secrets are never here. Storage credentials come from boto3's own chain (environment, profile,
  instance role), Label Studio's token from `LABEL_STUDIO_API_KEY`; a URL with a password in it is
  refused.
- `labelfleet plan cells.yaml` checks a config and says what a run would do; it touches nothing.
- `source.url`, the classes and every field that moves a box are settled when the run is created.
  Re-running continues the run; another model or threshold is refused with the fields named, and
  needs another `output`.
"""


def page() -> str:
    """The whole page, Markdown."""
    return "\n".join([_INTRODUCTION, *_section(RunConfig, "", "## The run", "")])


def _section(model: type[BaseModel], prefix: str, heading: str, about: str) -> Iterator[str]:
    yield f"{heading}\n"
    if about:
        yield f"{about}\n"
    yield "| field | takes | default | |"
    yield "|---|---|---|---|"
    inner = []
    for name, field in model.model_fields.items():
        section = section_in(field.annotation)
        yield _row(name, field, section)
        if section is not None:
            inner.append((name, section))
    yield ""
    for name, section in inner:
        about = (section.__doc__ or "").strip()
        yield from _section(section, f"{prefix}{name}.", f"## `{prefix}{name}`", about)


def _row(name: str, field: FieldInfo, section: type[BaseModel] | None) -> str:
    takes = expected(field)
    if section is not None:
        whole = expected(FieldInfo(annotation=section))
        takes = takes.replace(whole, "[a section](#" + name + ")")
    cells = [f"`{name}`", takes, _default(field, section), field.description or ""]
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return "**required**"
    value: Any = field.default
    if value is None:
        return "none"
    if section is not None and isinstance(value, section):
        return "its own defaults"
    if value == ():
        return "`[]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
