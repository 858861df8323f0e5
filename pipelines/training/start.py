"""Prepare a training: a network that fits into memory, a device, the options of the loop."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipelines.training.config import TrainConfig
from storage.errors import CheckpointError, ConfigError
from workers.checkpoints.cache import fetch_checkpoint
from workers.checkpoints.file import Checkpoint, read_checkpoint
from workers.checkpoints.provenance import ancestor
from workers.models.resolve import read_arch
from workers.training.batches import BatchSource
from workers.training.distributed import Team
from workers.training.int8.form import AsBuilt, AsInt8, Form
from workers.training.options import FitOptions, LrFactors, TrainPrecision
from workers.training.recipe.augmentation import Augmentation
from workers.training.samples import Samples
from workers.yolo_nas.network import build_network

# Bytes a weight: the weight and its average, fp32; its gradient and AdamW's two moments.
_KEPT, _LEARNED = 8, 12
_RANGE_IMAGES = 64
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The values that ``auto`` resolved to."""

    device: Literal["cpu", "cuda"]
    precision: TrainPrecision
    threads: int


def fit_options(config: TrainConfig, machine: Machine, images: int) -> FitOptions:
    """Return the loop's options for a training set of ``images`` images."""
    steps = config.steps_for(images)
    return FitOptions(
        steps=steps,
        lr=config.lr,
        warmup_steps=min(config.warmup_steps, steps),
        weight_decay=config.weight_decay,
        ema_decay=config.ema_decay,
        early_stop=config.early_stop,
        eval_every=config.eval_every or max(1, -(-steps // 10)),
        precision=machine.precision,
        device=machine.device,
        lr_factors=LrFactors(**config.lr_factors.model_dump()),
        freeze=config.freeze,
        clip_norm=config.clip_norm,
        accumulate=config.accumulate,
        channels_last=_channels_last(config, machine),
        compile=config.compile,
    )


def form_of(config: TrainConfig, first: nn.Module, training: Samples) -> Form:
    """Return the form in which ``first`` learns.

    The ranges of INT8's activations are found on the first images of ``training``, unvaried.
    """
    size = config.preprocessing.size
    if config.int8 is None:
        return AsBuilt(first, size)
    plain = BatchSource(
        training, config.preprocessing, Augmentation.none(), config.batch_size, config.seed
    )
    batches = -(-min(_RANGE_IMAGES, len(training)) // config.batch_size)
    return AsInt8(
        first, size, config.int8, (plain.batch(number).images for number in range(batches))
    )


def augmentations(config: TrainConfig) -> tuple[Augmentation, Augmentation]:
    """Return how images are varied that people labelled, and those that a model labelled."""
    fields = config.augment.model_dump(exclude={"pseudo", "close_mosaic"})
    differing = config.augment.pseudo.model_dump(exclude_none=True)
    return Augmentation(**fields), Augmentation(**{**fields, **differing})


def _channels_last(config: TrainConfig, machine: Machine) -> bool:
    """Return the memory layout; on a CPU torch 2.13's backward corrupts memory in channels_last."""
    if machine.device == "cpu":
        return False
    if config.channels_last == "auto":
        return machine.precision != "fp32"
    return config.channels_last


def first_network(config: TrainConfig, classes: tuple[str, ...]) -> nn.Module:
    """Random weights from the seed, or those of ``model.checkpoint``."""
    torch.manual_seed(config.seed)
    network = build_network(config.model.name, arch_params_of(config), len(classes))
    if config.model.checkpoint is not None:
        path = fetch_checkpoint(config.model.checkpoint, config.storage.options(), sha256=None)
        start_from(network, read_checkpoint(path))
    return network


def start_from(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights; class outputs stay as they are where their number differs.

    Raises:
        CheckpointError: anything else differs.
    """
    wanted, state = network.state_dict(), checkpoint.load_state_dict()
    for key, own in wanted.items():
        of_classes = ".cls_pred." in key and key in state and state[key].shape != own.shape
        if of_classes or key.endswith("num_batches_tracked"):
            state[key] = own
    differing = [k for k in wanted.keys() | state.keys() if not _alike(k, wanted, state)]
    if differing:
        raise CheckpointError(
            f"{checkpoint.path.name} does not fit the network: {len(differing)} weights differ, "
            f"such as {min(differing)}",
            hint="check model.name and model.arch",
        )
    network.load_state_dict(state)


def _alike(key: str, a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return key in a and key in b and a[key].shape == b[key].shape


def arch_params_of(config: TrainConfig) -> str | None:
    """Return the arch file's parameters, else the checkpoint's; None: plain ``model.name``."""
    if config.model.arch is not None:
        return read_arch(config.model.arch, config.storage.options())
    if config.model.checkpoint is not None:
        path = fetch_checkpoint(config.model.checkpoint, config.storage.options(), sha256=None)
        return read_checkpoint(path).arch_params
    return None


def provenance_of(
    config: TrainConfig,
    sources: Sequence[Mapping[str, Any]] = (),
    *,
    first_weights: str | None = None,
) -> dict[str, Any] | None:
    """Return the models that a training's weights come from, for its checkpoint; None: none.

    Args:
        config: says which they are.
        sources: what is learned, as ``TrainData`` has it; the model that made a label version is
            an ancestor too.
        first_weights: where the checkpoint that it starts from is to be found later; None: where
            the config says.
    """
    learned_from = {
        "first weights": config.model.checkpoint,
        "teacher": config.distill.teacher if config.distill else None,
    }
    places = {"first weights": first_weights} if first_weights else {}
    options = config.storage.options()
    found = [
        ancestor(
            role,
            places.get(role, url),
            read_checkpoint(fetch_checkpoint(url, options, sha256=None)),
        )
        for role, url in learned_from.items()
        if url is not None
    ]
    found += [
        {
            "role": "labels",
            "checkpoint": str(source["source"]),
            "sha256": source["model_sha256"],
            "licence": source["licence"],
            "ancestors": [],
        }
        for source in sources
        if "model_sha256" in source
    ]
    return {"ancestors": found} if found else None


def resolve_machine(config: TrainConfig) -> Machine:
    """Device, precision and threads of this process."""
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ConfigError("device: cuda, but torch sees no CUDA device", hint="use device: auto")
    device: Literal["cpu", "cuda"] = "cuda" if cuda and config.device != "cpu" else "cpu"
    precision = config.precision
    if precision == "fp16" and device == "cpu":
        raise ConfigError(
            "precision: fp16 needs CUDA, and this training runs on the CPU",
            hint="use precision: auto",
        )
    if config.channels_last is True and device == "cpu":
        raise ConfigError(
            "channels_last: true needs CUDA, and this training runs on the CPU",
            hint="use channels_last: auto",
        )
    if precision == "auto":
        # Of several processes the first decides: a step has one precision.
        fast = Team.joined().agree(float(fast_bf16(device)))
        precision = "bf16" if fast else "fp32"
    return Machine(device, precision, config.threads or _cores())


def _cores() -> int:
    """Cores this process may use, where the system says."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def fast_bf16(device: Literal["cpu", "cuda"]) -> bool:
    """Return whether the device computes in bf16 without emulating it."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def machine_facts(machine: Machine) -> dict[str, str]:
    """Return what a summary says about where it was trained."""
    name = platform.processor() or platform.machine()
    if machine.device == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": f"{machine.device} ({name})",
        "precision": machine.precision,
        "threads": str(machine.threads),
        "torch": torch.__version__,
    }


def check_fits(
    config: TrainConfig, device: Literal["cpu", "cuda"], *, memory: int | None = None
) -> None:
    """Refuse a scaled network whose weights alone, as training keeps them, exceed the memory.

    What the images need comes on top and shows at the first step. The plain S, M and L need at
    most 1.4 GB and are not looked at.

    Args:
        memory: bytes of the device; None: as it says.

    Raises:
        ConfigError: it does not fit, or `model.arch` cannot be read or built.
    """
    if config.model.arch is None:
        return
    weights = _weights_of(config.model.name, read_arch(config.model.arch, config.storage.options()))
    needed = weights * (_KEPT if config.freeze == "backbone" else _KEPT + _LEARNED)
    there = memory if memory is not None else _memory_of(device)
    if needed > there:
        raise ConfigError(
            f"model.arch makes a network of {weights:,} weights: to train it takes at least "
            f"{needed / 1e9:,.1f} GB, and {'the GPU' if device == 'cuda' else 'this machine'} has "
            f"{there / 1e9:,.1f} GB",
            hint=f"scale {config.model.arch} down",
        )


@functools.cache
def _weights_of(name: str, arch_params: str) -> int:
    with torch.device("meta"):  # shapes without memory
        network = build_network(name, arch_params, 1)
    return sum(weight.numel() for weight in network.parameters())


def _memory_of(device: Literal["cpu", "cuda"]) -> int:
    """Return the bytes of memory that this process can have at most."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *_container_limits()])


def _container_limits() -> Iterator[int]:
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # absent, or `max`
            yield int(path.read_text())
