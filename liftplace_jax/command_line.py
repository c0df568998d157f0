"""What the commands share: whatever is refused is one line on stderr, and exit status 2."""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn

from absl import flags, logging

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


def quieten_libraries() -> None:
    """Unless --verbosity says otherwise."""
    if not flags.FLAGS["verbosity"].present:
        # orbax, TFDS and TensorFlow tell much; errors of ours are raised, never logged.
        logging.set_verbosity(logging.ERROR)
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
