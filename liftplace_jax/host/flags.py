"""What the commands share: whatever is refused is one line on stderr, and exit status 2."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from absl import flags, logging

# A fault of the program itself is 1. What is neither is worth another try; 134 is also the status
# of a process that JAX ends itself.
EXIT_BAD_INPUT, EXIT_UNREACHABLE, EXIT_INTERRUPTED, EXIT_LOST = 2, 75, 130, 134


def define_runtime_flags() -> None:
    """The flags of commands that run as several processes; see `processes.initialise`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where JAX finds no cluster")
    flags.DEFINE_integer("num_processes", None, "with --coordinator: how many", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "with --coordinator: this one's number, from 0",
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_integer("init_timeout", 300, "seconds to wait for the other processes",
                         lower_bound=1)  # fmt: skip
    flags.DEFINE_integer("heartbeat_timeout", 100, "seconds after which a silent process is lost",
                         lower_bound=1)  # fmt: skip


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
            given.coordinator, given.num_processes, given.process_id, given.init_timeout,
            given.heartbeat_timeout,
        )  # fmt: skip
        # Outside the training loop, which saves first, SIGTERM is as good as Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # below the progress line
        processes.say("Interrupted. The same command goes on from what is saved.")
        processes.leave(EXIT_INTERRUPTED, stop)
    except Exception as error:
        known = isinstance(error, ValueError | RuntimeError | OSError) or is_of_bucket(error)
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


def parse_flags(argv: list[str]) -> list[str]:
    """As absl does, but whatever is refused is one line on stderr."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        # A config file's complaint comes with its traceback; its last line says it all.
        complaint = re.search(r"\n\s*ValueError: (.*)\Z", str(error).rstrip())
        refuse(complaint[1] if complaint else str(error))
    except OSError as error:
        refuse(str(error))
    except (AttributeError, KeyError) as error:
        # ml_collections says of --config.a.b=1 only that there is no b.
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        changes = " ".join(part for part in argv if part.lstrip("-").startswith("config."))
        refuse(f"unknown config field in {changes}: " + " ".join(str(error.args[0]).split()))


def refuse(message: str) -> NoReturn:
    """Ends the command."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
