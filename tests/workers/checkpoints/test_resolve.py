"""What real checkpoints carry is read, and agreed with the config or refused naming both."""

from __future__ import annotations

import json
import sys
import types
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from storage.errors import CheckpointError, ConfigError, StorageFull
from storage.objects.protocols import StorageOptions
from tests.support.samples.checkpoint_samples import NAMES, saved, weights
from workers.checkpoints.description import Description, canonical_arch
from workers.checkpoints.file import Checkpoint, read_checkpoint, save_checkpoint
from workers.checkpoints.processing import preprocessing_of
from workers.images.preprocessing import Preprocessing
from workers.models.resolve import coco_preprocessing, resolve_model
from workers.spec import ModelRequest, ModelSpec

ARCH = canonical_arch({"backbone": {}, "neck": {}, "heads": {"NDFLHeads": {"reg_max": 16}}})
BOTTOM_RIGHT = Preprocessing(size=(320, 320), resize_to=(320, 320), padding="bottom_right")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


def trainer_state(**params: Any) -> dict[str, Any]:
    """The dict super-gradients' Trainer saves."""
    return {
        "net": OrderedDict(weights(seed=1)),
        "ema_net": OrderedDict(weights(seed=2)),
        "acc": np.float32(0.5),
        "epoch": 3,
        "metrics": {"valid": {"mAP": np.float64(0.4)}, "best": defaultdict(list, {"a": [1]})},
        "packages": OmegaConf.create({"torch": "2.0", "nested": {"list": [1, 2]}}),
        "optimizer_state_dict": {
            "state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(4.0)}},
            "param_groups": [{"lr": np.float64(0.1), "betas": (0.9, 0.99)}],
        },
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "processing_params": {
            "class_names": OmegaConf.create(list(NAMES)),
            "image_processor": {
                "ComposeProcessing": {
                    "processings": [
                        "ReverseImageChannels",
                        {
                            "DetectionLongestMaxSizeRescale": {
                                "output_shape": OmegaConf.create([320, 320])
                            }
                        },
                        {
                            "DetectionBottomRightPadding": {
                                "output_shape": (320, 320),
                                "pad_value": 114,
                            }
                        },
                        {"ImagePermute": {"permutation": (2, 0, 1)}},
                        {"StandardizeImage": {"max_value": np.float64(255.0)}},
                    ]
                }
            },
            "iou": np.float64(0.65),
            "conf": 0.5,
            **params,
        },
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_trainers_checkpoint(tmp_path: Path, legacy: bool) -> None:
    path = saved(tmp_path / "ckpt_best.pth", trainer_state(), legacy=legacy)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)  # why this reader exists
    checkpoint = read_checkpoint(path)
    assert checkpoint.classes == NAMES
    assert checkpoint.num_classes == 3
    assert checkpoint.nms_iou == 0.65
    assert checkpoint.preprocessing == Preprocessing(
        size=(320, 320), resize_to=(320, 320), padding="bottom_right", channels="BGR"
    )
    assert same(checkpoint.load_state_dict(), weights(seed=2))  # the EMA's, as models.get does


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "package",
    [
        lambda w: {"net": w},
        lambda w: {"net": weights(seed=9), "ema_net": w},
        lambda w: w,
        lambda w: OrderedDict(w),
        lambda w: {"net": {f"module.{k}": v for k, v in w.items()}},
        lambda w: {"state_dict": w},
        lambda w: {k: torch.nn.Parameter(v) for k, v in w.items()},
        lambda w: {k: v.permute(*range(v.ndim)[::-1]).contiguous().permute(*range(v.ndim)[::-1])
                   for k, v in w.items()},
    ],
    ids=["net", "ema", "raw", "ordered", "module", "state_dict", "parameters", "strided"],
)  # fmt: skip
def test_packagings(tmp_path: Path, package: Any, legacy: bool, suffix: str) -> None:
    path = saved(tmp_path / f"c{suffix}", package(weights()), legacy=legacy)
    checkpoint = read_checkpoint(path)
    assert checkpoint.num_classes == 3
    assert checkpoint.classes is None
    assert same(checkpoint.load_state_dict(), weights())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_shared_storages(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in weights().items()}
    flat = torch.cat([v.flatten() for v in state.values()])
    views, start = {}, 0
    for name, w in state.items():
        views[name] = flat[start : start + w.numel()].view(w.shape)
        start += w.numel()
    for content in (state, views):
        loaded = read_checkpoint(saved(tmp_path / "c.pth", content)).load_state_dict()
        assert same(loaded, state)
        assert all(t.is_contiguous() for t in loaded.values())


