"""Several processes as one program: exact on any layout, and unharmed by signals and faults.

Real processes of launch/local.py. Most run a small function under the main command (pod_main.py);
one pod runs every stage with networks.
"""

import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import tiny_config
from conftest import QUICK_XLA

from liftplace_jax import data, weights
from liftplace_jax.encoders.autoencoder_config import AutoencoderConfig
from liftplace_jax.experiment import stages
from liftplace_jax.experiment.encoding import encode_data
from liftplace_jax.host import files, processes, sharding
from liftplace_jax.host.buckets import as_path, local_copy
from liftplace_jax.host.flags import EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_LOST
from liftplace_jax.host.locks import locked
from liftplace_jax.nn import building
from liftplace_jax.training.checkpoints import Checkpoints
from liftplace_jax.training.loop import train
from liftplace_jax.training.metrics_io import MetricsLog, read_metrics
from liftplace_jax.training.state import create_state
from liftplace_jax.training.step import make_train_step

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from launch.local import Pod, free_port  # noqa: E402

HEARTBEAT = 10
ENDS_WITHIN = 60  # seconds, on a busy machine: of these HEARTBEAT to notice, the rest to start


@pytest.fixture(scope="module")
def start(tmp_path_factory, bucket):
    """(moment, workdir, processes, devices, *flags) -> a `Pod` of pod_main.py, not started."""
    home = tmp_path_factory.mktemp("pods")
    data.load_source("digits", "train", data_dir=home / "tfds")  # prepares them
    environment = {
        "LIFTPLACE_TEST_DATA": str(home / "tfds"),
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": QUICK_XLA,
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(moment, workdir, processes, devices, *flags, config="tests/tiny_config.py"):
        flags = [
            f"--config={config}",
            f"--workdir={workdir}",
            f"--heartbeat_timeout={HEARTBEAT}",
            *flags,
        ]
        count = f"--xla_force_host_platform_device_count={devices}"
        return Pod(
            [sys.executable, str(ROOT / "tests" / "pod_main.py"), moment, *flags],
            processes,
            devices,
            home / "logs" / Path(workdir).name,
            echo=False,
            grace=120,
            environment=environment | {"XLA_FLAGS": f"{environment['XLA_FLAGS']} {count}"},
        )

    return start


@pytest.fixture(scope="module")
def run(start):
    """Likewise, until all processes have ended: (their statuses, what each printed)."""

    def run(*arguments, **options):
        with start(*arguments, **options) as pod:
            pod.wait(timeout=300)
            # Process 1 has a file of its own from when it knows the work directory.
            log = as_path(arguments[1]) / "logs" / "process1.log"
            more = log.read_text().rpartition("--- process")[2] if log.exists() else ""
            printed = [pod.output(i) + (more if i else "") for i in range(pod.processes)]
            return [child.returncode for child in pod.children], printed

    return run


def fsdp(size):
    return f"--config.mesh.fsdp={size}"


def final(workdir):
    with local_copy(workdir / "final.npz") as path, np.load(path) as file:
        return dict(file)


def equal(one, other, tolerance=0.0):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=tolerance, err_msg=name)


# Exactness --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """The work directory of 20 steps on 2 processes of 4 devices, parameters split over them."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    statuses, printed = run("none", workdir, 2, 4, fsdp(4))
    assert statuses == [0, 0], printed
    return workdir


@pytest.fixture(scope="module")
def preempted(run, tmp_path_factory):
    """A work directory of the same layout, cut off by a signal to process 1 at step 7."""
    workdir = tmp_path_factory.mktemp("preempted") / "run"
    statuses, printed = run("1 SIGTERM metrics 6", workdir, 2, 4, fsdp(4))
    assert statuses == [EXIT_INTERRUPTED, EXIT_INTERRUPTED], printed
    for text in printed:  # both know, at the step after
        assert "teacher: SIGTERM at step 8: saved. The same command goes on from there." in text
    assert (workdir / "logs" / "process1.log").read_text().count("--- process 1 of 2 on ") == 1
    assert Checkpoints(workdir / "teacher" / "checkpoints").latest_step() == 8
    return workdir


@pytest.mark.parametrize("devices", [1, 8])
def test_layouts_train_equally(run, undisturbed, tmp_path, devices):
    statuses, printed = run("none", tmp_path / "run", 1, devices)
    assert statuses == [0], printed
    equal(final(tmp_path / "run"), final(undisturbed), 1e-5)
    losses = [
        [row["loss"] for row in read_metrics(d / "teacher")]
        for d in (tmp_path / "run", undisturbed)
    ]
    assert len(losses[0]) == 20 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2])
