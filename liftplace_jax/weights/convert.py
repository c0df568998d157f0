"""One rule between our parameters and PyTorch's, for every model whose modules share the names.

The kind of a leaf decides: convolution kernels HWIO <-> OIHW, dense kernels (in, out) <->
(out, in), norm scales and embeddings as they are, all of them called `weight` in PyTorch; biases
and bare parameters keep their name and layout.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liftplace_jax.host.buckets import as_path, make_folder
from liftplace_jax.host.files import write_json
from liftplace_jax.host.outside import MOST_LINES, cut, read_json
from liftplace_jax.weights.entries import WeightFileError
from liftplace_jax.weights.torch_files import open_tensors, write_safetensors

_ALL = "*"  # in place of a name, in a misfit of all names together
_WEIGHTS = ("kernel", "scale", "embedding")


class WeightMismatchError(ValueError):
    """Tensors do not fit a model; the message says every misfit by its published name.

    Where they are many, those of one kind are one line with their count.

    Args:
      misfits: (name, problem) of each, as of `find_misfits`; kept as an attribute.
      origin: where the tensors come from.
    """

    def __init__(self, misfits: Sequence[tuple[str, str]], origin: Any = None):
        self.misfits = list(misfits)
        where = "" if origin is None else f"{origin}: "
        if [name for name, _ in misfits] == [_ALL]:
            super().__init__(f"{where}the names do not fit the model: {misfits[0][1]}")
            return
        lines = "\n".join(f"  {line}" for line in cut(_grouped(self.misfits)))
        super().__init__(
            f"{where}{len(misfits)} tensors do not fit the model; check its config against the "
            f"file:\n{lines}"
        )


def _grouped(misfits: Sequence[tuple[str, str]]) -> list[str]:
    if len(misfits) <= MOST_LINES:
        return [f"{name}: {problem}" for name, problem in misfits]
    # What is missing is the model's alone; what there is tells more of the file.
    misfits = sorted(misfits, key=lambda misfit: misfit[1].startswith("missing"))
    groups: dict[tuple[str, str], list[str]] = {}
    for name, problem in misfits:
        groups.setdefault((re.sub(r"\d+", "*", name), problem), []).append(name)
    lines = [
        f"{names[0] if len(names) == 1 else f'{pattern} ({len(names)} tensors)'}: {problem}"
        for (pattern, problem), names in groups.items()
    ]
    if len(lines) <= MOST_LINES:
        return lines
    counts = Counter(problem for _, problem in misfits)
    firsts = {problem: name for name, problem in reversed(misfits)}
    return [
        firsts[problem] + (f" and {count - 1} more" if count > 1 else "") + f": {problem}"
        for problem, count in counts.items()
    ]


def find_prefix(expected: Collection[str], names: Collection[str]) -> list[tuple[str, str]]:
    """Whether no name fits a model as it is, and most would without what they begin with.

    Args:
      expected: names of the model's tensors.
      names: those that there are.

    Returns:
      One misfit for all, as of `find_misfits`; empty if the names are not to blame.
    """
    wanted = set(expected)
    if not wanted.isdisjoint(names):
        return []
    found = Counter(
        name[: dot.end()]
        for name in names
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in wanted
    )
    prefixes = sorted(prefix for prefix, count in found.items() if 2 * count >= len(wanted))
    if not prefixes:
        return []
    said = " or ".join(f"{prefix!r} ({found[prefix]} of {len(names)})" for prefix in prefixes[:4])
    return [
        (
            _ALL,
            f"they would without the prefix {said}: choose it as the file's entry, "
            f"{prefixes[0].removesuffix('.')!r}, or save the tensors without it",
        )
    ]


def _published_name(path: tuple[Any, ...]) -> tuple[str, bool]:
    """A leaf's published name, and whether it is a kernel."""
    name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
    module, _, leaf = name.rpartition(".")
    if leaf in _WEIGHTS:
        name = f"{module}.weight" if module else "weight"
    return name, leaf == "kernel"


def _torch_axes(ndim: int) -> tuple[int, ...]:
    """Axes of a kernel (spatial..., in, out) in PyTorch's order, (out, in, spatial...)."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def _published_shape(leaf: Any, is_kernel: bool) -> tuple[int, ...]:
    shape = tuple(leaf.shape)
    return tuple(shape[axis] for axis in _torch_axes(len(shape))) if is_kernel else shape


def published_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Shapes in PyTorch's layouts by published name, of arrays or `jax.ShapeDtypeStruct`."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, is_kernel = _published_name(path)
        shapes[name] = _published_shape(leaf, is_kernel)
    return shapes


def find_misfits(
    params: Any, tensors: Mapping[str, np.ndarray], *, ignore: Iterable[str] = ()
) -> list[tuple[str, str]]:
    """What keeps published tensors from being a model's parameters; arguments as of `from_torch`.

    Returns:
      (published name, problem) of every missing, unexpected, mis-shaped or non-finite tensor, and
      of every one of whole numbers, in order; empty if all fit. One for all if no name fits, as of
      `find_prefix`.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, is_kernel = _published_name(path)
        leaves[name] = (_published_shape(leaf, is_kernel), leaf.dtype)
    misfits = find_prefix(leaves, tensors.keys())
    if misfits:
        return misfits
    for name, (shape, dtype) in leaves.items():
        if name not in tensors:
            misfits.append((name, f"missing, the model needs {shape}"))
        elif problem := _problem(tensors[name], shape, dtype):
            misfits.append((name, problem))
    for name in tensors.keys() - leaves.keys():
        if not any(re.fullmatch(pattern, name) for pattern in ignore):
            misfits.append((name, f"unexpected, of shape {tuple(tensors[name].shape)}"))
    return sorted(misfits)