def test_a_full_disk_under_our_own_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / ".best.safetensors.part").symlink_to("/dev/full")
    said = Description(
        name="yolo_nas_m",
        arch_params=ARCH,
        classes=NAMES,
        preprocessing=BOTTOM_RIGHT,
        licence="CC0-1.0",
        training={},
    )
    with pytest.raises(StorageFull, match=r"no space left for .*best\.safetensors"):
        save_checkpoint(tmp_path / "best.safetensors", weights(), said)


def test_our_own_checkpoint_describes_itself(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_checkpoint(
        path,
        weights(),
        Description(
            name="yolo_nas_m",
            arch_params=ARCH,
            classes=NAMES,
            preprocessing=BOTTOM_RIGHT,
            licence="CC0-1.0",
            training={"steps": 1500, "map": 0.5},
        ),
    )
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]
    found = read_checkpoint(path)
    assert (found.name, found.arch_params, found.classes) == ("yolo_nas_m", ARCH, NAMES)
    assert found.preprocessing == BOTTOM_RIGHT
    assert (found.licence, found.training) == ("CC0-1.0", {"steps": 1500, "map": 0.5})
    assert same(found.load_state_dict(), weights())
    spec = resolved(path)
    assert (spec.name, spec.arch_params, spec.classes) == ("yolo_nas_m", ARCH, NAMES)
    assert (spec.preprocessing, spec.licence) == (BOTTOM_RIGHT, "CC0-1.0")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"classes": [1, 2, 3]},
        {"classes": ["a", "b"]},
        {"classes": ["a", "b", "a"]},
        {"preprocessing": {"size": [10**9, 10**9], "resize_to": [4, 4]}},
        {"preprocessing": {"size": [32, 32], "resize_to": [64, 64]}},
        {"preprocessing": {"size": [32, 32], "resize_to": [32, 32], "scale": -1}},
        {"preprocessing": {"size": [32, 32], "resize_to": [32, 32], "std": [0, 1, 1]}},
        {"preprocessing": {"size": [32, 32], "resize_to": [32, 32], "padding": "left"}},
        {"preprocessing": {"size": "xy", "resize_to": [32, 32]}},
        {"preprocessing": {"surprise": 1}},
        {"preprocessing": None},
        {"arch_params": [1]},
        {"name": 3},
        {"licence": ["x"]},
        {"training": 3},
    ],
)
def test_descriptions_that_make_no_sense(tmp_path: Path, change: dict[str, Any]) -> None:
    said = {
        "format": 1,
        "classes": list(NAMES),
        "preprocessing": {"size": [320, 320], "resize_to": [320, 320]},
    }
    path = tmp_path / "own.safetensors"
    save_file(weights(), path, metadata={"labelfleet": json.dumps(said)})
    assert read_checkpoint(path).classes == NAMES
    save_file(weights(), path, metadata={"labelfleet": json.dumps(said | change)})
    with pytest.raises(CheckpointError, match=r"own\.safetensors"):
        read_checkpoint(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    state = weights()
    state["heads.head2.cls_pred.weight"][0, 0] = value
    for path in (saved(tmp_path / "c.pth", state), tmp_path / "c.safetensors"):
        save_file(state, tmp_path / "c.safetensors")
        with pytest.raises(CheckpointError, match=r"head2\.cls_pred\.weight .* not finite"):
            read_checkpoint(path).load_state_dict()


def test_what_is_not_a_detector(tmp_path: Path) -> None:
    cases: dict[str, Any] = {
        "no weights": {"epoch": 3},
        "not a YOLO-NAS": {"fc.weight": torch.ones(3)},
        "disagree": {**weights(), "heads.head3.cls_pred.weight": torch.ones(5, 32, 1, 1)},
        "not floating": {k: v.int() for k, v in weights().items()},
        "no dict": torch.nn.Linear(2, 2),
    }
    for message, content in cases.items():
        path = saved(tmp_path / "c.pth", content)
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path).load_state_dict()


