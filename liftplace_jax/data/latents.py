"""Says where the command went."""

import sys

if __name__ == "__main__":
    sys.exit("error: this command is python -m liftplace_jax.encode now, with the same flags")
