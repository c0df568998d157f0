"""How training is expected to scale on pods: from sizes, peaks and links, all of them stated."""

from __future__ import annotations

from typing import Any, NamedTuple

from liftplace_jax.families.registry import config_parameters, count_macs
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.suites.networks import pruned, published
from liftplace_jax.suites.peaks import PEAK_FLOPS

UTILISATION = 0.3
"""Share of the peak that networks reach: assumed, nothing of this kind was measured here."""
LINK_SHARE = 0.8
"""Share of a link's stated rate that collective operations reach: assumed."""
BYTES = 4
"""Of a parameter and of its gradient: float32, whatever the computation's type."""


class Device(NamedTuple):
    """A kind of accelerator.

    Attributes:
      kind: of PEAK_FLOPS.
      link: bytes/s that one sends to those it is linked to, all links together, one way.
      network: bytes/s that one sends to others over the network, one way; None: all are linked.
      per_host: devices of a host.
      source: where the numbers are from.
    """

    kind: str
    link: float
    network: float | None
    per_host: int
    source: str


DEVICES = {
    "TPU v5e": Device(
        "TPU v5e", 200e9, None, 8,
        "cloud.google.com/tpu/docs/v5e: 400 GB/s between chips, both ways; 8 chips a host",
    ),
    "TPU v5p": Device(
        "TPU v5p", 600e9, None, 4,
        "cloud.google.com/tpu/docs/v5p: 1200 GB/s between chips, both ways; 4 chips a host",
    ),
    "H100": Device(
        "NVIDIA H100 80GB HBM3", 450e9, 50e9, 8,
        "NVIDIA DGX H100: NVLink 900 GB/s, both ways; a 400 Gb/s InfiniBand port for each GPU",
    ),
}  # fmt: skip


class Pod(NamedTuple):
    """So many devices.

    Attributes:
      device: of DEVICES.
      count: devices.
      wraps: whether the links close to rings: half of them are of use otherwise.
    """

    device: str
    count: int
    wraps: bool = True


PODS = {
    "TPU v5e-16": Pod("TPU v5e", 16, wraps=False),  # 4x4, only a whole pod wraps around
    "TPU v5e-256": Pod("TPU v5e", 256),
    "TPU v5p-128": Pod("TPU v5p", 64),  # the name counts cores, two a chip; a cube of 4x4x4
} | {f"{count} H100": Pod("H100", count) for count in (8, 16, 32, 64)}


class Row(NamedTuple):
    """A student of the paper and its published training.

    Attributes:
      student: its config.
      teacher: its teacher's.
      batch: published, global.
      steps: published.
      per_device: examples that a device is given here.
    """

    student: DenoiserConfig
    teacher: DenoiserConfig
    batch: int
    steps: int
    per_device: int


def _unet(data: str, ratio: float, batch: int, steps: int, per_device: int) -> Row:
    teacher = published("unet")[data]
    return Row(pruned(teacher, ratio=ratio), teacher, batch, steps, per_device)


def _dit(name: str) -> Row:
    dits = published("dit")
    return Row(dits[name], dits["DiT-XL/2"], 256, 500_000, 16)


def paper_rows() -> dict[str, Row]:
    """The students of the paper's tables, by name."""
    celeba = {0.5: 200_000, 0.7: 240_000, 0.9: 500_000}
    bedroom = {0.3: 200_000, 0.5: 500_000, 0.7: 700_000}
    return (
        {f"CelebA {r:g}": _unet("celeba", r, 96, steps, 16) for r, steps in celeba.items()}
        | {f"Bedroom {r:g}": _unet("bedroom", r, 8, steps, 4) for r, steps in bedroom.items()}
        | {f"DiT-D{depth}": _dit(f"DiT-D{depth}/2") for depth in (14, 7, 4)}
    )


def example_flops(row: Row) -> int:
    """Floating-point operations of a distillation step on one example, two for each MAC.

    Forward and backward pass of the student, which takes twice the forward one's; the teacher's
    forward pass.
    """
    return 2 * (3 * count_macs(row.student) + count_macs(row.teacher))


def seconds_to_gather(pod: Pod, nbytes: float) -> float:
    """Seconds until every device has `nbytes` of which each had an equal part.

    Scattering the sum of such arrays takes as long, and an all-reduce twice that. First over the
    network, each device with those of its place in other hosts, then within the host.
    """
    device = DEVICES[pod.device]
    linked = pod.count if device.network is None else min(pod.count, device.per_host)
    link = device.link * LINK_SHARE * (1 if pod.wraps else 0.5)
    seconds = nbytes * (1 - 1 / linked) / link
    if device.network is not None and pod.count > linked:
        hosts = pod.count / linked
        seconds += nbytes / linked * (1 - 1 / hosts) / (device.network * LINK_SHARE)
    return seconds


