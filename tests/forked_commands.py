"""Runs commands as processes of their own, of a Python that has imported modules once.

python tests/forked_commands.py MODULE [OTHER MODULES] < list of argument lists, as JSON

Prints a JSON list of [exit status, stdout, stderr].
"""

import importlib
import json
import os
import sys
import tempfile


def run(module, arguments):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if not pid:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [f"{module.__name__}.py", *arguments]
            status = 1
            try:
                module.entry_point()
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
        return status, *texts


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    module = importlib.import_module(sys.argv[1])
    for other in sys.argv[2:]:
        importlib.import_module(other)
    print(json.dumps([run(module, arguments) for arguments in commands]))
