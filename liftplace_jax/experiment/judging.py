"""What samples of a network are drawn by, and compared with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from liftplace_jax import data, evaluation
from liftplace_jax.diffusion import Process
from liftplace_jax.encoders.autoencoder_folder import AutoencoderNetwork
from liftplace_jax.evaluation.samples import replicated
from liftplace_jax.evaluation.sampling import Sampler, make_sampler
from liftplace_jax.host import sharding
from liftplace_jax.host.progress import progress
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.nn.network import Network, make_apply


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """See the module's text.

    Attributes:
      fields: config.evaluation.
      process: the diffusion process.
      autoencoder: that decodes samples; None: they are images.
      batch_sharding: of batches.
      train_images: opens the training images.
    """

    fields: ConfigDict
    process: Process
    autoencoder: AutoencoderNetwork | None
    batch_sharding: jax.sharding.NamedSharding
    train_images: Callable[[], data.Source]

    @functools.cached_property
    def extractor(self) -> evaluation.Extractor | None:
        """What samples are compared by; None if config.evaluation.features names nothing."""
        if not self.fields.features:
            return None
        return evaluation.feature_extractor(self.fields.features, self.fields.weights)

    @functools.cached_property
    def real(self) -> evaluation.Samples | evaluation.Reference | None:
        """What samples are compared with: config.evaluation.reference, or the training data."""
        if self.extractor is None:
            return None
        if self.fields.reference:
            return evaluation.load_reference(self.fields.reference)
        images = self.train_images()
        with progress("reference", len(images), unit="image") as bar:
            return evaluation.reference(
                images, self.extractor, batch_size=self.fields.batch_size,
                sharding=self.batch_sharding, progress=lambda done: bar.update(done - bar.n),
            )  # fmt: skip

    def sampler(self, network: Network, clip: float | None = None) -> Sampler:
        """The config's sampler of a network; see `make_sampler`, and `params`."""
        return self._sampler(network.config, network.graphdef, clip)

    @functools.cached_property
    def _sampler(self) -> Callable[..., Sampler]:
        # One function, and so one compiled program, for all students of an architecture.
        @functools.cache
        def made(model: DenoiserConfig, graphdef: nnx.GraphDef, clip: float | None) -> Sampler:
            return make_sampler(
                self.fields, self.process, model, make_apply(graphdef), clip,
                self.autoencoder and self.autoencoder.decode,
            )  # fmt: skip

        return made

    def params(self, params: Any) -> Any:
        """What `sampler` takes as parameters: the network's, and the decoder's if there is one."""
        return (params, self.autoencoder.params) if self.autoencoder else params

    def placed(self, params: Any) -> Any:
        """Parameters on every device, sent once and not at every batch."""
        whole = replicated(self.batch_sharding)
        return sharding.place(params, jax.tree.map(lambda _: whole, params))

    def placed_params(self, network: Network) -> Any:
        """What `sampler` takes, of a network, `placed`."""
        return self.placed(self.params(network.params))

    @functools.cached_property
    def predictor(self) -> Callable[[nnx.GraphDef], Callable[..., jax.Array]]:
        """graphdef -> jitted (params, x_t, t, condition) -> prediction, without the rest of it."""

        @functools.cache
        def made(graphdef):
            apply = make_apply(graphdef)

            @jax.default_matmul_precision(self.fields.precision)
            def prediction(params, x, t, condition):
                return self.process.split(apply(params, x, t, False, None, condition)[0])[0]

            return jax.jit(prediction)

        return made

    def curve(self, network: Network) -> Callable[[Any], float]:
        """Parameters -> Frechet distance of few samples, in float32 and in-graph."""
        fields, sample = self.fields, self.sampler(network)
        real = evaluation.moments_of(self.real)
        distance = jax.jit(evaluation.frechet_distance_in_graph)
        # Whole on each device: split parameters would send the samples around instead.
        whole = jax.jit(lambda tree: tree, out_shardings=replicated(self.batch_sharding))

        def distance_of(params) -> float:
            samples = evaluation.collect(
                sample, whole(self.params(params)), fields.curve_samples,
                batch_size=fields.batch_size, extractor=self.extractor, seed=fields.seed,
                sharding=self.batch_sharding,
            )  # fmt: skip
            return float(distance(real, samples.moments))

        return distance_of