def predict(row: Row, pod: Pod) -> dict[str, Any]:
    """A step of a row on a pod.

    Returns:
      "global_batch", "compute_ms"; for "dp", the batch split, and "fsdp", parameters and optimizer
      split too: "<way>_mb" that a device sends, "<way>_ms" that takes, "<way>_efficiency", the
      compute over the step's time, and "<way>_overlapped", the same if devices send while they
      compute; "images_per_s_host", what a host must read at full efficiency; "batch_for_90",
      examples a device from which the efficiency of "dp" is 0.9 without overlap.
    """
    device = DEVICES[pod.device]
    student, teacher = (BYTES * config_parameters(c) for c in (row.student, row.teacher))
    compute = row.per_device * example_flops(row) / (PEAK_FLOPS[device.kind] * UTILISATION)
    backward = compute * 4 * count_macs(row.student) / example_flops(row)
    # All-reduce: scatter and gather. FSDP: gather teacher and student, scatter gradients.
    gathered = {"dp": 2 * student, "fsdp": 2 * student + teacher}
    hidden = {"dp": backward, "fsdp": compute}
    result = {"global_batch": row.per_device * pod.count, "compute_ms": compute * 1e3}
    for way, nbytes in gathered.items():
        seconds = seconds_to_gather(pod, nbytes)
        result |= {
            f"{way}_mb": nbytes * (1 - 1 / pod.count) / 1e6,
            f"{way}_ms": seconds * 1e3,
            f"{way}_efficiency": compute / (compute + seconds),
            f"{way}_overlapped": compute / (compute + max(0, seconds - hidden[way])),
        }
    sends = seconds_to_gather(pod, gathered["dp"])
    per_host = min(pod.count, device.per_host)
    return result | {
        "images_per_s_host": per_host * row.per_device / compute,
        "batch_for_90": 9 * sends / (compute / row.per_device),
    }


def predicted_rows() -> list[dict[str, Any]]:
    """`predict` for every student and pod."""
    return [
        {"student": name, "pod": where} | predict(row, pod)
        for name, row in paper_rows().items()
        for where, pod in PODS.items()
    ]


def run_costs() -> list[dict[str, Any]]:
    """Device-hours of every student's published training, without teacher, sending and sampling."""
    rows = []
    for name, row in paper_rows().items():
        flops = example_flops(row) * row.batch * row.steps
        hours = {
            kind: flops / (PEAK_FLOPS[device.kind] * UTILISATION) / 3600
            for kind, device in DEVICES.items()
        }
        rows.append(
            {"student": name, "batch": row.batch, "steps": row.steps, "flops": flops}
            | {f"{kind} hours": value for kind, value in hours.items()}
        )
    return rows


def assumptions() -> list[dict[str, str]]:
    """Every number that the prediction takes from outside, and where from."""
    rows = [
        ("FLOP of a step", "2 x (3 x student + teacher) MACs x examples", "suite sizes"),
        (
            "share of peak reached",
            f"{UTILISATION:.0%}",
            "assumed for computation in bfloat16, not measured",
        ),
        ("share of links reached", f"{LINK_SHARE:.0%}", "assumed, not measured"),
        ("parameters and gradients", f"{BYTES} bytes each", "float32 as trained here"),
        (
            "all-reduce",
            "2 (n - 1) / n x bytes sent by each of n devices",
            "rings; over the network each device sends its eighth of a host's gradient",
        ),
        (
            "FSDP",
            "(n - 1) / n x (2 x student + teacher)",
            "all split over all devices, gathered once a step",
        ),
        (
            "overlap",
            "gradients are sent during the student's backward pass, at best; FSDP during "
            "all of the step",
            "assumed",
        ),
    ]
    for kind, device in DEVICES.items():
        rate = f"{PEAK_FLOPS[device.kind] / 1e12:g} TFLOP/s bfloat16, {device.link / 1e9:g} GB/s"
        rate += f", {device.network / 1e9:g} GB/s over the network" if device.network else ""
        rows.append((kind, f"{rate}, each way", device.source))
    rows.append(("TPU v5e-16", "half of the links' rate", "4x4 chips: no links around"))
    rows.append(("TPU v5p-128", "64 chips of two cores", "4x4x4 chips"))
    names = ("assumption", "value", "source")
    return [dict(zip(names, row, strict=True)) for row in rows]
