"""super-gradients' ``processing_params`` as a ``Preprocessing``; what cannot be kept is refused.

super-gradients stores its steps as a list and runs them on an upright RGB image one by one. Ours
are one resize, one padding, and per-channel arithmetic inside the network: a list that says the
same in these terms is translated exactly, any other is an error that names the step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from storage.errors import CheckpointError
from workers.images.preprocessing import Preprocessing, check_preprocessing

_NAMES = (
    "ReverseImageChannels",
    "DetectionLongestMaxSizeRescale",
    "DetectionRescale",
    "DetectionCenterPadding",
    "DetectionBottomRightPadding",
    "StandardizeImage",
    "NormalizeImage",
    "ImagePermute",
)


@dataclass(slots=True)
class _Steps:
    """What the steps so far amount to; ``y = (x * scale - mean) / std`` per channel."""

    resize_to: tuple[int, int] | None = None
    keep_aspect: bool = True
    size: tuple[int, int] | None = None
    padding: Literal["center", "bottom_right"] = "center"
    pad_value: int = 114
    reversed_channels: bool = False
    scale: float = 1.0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    permuted: bool = False


def preprocessing_of(image_processor: Any) -> Preprocessing:
    """Translate ``processing_params["image_processor"]``.

    Args:
        image_processor: plain values: {"ComposeProcessing": {"processings": [...]}} or the list
            itself; each step a name or {name: {parameters}}.

    Raises:
        CheckpointError: a step that is not known, or steps in an order that one resize, one
            padding and per-channel arithmetic cannot express.
    """
    steps = _Steps()
    for name, params in _flat(image_processor):
        try:
            _APPLY[name](steps, params)
        except (KeyError, TypeError, ValueError, ArithmeticError) as exc:
            raise CheckpointError(
                f"the checkpoint's processing step {name} is malformed: {exc!r}"
            ) from exc
    return _finished(steps)


def _flat(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the steps in order, ComposeProcessing unfolded, names as super-gradients spells
    them."""
    if isinstance(value, list | tuple):
        return [step for item in value for step in _flat(item)]
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise CheckpointError(f"the checkpoint's processing_params hold {str(value)[:80]!r}")
    ((name, params),) = value.items()
    params = params if isinstance(params, Mapping) else {}
    if _plain_name(name) == _plain_name("ComposeProcessing"):
        return _flat(params.get("processings", []))
    for known in _NAMES:
        if _plain_name(name) == _plain_name(known):
            return [(known, params)]
    raise CheckpointError(
        f"the checkpoint asks for the processing step {name!s:.60}, which labelfleet does not know",
        hint=f"known are {', '.join(_NAMES)}",
    )


def _plain_name(name: Any) -> str:
    """super-gradients finds its steps by name whatever their case and underscores."""
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def _reverse(steps: _Steps, _: Mapping[str, Any]) -> None:
    _before("ReverseImageChannels", steps.permuted, "ImagePermute")
    _before("ReverseImageChannels", steps.mean is not None, "NormalizeImage")
    steps.reversed_channels = not steps.reversed_channels


def _longest_side(steps: _Steps, params: Mapping[str, Any]) -> None:
    _resize(steps, "DetectionLongestMaxSizeRescale", _size(params), keep_aspect=True)


def _rescale(steps: _Steps, params: Mapping[str, Any]) -> None:
    if steps.keep_aspect and steps.size is None and steps.resize_to == _size(params):
        # super-gradients' datasets fit every image into their input_dim first. Stretching that to
        # the same size leaves nothing of the first step but a second interpolation.
        steps.resize_to = None
    _resize(steps, "DetectionRescale", _size(params), keep_aspect=False)
    steps.size = steps.resize_to


