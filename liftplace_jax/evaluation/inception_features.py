"""Inception features as FID, sFID, KID and the Inception Score take them.

No weights ship with this package, and none are downloaded. Both published files fit:
`pt_inception-2015-12-05-6726825d.pth` (pytorch-fid) and `weights-inception-2015-12-05-6726825d.pth`
(torch-fidelity), made from the original TensorFlow graph by their projects, which say where to get
them.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from liftplace_jax import weights
from liftplace_jax.evaluation.extractor import Extractor
from liftplace_jax.evaluation.inception import DIMS, IMAGE_SIZE, Inception
from liftplace_jax.evaluation.resize import resize_bilinear
from liftplace_jax.host.buckets import as_path
from liftplace_jax.nn import building

# Protocol -> name of the distance, resizing, the pixel (0..255) that becomes 0, how many make 1.
PROTOCOLS = {
    # The original graph, the ADM evaluator, torch-fidelity.
    "inception": ("FID", "tensorflow1", 128.0, 128.0),
    "inception_pytorch_fid": ("FID (resized as pytorch-fid)", "half_pixel", 127.5, 127.5),
}
# Name -> protocols of the features, and of the logits: FID by pytorch-fid and Inception Score by
# torch-fidelity, as BK-SDM reports them. The network sees every image twice.
BOTH = {"inception_bk_sdm": ("inception_pytorch_fid", "inception")}


@functools.lru_cache(maxsize=2)
def inception_extractor(name: str, path: str | os.PathLike | None) -> Extractor:
    """The extractor of a protocol.

    Args:
      name: one of PROTOCOLS or BOTH.
      path: file of the network's weights.

    Raises:
      ValueError: no path, or a file that does not fit; says what to do.
    """
    if path is None:
        raise ValueError(
            f"features {name!r} need the weights of the FID Inception network: name the file "
            "(--weights, or config.evaluation.weights). It is pt_inception-2015-12-05-6726825d.pth "
            "of the pytorch-fid project, or weights-inception-2015-12-05-6726825d.pth of "
            "torch-fidelity: ports of the same network"
        )
    graphdef, params = load_inception(path)
    of_features, of_logits = BOTH.get(name, (name, name))

    def find(params, images, protocol):
        _, style, zero, scale = PROTOCOLS[protocol]
        pixels = (images + 1) * 127.5
        if images.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
            pixels = resize_bilinear(pixels, (IMAGE_SIZE, IMAGE_SIZE), style)
        return nnx.merge(graphdef, params)((pixels - zero) / scale)

    def apply(params, images):
        with jax.default_matmul_precision("highest"):
            found = find(params, images, of_features)
            other = found if of_logits == of_features else find(params, images, of_logits)
        return {"features": found["pool"], "spatial": found["spatial"], "logits": other["logits"]}

    styles = [PROTOCOLS[protocol][1] for protocol in (of_features, of_logits)]
    also = f" (of the logits {styles[1]})" if styles[0] != styles[1] else ""
    return Extractor(
        name=name,
        label=PROTOCOLS[of_features][0],
        dim=DIMS["pool"],
        image_shape=(None, None, 3),
        apply=apply,
        params=params,
        info={
            "weights": Path(path).name,
            "resize": f"bilinear, {styles[0]}{also}, to {IMAGE_SIZE}",
        },
    )


def load_inception(path: str | os.PathLike) -> tuple[nnx.GraphDef, building.Params]:
    """The FID Inception network with the weights of a file.

    Args:
      path: one of the published files that this module names, of this machine or a bucket.

    Returns:
      (graphdef, params), float32; `nnx.merge(graphdef, params)` takes (B, 299, 299, 3) images, as
      `evaluation.inception.Inception` says. The same ones for the same path, read once.

    Raises:
      ValueError: the file cannot be read or does not fit; lists every misfit.
    """
    return _load_inception(os.fspath(as_path(path)))


@functools.lru_cache(maxsize=1)
def _load_inception(path: str) -> tuple[nnx.GraphDef, building.Params]:
    graphdef, abstract = building.split(nnx.eval_shape(lambda: Inception(nnx.Rngs(0))))
    tensors = weights.read_tensors(path)
    try:
        params = weights.from_torch(abstract, tensors, ignore=(r".*\.num_batches_tracked",))
    except weights.WeightMismatchError as error:
        raise weights.WeightMismatchError(error.misfits, path) from error
    return graphdef, jax.tree.map(jnp.asarray, params)
