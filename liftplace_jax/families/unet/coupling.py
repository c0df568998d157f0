"""Which channels of a U-Net must be pruned together, and in which order the published code does.

A `ChannelGroup` is one set of channels that several layers share: through residual sums, the time
embedding's sum, normalisation, attention's products and concatenations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from liftplace_jax.families.unet.config import Node, UNetConfig

Layout = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Slice:
    """A stretch of a parameter's channels that belongs to a group.

    Attributes:
      layer: module name.
      offset: first channel of the stretch, in the unpruned layer.
    """

    layer: str
    offset: int


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels that are kept or removed together.

    Attributes:
      root: the layer at which the published code starts the group.
      width: number of channels.
      outputs: layers (convolution, linear) whose output channels these are.
      inputs: stretches of layers' input channels.
      norms: stretches of normalisation layers.
    """

    root: str
    width: int
    outputs: tuple[str, ...]
    inputs: tuple[Slice, ...]
    norms: tuple[Slice, ...]


def channel_groups(config: UNetConfig) -> list[ChannelGroup]:
    """All prunable groups of an unpruned or pruned U-Net, in the published pruning order.

    Source: order and coupling as of Diff_Pruning_EXP/torch_pruning (dependency graph from the
    network's output backwards, conv_out ignored).
    """
    return _Coupling(config).groups()


class _Coupling:
    """Union-find over layers' outputs; every activation is a layout, a tuple of such outputs."""

    def __init__(self, config: UNetConfig):
        self.config = config
        self.parent: dict[str, str] = {}
        self.width: dict[str, int] = {}
        self.layers: dict[str, Layout] = {}  # convolutions and linears -> layout of their input
        self.norms: dict[str, Layout] = {}
        widths = dict(config.widths)
        self._layer("temb.dense.0", (), widths["temb.dense.0"])
        temb = self._layer("temb.dense.1", ("temb.dense.0",), widths["temb.dense.1"])
        layouts: dict[str, Layout] = {}
        for node in config.block_plan():
            source = tuple(part for name in node.inputs for part in layouts[name])
            layouts[node.name] = self._node(node, source, temb)
        self.norms["norm_out"] = layouts[node.name]
        self._layer("conv_out", layouts[node.name], config.out_channels)

    def _layer(self, name: str, source: Layout, width: int) -> Layout:
        self.layers[name], self.width[name], self.parent[name] = source, width, name
        return (name,)

    def _node(self, node: Node, source: Layout, temb: Layout) -> Layout:
        name = node.name
        if node.kind == "block":
            self.norms[f"{name}.norm1"] = source
            hidden = self._layer(f"{name}.conv1", source, node.hidden_width)
            self._unite(hidden, self._layer(f"{name}.temb_proj", temb, node.hidden_width))
            self.norms[f"{name}.norm2"] = hidden
            out = self._layer(f"{name}.conv2", hidden, node.out_width)
            if node.shortcut:
                source = self._layer(f"{name}.nin_shortcut", source, node.out_width)
            self._unite(source, out)
            return source
        if node.kind == "attention":
            self.norms[f"{name}.norm"] = source
            q, k, v = (self._layer(f"{name}.{n}", source, node.hidden_width) for n in "qkv")
            self._unite(q, k)
            self._unite(q, v)
            self._unite(source, self._layer(f"{name}.proj_out", q, node.out_width))
            return source
        if node.kind == "conv_in" or self.config.resamp_with_conv:
            return self._layer(name, source, node.out_width)
        return source

    def _find(self, name: str) -> str:
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def _unite(self, a: Layout, b: Layout) -> None:
        (first,), (second,) = a, b
        self.parent[self._find(second)] = self._find(first)

    def _slices(self, layouts: dict[str, Layout], key: str) -> Iterator[Slice]:
        for layer, layout in layouts.items():
            offset = 0
            for part in layout:
                if self._find(part) == key:
                    yield Slice(layer, offset)
                offset += self.width[part]

    def groups(self) -> list[ChannelGroup]:
        result, done = [], {self._find("conv_out")}
        for root in traversal_order(self.config):
            key = self._find(root)
            if key in done:
                continue
            done.add(key)
            result.append(
                ChannelGroup(
                    root=root,
                    width=self.width[root],
                    outputs=tuple(name for name in self.layers if self._find(name) == key),
                    inputs=tuple(self._slices(self.layers, key)),
                    norms=tuple(self._slices(self.norms, key)),
                )
            )
        return result


def traversal_order(config: UNetConfig) -> list[str]:
    """Layers in the order in which a depth-first walk back from the output first meets them.

    The walk is that of the published tracer over PyTorch's graph: a stack, the last input first,
    and a layer counts as met when its consumer is visited. Later importances are taken on tensors
    that earlier groups have pruned already, so this order is part of the result.
    """
    inputs = _operations(config)
    met, stack, visited = ["conv_out"], ["conv_out"], set()
    while stack:
        operation = stack.pop()
        if operation in visited:
            continue
        visited.add(operation)
        for source in inputs[operation]:
            if source not in met:
                met.append(source)
            stack.append(source)
    return [name for name in met if not name.startswith("*")]


def _operations(config: UNetConfig) -> dict[str, list[str]]:
    """Operation -> its inputs, in PyTorch's order; names with "*" stand for no layer.

    Normalisation and activation have one input and change no order, so they are left out; sums,
    concatenations and the reshapes of attention matter.
    """
    graph = {"temb.dense.0": [], "temb.dense.1": ["temb.dense.0"]}
    output = {}
    for node in config.block_plan():
        name, out = node.name, f"*{node.name}"
        sources = [output[source] for source in node.inputs]
        if len(sources) > 1:
            graph[f"{out}.cat"] = sources
            sources = [f"{out}.cat"]
        if node.kind == "block":
            graph[f"{name}.conv1"] = sources
            graph[f"{name}.temb_proj"] = ["temb.dense.1"]
            graph[f"{out}.unsqueeze"] = [f"{name}.temb_proj"]
            graph[f"{out}.hidden"] = [f"{name}.conv1", f"{out}.unsqueeze"]
            graph[f"{name}.conv2"] = [f"{out}.hidden"]
            if node.shortcut:
                graph[f"{name}.nin_shortcut"] = sources
                sources = [f"{name}.nin_shortcut"]
            graph[out] = [*sources, f"{name}.conv2"]
        elif node.kind == "attention":
            for part in "qkv":
                graph[f"{name}.{part}"] = sources
                graph[f"{out}.{part}"] = [f"{name}.{part}"]
            graph[f"{out}.softmax"] = [f"{out}.q", f"{out}.k"]
            graph[f"{out}.bmm"] = [f"{out}.v", f"{out}.softmax"]
            graph[f"{name}.proj_out"] = [f"{out}.bmm"]
            graph[out] = [*sources, f"{name}.proj_out"]
        elif node.kind == "conv_in" or config.resamp_with_conv:
            out = name
            graph[out] = sources
        else:
            graph[out] = sources
        output[name] = out
    graph["conv_out"] = [output[node.name]]
    return graph
