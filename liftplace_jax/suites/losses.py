"""Suite "losses": value and gradient of MSE, LIFT and PLACE against plain PyTorch, same run."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from liftplace_jax.losses import lift_loss, output_kd_loss, place_loss
from liftplace_jax.losses.permute import sort_by_error
from liftplace_jax.suites import torch_losses
from liftplace_jax.suites.options import Options, Result
from liftplace_jax.suites.timing import Timing, milliseconds, time_side_by_side

SHAPES = ((96, 64, 64, 3), (32, 64, 64, 4), (8, 256, 256, 3), (256, 32, 32, 4))
GROUP_SIZES = (4, 16, 64, None)  # None: the whole channel
DTYPES = ("float32", "bfloat16")


def run(options: Options) -> Result:
    """Measures all cases; quick: one small shape in float32."""
    peer = importlib.util.find_spec("torch") is not None
    cases = tqdm.tqdm(list(_cases(options.quick)), desc="losses", unit="case")
    rows = [_measure(*case, options.repeats, peer) for case in cases]
    columns = ["shape", "dtype", "loss", "group", "ours_ms", "torch_ms", "ratio", "sort_share",
               "temporaries"]  # fmt: skip
    notes = [
        "ours_ms, torch_ms: median and quartiles of one call; ratio: torch / ours, of the medians.",
        "sort_share: time of the sort alone, which writes student, teacher and their order / time "
        "of the loss with its gradient.",
        "temporaries: memory beside arguments and results, in arrays of the output's size.",
        "" if peer else "PyTorch is not installed: no ratios.",
    ]
    return {"title": "Losses: value and gradient", "columns": columns, "rows": rows, "notes": notes}


def _cases(quick: bool) -> Iterator[tuple[tuple[int, ...], str, str, int | None]]:
    for dtype in DTYPES[:1] if quick else DTYPES:
        for shape in ((4, 16, 16, 3),) if quick else SHAPES:
            yield shape, dtype, "mse", None
            yield shape, dtype, "lift", None
            for group_size in GROUP_SIZES:
                yield shape, dtype, "place", group_size or shape[1] * shape[2]


def draw(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A student that errs as trained ones do, and its teacher; float32."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=shape)
    return (0.9 * teacher + 0.3 * rng.normal(size=shape)).astype(np.float32), teacher.astype("f4")


def our_loss(name: str, group_size: int | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(student, teacher) -> loss."""
    if name == "mse":
        return output_kd_loss
    if name == "lift":
        return lambda s, t: lift_loss(s, t).loss
    assert group_size is not None, "a case of PLACE has one"
    return lambda s, t: place_loss(s, t, group_size=group_size).loss


def _measure(shape, dtype, name, group_size, repeats, peer) -> dict[str, Any]:
    arrays = draw(shape)
    student, teacher = (jnp.asarray(x, dtype) for x in arrays)
    compiled = (
        jax.jit(jax.value_and_grad(our_loss(name, group_size))).lower(student, teacher).compile()
    )
    calls = {"ours": lambda: jax.block_until_ready(compiled(student, teacher))}
    if name == "place":
        flat = [x.astype(jnp.float32).reshape(len(x), -1, x.shape[-1]) for x in (student, teacher)]
        sort = jax.jit(sort_by_error)
        calls["sort"] = lambda: jax.block_until_ready(sort(*flat))
    if peer:
        calls["torch"] = _torch_call(arrays, dtype, name, group_size)
    times = time_side_by_side(calls, repeats, rounds=3)
    ours = times["ours"]
    size = int(np.prod(shape)) * student.dtype.itemsize
    plan = compiled.memory_analysis()
    temporary = None if plan is None else plan.temp_size_in_bytes / size
    return {
        "shape": "x".join(map(str, shape)),
        "dtype": dtype,
        "loss": name,
        "group": group_size if name == "place" else "-",
        "ours_ms": milliseconds(ours),
        "torch_ms": _maybe(times.get("torch"), milliseconds),
        "ratio": _maybe(times.get("torch"), lambda t: f"{t.median / ours.median:.2f}"),
        "sort_share": _maybe(times.get("sort"), lambda t: f"{t.median / ours.median:.0%}"),
        "temporaries": "-" if temporary is None else f"{temporary:.1f}",
        "seconds": {key: timing._asdict() for key, timing in times.items()},
    }


def _torch_call(arrays, dtype, name, group_size) -> Callable[[], None]:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
    student, teacher = (
        torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(device, getattr(torch, dtype))
        for x in arrays
    )
    student.requires_grad_()
    loss = functools.partial(torch_losses.LOSSES[name], group_size=group_size)

    def call():
        student.grad = None
        loss(student, teacher).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def _maybe(timing: Timing | None, form: Callable[[Timing], str]) -> str:
    return "-" if timing is None else form(timing)
