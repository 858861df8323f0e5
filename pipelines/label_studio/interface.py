"""Label Studio's labelling interface: made from the classes, or the one a project already has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from pipelines.display.palette import color_of
from storage.errors import ReviewError

# XML 1.0, production 2.
_XML = re.compile("[\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]*")
_HOTKEYS = "1234567890"
# The page fits an image to its column and then takes the toolbar off the column: at full width the
# image's borders, and what lies at them, would be cut off.
_WIDTH = "94%"


@dataclass(frozen=True, slots=True)
class Interface:
    """The names that predictions and answers go by.

    Attributes:
        control: the RectangleLabels tag (``from_name``).
        image: the Image tag (``to_name``).
        field: the field of a task's data that holds the image's URL.
    """

    control: str = "label"
    image: str = "image"
    field: str = "image"


def label_config(classes: Sequence[str]) -> str:
    """The interface for these classes: a colour each, digits as hotkeys, no rotated boxes.

    Rotation is switched off because labels are upright boxes; the page itself shows images upright,
    as their EXIF says.

    Raises:
        ReviewError: a class has a character in it that XML cannot hold.
    """
    for name in classes:
        if not _XML.fullmatch(name):
            raise ReviewError(
                f"the class {name!a} has control characters in it and cannot be a label",
                hint="give model.classes without them",
            )
    labels = "\n".join(
        f"    <Label value={quoteattr(name)} background={quoteattr(color_of(i))}"
        + (f' hotkey="{_HOTKEYS[i]}"' if i < len(_HOTKEYS) else "")
        + "/>"
        for i, name in enumerate(classes)
    )
    return (
        "<View>\n"
        f'  <Image name="image" value="$image" width="{_WIDTH}"/>\n'
        '  <RectangleLabels name="label" toName="image" canRotate="false" strokeWidth="2">\n'
        f"{labels}\n"
        "  </RectangleLabels>\n"
        "</View>\n"
    )


def interface_of(controls: Mapping[str, Any], classes: Sequence[str]) -> Interface:
    """Where boxes of these classes go in a project that is there.

    Args:
        controls: the project's interface as Label Studio parsed it, by control name.
        classes: every class must have a label.

    Raises:
        ReviewError: it has no rectangle control on an image, or lacks classes.
    """
    boxes = {n: c for n, c in controls.items() if c.get("type") == "RectangleLabels"}
    if not boxes:
        raise ReviewError(
            "the project's labelling interface has no RectangleLabels",
            hint="paste this into Settings > Labeling Interface > Code:\n" + label_config(classes),
        )
    lacking = {name: [c for c in classes if c not in boxes[name]["labels"]] for name in boxes}
    name = min(lacking, key=lambda n: len(lacking[n]))
    if lacking[name]:
        tags = " ".join(f"<Label value={quoteattr(c)}/>" for c in lacking[name])
        raise ReviewError(
            f"the project's labelling interface lacks {', '.join(lacking[name])}",
            hint=f"add to its RectangleLabels {name!r} in Settings > Labeling Interface: {tags}",
        )
    inputs = boxes[name].get("inputs") or [{}]
    return Interface(name, boxes[name]["to_name"][0], str(inputs[0].get("value") or "image"))
