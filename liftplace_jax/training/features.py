"""Which features of student and teacher are compared, and the adapters between them."""

from __future__ import annotations

import json
from collections.abc import Mapping

import jax

from liftplace_jax.losses import init_adapters
from liftplace_jax.nn.network import Network, example_inputs, make_apply


def read_layer_map(text: str | None) -> dict[str, str] | None:
    """config.distill.layer_map as {student feature: teacher feature}, None if not set.

    Raises:
      ValueError: it is no JSON object of names.
    """
    if text is None:
        return None
    try:
        layer_map = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"config.distill.layer_map is no JSON: {error}: {text!r}") from error
    names = [*layer_map, *layer_map.values()] if isinstance(layer_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            'config.distill.layer_map must be like {"student feature": "teacher feature"}, '
            f"got {text!r}"
        )
    return layer_map


def match_features(
    student: Network, teacher: Network, layer_map: Mapping[str, str] | None, adapters: bool
) -> dict[str, tuple[str, int, int]]:
    """Checks a layer map on shapes, before any training.

    Args:
      student: the student.
      teacher: its teacher.
      layer_map: student feature -> teacher feature; None: the published one of their depths, or
        all features by name.
      adapters: whether widths may differ.

    Returns:
      Student feature -> (teacher feature, the student's width, the teacher's width).

    Raises:
      ValueError: a layer of the map does not exist, or shapes do not fit.
    """
    features = [_feature_shapes(network) for network in (student, teacher)]
    pairs: Mapping[str, str] = {name: name for name in features[0]}
    if layer_map is not None:
        pairs = layer_map
    elif published := student.config.layer_map(teacher.config):
        pairs = published
    for s, t in pairs.items():
        for side, name, known in (("student", s, features[0]), ("teacher", t, features[1])):
            if name not in known:
                raise ValueError(
                    f"config.distill.layer_map: the {side} has no feature {name!r}; "
                    f"it has {sorted(known)}"
                )
        last = -1 if adapters else None
        if features[0][s][1:last] != features[1][t][1:last]:
            raise ValueError(
                f"config.distill.layer_map: {s!r} is {features[0][s][1:]}, the teacher's {t!r} "
                f"{features[1][t][1:]}; "
                + (
                    "only widths may differ"
                    if adapters
                    else "without config.distill.feature.adapters they must be equal"
                )
            )
    return {s: (t, features[0][s][-1], features[1][t][-1]) for s, t in pairs.items()}


def _feature_shapes(network: Network) -> dict[str, tuple[int, ...]]:
    config, apply = network.config, make_apply(network.graphdef)
    shapes = jax.eval_shape(
        lambda params, x, t, cond: apply(params, x, t, True, None, cond)[1],
        network.params,
        *example_inputs(config),
    )
    return {name: feature.shape for name, feature in shapes.items()}


def make_adapters(
    student: Network, teacher: Network, layer_map: Mapping[str, str] | None, seed: int
) -> dict[str, jax.Array]:
    """Adapters between features, student layer -> matrix; see `match_features`."""
    matched = match_features(student, teacher, layer_map, adapters=True)
    return init_adapters(
        jax.random.key(seed),
        {s: width for s, (_, width, _) in matched.items()},
        {t: width for t, _, width in matched.values()},
        layer_map={s: t for s, (t, _, _) in matched.items()},
    )
