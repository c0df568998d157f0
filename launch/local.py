"""A simulated pod: N processes of M CPU devices each, on this machine.

    python launch/local.py --processes=2 --devices=4 --config=configs/digits.py:runlocal \
        --workdir=runs/pod [-- FLAG...]

For teaching, debugging and tests: the processes find each other as the hosts of a pod do. Each
line is printed with its process' number and goes to process<i>.log in the folder of logs. SIGINT
and SIGTERM are passed on, once each. When a process fails, the others have --grace seconds to end
by themselves; the status is that of the first to fail. From Python, with the repository on the
path: `from launch.local import Pod`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

DEVICE_COUNT = "--xla_force_host_platform_device_count"
RECORD = "pod.json"
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL


class Pod:
    """Processes of one program, each with its own CPU devices, that know their coordinator.

    As a context manager it leaves no process behind.

    Args:
      command: the program's argv; the flags --coordinator, --num_processes and --process_id are
        put behind it.
      processes: how many.
      devices: simulated CPU devices of each process.
      logs_dir: folder of process<i>.log, which are appended to; made if missing.
      port: of the coordinator, on localhost. None: one that is free.
      environment: variables on top of this process'.
      grace: seconds that the others have to end by themselves once a process has failed.
      echo: print every line, behind the number of its process.

    Raises:
      ValueError: fewer than one process or device.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        devices: int,
        logs_dir: str | os.PathLike,
        *,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        grace: float = 120.0,
        echo: bool = True,
    ):
        if processes < 1 or devices < 1:
            raise ValueError(
                f"a pod needs at least 1 process and 1 device, got {processes} and {devices}"
            )
        self.command, self.processes, self.devices = list(command), processes, devices
        self.logs_dir, self.port = Path(logs_dir), port or free_port()
        self.environment, self.grace, self.echo = dict(environment or {}), grace, echo
        self.children: list[subprocess.Popen] = []
        self.first_failure: int | None = None
        self._lines: list[list[str]] = [[] for _ in range(processes)]
        self._readers: list[threading.Thread] = []

    def argv(self, process: int) -> list[str]:
        """The command line of one process."""
        return [
            *self.command,
            f"--coordinator=localhost:{self.port}",
            f"--num_processes={self.processes}",
            f"--process_id={process}",
        ]

    def variables(self) -> dict[str, str]:
        """The variables that every process gets on top of this process'."""
        others = [
            flag
            for flag in os.environ.get("XLA_FLAGS", "").split()
            if not flag.startswith(f"{DEVICE_COUNT}=")
        ]
        flags = " ".join([*others, f"{DEVICE_COUNT}={self.devices}"])
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **self.environment}

    def log(self, process: int) -> Path:
        """The file that a process' output is appended to."""
        return self.logs_dir / f"process{process}.log"

    def start(self) -> Pod:
        """Starts all processes.

        Raises:
          RuntimeError: it was started before.
        """
        if self.children:
            raise RuntimeError("a pod starts once; make another")
        self.logs_dir.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self.variables()
        try:
            for process in range(self.processes):
                # A session of its own: Ctrl-C reaches a process through us, and so only once.
                child = subprocess.Popen(
                    self.argv(process),
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    text=True,
                    errors="replace",
                )
                self.children.append(child)
                reader = threading.Thread(target=self._read, args=(process,), daemon=True)
                reader.start()
                self._readers.append(reader)
        except BaseException:
            self.kill()
            raise
        return self

    def wait(self, timeout: float | None = None) -> int:
        """Until all processes have ended; after a failure those that do not end are ended.

        Args:
          timeout: seconds; None: as long as it takes.

        Returns:
          0, or the status of the process that failed first; 128 + the signal that killed it.

        Raises:
          TimeoutError: they have not ended in time; they go on.
        """
        begin, failed_at, asked_at = time.monotonic(), None, None
        while any(status is None for status in self.poll()):
            now = time.monotonic()
            if timeout is not None and now - begin > timeout:
                running = [i for i, status in enumerate(self.poll()) if status is None]
                raise TimeoutError(f"processes {running} run after {timeout:g} seconds")
            if self.first_failure is not None and failed_at is None:
                failed_at = now
                self._say(f"the others have {self.grace:g} seconds to end")
            if failed_at is not None and asked_at is None and now - failed_at > self.grace:
                asked_at = now
                self._say("ending the others")
                self.signal(signal.SIGTERM)
            if asked_at is not None and now - asked_at > STOP_SECONDS:
                self.signal(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(timeout=STOP_SECONDS)
        if self.first_failure is None:
            return 0
        return shell_status(self.children[self.first_failure].returncode)

    def poll(self) -> list[int | None]:
        """The status of every process, as Popen.returncode; None: it runs."""
        statuses = [child.poll() for child in self.children]
        if self.first_failure is None and any(statuses):
            self.first_failure = next(i for i, status in enumerate(statuses) if status)
            self._say(f"process {self.first_failure} {ending(statuses[self.first_failure])}")
        return statuses

    def signal(self, number: int, process: int | None = None) -> None:
        """Sends a signal to one process, or to all that run."""
        for i, child in enumerate(self.children):
            if process in (None, i) and child.poll() is None:
                child.send_signal(number)

    def kill(self, process: int | None = None) -> None:
        """Kills one process, or all, and waits until they are gone."""
        self.signal(signal.SIGKILL, process)
        for i, child in enumerate(self.children):
            if process in (None, i):
                child.wait()

    def output(self, process: int) -> str:
        """What a process has printed since this pod was started."""
        return "".join(self._lines[process])

    def __enter__(self) -> Pod:
        return self.start()

    def __exit__(self, *_) -> None:
        self.kill()

    def _read(self, process: int) -> None:
        child = self.children[process]
        with child.stdout, self.log(process).open("a", buffering=1) as log:
            for line in child.stdout:
                log.write(line)
                self._lines[process].append(line)
                if self.echo:
                    # One write: lines of several processes do not mix.
                    sys.stdout.write(f"[{process}] {line.rstrip()}\n")
                    sys.stdout.flush()

    def _say(self, text: str) -> None:
        if self.echo:
            print(f"local pod: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """A TCP port of localhost that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def shell_status(returncode: int) -> int:
    """As a shell has it: 128 + the signal's number for a process that a signal ended."""
    return 128 - returncode if returncode < 0 else returncode


def ending(returncode: int) -> str:
    """In words, how a process ended."""
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        refuse(message)


def refuse(message: str):
    """Ends the command: one line on stderr, status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what follows `--`: flags of the program."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = _Parser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, default=2, help="how many (2)")
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process (4)")
    parser.add_argument("--module", default="liftplace_jax.main", help="what runs (%(default)s)")
    parser.add_argument("--config", help="config file of the program, FILE.py[:key=value,...]")
    parser.add_argument("--workdir", help="work directory of the program")
    parser.add_argument("--logs_dir", help="folder of the logs (default: WORKDIR-logs)")
    parser.add_argument("--port", type=int, help="of the coordinator (default: a free one)")
    parser.add_argument(
        "--grace",
        type=float,
        default=120.0,
        help="seconds that the others have to end after a failure (120)",
    )
    action = parser.add_mutually_exclusive_group()
    for name, what in (
        ("--dry-run", "print the commands and run nothing"),
        ("--list", "the processes of the pod that runs"),
        ("--logs", "print the logs"),
        ("--delete", "end the pod that runs: it saves first"),
    ):
        action.add_argument(name, action="store_true", help=what)
    options = parser.parse_args(argv[:split])
    if not (options.logs_dir or options.workdir):
        parser.error("--workdir is needed; --help explains it")
    if not options.logs_dir:
        if "://" in options.workdir:
            parser.error("--logs_dir is needed, as the work directory is in a bucket")
        options.logs_dir = options.workdir.rstrip("/") + "-logs"
    return options, argv[split + 1 :]


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    options, extra = parse(argv)
    logs_dir = Path(options.logs_dir)
    if options.list or options.delete:
        return list_or_delete(logs_dir, options.delete)
    if options.logs:
        for log in sorted(logs_dir.glob("process*.log"), key=_number):
            for line in log.read_text(errors="replace").splitlines():
                print(f"[{_number(log)}] {line}")
        return 0
    for name in ("config", "workdir"):
        if not getattr(options, name):
            refuse(f"--{name} is needed; --help explains it")
    command = [
        sys.executable,
        "-m",
        options.module,
        f"--config={options.config}",
        f"--workdir={options.workdir}",
        *extra,
    ]
    try:
        pod = Pod(
            command,
            options.processes,
            options.devices,
            logs_dir,
            port=options.port,
            grace=options.grace,
        )
    except ValueError as error:
        refuse(str(error))
    if options.dry_run:
        print(dry_run(pod))
        return 0
    return launch(pod)


def launch(pod: Pod) -> int:
    """Runs a pod to its end, with signals passed on, and keeps a record locked meanwhile."""
    pod.logs_dir.mkdir(parents=True, exist_ok=True)
    with (pod.logs_dir / RECORD).open("a") as record:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"a pod of {pod.logs_dir} runs; --list shows it, --delete ends it")
        record.truncate(0)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: pod.signal(number))
        with pod:
            pids = [child.pid for child in pod.children]
            record.write(json.dumps({"launcher": os.getpid(), "processes": pids}))
            record.flush()
            return pod.wait()


def dry_run(pod: Pod) -> str:
    """What would run, as lines for a shell."""
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in pod.variables().items())
    lines = [f"mkdir -p {shlex.quote(str(pod.logs_dir))}"]
    for process in range(pod.processes):
        log = shlex.quote(str(pod.log(process)))
        lines.append(f"{variables} {shlex.join(pod.argv(process))} >> {log} 2>&1 &")
    return "\n".join([*lines, "wait"])


def running(logs_dir: Path) -> dict | None:
    """The record of the pod whose logs lie there, if its launcher runs."""
    try:
        record = (logs_dir / RECORD).open()
    except FileNotFoundError:
        return None
    with record:
        try:
            # Its launcher, even one that is killed, lets go of the lock only by ending.
            fcntl.flock(record, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return json.load(record)
    return None


def list_or_delete(logs_dir: Path, delete: bool) -> int:
    """Shows the running pod, or ends it and waits for that; returns the exit status."""
    record = running(logs_dir)
    if record is None:
        print(f"no pod of {logs_dir} runs")
        return 0
    if not delete:
        for process, pid in enumerate(record["processes"]):
            print(f"[{process}] pid {pid}, {logs_dir / f'process{process}.log'}")
        return 0
    os.kill(record["launcher"], signal.SIGTERM)
    while running(logs_dir) is not None:
        time.sleep(0.1)
    return 0


def _number(log: Path) -> int:
    return int(re.search(r"\d+", log.stem)[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
