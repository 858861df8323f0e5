"""docs/round_configuration.md, generated from the config of ``labelfleet round``.

``python -m pipelines.rounds.reference`` prints the page.
"""

from __future__ import annotations

import sys

from pipelines.config.reference import sections
from pipelines.rounds.round_config import RoundConfig

_INTRODUCTION = """\
# Configuration of a round

<!-- Generated: edit pipelines/rounds/round_config.py, then
     python -m pipelines.rounds.reference > docs/round_configuration.md -->

A round is one YAML file: `labelfleet round cells.yaml`. The least that works:

```yaml
name: cells
output: runs/round-1
pool: {url: data/unlabelled}
truth: {annotations: data/truth.json, images: data/images}
test: {annotations: data/test.json, images: data/images}
```

With a teacher of your own, and people:

```yaml
teacher: {checkpoint: cells.safetensors}   # else one is trained on `truth`
review: {url: http://localhost:8080, project: cells, budget: 500 images}
```

- A key that is not listed here is an error, and the nearest valid one is named.
- `--set key.sub=value` overrides a field; the value is read as YAML.
- Paths are relative to the folder the command is started in.
- `train` and `student` take the fields of [a training](train_configuration.md) except `name`,
  `output`, `train`, `val` and `test`; `run` those of [a run](configuration.md) except `name`,
  `source`, `output`, `review`, `gate` and `policy`.
- [Rounds](rounds.md) says what the steps do with them.
"""
# Sections that a run's config has as well.
_OF_A_RUN = {
    "pool": "configuration.md#source",
    "teacher": "configuration.md#model",
    "policy": "configuration.md#policy",
    "storage": "configuration.md#storage",
}


def page() -> str:
    """Return the whole page as Markdown."""
    return "\n".join([_INTRODUCTION, *sections(RoundConfig, "## The round", _OF_A_RUN)])


if __name__ == "__main__":
    sys.stdout.write(page())
