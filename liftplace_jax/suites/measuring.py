"""What one network costs: to sample from, and to train by each method."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from liftplace_jax import weights
from liftplace_jax.evaluation.sampling import make_sampler
from liftplace_jax.experiment.context import Context
from liftplace_jax.families.registry import count_macs
from liftplace_jax.nn import building
from liftplace_jax.nn.network import Network, make_apply
from liftplace_jax.suites.peaks import peak_fraction
from liftplace_jax.suites.timing import Timing, time_side_by_side
from liftplace_jax.training.distillation import student_objective
from liftplace_jax.training.objective import METHODS
from liftplace_jax.training.prepare import prepare

Measured = dict[str, Any]
QUICK_STEPS = 5
MEGA = 1e6


@functools.lru_cache(maxsize=1)
def random_network(config: Any, dtype: str = "float32") -> Network:
    """A network with random weights: they cost what trained ones do."""
    return Network(config, *building.create(config, 0, jnp.dtype(dtype)))


def timed_steps(context: Context, quick: bool) -> int:
    """Sampling steps that are run: the config's; if quick, a few, which suit the process."""
    fields = context.config.evaluation
    if not quick:
        return fields.sample_steps

    def suits(steps):
        with contextlib.suppress(ValueError):
            return bool(context.process.sampling(_with_steps(fields, steps)))

    counts = range(min(fields.sample_steps, QUICK_STEPS), 0, -1)
    return next(filter(suits, counts), fields.sample_steps)


def _with_steps(fields: ConfigDict, steps: int) -> ConfigDict:
    return ConfigDict(fields.to_dict() | {"sample_steps": steps})


def measure_network(context: Context, config: Any, quick: bool, repeats: int) -> Measured:
    """Size on disk, latency, sampling throughput.

    Args:
      context: whose process, sampler and mesh are used; a checkpoint is written in its folder.
      config: of the network.
      quick: run few sampling steps and extrapolate.
      repeats: timed calls of each.
    """
    fields, process = context.config.evaluation, context.process
    timed = _with_steps(fields, timed_steps(context, quick))
    evaluations, run = (process.sampling(f)["evaluations"] for f in (fields, timed))
    network = random_network(config)
    params, apply = network.params, make_apply(network.graphdef)
    shape = (config.image_size, config.image_size, config.in_channels)
    sampler = make_sampler(timed, process, config, apply)
    keys = jax.random.split(jax.random.key(0), fields.batch_size)
    everywhere = NamedSharding(context.mesh, PartitionSpec())
    evaluation, _ = _compiled(
        lambda params, x, t: apply(params, x, t, False, None)[0],
        params,
        jnp.zeros((1, *shape)),
        process.at(jnp.zeros(1)),
    )
    image, _ = _compiled(sampler, params, keys[:1])
    batch, compile_seconds = _compiled(
        sampler, jax.device_put(params, everywhere), jax.device_put(keys, context.batch_sharding)
    )
    times = time_side_by_side({"evaluation": evaluation, "image": image}, repeats)
    times |= time_side_by_side({"batch": batch}, max(3, repeats // 3))
    for name in ("image", "batch"):
        times[name] = Timing(*(s * evaluations / run for s in times[name]))
    rate = fields.batch_size / times["batch"].median
    macs = count_macs(config)
    return {
        "checkpoint_mb": _checkpoint_bytes(context, network) / MEGA,
        "images_per_s": rate,
        "evaluation_ms": times["evaluation"].median * 1e3,
        "image_ms": times["image"].median * 1e3,
        "sampler_compile_s": compile_seconds,
        **_speed(2 * macs * evaluations * rate, context.mesh.size),
        "seconds": {name: timing._asdict() for name, timing in times.items()},
    }


def measure_training(
    context: Context, method: str, student: Network, teacher: Network, repeats: int
) -> Measured:
    """Time and memory of a training step, on one random batch.

    Args:
      context: whose distillation and mesh are used.
      method: of METHODS.
      student: the network that is trained.
      teacher: its teacher.
      repeats: timed steps.
    """
    fields, needs_teacher = context.config.distill, METHODS[method].needs_teacher
    before = device_peak(context)
    objective, params = student_objective(
        context.config, context.process, method, 0, student, teacher
    )
    training = prepare(
        fields,
        objective,
        jax.tree.map(jnp.copy, params),  # the network is measured again
        {"teacher": teacher.params} if needs_teacher else {},
        context.mesh,
        context.config.sharding_rules,
    )
    config = student.config
    shape = (fields.batch_size, config.image_size, config.image_size, config.in_channels)
    images = jax.random.normal(jax.random.key(0), shape)
    batch = {"image": jax.device_put(images, context.batch_sharding)}
    started = time.perf_counter()
    step = training.step.lower(training.state, training.frozen, batch).compile()
    compile_seconds = time.perf_counter() - started
    state = training.state

    def call():
        nonlocal state
        state, metrics = step(state, training.frozen, batch)
        jax.block_until_ready((state, metrics))

    timing = time_side_by_side({method: call}, repeats)[method]
    after = device_peak(context)
    macs = 3 * count_macs(config) + (count_macs(teacher.config) if needs_teacher else 0)
    planned, peak = planned_bytes(step), None
    if after is not None and before is not None and after > before:
        peak = after / MEGA
    return {
        "step_ms": timing.median * 1e3,
        "examples_per_s": fields.batch_size / timing.median,
        "memory_mb": None if planned is None else planned / MEGA,
        "device_peak_mb": peak,
        "step_compile_s": compile_seconds,
        **_speed(2 * macs * fields.batch_size / timing.median, context.mesh.size),
        "seconds": timing._asdict(),
    }


def planned_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Memory that a compiled program needs on each device; None if the backend does not say."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        - plan.alias_size_in_bytes
        + plan.temp_size_in_bytes
        + plan.generated_code_size_in_bytes
    )


def device_peak(context: Context) -> int | None:
    """Most memory of a device that was ever in use in this process; None if it does not say."""
    stats = [device.memory_stats() for device in context.mesh.local_devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def _compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Any], float]:
    """A call of the compiled function that waits for its result, and seconds of compilation."""
    # Arrays alone as arguments: taking a tree of parameters apart in Python would cost more than
    # a small network does.
    leaves, tree = jax.tree.flatten(arguments)
    started = time.perf_counter()
    compiled = jax.jit(lambda *x: function(*tree.unflatten(x))).lower(*leaves).compile()
    seconds = time.perf_counter() - started
    return lambda: jax.block_until_ready(compiled(*leaves)), seconds


def _checkpoint_bytes(context: Context, network: Network) -> int:
    folder = context.workdir / "checkpoint"
    weights.save_model(folder, network.config.described(), network.params)
    return (folder / "model.safetensors").stat().st_size


def _speed(flops_per_second: float, devices: int) -> Measured:
    kind = jax.devices()[0].device_kind
    return {
        "tflops": flops_per_second / 1e12,
        "of_peak": peak_fraction(flops_per_second, kind, devices),
    }
