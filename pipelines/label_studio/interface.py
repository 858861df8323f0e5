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
_FEW_CLASSES = 10  # that fit on the page and have a hotkey each
# The page fits an image to its column and then takes the toolbar off the column: at full width the
# image's borders, and what lies at them, would be cut off.
_WIDTH = "94%"
_WHY = '  <Header name="why" value="$why" size="6"/>\n'


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


def label_config(classes: Sequence[str], *, show_why: bool = False) -> str:
    """Return the interface for these classes: a colour each, digits as hotkeys, no rotated boxes.

    With many classes there is a field that filters them.

    Rotation is switched off because labels are upright boxes; the page itself shows images upright,
    as their EXIF says.

    Args:
        classes: of the run.
        show_why: show the task's ``why`` above the image.

    Raises:
        ReviewError: a class has a character in it that XML cannot hold.
    """
    for name in classes:
        if not _XML.fullmatch(name):
            raise ReviewError(
                f"the class {name!a} has control characters in it and cannot be a label",
                hint="give model.classes without them",
            )
    keys = hotkeys(classes)
    labels = "\n".join(
        f"    <Label value={quoteattr(name)} background={quoteattr(color_of(i))}"
        + (f' hotkey="{keys[name]}"' if name in keys else "")
        + "/>"
        for i, name in enumerate(classes)
    )
    search = '  <Filter name="filter" toName="label" minlength="0" hotkey="shift+f"/>\n'
    return (
        "<View>\n"
        f"{_WHY if show_why else ''}"
        f"{search if len(classes) > _FEW_CLASSES else ''}"
        f'  <Image name="image" value="$image" width="{_WIDTH}"/>\n'
        '  <RectangleLabels name="label" toName="image" canRotate="false" strokeWidth="2">\n'
        f"{labels}\n"
        "  </RectangleLabels>\n"
        "</View>\n"
    )


def hotkeys(classes: Sequence[str]) -> dict[str, str]:
    """Assign a digit to each of up to ten classes: its own if the name has one (``Digit0``)."""
    keys: dict[str, str] = {}
    for name in classes:
        digits = re.findall(r"[0-9]+", name)
        if len(digits) == 1 and len(digits[0]) == 1 and digits[0] not in keys.values():
            keys[name] = digits[0]
    free = [key for key in _HOTKEYS if key not in keys.values()]
    unkeyed = [name for name in dict.fromkeys(classes) if name not in keys]
    return keys | dict(zip(unkeyed, free, strict=False))


def interface_of(controls: Mapping[str, Any], classes: Sequence[str]) -> Interface:
    """Return where boxes of these classes go in an existing project.

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
