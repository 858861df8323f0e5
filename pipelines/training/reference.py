"""docs/train_configuration.md, generated from the config of ``labelfleet train``.

``python -m pipelines.training.reference`` prints the page.
"""

from __future__ import annotations

import sys

from pipelines.config.reference import sections
from pipelines.training.config import SourceConfig, TrainConfig

_INTRODUCTION = """\
# Configuration of a training

<!-- Generated: edit pipelines/training/config.py, then
     python -m pipelines.training.reference > docs/train_configuration.md -->

A training is one YAML file: `labelfleet train cells.yaml`. The least that works:

```yaml
name: cells
output: runs/cells
train: {annotations: data/train.json, images: data/images}
val: {annotations: data/val.json, images: data/images}
epochs: 30
```

- A key that is not listed here is an error, and the nearest valid one is named.
- `--set key.sub=value` overrides a field; the value is read as YAML.
- Paths are relative to the folder the command is started in.
- [Training](training.md) says how the fields work together.
"""


def page() -> str:
    """Return the whole page as Markdown."""
    sources = sections(SourceConfig, "## A source in the list `train`")
    return "\n".join([_INTRODUCTION, *sections(TrainConfig, "## The training"), *sources])


if __name__ == "__main__":
    sys.stdout.write(page())
