"""Shared by all tests: eight simulated CPU devices and full float32 products."""

import os
from importlib.metadata import version

# Most of a test is compilation, which takes half the time without fusing and optimising; the main
# command of .ci/run does both. XLA ends a process that names a flag it no longer has.
QUICK_XLA = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICK_XLA += " --xla_cpu_use_fusion_emitters=false"

# Set before JAX starts its backends; sharding tests need more devices than a laptop has.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK_XLA}"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# As liftplace_jax.host.buckets does, where a test imports gcsfs first.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from liftplace_jax.suites.torch_inception import import_torchvision

import_torchvision()  # before diffusers does, which could not where only this function can
jax.config.update("jax_default_matmul_precision", "highest")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """Returns a loader: name -> (arrays, meta) of tests/golden/<name>.npz (never unpickles)."""
    cache = {}

    def load(name):
        if name not in cache:
            with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            cache[name] = arrays, json.loads(str(arrays.pop("meta")))
        return cache[name]

    return load


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A folder of transformers' CLIPModel, tokenizer and processor, tiny and random."""
    from tiny_clip import write_clip

    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def bucket():
    """ "gs://bucket", empty at first; also for programs that tests start."""
    import bucket

    program = [sys.executable, bucket.__file__]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        # For the session: gcsfs reads it once.
        os.environ.update(bucket.environment(int(server.stdout.readline())))
        yield "gs://bucket"
        server.kill()


@pytest.fixture(scope="module")
def machine_code():
    """The losses sort by machine code, as they do with large arrays."""
    from liftplace_jax.losses import permute

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "HOST_LEAST", 0)
        jax.clear_caches()
        yield
    jax.clear_caches()


@functools.cache
def config_module(name):
    """The module configs/<name>.py."""
    path = GOLDEN.parents[1] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def nhwc(array):
    """(N, C, H, W) as published -> (N, H, W, C) as used here."""
    return np.moveaxis(array, 1, -1)
