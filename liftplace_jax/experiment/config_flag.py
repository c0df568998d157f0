"""The flag --config: a config file, arguments after its colon, and changes of single fields.

    --config=FILE.py:KEY=VALUE,...  --config.FIELD=VALUE

Whatever is wrong with the file is said in one line. None unsets a field, and "0+1+2" is a tuple of
numbers, after the colon as in a field.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from liftplace_jax.host import flags as host_flags

flags.disclaim_key_flags()  # they are those of the command

HELP = "config file, FILE.py[:key=value,...]"
_MODULE = "config_config"
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class ConfigError(flags.Error):
    """A config file that cannot be used; absl hands it on as it is."""


def define_config_flag(help_text: str = HELP) -> flags.FlagHolder:
    """Defines --config; its value is the config, with what --config.FIELD=VALUE changes."""
    holder = config_flags.DEFINE_config_file("config", None, help_text)
    host_flags.describe_config = describe
    flags.FLAGS["config"].parser = _FileParser()
    parsers = {
        int: flags.IntegerParser(),
        float: flags.FloatParser(),
        bool: flags.BooleanParser(),
        str: flags.ArgumentParser(),
        tuple: _TupleParser(),
    }
    for kind, parser in parsers.items():
        config_flags.register_flag_parser_for_type(kind, _OrNone(parser))
    return holder


def load_config(text: str) -> ConfigDict:
    """The config of "FILE.py" or "FILE.py:ARGUMENTS".

    Raises:
      ConfigError: there is no such file, it is no config, or the arguments do not suit it.
    """
    if "://" in text:
        raise ConfigError(f"--config={text} must be a file of this machine")
    path, colon, arg = text.partition(":")
    get_config = getattr(load_module(path), "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{path} is no config file: it has no function get_config(arg=None)")
    if colon and not inspect.signature(get_config).parameters:
        raise ConfigError(f"{path} takes no arguments after a colon, got {arg!r}")
    try:
        config = get_config(arg) if colon else get_config()
    except (Exception, SystemExit) as error:
        raise ConfigError(_complaint(error, path)) from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"{path}: get_config must return a ConfigDict, not {kind}")
    return config


def load_module(path: str) -> ModuleType:
    """Runs a config file.

    Raises:
      ConfigError: it cannot be read, is no Python, or raises.
    """
    file = Path(path).expanduser()
    if not path:
        raise ConfigError("--config is empty: it must be a config file, such as configs/digits.py")
    if file.is_dir():
        raise ConfigError(f"--config={path} is a folder: give one of its .py files")
    if not file.exists():
        others = [other.name for other in file.parent.glob("*.py")]
        near = difflib.get_close_matches(file.name, others, 1, cutoff=0.75)
        meant = f"; did you mean {file.parent / near[0]}?" if near else ""
        raise ConfigError(f"--config={path}: there is no such file{meant}")
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"--config={path} is no Python file (.py) with a function get_config")
    try:
        code = compile(file.read_bytes(), path, "exec")
    except OSError as error:
        raise ConfigError(f"--config={path} cannot be read: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        number = getattr(error, "lineno", None)
        where = f", line {number}" if number else ""
        said = getattr(error, "msg", None) or error
        raise ConfigError(f"{path}{where} is no Python: {said}") from error
    module = ModuleType(_MODULE)
    module.__file__ = str(file)
    sys.modules[_MODULE] = module  # where dataclasses look for their module
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        raise ConfigError(_complaint(error, path)) from error
    return module


def _complaint(error: BaseException, path: str) -> str:
    """One line: what was raised, and by which line of the config file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    said = " ".join(str(error).split())
    # A ValueError is said to people; any other says more with its name.
    if not isinstance(error, ValueError) or not said:
        said = f"{type(error).__name__}: {said}"
    return f"{said} ({path}" + (f", line {lines[-1]})" if lines else ")")


class _FileParser(flags.ArgumentParser):
    """Of FILE.py[:ARGUMENTS]; what is wrong is said at once, not when the config is first used."""

    def parse(self, path: str) -> ConfigDict:
        config = load_config(path)
        config.lock()
        return config

    def flag_type(self) -> str:
        return "config file"


class _OrNone(flags.ArgumentParser):
    """What another parser takes, and None."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        if argument == "None":
            return None
        try:
            return self._parser.parse(argument)
        except ValueError as error:
            kind = {"int": "a whole number", "float": "a number", "bool": "true or false"}
            wanted = kind.get(self._parser.flag_type())
            raise ValueError(f"want {wanted}, got {argument!r}" if wanted else error) from error

    def flag_type(self) -> str:
        return self._parser.flag_type()


class _TupleParser(flags.ArgumentParser):
    """Python's spelling of a tuple, or numbers joined by "+", as after the colon; or one item."""

    def parse(self, argument: Any) -> tuple:
        if not isinstance(argument, str):
            return tuple(argument)
        parts = argument.split("+")
        if all(_NUMBER.fullmatch(part.strip()) for part in parts):
            return tuple(ast.literal_eval(part.strip()) for part in parts)
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError) as error:
            if re.fullmatch(r"[\w./-]+", argument):
                return (argument,)
            raise ValueError('want a tuple, such as 0+1+2 or \'("a", "b")\'') from error
        return tuple(value) if isinstance(value, list | tuple) else (value,)

    def flag_type(self) -> str:
        return "tuple"


def describe(text: str) -> str:
    """What --help says of a config: the file's own text, and every field with its value and range.

    Raises:
      ConfigError: as of `load_config`.
    """
    from liftplace_jax.experiment.fields import RANGES, leaves

    config = load_config(text)
    rows = []
    for field, value in leaves(config, model=True):
        limits = f"   ({RANGES[field]})" if field in RANGES else ""
        rows.append(f"  --config.{field}={value}{limits}")
    own = (sys.modules[_MODULE].__doc__ or "").strip()
    return f"{text}:\n\n{own}\n\nIts fields:\n" + "\n".join(rows)
