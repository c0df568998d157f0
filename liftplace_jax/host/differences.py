"""What differs between two nested dicts, in lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines "field: old -> new" for all fields of two nested dicts that differ."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def refuse_other(path: Path, wanted: Mapping[str, Any], read: Callable[[], Any]) -> None:
    """Raises a ValueError if a result is there that was made in another way, or anything else.

    Args:
      path: of the result.
      wanted: what the new result will say of how it was made.
      read: what the old one says.
    """
    if not path.exists():
        return
    advice = "choose another --out, delete it, or add --overwrite"
    try:
        found = {key: value for key, value in dict(read()).items() if key in wanted}
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no result of this command: {advice}") from error
    lines = differences(found, wanted)
    if lines:
        raise ValueError(
            f"{path} holds a result of another protocol ({'; '.join(lines)}): {advice}"
        )


def refuse_other_json(path: Path, wanted: Mapping[str, Any]) -> None:
    """`refuse_other` of a JSON file."""
    refuse_other(path, json.loads(json.dumps(wanted)), lambda: json.loads(path.read_text()))
