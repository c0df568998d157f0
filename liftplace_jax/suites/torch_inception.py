"""The peer: the network of pytorch-fid, as that package makes it.

Only the benchmark and tests use it; torch is imported when it is called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np

PACKAGES = ("torch", "torchvision", "pytorch_fid")


def available() -> bool:
    """Whether the packages of the peer are installed."""
    return all(importlib.util.find_spec(name) is not None for name in PACKAGES)


def import_torchvision() -> None:
    """Imports torchvision, which the peers import, also where its compiled part cannot load.

    That is so for the build on PyPI, which is for CUDA, beside a PyTorch for the CPU. torchvision
    then describes two operators that nobody has declared. They belong to detection; no network
    here calls them.

    Raises:
      RuntimeError: it cannot be imported for another reason.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in ("nms", "qnms"):
            arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", arguments)
        import torchvision  # noqa: F401


def pytorch_fid_network(tensors: Mapping[str, np.ndarray]) -> Any:
    """The network up to its pooled features, in evaluation mode; nothing is downloaded.

    Args:
      tensors: all of its weights, by published name.

    Returns:
      A torch module: float images (B, 3, H, W) in [0, 1] -> [(B, 2048, 1, 1)].
    """
    import torch

    import_torchvision()
    import pytorch_fid.inception

    state = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    # Its constructor always fetches the published weights.
    with mock.patch.object(
        pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state
    ):
        return pytorch_fid.inception.InceptionV3().eval()
