"""Students of fewer blocks: which of a teacher's layers stay, and the tensors they begin with.

Source: BK-SDM (Kim et al. 2024) and "BK_SDM_EXP/src/kd_t2i.py", copy_weight_from_teacher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from liftplace_jax.families.sd_unet.config import Block, SDUNetConfig

STUDENTS = ("base", "small", "tiny", "extreme")
"""The published ones: each is the one before it, with less."""
MIDDLE = "mid_block"
_NAME = re.compile(r"(mid_block)|(down|up)_blocks\.(\d+)(?:\.(\d+))?")


def kept_layers(student: str, teacher: SDUNetConfig) -> tuple[str, ...]:
    """The layers of a teacher that stay in a published student, or in one that is written down.

    A layer is "down_blocks.<i>.<j>" or "up_blocks.<i>.<j>", which is resnets.<j> and
    attentions.<j> of that block, or "mid_block".

    Args:
      student: "base": the first layer of each block on the way down, the first and the last on the
        way up; "small": without the middle; "tiny": also without the last level; "extreme": also
        without the last but one. Or names of layers that stay, joined by commas or plus signs; the
        name of a block stands for all its layers.
      teacher: the teacher's config.

    Returns:
      Names of layers, in execution order.

    Raises:
      ValueError: no such student, layer or level; names it.
    """
    blocks = {block.name: block for block in teacher.blocks()}
    if student not in STUDENTS:
        return _read_layers(student, blocks)
    levels = len(teacher.widths)
    lost = max(0, STUDENTS.index(student) - 1)
    if lost >= levels:
        raise ValueError(f"student {student!r} has {lost} levels less, the teacher has {levels}")
    kept = [f"down_blocks.{level}.0" for level in range(levels - lost)]
    if student == "base" and teacher.mid_block:
        kept.append(MIDDLE)
    for index in range(lost, levels):
        last = len(blocks[f"up_blocks.{index}"].inputs) - 1
        kept += [f"up_blocks.{index}.{layer}" for layer in (0, last)]
    return tuple(kept)


def _read_layers(text: str, blocks: Mapping[str, Block]) -> tuple[str, ...]:
    kept = set()
    for name in re.split(r"[,+\s]+", text.strip(" ,+")):
        match = _NAME.fullmatch(name)
        if not match:
            raise ValueError(
                f"student must be one of {list(STUDENTS)}, or layers that stay such as "
                f"'down_blocks.0.1,mid_block,up_blocks.3', got {name!r}"
            )
        block = name if match[1] else f"{match[2]}_blocks.{match[3]}"
        layers = range(len(blocks[block].inputs)) if block in blocks else ()
        if not layers or (match[4] and int(match[4]) not in layers):
            has = f"{block} has {len(layers)} layers" if layers else f"it has {list(blocks)}"
            raise ValueError(f"student: the teacher has no {name}: {has}")
        if match[1]:
            kept.add(MIDDLE)
        else:
            kept |= {f"{block}.{layer}" for layer in ([int(match[4])] if match[4] else layers)}
    order = [
        MIDDLE if name == MIDDLE else f"{name}.{layer}"
        for name, block in blocks.items()
        for layer in range(len(block.inputs))
    ]
    return tuple(name for name in dict.fromkeys(order) if name in kept)


def student_config(teacher: SDUNetConfig, kept: Sequence[str]) -> SDUNetConfig:
    """The architecture of the student that has the layers `kept` alone.

    Args:
      teacher: the teacher's config.
      kept: as of `kept_layers`.

    Raises:
      ValueError: the layers make no U-Net, nothing is left out, or widths do not fit; names the
        level or the layer.
    """
    levels = len(teacher.widths)
    down, up = _by_block(kept, "down"), _by_block(kept, "up")
    layers = [len(down.get(level, ())) for level in range(levels)]
    few = next((level for level, count in enumerate(layers) if not count), levels)
    if not few or any(layers[few:]):
        raise ValueError(
            f"student: no layer of down_blocks.{few} stays, so no other level can hang on it: only "
            "the last levels can be left out whole"
        )
    for level in range(levels):
        name, has = f"up_blocks.{levels - 1 - level}", len(up.get(levels - 1 - level, ()))
        needs = layers[level] + 1 if layers[level] else 0
        if has != needs:
            raise ValueError(
                f"student: {layers[level]} layers of down_blocks.{level} stay, so {needs} of {name}"
                f" must, which takes their outputs, not {has}"
            )
    student = teacher.replace(
        widths=teacher.widths[:few],
        heads=teacher.heads[:few],
        layers=tuple(layers[:few]),
        down_attention=teacher.down_attention[:few],
        up_attention=teacher.up_attention[levels - few :],
        mid_block=MIDDLE in kept,
    )
    if student == teacher:
        raise ValueError("student: all of the teacher's layers stay")
    _check_inputs(student, teacher, kept)
    return student


def _by_block(kept: Sequence[str], way: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in kept:
        match = _NAME.fullmatch(name)
        assert match is not None, "names of the network itself"
        if match[2] == way:
            found.setdefault(int(match[3]), []).append(int(match[4]))
    return found


def _sources(
    student: SDUNetConfig, teacher: SDUNetConfig, kept: Sequence[str]
) -> Iterator[tuple[Block, int, Block, int]]:
    """(the student's block, layer in it, the teacher's block, layer in it) of all that stay."""
    theirs = {block.name: block for block in teacher.blocks()}
    more = len(teacher.widths) - len(student.widths)
    layers = {way: _by_block(kept, way) for way in ("down", "up")}
    for block in student.blocks():
        if block.name == MIDDLE:
            yield from ((block, layer, theirs[MIDDLE], layer) for layer in range(2))
            continue
        way, number = block.name.split("_blocks.")
        number = int(number) + (more if way == "up" else 0)
        for layer, source in enumerate(layers[way][number]):
            yield block, layer, theirs[f"{way}_blocks.{number}"], source


def _check_inputs(student: SDUNetConfig, teacher: SDUNetConfig, kept: Sequence[str]) -> None:
    for block, layer, source, number in _sources(student, teacher, kept):
        if (block.width, block.heads) != (source.width, source.heads):  # the middle's alone
            raise ValueError(
                f"student: {source.name} has {source.width} channels and {source.heads} heads, the "
                f"last level that stays {block.width} and {block.heads}: leave {source.name} out"
            )
        (into, skip), (needs, takes) = block.inputs[layer], source.inputs[number]
        name = f"{source.name}.{number}"
        lost = block.name == "up_blocks.0" and not layer and into < needs
        if skip != takes or (into != needs and not lost):
            raise ValueError(
                f"student: {name} of the teacher takes {needs} channels of the layer before it and "
                f"{takes} of a skip, in the student it would get {into} and {skip}: keep another "
                f"layer of {source.name} at this place (the first one where widths change, the "
                "last one for the last skip)"
            )
        if (into + skip == block.width) != (needs + takes == source.width):
            raise ValueError(
                f"student: {name} would get as many channels as it has, and the teacher's has "
                "others: it has a conv_shortcut that does not fit"
            )


def copied_from(
    student: SDUNetConfig, teacher: SDUNetConfig, kept: Sequence[str]
) -> dict[str, tuple[str, np.ndarray | None]]:
    """Where the student's modules come from.

    Args:
      student: of `student_config`.
      teacher: the teacher's config.
      kept: as of `kept_layers`.

    Returns:
      The student's module, of a layer or beside the layers -> (the teacher's module, which of the
      channels that it takes stay; None: all). Only the student's first layer on the way up can
      take fewer, where the levels below it are gone: of the channels from there the first stay.
    """
    found: dict[str, tuple[str, np.ndarray | None]] = {
        name: (name, None) for name in ("conv_in", "time_embedding", "conv_norm_out", "conv_out")
    }
    for block, layer, source, number in _sources(student, teacher, kept):
        (into, skip), (needs, _) = block.inputs[layer], source.inputs[number]
        stay = None
        if into != needs:
            stay = np.concatenate([np.arange(into), needs + np.arange(skip)])
        found[f"{block.name}.resnets.{layer}"] = (f"{source.name}.resnets.{number}", stay)
        if layer < block.attentions:
            found[f"{block.name}.attentions.{layer}"] = (f"{source.name}.attentions.{number}", None)
        if block.resample:
            found[f"{block.name}.{block.resample}"] = (f"{source.name}.{block.resample}", None)
    return found


_MODULE = re.compile(r"(?:\w+_blocks\.\d+|mid_block)\.(?:(?:resnets|attentions)\.\d+|\w+)|\w+")
_INPUTS = {"norm1.weight": 0, "norm1.bias": 0, "conv1.weight": 1, "conv_shortcut.weight": 1}
"""Tensors of a residual block that have an axis of its input channels."""


def prune_blocks(
    teacher: SDUNetConfig, tensors: Mapping[str, np.ndarray], kept: Sequence[str]
) -> tuple[SDUNetConfig, dict[str, np.ndarray], list[str]]:
    """Leaves layers out.

    Args:
      teacher: the teacher's config.
      tensors: its weights, by published name, in PyTorch's layouts.
      kept: as of `kept_layers`.

    Returns:
      (the student's config, its weights: the teacher's arrays, names of those that were cut to
      fewer input channels).

    Raises:
      ValueError: see `student_config`; or a tensor is missing.
    """
    student = student_config(teacher, kept)
    modules: dict[str, list[str]] = {}
    for name in tensors:
        match = _MODULE.match(name)
        assert match is not None, "every name has a module"
        modules.setdefault(match[0], []).append(name)
    result, cuts = {}, []
    for module, (source, stay) in copied_from(student, teacher, kept).items():
        if source not in modules:
            raise ValueError(f"the weights lack {source!r}, which this architecture has")
        for name in modules[source]:
            leaf, value = name.removeprefix(f"{source}."), tensors[name]
            if stay is not None and leaf in _INPUTS:
                value = np.take(value, stay, axis=_INPUTS[leaf])
                cuts.append(f"{module}.{leaf}")
            result[f"{module}.{leaf}"] = value
    return student, result, cuts