# config and checkpoint


def resolved(path: Path, **asked: Any) -> ModelSpec:
    return resolve_model(
        ModelRequest(checkpoint=str(path), **asked), StorageOptions(), device="cpu"
    )


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Weights that say nothing about themselves."""
    return saved(tmp_path / "plain.pth", {"net": weights()})


@pytest.fixture
def arch(tmp_path: Path) -> str:
    path = tmp_path / "arch.yaml"
    path.write_text(
        "num_classes: 80\nheads: {NDFLHeads: {num_classes: 80, reg_max: 16}}\n"
        "backbone: {}\nneck: {}\n"
    )
    return str(path)


def test_the_config_alone(plain: Path, arch: str) -> None:
    spec = resolved(plain, classes=NAMES, arch=arch)
    assert spec.name == "yolo_nas_s"
    assert spec.arch_params == ARCH
    assert spec.preprocessing == Preprocessing()  # predict()'s, with the COCO weights
    assert (spec.nms_iou, spec.precision, spec.keep) == (0.7, "fp32", (0, 1, 2))
    assert spec.sha256 == read_checkpoint(plain).sha256
    wide = resolved(plain, classes=NAMES, arch=arch, image_size=(256, 320)).preprocessing
    assert wide == coco_preprocessing((256, 320))
    assert (wide.size, wide.resize_to) == ((256, 320), (252, 316))


def test_keep(plain: Path, arch: str) -> None:
    assert resolved(plain, classes=NAMES, arch=arch, keep=("Platelets", "RBC")).keep == (0, 2)
    with pytest.raises(ConfigError) as caught:
        resolved(plain, classes=NAMES, arch=arch, keep=("Platelet",))
    assert caught.value.hint == "did you mean Platelets?"


@pytest.mark.parametrize(
    ("asked", "both"),
    [
        ({"classes": ("a", "b")}, ["a, b", "3 classes", "RBC, WBC, Platelets"]),
        ({"classes": ("WBC", "RBC", "Platelets")}, ["WBC, RBC", "RBC, WBC, Platelets"]),
        ({"image_size": (640, 640)}, ["640 × 640", "320 × 320"]),
    ],
)
def test_conflicts_name_both(
    tmp_path: Path, arch: str, asked: dict[str, Any], both: list[str]
) -> None:
    path = saved(tmp_path / "trained.pth", trainer_state())
    assert resolved(path, arch=arch, classes=NAMES, image_size=(320, 320)).classes == NAMES
    with pytest.raises(ConfigError) as caught:
        resolved(path, arch=arch, **asked)
    for text in (*both, "trained.pth"):
        assert text in caught.value.message


def test_conflicting_architectures(tmp_path: Path, arch: str) -> None:
    path = tmp_path / "own.safetensors"
    said: dict[str, Any] = {"classes": NAMES, "preprocessing": BOTTOM_RIGHT, "licence": None}
    save_checkpoint(
        path, weights(), Description(name="yolo_nas_m", arch_params=ARCH, training={}, **said)
    )
    assert resolved(path, arch=arch, name="yolo_nas_m").arch_params == ARCH
    with pytest.raises(ConfigError, match=r"model\.name: .*yolo_nas_l.*own.*yolo_nas_m"):
        resolved(path, name="yolo_nas_l")
    Path(arch).write_text("backbone: {x: 1}\nneck: {}\nheads: {}\n")
    with pytest.raises(ConfigError, match=r"model\.arch"):
        resolved(path, arch=arch)


def test_what_is_missing_in_both(plain: Path, arch: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.classes is missing.*3 classes"):
        resolved(plain, arch=arch)
    with pytest.raises(ConfigError, match=r"model\.arch is missing"):
        resolved(plain, classes=NAMES)
    with pytest.raises(ConfigError, match="multiples of 32"):
        resolved(plain, classes=NAMES, arch=arch, image_size=(300, 320))


def test_unscaled_weights_are_told_apart(tmp_path: Path) -> None:
    heads = {
        f"heads.head{i}.cls_pred.weight": torch.zeros(3, c, 1, 1)
        for i, c in ((1, 96), (2, 192), (3, 384))
    }
    path = saved(tmp_path / "m.pth", heads)
    assert resolved(path, classes=NAMES).name == "yolo_nas_m"
    with pytest.raises(ConfigError, match=r"yolo_nas_s, and the weights in m\.pth are yolo_nas_m"):
        resolved(path, classes=NAMES, name="yolo_nas_s")


@pytest.mark.parametrize(
    "text", ["[1, 2]", "a: [", "hello", "", "!!python/object/apply:os.system [ls]"]
)
def test_arch_files_that_are_none(plain: Path, arch: str, text: str) -> None:
    Path(arch).write_text(text)
    with pytest.raises(ConfigError, match=r"model\.arch"):
        resolved(plain, classes=NAMES, arch=arch)
    with pytest.raises(ConfigError, match="there is nothing at"):
        resolved(plain, classes=NAMES, arch=arch + "x")


# super-gradients' processing steps

LONGEST = {"DetectionLongestMaxSizeRescale": {"output_shape": (636, 636)}}
CENTER = {"DetectionCenterPadding": {"output_shape": (640, 640), "pad_value": 114}}
COLOURED = {"DetectionCenterPadding": {"output_shape": (640, 640), "pad_value": (1, 2, 3)}}
SCALE = {"StandardizeImage": {"max_value": 255.0}}
NORMALIZE = {"NormalizeImage": {"mean": [1, 2, 3], "std": [4, 5, 6]}}


def test_the_coco_pipeline_is_the_default() -> None:
    assert preprocessing_of([LONGEST, CENTER, SCALE, "ImagePermute"]) == Preprocessing()


def test_steps_that_undo_or_repeat_each_other() -> None:
    reverse, again = "ReverseImageChannels", "reverse_image_channels"
    steps = [reverse, LONGEST, LONGEST, again, CENTER, CENTER, SCALE]
    assert preprocessing_of({"ComposeProcessing": {"processings": steps}}) == Preprocessing()


def test_normalisation_in_either_order() -> None:
    first = preprocessing_of([LONGEST, CENTER, SCALE, NORMALIZE])
    assert (first.scale, first.mean, first.std) == (1 / 255, (1, 2, 3), (4, 5, 6))
    second = preprocessing_of([LONGEST, CENTER, NORMALIZE, SCALE])
    assert (second.scale, second.mean) == (1.0, (1, 2, 3))
    assert second.std == (4 * 255, 5 * 255, 6 * 255)


def test_stretching_what_a_dataset_fitted_before() -> None:
    fitted = {"DetectionLongestMaxSizeRescale": {"output_shape": [64, 96]}}
    stretched = {"DetectionRescale": {"output_shape": (64, 96)}}
    found = preprocessing_of([fitted, stretched, SCALE])
    assert found == Preprocessing(size=(64, 96), resize_to=(64, 96), keep_aspect=False)


def test_stretching() -> None:
    found = preprocessing_of([{"DetectionRescale": {"output_shape": (320, 640)}}, SCALE])
    assert (found.size, found.resize_to, found.keep_aspect) == ((320, 640), (320, 640), False)


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        (["KeypointsRescale"], "KeypointsRescale"),
        ([LONGEST, {"DetectionAutoPadding": {"shape_multiple": (32, 32)}}], "DetectionAutoPadding"),
        ([LONGEST], "no padding"),
        ([CENTER], "resizes"),
        ([LONGEST, {"DetectionLongestMaxSizeRescale": {"output_shape": (640, 640)}}], "Longest"),
        ([CENTER, LONGEST], "Longest"),
        ([SCALE, LONGEST, CENTER], "Longest"),
        ([LONGEST, SCALE, CENTER], "padding"),
        ([LONGEST, CENTER, "ImagePermute", "ImagePermute"], "ImagePermute"),
        ([LONGEST, CENTER, {"ImagePermute": {"permutation": (0, 1, 2)}}], "ImagePermute"),
        ([LONGEST, CENTER, NORMALIZE, "ReverseImageChannels"], "ReverseImageChannels"),
        ([LONGEST, CENTER, {"StandardizeImage": {"max_value": 0}}], "StandardizeImage"),
        ([LONGEST, COLOURED], "Center"),
        ([{"DetectionLongestMaxSizeRescale": {"output_shape": "big"}}], "Longest"),
        ([{"DetectionLongestMaxSizeRescale": {}}], "Longest"),
        ([{"a": 1, "b": 2}], "processing_params"),
        ([3], "processing_params"),
    ],
)
def test_steps_that_cannot_be_kept_are_named(steps: list[Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        preprocessing_of(steps)


def test_pickled_processing_objects(tmp_path: Path) -> None:
    """Some save the objects and not the names of the steps."""
    module = types.ModuleType("super_gradients.training.processing.processing")

    def object_of(name: str, **attributes: Any) -> Any:
        kind = type(name, (), {"__module__": module.__name__})
        setattr(module, name, kind)
        made = kind()
        made.__dict__.update(attributes)
        return made

    steps = [
        object_of("DetectionLongestMaxSizeRescale", output_shape=(636, 636)),
        object_of("DetectionCenterPadding", output_shape=(640, 640), pad_value=114),
        object_of("StandardizeImage", max_value=255.0),
        object_of(
            "NormalizeImage",
            mean=np.array([1, 2, 3], np.float32).reshape(1, 1, 3),
            std=np.array([4, 5, 6], np.float32).reshape(1, 1, 3),
        ),
    ]
    params = {"image_processor": object_of("ComposeProcessing", processings=steps)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "super_gradients", module)  # or pickle would import it
        patch.setitem(sys.modules, module.__name__, module)
        path = saved(tmp_path / "c.pth", {"net": weights(), "processing_params": params})
    found: Checkpoint = read_checkpoint(path)
    assert found.preprocessing == Preprocessing(mean=(1, 2, 3), std=(4, 5, 6))


# how networks are wrapped, and class names told


@pytest.mark.parametrize("suffix", [".ckpt", ".pth.tar", ".pth"])
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda w: {"net": {f"_orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {"net": {f"module._orig_mod.{k}": v for k, v in w.items()}},
        lambda w: {"net": {k.replace(".", "._orig_mod.", 1): v for k, v in w.items()}},
        lambda w: {"model": w},
        lambda w: {
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {
                **{f"model.{k}": v for k, v in w.items()},
                "loss.proj_conv": torch.ones(3),
            },
        },
        lambda w: {
            "state_dict": {
                **{f"model.{k}": v + 1 for k, v in w.items()},
                **{f"model_ema.module.{k}": v for k, v in w.items()},
            }
        },
    ],
    ids=["compiled", "ddp and compiled", "parts compiled", "model", "lightning", "lightning ema"],
)
def test_wrapped_networks(tmp_path: Path, wrapped: Any, suffix: str) -> None:
    checkpoint = read_checkpoint(saved(tmp_path / f"c{suffix}", wrapped(weights())))
    assert same(checkpoint.load_state_dict(), weights())
    assert set(checkpoint.shapes) == set(weights())


def test_wrapped_names_in_safetensors(tmp_path: Path) -> None:
    save_file({f"model.{k}": v for k, v in weights().items()}, tmp_path / "c.safetensors")
    assert same(read_checkpoint(tmp_path / "c.safetensors").load_state_dict(), weights())


def test_two_networks_in_one_file_are_named(tmp_path: Path) -> None:
    both = {f"{part}.{k}": v for part in ("student", "teacher") for k, v in weights().items()}
    path = saved(tmp_path / "c.ckpt", {"state_dict": both})
    with pytest.raises(CheckpointError, match=r"several networks: student\., teacher\."):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "names",
    [
        [np.str_(name) for name in NAMES],
        np.array(NAMES),
        np.array(NAMES, object),
        {0: "RBC", 1: "WBC", 2: "Platelets"},
        {np.int64(2): "Platelets", np.int64(1): "WBC", np.int64(0): "RBC"},
        {"0": "RBC", "1": "WBC", "2": "Platelets"},
        {"Platelets": 2, "RBC": 0, "WBC": 1},
        OmegaConf.create({0: "RBC", 1: "WBC", 2: "Platelets"}),
    ],
    ids=["np.str_", "array", "objects", "dict", "np keys", "text keys", "inverse", "omegaconf"],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_class_names_of_any_kind(tmp_path: Path, names: Any, legacy: bool) -> None:
    state = trainer_state(class_names=names)
    assert read_checkpoint(saved(tmp_path / "c.pth", state, legacy=legacy)).classes == NAMES


@pytest.mark.parametrize("names", [{0: "a", 2: "b", 3: "c"}, {0: "a", 1: "b", 2: 3}])
def test_class_names_that_are_not_numbered(tmp_path: Path, names: Any) -> None:
    path = saved(tmp_path / "c.pth", trainer_state(class_names=names))
    with pytest.raises(CheckpointError, match="processing_params: classes are"):
        read_checkpoint(path)


def test_names_beyond_latin(tmp_path: Path) -> None:
    names = [np.str_("Blutkörperchen"), np.str_("细胞"), np.str_("🩸")]
    path = saved(tmp_path / "c.pth", trainer_state(class_names=names))
    assert read_checkpoint(path).classes == ("Blutkörperchen", "细胞", "🩸")


# what was assumed is said, and can be stated


def test_an_assumed_preprocessing_is_said(plain: Path, arch: str) -> None:
    (remark,) = resolved(plain, classes=NAMES, arch=arch).remarks
    assert remark.startswith("plain.pth does not say how its training images were prepared")
    assert "RGB, fitted into 636 × 636, padded around the centre to 640 × 640 with 114" in remark
    stated = resolved(plain, classes=NAMES, arch=arch, preprocessing=BOTTOM_RIGHT)
    assert (stated.preprocessing, stated.remarks) == (BOTTOM_RIGHT, ())


def test_a_stated_preprocessing_that_differs_is_used_and_said(tmp_path: Path, arch: str) -> None:
    path = saved(tmp_path / "trained.pth", trainer_state())
    spec = resolved(path, arch=arch, preprocessing=BOTTOM_RIGHT)
    assert spec.preprocessing == BOTTOM_RIGHT
    assert "is used instead of what trained.pth says (BGR" in spec.remarks[0]
    with pytest.raises(ConfigError, match=r"image_size says 64 × 64.*size 320 × 320"):
        resolved(path, arch=arch, preprocessing=BOTTOM_RIGHT, image_size=(64, 64))


def test_our_own_checkpoint_at_another_size(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    trained = coco_preprocessing((320, 384))
    said: dict[str, Any] = {"classes": NAMES, "preprocessing": trained, "licence": None}
    save_checkpoint(
        path,
        weights(),
        Description(
            name="yolo_nas_s",
            arch_params=ARCH,
            training={"step": 3},
            official_ids=(7, 3, 90),
            **said,
        ),
    )
    assert resolved(path).preprocessing == trained
    other = resolved(path, image_size=(640, 640))
    assert other.preprocessing == coco_preprocessing((640, 640))
    assert "trained with 320 × 384 and runs at 640 × 640" in other.remarks[0]
    assert other.official_ids == (7, 3, 90)