def _problem(value: Any, shape: tuple[int, ...], dtype: Any) -> str | None:
    if tuple(value.shape) != shape:
        return f"has shape {tuple(value.shape)}, the model needs {shape}"
    if jnp.issubdtype(dtype, jnp.floating) and not jnp.issubdtype(value.dtype, jnp.floating):
        return f"is of {value.dtype}, the model needs numbers of {dtype}"
    with np.errstate(over="ignore"):
        lost = value.size - np.isfinite(value.astype(dtype, copy=False)).sum()
    return f"has values that are not finite in {dtype}: {lost} of {value.size}" if lost else None


def from_torch(
    params: Any,
    tensors: Mapping[str, np.ndarray],
    *,
    ignore: Iterable[str] = (),
    put: Callable[[np.ndarray, int], Any] | None = None,
):
    """Published tensors as parameters.

    Args:
      params: the parameters (arrays or `jax.ShapeDtypeStruct`), such as of
        `building.create` or `building.abstract`. Only names, shapes and dtypes are read.
      tensors: arrays by published name, in PyTorch's layouts.
      ignore: regular expressions of published names that may be left over.
      put: (array, number of the leaf) -> what takes the leaf's place, such as the array on its
        devices, before the next one is read.

    Returns:
      The same tree with NumPy arrays of the parameters' dtypes, or what `put` made of them.

    Raises:
      WeightMismatchError: names or shapes differ, values are not finite or no floating point
        numbers; lists all.
    """
    misfits = find_misfits(params, tensors, ignore=ignore)
    if misfits:
        raise WeightMismatchError(misfits)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    values = []
    for number, (path, leaf) in enumerate(leaves):
        name, is_kernel = _published_name(path)
        value = tensors[name]
        if is_kernel:
            value = np.transpose(value, np.argsort(_torch_axes(value.ndim)))
        value = value.astype(leaf.dtype, order="C")
        values.append(put(value, number) if put else value)
    return jax.tree_util.tree_unflatten(treedef, values)


def to_torch(params: Any) -> dict[str, np.ndarray]:
    """Parameters as arrays in PyTorch's layouts, by published name; the inverse of `from_torch`."""
    tensors = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name, is_kernel = _published_name(path)
        value = np.asarray(leaf)
        tensors[name] = value.transpose(_torch_axes(value.ndim)) if is_kernel else value
    return tensors


def save_model(folder: str | os.PathLike, config: Mapping[str, Any], params: Any) -> None:
    """Writes model.safetensors (published names) and config.json into a folder, made if missing.

    Args:
      folder: where to write; each file is replaced whole or not at all.
      config: the model's config as JSON types.
      params: its parameters.
    """
    folder = as_path(folder)
    json.dumps(config)  # what is no JSON is refused before anything is written
    tensors = to_torch(params)
    make_folder(folder)
    write_safetensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)


def save_raw(folder: str | os.PathLike, params: Any) -> None:
    """Writes parameters as they were trained, without averaging, beside `save_model`'s files.

    Args:
      folder: made if missing; gets raw.safetensors, whole or not at all.
      params: the parameters.
    """
    folder = as_path(folder)
    make_folder(folder)
    write_safetensors(folder / "raw.safetensors", to_torch(params))


@contextmanager
def open_model(
    folder: str | os.PathLike, file: str = "model.safetensors"
) -> Iterator[tuple[dict[str, Any], Mapping[str, np.ndarray]]]:
    """Opens a folder of `save_model`, each of whose tensors is read when it is asked for.

    Args:
      folder: the folder.
      file: the weights in it; "raw.safetensors" are those of `save_raw`.

    Yields:
      The config as JSON types, and the published tensors by name.

    Raises:
      WeightFileError: a file is missing or damaged; names it and the reason.
    """
    folder = as_path(folder)
    path = folder / "config.json"
    try:
        config = read_json(path)
    except ValueError as error:
        raise WeightFileError(str(error)) from error
    with open_tensors(folder / file) as tensors:
        yield config, tensors
