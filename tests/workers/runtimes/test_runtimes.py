"""What `auto` means for runtime and precision, on every machine there is."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from storage.errors import ConfigError
from workers.runtimes.choose import PRECISIONS, choose_runtime
from workers.spec import DeviceName, PrecisionName, RuntimeName

ALL: tuple[RuntimeName, ...] = get_args(RuntimeName)


@pytest.mark.parametrize(
    ("present", "machine", "chosen"),
    [
        (ALL, "x86_64", "openvino"),
        (ALL, "AMD64", "openvino"),
        (ALL, "aarch64", "onnx"),
        (("torch", "onnx"), "x86_64", "onnx"),
        (("torch",), "x86_64", "torch"),
    ],
)
def test_auto_on_a_cpu(present: tuple[RuntimeName, ...], machine: str, chosen: str) -> None:
    found = choose_runtime("auto", "auto", "cpu", present=present, machine=machine)
    assert found == (chosen, "fp32")


def test_auto_on_a_gpu_is_torch_in_fp16() -> None:
    assert choose_runtime("auto", "auto", "cuda", present=ALL) == ("torch", "fp16")


def test_int8_chooses_who_does_it() -> None:
    assert choose_runtime("auto", "int8", "cpu", present=ALL, machine="x86_64")[0] == "openvino"
    assert choose_runtime("auto", "int8", "cuda", present=ALL)[0] == "tensorrt"
    assert choose_runtime("auto", "int8", "cpu", present=("torch", "onnx"))[0] == "onnx"
    with pytest.raises(ConfigError, match="openvino is not installed") as caught:
        choose_runtime("openvino", "int8", "cpu", present=("torch", "onnx"))
    assert "labelfleet[openvino]" in str(caught.value.hint)


def test_every_choice_is_possible_or_refused_in_words() -> None:
    names: tuple[Any, ...] = ("auto", *ALL)
    precisions: tuple[Any, ...] = ("auto", *get_args(PrecisionName))
    possible, messages = 0, list[str]()
    for runtime, precision, device in itertools.product(names, precisions, get_args(DeviceName)):
        try:
            found = choose_runtime(runtime, precision, device, present=ALL)
        except ConfigError as refused:
            messages.append(refused.message)
            continue
        possible += 1
        assert found[1] in PRECISIONS[found[0], device]
        assert runtime in ("auto", found[0])
        assert precision in ("auto", found[1])
    assert possible > 20
    assert all(message.startswith("model.") for message in messages)


_WORKER = """
import sys
import workers.runtimes.choose, workers.runtimes.openvino_session
import workers.runtimes.onnx_session, workers.labelling.labeller
workers.runtimes.openvino_session.import_openvino()
workers.runtimes.onnx_session.import_onnxruntime()
heavy = {"torch", "super_gradients", "nncf", "matplotlib", "faster_coco_eval"} & set(sys.modules)
assert not heavy, heavy
assert not [m for m, v in sys.modules.items() if m.startswith("openvino_telemetry") and v]
print("done")
"""


@pytest.mark.slow
def test_a_worker_without_torch_imports_none_of_it(tmp_path: Path) -> None:
    """Start-up stays short, and OpenVINO loads without its usage statistics."""
    done = subprocess.run(
        [sys.executable, "-c", _WORKER],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
        env={"HOME": str(tmp_path), "PATH": ""},
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert list(tmp_path.iterdir()) == []
