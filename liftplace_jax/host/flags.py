"""What the commands share: whatever is refused is one line on stderr, and exit status 2."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn, TypeVar

from absl import app, flags, logging

T = TypeVar("T")

# A fault of the program itself is 1. What is neither is worth another try; 134 is also the status
# of a process that JAX ends itself.
EXIT_BAD_INPUT, EXIT_UNREACHABLE, EXIT_INTERRUPTED, EXIT_LOST = 2, 75, 130, 134


REFUSED = (ValueError, RuntimeError, OSError, MemoryError)
"""What is an input's fault, or the machine's: said in one line."""
_HELP = ("help", "h", "?", "helpshort", "helpfull")
CONFIG_HELP = """\
The config, of which a command takes any field:
  --config=FILE.py:KEY=VALUE,...   a file, and arguments that its own text explains
  --config.FIELD=VALUE             after it: one field, such as --config.distill.steps=100;
                                   None unsets it, 0+1+2 is a tuple
  --config=FILE.py --help          lists its arguments, and all fields with values and ranges"""


def define_runtime_flags() -> None:
    """The flags of commands that run as several processes; see `processes.initialise`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX finds no cluster")
    flags.DEFINE_integer("num_processes", None, "with --coordinator: how many", lower_bound=1)
    flags.DEFINE_integer(
        "process_id", None, "with --coordinator: this one's number, from 0", lower_bound=0
    )
    flags.DEFINE_integer(
        "init_timeout", 300, "seconds to wait for the other processes", lower_bound=1
    )
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "seconds after which a silent process is lost", lower_bound=1
    )


@contextmanager
def running(debug: bool) -> Iterator[None]:
    """The block of a command: joins the other processes first, and says in one line why it ended.

    Args:
      debug: whether what is refused is raised, with its traceback.
    """
    # Late, so that --help and a misspelt flag answer at once.
    from liftplace_jax.host import processes
    from liftplace_jax.host.buckets import is_of_bucket, may_pass

    given = flags.FLAGS
    try:
        processes.initialise(
            given.coordinator,
            given.num_processes,
            given.process_id,
            given.init_timeout,
            given.heartbeat_timeout,
        )
        # Outside the training loop, which saves first, SIGTERM is as good as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # below the progress line
        processes.say("Interrupted. The same command goes on from what is saved.")
        processes.leave(EXIT_INTERRUPTED, stop)
    except Exception as error:
        known = isinstance(error, REFUSED) or is_of_bucket(error)
        if debug or (not known and processes.is_alone()):
            raise
        if not known:
            traceback.print_exc()
        processes.say(f"error: {error}" + processes.advice(error))
        if processes.is_of_others(error):
            status = EXIT_LOST
        elif may_pass(error):
            status = EXIT_UNREACHABLE
        else:
            status = EXIT_BAD_INPUT if known else 1
        processes.leave(status, error)


def quieten_libraries() -> None:
    """Unless --verbosity says otherwise."""
    if not flags.FLAGS["verbosity"].present:
        # orbax, TFDS and TensorFlow tell much; errors are raised, and never only logged.
        logging.set_verbosity(logging.FATAL)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def start(main: Callable[[list[str]], None], required: Sequence[str] = ()) -> None:
    """Runs a command: `main` with the arguments that are no flags.

    Args:
      main: of the command's module, which defines its flags and whose text --help begins with.
      required: names of flags that must be given.
    """
    if required:
        flags.mark_flags_as_required(required)
    module = sys.modules[main.__module__]
    app.run(main, flags_parser=functools.partial(parse_flags, module=module))


def given(flag: flags.FlagHolder[T | None]) -> T:
    """The value of a flag that `start` requires."""
    assert flag.value is not None, f"--{flag.name} is required"
    return flag.value


def parse_flags(argv: list[str], module: ModuleType) -> list[str]:
    """As absl does, but whatever is refused is one line on stderr, and --help tells of the config.

    Args:
      argv: of the command, its name first.
      module: the command's.
    """
    debugging = bool({"--debug", "-debug", "--debug=true"} & set(argv))  # it is not parsed yet
    try:
        asked = [name for arg in argv if (name := arg.lstrip("-")) in _HELP and name != arg]
        if asked:
            print(usage(argv, module, full="helpfull" in asked))
            sys.exit(0)
        for name in (arg.partition("=")[0] for arg in argv):
            fits = re.fullmatch(r"--?(no)?config(\.[A-Za-z_]\w*)+", name)
            if name.startswith(("-config.", "--config.")) and not fits:
                refuse(f"{name} names no field: want --config.FIELD=VALUE, such as --config.seed=1")
        return flags.FLAGS(argv)
    except (flags.Error, OSError) as error:
        if debugging:
            raise
        refuse(" ".join(str(error).split()))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        if debugging:
            raise
        # ml_collections says of --config.a.b=1 only that there is no b.
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        said = " ".join(str(error.args[0] if error.args else error).split())
        changes = " ".join(part for part in argv if part.lstrip("-").startswith("config."))
        refuse(f"unknown config field in {changes}: {said}")


describe_config: Callable[[str], str] | None = None
"""A config's text -> what --help says of it; set by who defines the flag."""


def usage(argv: Sequence[str], module: ModuleType, full: bool = False) -> str:
    """What --help prints: the command's text, its flags, and what its config is.

    Args:
      argv: of the command; a --config=FILE among them is described too.
      module: the command's.
      full: whether the flags of all modules are listed.

    Raises:
      ConfigError: the given config cannot be used.
    """
    # Without absl's first line, the name of the module.
    own = flags.FLAGS.module_help(module).strip().partition("\n")[2]
    own = flags.FLAGS.get_help() if full else f"Flags:\n{own}"
    parts = [(module.__doc__ or "").strip(), own.strip()]
    if "config" in flags.FLAGS:
        given = None
        for arg, following in zip(argv, [*argv[1:], None], strict=True):
            name, equals, value = arg.lstrip("-").partition("=")
            if name == "config" and name != arg:
                given = value if equals else following
        parts.append(describe_config(given) if given and describe_config else CONFIG_HELP)
    if not full:
        parts.append("--helpfull lists the flags of all modules: of several processes, of logging.")
    return "\n\n".join(parts)


def refuse(message: str) -> NoReturn:
    """Ends the command."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
