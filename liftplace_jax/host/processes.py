"""Several processes as one program: started together, agreeing, and ended when one is lost.

Every host of a pod runs the same command. JAX finds the other processes on TPU VMs, GKE, Slurm and
Open MPI; elsewhere flags say where they are. Files are written by process 0, on a file system that
all share, or in a bucket.
"""

from __future__ import annotations

import functools
import glob
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from liftplace_jax.host.buckets import is_in_bucket

START_TIMEOUT, HEARTBEAT_TIMEOUT = 300, 100
_SHARED_WITHIN = 60  # seconds in which a file system must show what another host wrote
_LAST_WORDS = 3  # seconds that process 0, without which all end, leaves the others to say why


class OthersError(RuntimeError):
    """The other processes cannot be reached."""


_CAUSES = (
    "Usual causes: the command was started on one host only (every host must run it, with the same "
    "flags but --process_id), or the port is blocked or taken (open it between the hosts, or name "
    "another in --coordinator)."
)


class _State:
    """Of this process."""

    index: int | None = None  # its number, once it has found the others
    joining = False
    heartbeat_timeout = HEARTBEAT_TIMEOUT
    terminal: int | None = None  # where one with a log printed before


def initialise(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = START_TIMEOUT,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Joins the processes of a pod; before any other call of JAX. Does nothing for a single one.

    Args:
      coordinator: HOST:PORT of process 0, the same in all processes; None: JAX finds it, if
        `find_cluster` sees a cluster.
      num_processes: how many; None as `coordinator`.
      process_id: which of them this is, from 0; None as `coordinator`.
      timeout: seconds to wait for the others.
      heartbeat_timeout: seconds after which a silent process counts as lost; JAX then ends the
        others, with an error that gives its number.

    Raises:
      ValueError: some of the three are given, others not, or they make no sense.
      OthersError: the others cannot be reached.
    """
    cluster = find_cluster(os.environ)
    if (coordinator, num_processes, process_id) != (None, None, None):
        _check_flags(coordinator, num_processes, process_id)
        who, detect = f"process {process_id} of {num_processes} at {coordinator}", "deactivate"
    elif cluster:
        who, detect = f"this process of {cluster}", None
    else:
        return
    # The loop agrees on a step itself, for Ctrl-C too; JAX's service would take SIGTERM away.
    jax.config.update("jax_enable_preemption_service", False)
    _State.heartbeat_timeout, _State.joining = heartbeat_timeout, True
    failed = _start(
        timeout,
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
        cluster_detection_method=detect,
    )
    if cluster == "TPU" and detect is None and isinstance(failed, ValueError):
        _State.joining = False
        return  # a TPU without such metadata, as of a notebook, has no others
    if failed:
        raise OthersError(
            f"{who} did not find the others within {timeout} s: {failed}. {_CAUSES}"
        ) from failed
    _State.index = jax.process_index()


def _check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None):
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"--coordinator, --num_processes and --process_id go together: {missing} not given"
        )
    assert coordinator is not None and num_processes is not None and process_id is not None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id {process_id} is not in [0, {num_processes}), of --num_processes"
        )
    if process_id == 0:
        _check_port(coordinator, int(port))


def _check_port(coordinator: str, port: int) -> None:
    """Here, because where process 0 cannot listen jaxlib may end it with a segmentation fault."""
    wide = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if wide else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=wide).close()
    except OSError as error:
        raise OthersError(
            f"process 0 cannot listen at {coordinator}: {error}. {_CAUSES}"
        ) from error


def _start(timeout: int, **options) -> Exception | None:
    """`jax.distributed.initialize`; returns why it failed.

    In a thread: where JAX gives up waiting it ends the process, with a stack trace only.
    """
    failed: list[Exception] = []

    def start():
        try:
            jax.distributed.initialize(initialization_timeout=timeout + 60, **options)
        except Exception as error:  # the caller raises it
            failed.append(error)

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        return TimeoutError("no answer")
    return failed[0] if failed else None


def find_cluster(environment: Mapping[str, str]) -> str | None:
    """What starts processes here, where JAX can find them all by itself; None: nothing does.

    Args:
      environment: such as `os.environ`.
    """

    def several(name: str) -> bool:
        return environment.get(name, "1") != "1"

    # Only the machine's metadata tell whether a TPU VM has others beside it; JAX asks for them.
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    tpu = "TPU_WORKER_HOSTNAMES" in environment or (devices and find_spec("libtpu"))
    if tpu and environment.get("JAX_PLATFORMS") != "cpu":
        return "TPU"
    if "SLURM_STEP_NODELIST" in environment and several("SLURM_NTASKS"):
        return "Slurm"
    if "OMPI_MCA_orte_hnp_uri" in environment and several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    return None


def log_to(folder: Path) -> None:
    """From here on, process i > 0 prints to process<i>.log in a folder, made if missing.

    Nothing changes if the folder is of a bucket, which no file can grow in: the launchers keep what
    each host prints.
    """
    index = jax.process_index()
    if index == 0 or is_in_bucket(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    _State.terminal = os.dup(2)
    with (folder / f"process{index}.log").open("a") as log:
        # Of the process, not of Python: JAX's own messages come from C++.
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    print(
        f"--- process {index} of {jax.process_count()} on {socket.gethostname()}, "
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}",
        file=sys.stderr,
    )


def say(message: str) -> None:
    """Prints an error to stderr, and to the terminal of a process that has a log; says whose."""
    if _State.index is not None:
        message = f"process {_State.index}: {message}"
    print(message, file=sys.stderr, flush=True)
    if _State.terminal is not None:
        os.write(_State.terminal, f"{message}\n".encode())


@functools.cache
def say_once(message: str) -> None:
    """Prints what a user should know to stderr, once a program, from process 0."""
    if is_alone() or is_first():
        say(message)


def is_first() -> bool:
    """Whether this is process 0, which writes the files."""
    return jax.process_index() == 0


def wait_for(path: Path) -> None:
    """Every process goes on once process 0 has come here and `path`, which it wrote, is seen.

    Raises:
      OSError: this process does not see it.
    """
    if jax.process_count() == 1:
        return
    barrier(str(path))
    for _ in range(_SHARED_WITHIN * 10):
        if path.exists():
            return
        time.sleep(0.1)  # NFS shows new files late
    raise OSError(
        f"{path}, which process 0 wrote, is not seen by process {jax.process_index()}: the work "
        "directory must lie on a file system that all hosts share, or in a bucket"
    )


def told_by_first(ask: Callable[[], bool]) -> bool:
    """What `ask` answers in process 0, for all: a file may appear between two processes' looks."""
    if jax.process_count() == 1:
        return ask()
    return bool(multihost_utils.broadcast_one_to_all(np.int32(is_first() and ask())))


def is_alone() -> bool:
    """Whether this process has joined, and tried to join, no others."""
    return not _State.joining


def barrier(name: str) -> None:
    """Every process goes on once all have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Agreement:
    """A number that all processes learn at the same call: the largest that any of them says."""

    def __init__(self):
        self._pending: jax.Array | None = None

    def __call__(self, value: int) -> int:
        """Several processes get what was said at the call before: no step waits for another."""
        if jax.process_count() == 1:
            return value
        pending, self._pending = self._pending, _largest(value)
        return 0 if pending is None else int(jax.device_get(pending))


def _largest(value: int) -> jax.Array:
    program, sharding = _largest_program()
    values = np.full(jax.local_device_count(), value, np.int32)
    return program(jax.make_array_from_process_local_data(sharding, values))


@functools.cache
def _largest_program():
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(jax.numpy.max, out_shardings=whole), NamedSharding(mesh, PartitionSpec("all"))


def _may_be_lost(error: BaseException | None) -> bool:
    """Whether an error may be that another process is gone."""
    return (
        isinstance(error, jax.errors.JaxRuntimeError)
        and _State.index is not None
        and "RESOURCE_EXHAUSTED" not in str(error)  # the memory of this one
    )


def is_of_others(error: BaseException) -> bool:
    """Whether an error may be another process's: then a restart of all may mend it."""
    several = _State.index is not None and jax.process_count() > 1
    return isinstance(error, OthersError) or (
        several and isinstance(error, jax.errors.JaxRuntimeError)
    )


def advice(error: BaseException) -> str:
    """What to add to the message of an error: that it may come from another process."""
    if not _may_be_lost(error):
        return ""
    return (
        "\nIf another process is gone, JAX says within "
        f"{_State.heartbeat_timeout + _LAST_WORDS} s which one; its log says why. The same command "
        "goes on from what is saved."
    )


def leave(status: int, error: BaseException | None = None) -> NoReturn:
    """Ends this process. One of several waits for no other: those may be waiting for it.

    Args:
      status: of the process.
      error: why. If it may be that another process was lost, JAX is left the time to say which
        one, and to end this process itself.
    """
    if not _State.joining or (_State.index is not None and jax.process_count() == 1):
        sys.exit(status)
    if _may_be_lost(error):
        time.sleep(_State.heartbeat_timeout + _LAST_WORDS)
    elif _State.index == 0:
        time.sleep(_LAST_WORDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
