"""What samples of a network are drawn by, and compared with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from liftplace_jax import data, evaluation
from liftplace_jax.conditioning import Shown
from liftplace_jax.diffusion import Process
from liftplace_jax.encoders.autoencoder_folder import Decoder
from liftplace_jax.evaluation.handling import Handling, Look, handling_of, said_of_reference
from liftplace_jax.evaluation.samples import replicated
from liftplace_jax.evaluation.sampling import Sampler, make_sampler
from liftplace_jax.experiment.configuration import under
from liftplace_jax.experiment.texts import Prompts
from liftplace_jax.host import processes, sharding
from liftplace_jax.host.progress import progress
from liftplace_jax.nn import building, frozen
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.nn.network import Network, kept_params, make_apply


@dataclasses.dataclass(frozen=True, eq=False)
class Judge:
    """See the module's text. Networks compute in fields.dtype here, however they were trained.

    Attributes:
      fields: config.evaluation.
      process: the diffusion process.
      decoder: of samples; None: they are images.
      batch_sharding: of batches.
      train_images: opens the training images.
      open_prompts: reads what networks of texts are told; None: they are told none.
    """

    fields: ConfigDict
    process: Process
    decoder: Decoder | None
    batch_sharding: jax.sharding.NamedSharding
    train_images: Callable[[], data.Source]
    open_prompts: Callable[[], Prompts | None]

    @functools.cached_property
    def prompts(self) -> Prompts | None:
        """What networks of texts are told; None: they are told none."""
        return self.open_prompts()

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
            reference = evaluation.load_reference(self.fields.reference)
            if said := said_of_reference(self.handling.of_real, reference.info):
                processes.say_once(f"{self.fields.reference}: {said}")
            return reference
        images = self.train_images()
        with progress("reference", len(images), unit="image") as bar:
            return evaluation.reference(
                images,
                self.extractor,
                batch_size=self.fields.batch_size,
                sharding=self.batch_sharding,
                progress=lambda done: bar.update(done - bar.n),
                look=Look(self.handling.of_real),
            )

    @property
    def handling(self) -> Handling:
        """What is done to samples before they are looked at."""
        return handling_of(self.fields)

    @functools.cached_property
    def clip(self) -> evaluation.ClipScorer | None:
        """What finds how well samples fit their prompts; None if no model is named."""
        if not self.fields.clip_model:
            return None
        with under("evaluation.clip_model: "):
            return evaluation.load_clip(self.fields.clip_model)

    @functools.cached_property
    def look(self) -> Look:
        """How samples are looked at, beside the extractor's features."""
        if self.clip is None or self.prompts is None:
            return Look(self.handling)
        return Look.of(self.handling, self.clip, self.prompts.prompts)

    def sampler(self, network: Network, clip: float | None = None) -> Sampler:
        """The config's sampler of a network; see `make_sampler`, and `placed_params`."""
        return self._sampler(network.config, clip)

    @functools.cached_property
    def _sampler(self) -> Callable[..., Sampler]:
        # One function, and so one compiled program, for all students of an architecture.
        @functools.cache
        def made(model: DenoiserConfig, clip: float | None) -> Sampler:
            return make_sampler(
                self.fields,
                self.process,
                model,
                self._apply(model),
                clip,
                self.decoder and self.decoder.decode,
                self.prompts and self.prompts.conditioning,
            )

        return made

    def _apply(self, model: DenoiserConfig) -> Callable[..., Any]:
        return make_apply(building.abstract(model, jnp.dtype(self.fields.dtype))[0])

    def condition(self, count: int) -> Any:
        """Of samples 0..count - 1; None: each draws its own from its key."""
        return self.prompts and self.prompts.condition(count)

    def shown(self, model: DenoiserConfig, most: int) -> Shown | None:
        """As of `Conditioning.shown`, of a network's config."""
        return (self.prompts or model.conditioning).shown(most)

    def kept(self, model: DenoiserConfig, params: Any) -> Any:
        """A network's parameters in the dtype that they are computed in."""
        return frozen.cast(params, kept_params(model, self.fields.dtype))

    def placed(self, network: Network) -> Any:
        """A network's parameters on every device, sent once and not at every batch."""
        return self._everywhere(self.kept(network.config, network.params))

    def placed_params(self, network: Network) -> Any:
        """What `sampler` takes as parameters, `placed`."""
        return self._with_frozen(self.placed(network))

    def _everywhere(self, params: Any) -> Any:
        whole = replicated(self.batch_sharding)
        return sharding.place(params, jax.tree.map(lambda _: whole, params))

    @functools.cached_property
    def _decoder_params(self) -> Any:
        assert self.decoder is not None, "asked for where there is one"
        return self._everywhere(self.decoder.params)

    @functools.cached_property
    def _text_params(self) -> Any:
        assert self.prompts is not None, "asked for where there are some"
        return self._everywhere(self.prompts.frozen)

    def _with_frozen(self, params: Any) -> Any:
        """A network's parameters, and those of the frozen networks that a sampler takes beside."""
        found = [params]
        found += [self._decoder_params] if self.decoder else []
        found += [self._text_params] if self.prompts else []
        return tuple(found) if len(found) > 1 else params

    @functools.cached_property
    def predictor(self) -> Callable[[DenoiserConfig], Callable[..., jax.Array]]:
        """config -> jitted (params, x_t, t, condition) -> prediction, without the rest of it."""

        @functools.cache
        def made(model):
            apply = self._apply(model)

            @jax.default_matmul_precision(self.fields.precision)
            def prediction(params, x, t, condition):
                return self.process.split(apply(params, x, t, False, None, condition)[0])[0]

            return jax.jit(prediction)

        return made

    def curve(self, network: Network) -> Callable[[Any], float]:
        """Parameters -> Frechet distance of few samples, in float32 and in-graph.

        Where the host handles samples, the distance alone is in-graph.
        """
        fields, sample = self.fields, self.sampler(network)
        real = evaluation.moments_of(self.real)
        distance = jax.jit(evaluation.frechet_distance_in_graph)
        # Whole on each device: split parameters would send the samples around instead.
        kept = functools.partial(self.kept, network.config)
        whole = jax.jit(kept, out_shardings=replicated(self.batch_sharding))

        def distance_of(params) -> float:
            samples = evaluation.collect(
                sample,
                self._with_frozen(whole(params)),
                fields.curve_samples,
                batch_size=fields.batch_size,
                extractor=self.extractor,
                seed=fields.seed,
                sharding=self.batch_sharding,
                condition=self.condition(fields.curve_samples),
                look=Look(self.handling),
            )
            return float(distance(real, samples.moments))

        return distance_of
