"""Suite "steps": what PLACE adds to a training step, against output distillation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
import tqdm
from flax import nnx

from liftplace_jax.diffusion import GaussianDiffusion, beta_schedule
from liftplace_jax.nn import building
from liftplace_jax.nn.model_config import DenoiserConfig
from liftplace_jax.nn.network import make_apply
from liftplace_jax.suites.networks import pruned, published, small
from liftplace_jax.suites.options import Options, Result
from liftplace_jax.suites.timing import milliseconds, time_side_by_side
from liftplace_jax.training.objective import METHODS, make_objective
from liftplace_jax.training.state import create_state
from liftplace_jax.training.step import make_train_step

DIGITS = small("unet")
COMPARED = ("output_kd", "lift", "lift_place")


def run(options: Options) -> Result:
    """Measures a step of each method, side by side; quick: on digits alone."""
    # A CelebA batch of 96 is for accelerators.
    large = 96 if jax.default_backend() != "cpu" else 2
    cases = [("digits 8x8", DIGITS, 64, options.repeats * 4)]
    if not options.quick:
        cases.append(("CelebA 64x64", published("unet")["celeba"], large, options.repeats))
    rows = []
    for name, config, batch, times in tqdm.tqdm(cases, desc="steps", unit="case"):
        rows += _measure(name, config, batch, times)
    rows += _measure_dispatch(options.repeats * 20)
    return {
        "title": "Training steps, student pruned by 90 %",
        "columns": ["case", "batch", "method", "step_ms", "over_output_kd"],
        "rows": rows,
        "notes": [
            "over_output_kd: median step time / that of output_kd, minus 1.",
            "dispatch: a step on digits' state that computes nothing, what Python costs alone; the "
            "parameters as plain dicts, as here, and as `nnx.State`.",
        ],
    }


def _measure(name: str, config: DenoiserConfig, batch: int, repeats: int) -> list[dict[str, Any]]:
    process = GaussianDiffusion(beta_schedule("linear", 1000))
    teacher_def, teacher = building.create(config, 0)
    student_def, student = building.create(pruned(config, ratio=0.9), 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
    shape = (batch, config.image_size, config.image_size, config.in_channels)
    images = {"image": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    calls, states = {}, {}
    for method in COMPARED:
        objective = make_objective(
            METHODS[method],
            make_apply(student_def),
            process,
            0,
            teacher_apply=make_apply(teacher_def),
        )
        step = make_train_step(objective, optimizer, ema_decay=0.9999)
        states[method] = create_state({"student": student}, optimizer)
        calls[method] = functools.partial(_call, step, states, method, teacher, images)
    times = time_side_by_side(calls, repeats)
    base = times["output_kd"].median
    return [
        {
            "case": name,
            "batch": batch,
            "method": method,
            "step_ms": milliseconds(timing),
            "over_output_kd": f"{timing.median / base - 1:+.1%}",
            "seconds": timing._asdict(),
        }
        for method, timing in times.items()
    ]


def _call(step, states, method, teacher, images):
    states[method], metrics = step(states[method], {"teacher": teacher}, images)
    jax.block_until_ready(metrics)


def _measure_dispatch(repeats: int) -> list[dict[str, Any]]:
    """What a call costs before devices have anything to do."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
    graphdef, params = building.create(DIGITS, 0)
    forms = {"dicts": params, "nnx.State": nnx.state(nnx.merge(graphdef, params))}
    step = jax.jit(lambda s: (s._replace(step=s.step + 1), s.step), donate_argnums=0)
    calls, states = {}, {}
    for form, tree in forms.items():
        states[form] = create_state({"student": tree}, optimizer)
        calls[form] = functools.partial(_dispatch, step, states, form)
    leaves = len(jax.tree.leaves(states["dicts"]))
    return [
        {
            "case": f"dispatch, {leaves} leaves",
            "batch": "",
            "method": form,
            "step_ms": milliseconds(timing),
            "over_output_kd": "",
            "seconds": timing._asdict(),
        }
        for form, timing in time_side_by_side(calls, repeats).items()
    ]


def _dispatch(step, states, form):
    states[form], number = step(states[form])
    jax.block_until_ready(number)
