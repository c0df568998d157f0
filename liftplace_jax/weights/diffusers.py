"""Networks of diffusers and ours: the contract, and what reading all of them needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from liftplace_jax.host.outside import shown

Tensors = Mapping[str, np.ndarray]
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MOST_PROBLEMS = 40
"""Of a config in a message."""


class DiffusersError(ValueError):
    """A folder, or a network, that is not in both diffusers and this library; lists why."""


class Format(NamedTuple):
    """How networks of diffusers and those of a family of ours are carried into each other.

    Attributes:
      classes: diffusers' names of them, "_class_name"; the first is the one that is written.
      part: name of the folder that holds the network in a pipeline's.
      telltale: name of a tensor by which weights of diffusers can be told from published ones;
        None: they are the published ones.
      config_from: fields of config.json -> our config.
      tensors_from: (that config, their tensors) -> (config, our tensors by published name); only
        the tensors may tell all of the config.
      config_to: our config -> their fields.
      tensors_to: (our config, our tensors) -> theirs.
      pipeline: the content of model_index.json of a pipeline of such networks, but for the network
        and the scheduler; None: pipelines of them are not put together here.
    """

    classes: tuple[str, ...]
    part: str
    telltale: str | None
    config_from: Callable[[Mapping[str, Any]], Any]
    tensors_from: Callable[[Any, Tensors], tuple[Any, dict[str, np.ndarray]]]
    config_to: Callable[[Any], dict[str, Any]]
    tensors_to: Callable[[Any, Tensors], dict[str, np.ndarray]]
    pipeline: Mapping[str, Any] | None = None


def find_problems(
    fields: Mapping[str, Any],
    fixed: Mapping[str, tuple[Any, tuple[Any, ...]]],
    others: Collection[str],
) -> list[str]:
    """What keeps fields of diffusers from being a network of ours.

    Args:
      fields: the content of a config.json.
      fixed: field -> (diffusers' default, the values that it may have).
      others: fields that may have any value.

    Returns:
      A line for each field of another value, and for each that is unknown.
    """
    problems = []
    for name, (default, allowed) in fixed.items():
        value = fields.get(name, default)
        if value not in allowed:
            absent = "" if name in fields else " (the default, as the field is absent)"
            problems.append(f"{name} {shown(value)}{absent}: must be {allowed[0]!r}")
    known = {*fixed, *others}
    for name in sorted(name for name in fields if name not in known and name[:1] != "_"):
        problems.append(f"{name} {shown(fields[name])}: not a field known here")
    return problems


def is_count(value: Any) -> bool:
    """Whether a field is an integer above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def in_their_words(message: str, names: Mapping[str, str]) -> str:
    """A message about a config of ours, with diffusers' name of the field that it begins with.

    Args:
      message: begins with a name of ours.
      names: ours -> theirs.
    """
    ours = next((name for name in names if re.match(rf"{re.escape(name)}(?!\w)", message)), None)
    return message if ours is None else f"{message} ({ours} is diffusers' {names[ours]})"


def current_name(name: str) -> str:
    """A tensor's name since diffusers 0.12, where those of attention changed."""
    return re.sub(
        rf"\.({'|'.join(_OLD_ATTENTION)})\.(weight|bias)$",
        lambda match: f".{_OLD_ATTENTION[match[1]]}.{match[2]}",
        name,
    )
