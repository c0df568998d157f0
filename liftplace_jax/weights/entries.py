"""Where in a checkpoint the weights are, and what training put around their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from liftplace_jax.host.outside import shown


class WeightFileError(ValueError):
    """A weight file cannot be used; the message names the file and the reason."""


class EntryError(WeightFileError):
    """A file holds no state dict, or several and the chosen entry is none; names the entries."""


# Modules that others are put into, whose names are no model's.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LEVELS = 2  # below the whole; deeper lies what an optimizer keeps of each parameter


def find_state_dict(path: Path, content: Any, entry: str | int | None) -> dict[str, Any]:
    """The named tensors in what a file holds, without the numbers and texts beside them.

    Args:
      path: of the file, for the error message.
      content: what it holds.
      entry: as of `read_tensors`.

    Raises:
      EntryError: there are none, none at `entry`, or several and entry is None.
    """
    hint = ""
    if isinstance(content, list | tuple):
        hint = " (in the published DDPM checkpoints, 0 is the model and -1 its EMA)"
        entry = int(str(entry)) if re.fullmatch(r"-?\d{1,9}", str(entry)) else entry
    places = _places(content)
    chosen = content if entry is None else _at(content, str(entry))
    if chosen is None and len(places) == 1:  # a part of the only one there is
        chosen = _at(next(iter(places.values())), str(entry))
    found = _places(chosen)
    if entry is not None and "." in found:
        found = {".": found["."]}
    if len(found) == 1:
        return {name: v for name, v in next(iter(found.values())).items() if _is_named(name, v)}
    if found:
        names = [*found] if entry is None else [f"{entry}.{name}" for name in found]
        hint += " ('.' is the tensors beside the others)" if "." in found else ""
        raise EntryError(
            f"{path}: holds several state dicts, {shown(names, 500)}; choose one as entry{hint}"
        )
    where = "" if entry is None else f" at entry {entry!r}"
    if [*places] == ["."]:
        raise EntryError(
            f"{path}: is itself a state dict, it has no entry {entry!r}, and no names that begin so"
        )
    held = f"there are some at {shown([*places], 500)}{hint}" if places else _summary(content)
    raise EntryError(f"{path}: no state dict (named tensors){where}; {held}")


def _places(content: Any) -> dict[Any, Mapping]:
    """Entry -> state dict, of all that a person may mean; "." is the whole."""
    found = {_label(keys): value for keys, value in _search(content, (), _LEVELS)}
    # Random states are tensors too, of whole numbers.
    return {k: v for k, v in found.items() if any(map(_is_float, v.values()))} or found


def _label(keys: tuple[str | int, ...]) -> str | int:
    return keys[0] if len(keys) == 1 else ".".join(map(str, keys)) or "."


def _search(content: Any, keys: tuple, levels: int) -> Iterator[tuple[tuple, Mapping]]:
    if isinstance(content, Mapping):
        tensors = [v for name, v in content.items() if _is_named(name, v) and len(v.shape)]
        if tensors:
            yield keys, content
        # Numbers are those of an optimizer's parameters.
        items = [(name, value) for name, value in content.items() if isinstance(name, str)]
    else:
        items = enumerate(content) if isinstance(content, list | tuple) else ()
    for name, value in items if levels else ():
        yield from _search(value, (*keys, name), levels - 1)


def _is_tensor(value: Any) -> bool:
    own = hasattr(value, "shape") and hasattr(value, "dtype")
    return own and not isinstance(value, np.generic)


def _is_named(name: Any, value: Any) -> bool:
    return isinstance(name, str) and _is_tensor(value)


def _is_float(value: Any) -> bool:
    return _is_tensor(value) and "float" in str(value.dtype) and len(value.shape) > 0


def _at(content: Any, entry: str) -> Any:
    """What lies at an entry: of keys and numbers with dots between, or how names begin."""
    if entry in ("", "."):
        return content
    if isinstance(content, list | tuple):
        head, _, rest = entry.partition(".")
        if re.fullmatch(r"-?\d{1,9}", head) and -len(content) <= int(head) < len(content):
            return _at(content[int(head)], rest)
        return None
    if not isinstance(content, Mapping):
        return None
    for key, value in content.items():
        if entry == str(key):
            return value
        if entry.startswith(f"{key}."):
            found = _at(value, entry[len(str(key)) + 1 :])
            if found is not None:
                return found
    start = f"{entry}."
    return {
        name[len(start) :]: value
        for name, value in content.items()
        if isinstance(name, str) and name.startswith(start)
    } or None


def _summary(content: Any) -> str:
    if isinstance(content, Mapping):
        unnamed = [
            f"{key} is a list of {len(value)} tensors"
            for key, value in content.items()
            if isinstance(value, list | tuple) and value and all(map(_is_tensor, value))
        ]
        if unnamed:
            return (
                f"{unnamed[0]} without names, in an order that only its program knows: copy them "
                "into the model there, and save the model's state_dict()"
            )
        return f"it holds a dictionary of {shown(sorted(map(str, content)), 500)}"
    if isinstance(content, list | tuple):
        return f"it holds a list of {shown([type(item).__name__ for item in content], 500)}"
    return f"it holds a {type(content).__name__}"


def plain_names(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by the names of their model, without those of what it was trained or averaged in.

    Any chain of "module." (DataParallel, AveragedModel with its `n_averaged`) and "_orig_mod."
    (torch.compile) before all names is dropped; "_orig_mod." and FSDP's wherever they are.

    Raises:
      WeightFileError: two tensors get one name.
    """
    names = {
        name: ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        for name in tensors
    }
    while True:
        others = [name for name in names.values() if name != "n_averaged"]
        if not others or not all(name.startswith("module.") for name in others):
            break
        names = {
            theirs: name.removeprefix("module.")
            for theirs, name in names.items()
            if name != "n_averaged"
        }
    found: dict[str, str] = {}
    for theirs, name in names.items():
        if name in found:
            raise WeightFileError(
                f"{path}: {found[name]} and {theirs} are both {name}: save the weights of one model"
            )
        found[name] = theirs
    return {name: tensors[theirs] for name, theirs in found.items()}