def test_checkpoints_go_on_on_other_layouts(run, undisturbed, preempted, tmp_path, devices):
    workdir = shutil.copytree(preempted, tmp_path / "run")
    statuses, printed = run("none", workdir, 1, devices, fsdp(devices))
    assert statuses == [0], printed
    assert "teacher: goes on from step 8\n" in printed[0]
    equal(final(workdir), final(undisturbed), 1e-5)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Flags of a config whose data are latents of 4x4x4, drawn and flipped in the step."""
    home = tmp_path_factory.mktemp("latents")
    config = AutoencoderConfig(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        in_channels=1,
        out_channels=1,
        sample_size=8,
    )
    weights.save_model(home / "autoencoder", config.described(), building.create(config)[1])
    config = tiny_config.get_config()
    config.data.train_split, config.data.test_split = "train[:3%]", "test[:5%]"
    config.data.data_dir = str(home / "tfds")
    config.model.update(image_size=4, in_channels=4, out_channels=4)
    config.latents.update(autoencoder=str(home / "autoencoder"), path=str(home / "latents"))
    over = sharding.batch_sharding(sharding.make_mesh({"data": -1}))
    encode_data(config, over, batch_size=8, shard_size=16)
    return [
        "--config.data.train_split=train[:3%]",
        "--config.data.test_split=test[:5%]",
        "--config.data.flip=True",
        "--config.evaluation.clip=None",
        "--config.model.image_size=4",
        "--config.model.in_channels=4",
        "--config.model.out_channels=4",
        "--config.teacher.accumulation=2",
        f"--config.latents.autoencoder={home / 'autoencoder'}",
        f"--config.latents.path={home / 'latents'}",
    ]


def test_latents_are_drawn_equally_on_any_layout_and_after_a_signal(run, latents, tmp_path):
    for workdir, count, devices in (("one", 1, 1), ("pod", 2, 2)):
        statuses, printed = run("none", tmp_path / workdir, count, devices, *latents)
        assert statuses == [0] * count, printed
    equal(final(tmp_path / "pod"), final(tmp_path / "one"), 1e-5)
    statuses, printed = run("1 SIGTERM metrics 6", tmp_path / "cut", 2, 2, *latents)
    assert statuses == [EXIT_INTERRUPTED] * 2, printed
    statuses, printed = run("none", tmp_path / "cut", 2, 2, *latents)
    assert statuses == [0, 0], printed
    equal(final(tmp_path / "cut"), final(tmp_path / "pod"))


def test_devices_of_a_pod_stand_in_the_order_of_its_processes():
    # As on a v5e-16: rows of four devices, hosts of two by two.
    devices = [SimpleNamespace(id=i, process_index=2 * (i // 8) + i % 4 // 2) for i in range(16)]
    ordered = sharding.by_process(devices)
    assert [d.id for d in ordered[:8]] == [0, 1, 4, 5, 2, 3, 6, 7]
    assert [d.process_index for d in ordered] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


# Faults -----------------------------------------------------------------------------------------


def assert_ends_as(run, workdir, undisturbed):
    """A run whose checkpoint of step 15 is unfinished goes on to the same bits."""
    statuses, printed = run("none", workdir, 2, 4, fsdp(4))
    assert statuses == [0, 0], printed
    assert (
        "teacher: goes on from step 10; the checkpoint of step 15 was not finished and is ignored"
        in printed[0]
    )
    equal(final(workdir), final(undisturbed))
    rows = [read_metrics(d / "teacher") for d in (workdir, undisturbed)]
    assert [row["step"] for row in rows[0]] == list(range(1, 21))
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_a_pod_cut_off_again_and_again_ends_with_the_same_bits(
    run, undisturbed, preempted, tmp_path
):
    workdir = shutil.copytree(preempted, tmp_path / "run")
    checkpoints = workdir / "teacher" / "checkpoints"

    # Process 1 is lost: process 0, waiting for it, ends with an error that names it.
    begin = time.monotonic()
    statuses, printed = run("1 SIGKILL metrics 13", workdir, 2, 4, fsdp(4))
    assert time.monotonic() - begin < ENDS_WITHIN
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, EXIT_INTERRUPTED)
    assert "tasks are unhealthy (stopped sending heartbeats):\n1\n" in printed[0]

    # Process 0 is lost as it saves: what it was writing does not count, and that is said.
    begin = time.monotonic()
    statuses, printed = run("0 SIGKILL checkpoint 15", workdir, 2, 4, fsdp(4))
    assert time.monotonic() - begin < ENDS_WITHIN
    assert statuses[0] == -signal.SIGKILL and statuses[1] not in (0, EXIT_INTERRUPTED)
    assert "goes on from step 10" in printed[0]
    assert "the leader task was preempted/died" in printed[1]
    assert any(path.name.startswith("15.") for path in checkpoints.iterdir())

    assert_ends_as(run, workdir, undisturbed)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["15", "20"]


def test_a_pod_whose_work_directory_is_in_a_bucket_is_cut_off(run, undisturbed, bucket):
    workdir = as_path(f"{bucket}/cut/run")
    statuses, printed = run("1 SIGTERM metrics 6", workdir, 2, 4, fsdp(4))
    assert statuses == [EXIT_INTERRUPTED, EXIT_INTERRUPTED], printed
    statuses, printed = run("0 SIGKILL checkpoint 15", workdir, 2, 4, fsdp(4))
    assert statuses[0] == -signal.SIGKILL and "goes on from step 8" in printed[0]
    assert [row["step"] for row in read_metrics(workdir / "teacher")] == list(range(1, 16))
    assert_ends_as(run, workdir, undisturbed)


SGD = optax.adam(0.1)


def squares(params, frozen, batch, step):
    return ((params["student"]["w"] - 1) ** 2).sum() + 0 * step, {}


def looped(folder, total_steps):
    """A run of the loop in this process, checkpoints after every 3 steps."""
    return train(
        make_train_step(squares, SGD, ema_decay=0.9),
        create_state({"student": {"w": jax.random.normal(jax.random.key(0), (200, 200))}}, SGD),
        None,
        lambda first: (None for _ in range(99)),
        total_steps=total_steps,
        folder=folder,
        title="test",
        checkpoint_every=3,
    )


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def change_a_byte(folder):
    path = largest_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_off(folder):
    path = largest_file(folder)
    os.truncate(path, path.stat().st_size // 2)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", [change_a_byte, cut_off, empty])
def test_a_damaged_newest_checkpoint_is_named_and_an_older_one_can_be_chosen(
    tmp_path, damage, capsys
):
    looped(tmp_path, 6)
    newest = tmp_path / "checkpoints" / "6"
    damage(newest)
    before = read_metrics(tmp_path)
    with pytest.raises(ValueError, match=f"step 6 in {newest.parent} cannot be restored") as error:
        looped(tmp_path, 9)
    assert "Delete that checkpoint to go on from an older one" in str(error.value)
    assert read_metrics(tmp_path) == before
    shutil.rmtree(newest)
    capsys.readouterr()
    resumed = looped(tmp_path, 9)
    assert "test: goes on from step 3\n" in capsys.readouterr().err
    whole = looped(tmp_path.with_name("whole"), 9)
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def full_disk():
    """No file can grow beyond 10 kB, from when it is called."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=10_000: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, full_disk):
    state = looped(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    full_disk()
    with pytest.raises(OSError, match="(?s)checkpoint of step 6 cannot be written.*too large") as e:
        checkpoints.save(6, state)
    full_disk(resource.RLIM_INFINITY)
    assert "That of step 3 is whole. Make room" in str(e.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert int(looped(tmp_path, 6).step) == 6


def test_other_files_on_a_full_disk_are_named_and_not_left_half_written(tmp_path, full_disk):
    files.write_json(tmp_path / "a.json", [1])
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    full_disk()
    with pytest.raises(OSError, match=r"File too large.*a\.json"):
        files.write_json(tmp_path / "a.json", list(range(10_000)))
    with pytest.raises(OSError, match=r"File too large.*metrics\.jsonl"):
        log.write(1, {f"term {i}": 0.0 for i in range(1000)})
    log.close()
    with pytest.raises(OSError, match=r"w\.safetensors cannot be written: .*too large"):
        weights.write_safetensors(tmp_path / "w.safetensors", {"w": np.zeros(10_000)})
    full_disk(resource.RLIM_INFINITY)
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "metrics.jsonl"}


def test_a_work_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the work directory cannot be written.*file/run"):
        stages.run(tiny_config.get_config(), tmp_path / "file" / "run", "teacher")


def test_a_pod_is_refused_where_another_run_is_under_way(run, tmp_path):
    with locked(tmp_path):
        before = (tmp_path / ".lock").read_bytes()
        statuses, printed = run("none", tmp_path, 2, 1)
        assert statuses == [EXIT_BAD_INPUT, EXIT_BAD_INPUT], printed
        assert f"is in use by process {os.getpid()} on {socket.gethostname()}, since" in printed[0]
        assert f"process 1: error: process 0 cannot use {tmp_path}, and says why" in printed[1]
        assert "Traceback" not in printed[0] + printed[1]
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        assert (tmp_path / ".lock").read_bytes() == before


# The runtime ------------------------------------------------------------------------------------


def test_a_process_without_the_others_says_the_usual_causes(start, tmp_path):
    for process in (0, 1):
        pod = start("none", tmp_path / "run", 2, 1, "--init_timeout=2")
        argv = pod.argv(process)
        pod.argv = lambda _, argv=argv: argv
        pod.processes = 1
        with pod:
            pod.wait(timeout=120)
            said = pod.output(0)
        assert pod.children[0].returncode == EXIT_LOST, said
        assert f"error: process {process} of 2 at localhost:{pod.port} did not find the" in said
        assert "started on one host only" in said and "the port is blocked" in said
        assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_a_port_that_is_taken_is_said(start, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", free_port()))
        taken.listen()
        pod = start("none", tmp_path / "run", 1, 1)
        pod.port = taken.getsockname()[1]
        with pod:
            pod.wait(timeout=120)
            assert pod.children[0].returncode == EXIT_LOST
            assert "the port is blocked or taken" in pod.output(0)


def test_a_work_directory_that_hosts_do_not_share_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "barrier", lambda name: None)
    monkeypatch.setattr(processes, "_SHARED_WITHIN", 0)
    with pytest.raises(OSError, match="config.json, .*not seen by process 0: .* all hosts share"):
        processes.wait_for(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "go together: .*--num_processes.*--process_id.* not given"),
        ({"coordinator": "a", "num_processes": 2, "process_id": 0}, "HOST:PORT, got 'a'"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, r"2 is not in \[0, 2\)"),
    ],
)
def test_flags_that_make_no_pod_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        processes.initialise(**options)


SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "2"}, None),  # a batch script without srun
        ({"OMPI_MCA_orte_hnp_uri": "x", "OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "TPU"),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_clusters_are_recognised(environment, cluster, monkeypatch):
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [])
    assert processes.find_cluster(environment) == cluster


def test_a_single_process_starts_nothing(monkeypatch):
    monkeypatch.setattr(processes, "find_cluster", lambda environment: None)
    processes.initialise()
    assert not jax.distributed.is_initialized()


# Every stage ------------------------------------------------------------------------------------


def test_every_stage_runs_on_a_pod(run, bucket):
    workdir = as_path(f"{bucket}/stages/run")
    rules = (("kernel", ("fsdp",)), ("gates", ("fsdp", None)))
    flags = [fsdp(4), f"--config.sharding_rules={rules!r}"]
    config = "tests/tiny_dit_config.py"
    statuses, printed = run("networks", workdir, 2, 4, *flags, config=config)
    assert statuses == [0, 0], printed
    assert "teacher: 100%" in printed[0] and "%|" not in printed[1]  # one of them shows progress
    assert [row["step"] for row in read_metrics(workdir / "teacher")] == [1, 2, 3, 4]
    assert json.loads((workdir / "pruned" / "layers.json").read_text())["kept"]
    report = json.loads((workdir / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["teacher", "lift_place"]
    for row in report["rows"]:
        assert (row["num_samples"], row["num_reference"]) == (100, 1437)
        assert row["frechet"] > 0
    assert report["rows"][1]["num_examples"] == 360
    with (
        local_copy(workdir / "student" / "lift_place" / "seed0" / "samples.npz") as path,
        np.load(path) as samples,
    ):
        assert samples["images"].shape == (64, 8, 8, 1)
    # One process gets the same numbers of the same model.
    found = workdir / "student" / "lift_place" / "seed0" / "evaluation.json"
    of_two = json.loads(found.read_text())
    found.unlink()
    statuses, printed = run("networks", workdir, 1, 8, "--mode=evaluate", *flags, config=config)
    assert statuses == [0], printed
    of_one = json.loads(found.read_text())
    for name in ("frechet", "output_error", "num_samples", "num_reference", "num_examples"):
        assert of_one[name] == pytest.approx(of_two[name], rel=1e-4), name