def _resize(steps: _Steps, name: str, to: tuple[int, int], *, keep_aspect: bool) -> None:
    if (steps.resize_to, steps.keep_aspect) == (to, keep_aspect):
        return  # resizing to the same size again changes nothing
    _before(name, steps.resize_to is not None, "another resize")
    _before(name, steps.size is not None, "padding")
    _before(name, steps.scale != 1.0 or steps.mean is not None, "normalisation")
    steps.resize_to, steps.keep_aspect = to, keep_aspect


def _center(steps: _Steps, params: Mapping[str, Any]) -> None:
    _pad(steps, "center", params)


def _bottom_right(steps: _Steps, params: Mapping[str, Any]) -> None:
    _pad(steps, "bottom_right", params)


def _pad(
    steps: _Steps, where: Literal["center", "bottom_right"], params: Mapping[str, Any]
) -> None:
    name = "padding"
    _before(name, steps.mean is not None or steps.scale != 1.0, "normalisation")
    size = _size(params)
    if steps.size == size:
        return  # already that large
    _before(name, steps.size is not None, "another padding")
    value = params["pad_value"]
    values = set(value) if isinstance(value, list | tuple) else {value}
    if len(values) != 1 or not 0 <= (only := values.pop()) <= 255 or only != int(only):
        raise ValueError(f"pad_value {value} is not one value from 0 to 255")
    steps.size, steps.padding, steps.pad_value = size, where, int(only)


def _standardize(steps: _Steps, params: Mapping[str, Any]) -> None:
    maximum = float(params.get("max_value", 255.0))
    if steps.mean is None and steps.std is None:
        steps.scale /= maximum
    elif steps.std is not None:
        steps.std = _triple([s * maximum for s in steps.std])


def _normalize(steps: _Steps, params: Mapping[str, Any]) -> None:
    _before("NormalizeImage", steps.permuted, "ImagePermute")
    _before("NormalizeImage", steps.mean is not None, "another NormalizeImage")
    steps.mean, steps.std = _triple(params["mean"]), _triple(params["std"])


def _permute(steps: _Steps, params: Mapping[str, Any]) -> None:
    _before("ImagePermute", steps.permuted, "another ImagePermute")
    if tuple(params.get("permutation", (2, 0, 1))) != (2, 0, 1):
        raise ValueError(f"permutation {params['permutation']} is not (2, 0, 1)")
    steps.permuted = True


_APPLY: dict[str, Callable[[_Steps, Mapping[str, Any]], None]] = {
    "ReverseImageChannels": _reverse,
    "DetectionLongestMaxSizeRescale": _longest_side,
    "DetectionRescale": _rescale,
    "DetectionCenterPadding": _center,
    "DetectionBottomRightPadding": _bottom_right,
    "StandardizeImage": _standardize,
    "NormalizeImage": _normalize,
    "ImagePermute": _permute,
}


def _before(name: str, violated: bool, other: str) -> None:
    if violated:
        raise CheckpointError(f"the checkpoint has its step {name} after {other}: not supported")


def _size(params: Mapping[str, Any]) -> tuple[int, int]:
    value = params["output_shape"]
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)


def _triple(values: Any) -> tuple[float, float, float]:
    a, b, c = (float(v) for v in values)
    return a, b, c


def _finished(steps: _Steps) -> Preprocessing:
    if steps.size is None:
        raise CheckpointError(
            "the checkpoint's processing leaves images of different sizes: it has no padding step"
        )
    resize_to = steps.resize_to
    if resize_to is None:
        raise CheckpointError("the checkpoint's processing has no step that resizes the image")
    found = Preprocessing(
        size=steps.size,
        resize_to=resize_to,
        keep_aspect=steps.keep_aspect,
        padding=steps.padding,
        pad_value=steps.pad_value,
        channels="BGR" if steps.reversed_channels else "RGB",
        scale=steps.scale,
        mean=steps.mean,
        std=steps.std,
    )
    try:
        check_preprocessing(found)
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"the checkpoint's processing cannot be used: {exc}") from exc
    return found
