"""Suite "loading": the memory of the host, and the time, that it takes to load a teacher.

    python -m liftplace_jax.suites.loading FOLDER CASE

is a case in a process of its own, which prints a line of JSON.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tqdm

from liftplace_jax.suites.options import Options, Result

DEVICES = 8  # simulated ones
XL = {"hidden_size": 1152, "depth": 28, "num_heads": 16}  # of DiT-XL/2
QUICK = {"hidden_size": 128, "depth": 12, "num_heads": 4}
RULES = ((r"kernel|embedding", ("fsdp",)),)
_GIGA = 1e9


def run(options: Options) -> Result:
    """Loads DiT-XL/2 (quick: a small DiT) with random weights, and for comparison the mere file."""
    from liftplace_jax import weights
    from liftplace_jax.families.registry import config_from_dict
    from liftplace_jax.nn import building

    sizes = QUICK if options.quick else XL
    latents = dict(model="dit", image_size=32, patch_size=2, in_channels=4, num_classes=1000)
    config = config_from_dict({**latents, **sizes}, partial=True)
    with tempfile.TemporaryDirectory() as folder:
        weights.save_model(folder, config.described(), building.create(config)[1])
        rows = [_measured(folder, case) for case in tqdm.tqdm(CASES, unit="case")]
    for row in rows:
        row["over_size"] = row["host_gb"] / row["size_gb"]
        row["over_plain"] = row["seconds"] / rows[0]["seconds"]
    return {
        "title": "Loading a teacher",
        "columns": ["case", "size_gb", "host_gb", "over_size", "seconds", "over_plain"],
        "formats": {
            "size_gb": ".3f",
            "host_gb": ".3f",
            "over_size": ".2f",
            "seconds": ".1f",
            "over_plain": ".2f",
        },
        "rows": rows,
        "notes": [
            f"A DiT of {sizes['depth']} blocks of width {sizes['hidden_size']}, float32, in a "
            "folder of ours; each case in a process of its own, the file in the system's cache.",
            "host_gb: the most memory that the process had of its own while loading, without what "
            "it had before and without the arrays on the devices, which on accelerators are "
            "elsewhere. Pages of the mapped file are the system's cache and not counted.",
            "plain: all tensors as NumPy arrays by safetensors alone. checkpoint: what "
            "config.teacher.checkpoint does with published weights, once: read, checked, written "
            "as the teacher.",
        ],
    }


def _measured(folder: str, case: str) -> dict[str, Any]:
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    command = [sys.executable, "-m", "liftplace_jax.suites.loading", folder, case]
    found = subprocess.run(command, env=environment, text=True, capture_output=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {found.stderr.strip()[-2000:]}")
    return {"case": case} | json.loads(found.stdout)


def _plain(folder: Path) -> Any:
    from safetensors.numpy import load_file

    load_file(folder / "model.safetensors")
    return ()


def _one_device(folder: Path) -> Any:
    from liftplace_jax.families.loading import load_network

    return load_network(folder).params


def _split(folder: Path) -> Any:
    from liftplace_jax.families.loading import load_network
    from liftplace_jax.host import sharding

    mesh = sharding.make_mesh({"data": 1, "fsdp": DEVICES})
    shardings = functools.partial(sharding.tree_shardings, rules=RULES, mesh=mesh)
    return load_network(folder, shardings=shardings).params


def _checkpoint(folder: Path) -> Any:
    from liftplace_jax import weights
    from liftplace_jax.families import registry
    from liftplace_jax.families.loading import load_checkpoint

    config = registry.config_from_dict(json.loads((folder / "config.json").read_text()))
    network = load_checkpoint(folder / "model.safetensors", config)
    with tempfile.TemporaryDirectory(dir=folder) as target:
        weights.save_model(target, network.config.described(), network.params)
    return network.params


CASES: dict[str, Callable[[Path], Any]] = {
    "plain": _plain,
    "one device": _one_device,
    f"{DEVICES} devices, split": _split,
    "checkpoint": _checkpoint,
}


def _own_memory() -> int:
    """Bytes of this process that are not of files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class _Peak(threading.Thread):
    """The most that `_own_memory` is within the block."""

    def __enter__(self):
        self.bytes, self._ended = _own_memory(), threading.Event()
        self.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self.join()

    def run(self):
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, _own_memory())


def main() -> None:
    """The process."""
    import jax

    # Late imports count no more.

    folder, case = Path(sys.argv[1]), CASES[sys.argv[2]]
    jax.block_until_ready(jax.numpy.zeros(()))
    size = (folder / "model.safetensors").stat().st_size
    before, started = _own_memory(), time.monotonic()
    with _Peak(daemon=True) as peak:
        params = case(folder)
        seconds = time.monotonic() - started
    on_devices = sum(
        shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards
    )
    host = peak.bytes - before - on_devices
    print(json.dumps({"size_gb": size / _GIGA, "host_gb": host / _GIGA, "seconds": seconds}))


if __name__ == "__main__":
    main()
