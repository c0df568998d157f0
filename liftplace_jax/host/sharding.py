"""A mesh of devices, and where every array lives on it.

Parameters follow regular expressions on their names; what no rule matches is replicated. Axes:
"data" splits the batch; "fsdp" splits the batch and, by rule, parameters.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
Device = Any  # `jax.Device`, which is no type to those that check types
Rules = Sequence[tuple[str, Sequence[str | None]]]
Batch = Mapping[str, np.ndarray]


def make_mesh(shape: Mapping[str, int], devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh with axes "data" and "fsdp".

    Args:
      shape: axis -> size; one of them may be -1, the rest of the devices.
      devices: default all.

    Raises:
      ValueError: unknown axis, or the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ValueError(f"mesh: unknown axes {unknown}; the axes are {list(AXES)}")
    sizes = [int(shape.get(axis, 1)) for axis in AXES]
    if sizes.count(-1) == 1:
        rest = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        wanted = " x ".join(f"{a}={shape.get(a, 1)}" for a in AXES)
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices")
    types = (AxisType.Auto,) * len(AXES)
    if jax.process_count() == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return Mesh(np.array(by_process(devices)).reshape(sizes), AXES, axis_types=types)


def by_process(devices: Sequence[Device]) -> list[Device]:
    """In the order of processes: each reads a contiguous part of every batch (see `data`).

    A TPU pod's devices are numbered across its hosts.
    """
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def parameter_name(path: tuple[Any, ...]) -> str:
    """A leaf's path in a tree of parameters as a name, such as "down.0.block.1.conv1.kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def tree_shardings(tree: Any, rules: Rules, mesh: Mesh, prefix: str = "") -> Any:
    """A sharding for each leaf of a tree of arrays or `jax.ShapeDtypeStruct`.

    Args:
      tree: names are the paths of its leaves, joined by dots, for example
        "params.student.down.0.block.1.conv1.kernel".
      rules: (regular expression, partition) pairs; the first whose expression is found in a name
        decides. A partition names for each dimension, from the last backwards, a mesh axis or
        None: ("fsdp",) splits the last dimension. A dimension that its axis does not divide stays
        whole.
      mesh: of `make_mesh`.
      prefix: of all names, such as "params.student." for what will be there in a `TrainState`.
    """

    def place(path, leaf):
        name = prefix + parameter_name(path)
        found = (partition for pattern, partition in rules if re.search(pattern, name))
        return NamedSharding(mesh, _spec(leaf.shape, next(found, ()), mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def _spec(shape: tuple[int, ...], partition: Sequence[str | None], mesh: Mesh) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)
    for back, axis in enumerate(reversed(partition), start=1):
        if back <= len(spec) and axis and shape[-back] % mesh.shape[axis] == 0:
            spec[-back] = axis
    return PartitionSpec(*spec)


def idle_rules(tree: Any, rules: Rules, mesh: Mesh) -> Iterator[str]:
    """Rules that split nothing of a tree although they should; a line for each.

    Args:
      tree, rules, mesh: as of `tree_shardings`.
    """
    leaves = [(parameter_name(path), x.shape) for path, x in jax.tree.leaves_with_path(tree)]
    free = dict(leaves)  # what no rule has decided yet
    for number, (pattern, partition) in enumerate(rules):
        found = [name for name, _ in leaves if re.search(pattern, name)]
        own = {name: free.pop(name) for name in found if name in free}
        splits = [a for shape in own.values() for a in _spec(shape, partition, mesh) if a]
        sizes = {axis: mesh.shape[axis] for axis in partition if axis}
        if not found:
            why = "it is found in no name"
        elif not own:
            why = "rules before it decide all that it is found in"
        elif sizes and set(sizes.values()) == {1}:
            why = f"the mesh has one device along {sorted(sizes)}"
        elif sizes and not any(sizes[axis] > 1 for axis in splits):
            why = f"the axes, {sizes}, divide no dimension of the {len(own)} arrays it is found in"
        else:
            continue
        yield f"config.sharding_rules[{number}] {(pattern, tuple(partition))} splits nothing: {why}"


def check_rules(rules: Any) -> None:
    """Checks what `tree_shardings` takes as rules.

    Raises:
      ValueError: names config.sharding_rules and the first rule that is none.
    """
    for number, rule in enumerate(rules):
        name = f"config.sharding_rules[{number}]"
        pair = isinstance(rule, list | tuple) and len(rule) == 2 and isinstance(rule[0], str)
        if not pair or not isinstance(rule[1], list | tuple):
            raise ValueError(
                f"{name} must be (regular expression, partition), such as "
                f"('kernel', ('fsdp',)), got {rule!r}"
            )
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(f"{name}: {rule[0]!r} is no regular expression: {error}") from error
        axes = [axis for axis in rule[1] if axis is not None]
        if any(axis not in AXES for axis in axes) or len(axes) != len(set(axes)):
            raise ValueError(
                f"{name}: a partition names for each dimension None or an axis, one of "
                f"{list(AXES)}, each axis once at most; got {rule[1]!r}"
            )


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, such as just read ones, on the mesh.

    Each process puts its own parts there and nothing is sent, where `jax.device_put` would send
    all of them to compare them.

    Args:
      tree: arrays, the same in all processes; those that are in their place stay there.
      shardings: tree of shardings.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x, sharding):
        if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)

    return jax.tree.map(put, tree, shardings)


def gathered(tree: Any) -> Any:
    """A tree whose arrays can be read in every process: parts that only others have are fetched."""
    return jax.tree.map(
        lambda x: (
            x
            if x.is_fully_addressable or x.is_fully_replicated
            else multihost_utils.process_allgather(x, tiled=True)
        ),
        tree,
    )


def global_batches(batches: Iterable[Batch], mesh: Mesh) -> Generator[Any]:
    """As `placed_ahead`, over all devices of a mesh."""
    return placed_ahead(batches, batch_sharding(mesh))


def placed_ahead(batches: Iterable[Batch], sharding: NamedSharding) -> Generator[Any]:
    """Each process's part of every batch as global arrays, one batch ahead.

    While a batch is in use, a thread waits for the next one and puts it on the devices. Its
    `close()` stops the thread and closes the batches; an error of theirs is raised by the `next`
    that would have had the batch.

    Args:
      batches: an iterable, of which no one else takes.
      sharding: of the batch axis.
    """
    batches = iter(batches)

    def place():
        batch = next(batches, None)
        if batch is None:
            return None
        return {
            name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()
        }

    try:
        with ThreadPoolExecutor(1, thread_name_prefix="placing") as thread:
            ahead = thread.submit(place)
            while True:
                ready = [ahead.result()]
                if ready[0] is None:
                    return
                ahead = thread.submit(place)
                yield ready.pop()  # and keep no hold of it
    finally:
        close = getattr(batches, "close", None)  # of generators, and of what is like them
        if close is not None:
            close()
