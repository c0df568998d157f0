"""The launchers: what they would run, word by word, what they refuse; and the simulated pod."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import Pod, shell_status

ROOT = Path(__file__).parent.parent
CONFIG = "--config=configs/celeba64_unet.py:ratio=0.9"
TPU = ["tpu_vm.sh", "--name=lift", "--zone=us-west4-a", "--accelerator-type=v5litepod-16"]
XPK = ["xpk.sh", "--cluster=pods", "--name=lift", "--tpu-type=v5litepod-16"]
SLURM = ["slurm.sbatch"]
PLACES = [CONFIG, "--workdir=/mnt/celeba"]
# Words that a shell would take apart, expand or run.
AWKWARD = ["--a=it's a b", '--b="$HOME"', "--c=x;y&z", "--d=*", "--e=`id`", "--f="]


def launch(script, *flags, **environment):
    """-> status, stdout, stderr; without any cloud's command on the path."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        ["bash", ROOT / "launch" / script, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env=variables | environment,
    )
    return done.returncode, done.stdout, done.stderr


def dry_run(script, *flags, **environment):
    status, out, err = launch(script, "--dry-run", *flags, **environment)
    assert (status, err) == (0, "")
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    return out


def test_tpu_vm():
    vm = "gcloud compute tpus tpu-vm"
    assert (
        dry_run(*TPU, *PLACES, "--spot", "--env=A=1", "--", "--mode=distill")
        == f"""\
mkdir -p build
git archive --format=tar.gz --prefix=liftplace/ --output=build/lift.tar.gz HEAD
state=$({vm} describe lift --zone=us-west4-a --format='value(state)' 2> /dev/null || true)
[ "$state" != PREEMPTED ] || {vm} delete lift --zone=us-west4-a --quiet
[ "$state" = READY ] ||
  {vm} create lift --zone=us-west4-a --accelerator-type=v5litepod-16 --spot \
--version=v2-alpha-tpuv5-lite
{vm} scp build/lift.tar.gz lift: --zone=us-west4-a --worker=all
{vm} ssh lift --zone=us-west4-a --worker=all --command='tar -xzf lift.tar.gz && cd liftplace && \
python3 -m pip install --quiet --user uv && \
python3 -m uv venv --allow-existing --quiet --python 3.11 && \
python3 -m uv pip install --quiet -e '\\''.[tpu]'\\'''
{vm} ssh lift --zone=us-west4-a --worker=all --command='cd liftplace && \
if [ -f run.pid ] && kill -0 "$(cat run.pid)" 2> /dev/null; then echo "runs already"; \
else nohup env A=1 .venv/bin/python -m liftplace_jax.main {CONFIG} --workdir=/mnt/celeba \
--mode=distill >> run.log 2>&1 < /dev/null & echo $! > run.pid; fi'
"""
    )


def test_tpu_vm_as_a_queued_resource():
    queue, where = "gcloud compute tpus queued-resources", "--zone=us-west4-a --project=paper"
    out = dry_run(*TPU, *PLACES, "--queued", "--project=paper", "--ref=v1 a")
    assert (
        f"""\
git archive --format=tar.gz --prefix=liftplace/ --output=build/lift.tar.gz 'v1 a'
state=$({queue} describe lift {where} --format='value(state.state)' 2> /dev/null || true)
case $state in FAILED | SUSPENDED)
  {queue} delete lift {where} --force --quiet
  state= ;;
esac
[ -n "$state" ] ||
  {queue} create lift --node-id=lift {where} --accelerator-type=v5litepod-16 \
--runtime-version=v2-alpha-tpuv5-lite
while state=$({queue} describe lift {where} --format='value(state.state)'); \
[ "$state" != ACTIVE ]; do
  case $state in FAILED | SUSPENDED) echo "the queued resource is $state" >&2; false ;; esac
  sleep 60
done
gcloud compute tpus tpu-vm scp build/lift.tar.gz lift: {where} --worker=all
"""
        in out
    )


def test_xpk():
    out = dry_run(*XPK, *PLACES, "--zone=us-west4-a", "--num-slices=2", "--", "--mode=all")
    assert (
        out
        == f"""\
xpk workload create --cluster=pods --zone=us-west4-a --workload=lift --tpu-type=v5litepod-16 \
--num-slices=2 --base-docker-image=python:3.11 --max-restarts=50 \\
  --termination-grace-period-seconds=120 --restart-on-exit-codes=75 \
--command='pip install --quiet '\\''.[tpu]'\\'' && \
exec python -m liftplace_jax.main {CONFIG} --workdir=/mnt/celeba --mode=all'
"""
    )
    # A file that only the image has is not looked for here.
    out = dry_run(*XPK, "--docker-image=gcr.io/p/i", "--config=inside.py", "--workdir=gs://b/runs")
    assert (
        out
        == """\
xpk workload create --cluster=pods --workload=lift --tpu-type=v5litepod-16 --num-slices=1 \
--docker-image=gcr.io/p/i --max-restarts=50 \\
  --termination-grace-period-seconds=120 --restart-on-exit-codes=75 \
--command='exec python -m liftplace_jax.main \
--config=inside.py --workdir=gs://b/runs'
"""
    )


def test_slurm_outside_and_inside_a_job():
    flags = [*SLURM, CONFIG, "--workdir=/nfs/celeba", "--nodes=4", "--time=24:00:00"]
    job = f"""\
mkdir -p runs/logs
srun --gpu-bind=none --cpus-per-task=8 --kill-on-bad-exit=0 --wait=600 \\
  --open-mode=append --output=runs/logs/%x-%j-%t.log \\
  env A=b python -m liftplace_jax.main {CONFIG} --workdir=/nfs/celeba --mode=all || code=$?
again=$((${{SLURM_RESTART_COUNT:-0}} < 10))
case ${{code:-0}}:$again in 130:* | 75:1) scontrol requeue "$SLURM_JOB_ID" ;; esac
( exit "${{code:-0}}" )
"""
    last = ["--env=A=b", "--", "--mode=all"]
    assert dry_run(*flags, *last, SLURM_JOB_ID="7") == job
    assert (
        dry_run(*flags, *last)
        == f"""\
mkdir -p runs/logs
sbatch --job-name=liftplace --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 \
--time=24:00:00 --output=runs/logs/%x-%j.out \\
  launch/slurm.sbatch {CONFIG} --workdir=/nfs/celeba --cpus-per-task=8 --env=A=b -- --mode=all
# In the job:
"""
        + "".join(f"# {line}\n" for line in job.splitlines())
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["tpu_vm.sh", "--zone=z", "--list"],
            [
                "gcloud compute tpus tpu-vm list --zone=z",
                "gcloud compute tpus queued-resources list --zone=z",
            ],
        ),
        (
            ["tpu_vm.sh", "--zone=z", "--name=a", "--logs"],
            [
                "gcloud compute tpus tpu-vm ssh a --zone=z --worker=all "
                "--command='tail -n 20 liftplace/run.log'"
            ],
        ),
        (
            ["tpu_vm.sh", "--zone", "z", "--name", "a", "--delete"],
            ["gcloud compute tpus tpu-vm delete a --zone=z --quiet"],
        ),
        (
            ["tpu_vm.sh", "--zone=z", "--name=a", "--delete", "--queued"],
            ["gcloud compute tpus queued-resources delete a --zone=z --force --quiet"],
        ),
        (["xpk.sh", "--cluster=c", "--list"], ["xpk workload list --cluster=c"]),
        (
            ["xpk.sh", "--cluster=c", "--name=a", "--logs"],
            [
                "kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=a "
                "--all-containers --prefix "
                "--tail=20"
            ],
        ),
        (
            ["xpk.sh", "--cluster=c", "--name=a", "--delete"],
            ["xpk workload delete --cluster=c --workload=a --force"],
        ),
        (["slurm.sbatch", "--list"], ['squeue --user="$USER" --name=liftplace']),
        (["slurm.sbatch", "--name=a", "--logs"], ["tail -n 20 runs/logs/a-*.log"]),
        (["slurm.sbatch", "--delete"], ['scancel --user="$USER" --name=liftplace']),
    ],
)
def test_list_logs_delete(flags, expected):
    assert dry_run(*flags).splitlines() == expected


@pytest.fixture
def stand_ins(tmp_path):
    """Returns a function: name=shell text -> the variables with which these commands come first;
    each call is noted in the file `calls`."""

    def make(**texts):
        for name, text in ({"git": "", "mkdir": "", "pip": "", "sleep": ""} | texts).items():
            note = f'echo "{name} $*" >> {shlex.quote(str(tmp_path / "calls"))}\n'
            (tmp_path / name).write_text(f"#!/bin/sh\n{note}{text}\n")
            (tmp_path / name).chmod(0o755)
        return {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}

    return make


@pytest.mark.parametrize("flags", [TPU, XPK, SLURM])
def test_awkward_words_arrive_whole(flags, stand_ins, tmp_path):
    """Run with stand-ins for the clouds' commands: what the program gets is what was given."""
    inner = 'for word; do case $word in --command=*main*) cd; sh -c "${word#*=}"; esac; done\n'
    program = f"exec > {tmp_path / 'words'}; for word; do printf '%s\\n' \"$word\"; done; echo end"
    variables = stand_ins(
        gcloud=inner + '[ "$4" != describe ] || echo READY',
        xpk=inner,
        python=program,
        srun='while [ "$1" != python ]; do shift; done; exec "$@"',
    )
    venv = tmp_path / "liftplace" / ".venv" / "bin"
    venv.mkdir(parents=True)
    shutil.copy(tmp_path / "python", venv)
    status, _, err = launch(*flags, *PLACES, "--", *AWKWARD, SLURM_JOB_ID="7", **variables)
    assert status == 0, err
    words = tmp_path / "words"  # on a TPU VM the program goes on behind the launcher
    wait_for(lambda: words.exists() and words.read_text().endswith("end\n"))
    assert words.read_text().splitlines() == ["-m", "liftplace_jax.main", *PLACES, *AWKWARD, "end"]


@pytest.mark.parametrize(
    ("flags", "states", "expected"),
    [
        ([], ["READY"], ["describe"]),
        ([], [""], ["describe", "create"]),
        ([], ["PREEMPTED"], ["describe", "delete", "create"]),
        (
            ["--queued"],
            ["", "PROVISIONING", "ACTIVE"],
            ["describe", "create", "describe", "describe"],
        ),
        (["--queued"], ["SUSPENDED", "ACTIVE"], ["describe", "delete", "create", "describe"]),
        (["--queued"], ["ACTIVE", "ACTIVE"], ["describe", "describe"]),
    ],
)
def test_tpu_is_made_if_need_be(flags, states, expected, stand_ins, tmp_path):
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    variables = stand_ins(
        gcloud='cd; [ "$4" != describe ] || { head -n 1 states; sed -i.old 1d states; }'
    )
    status, _, err = launch(*TPU, *PLACES, *flags, **variables)
    assert status == 0, err
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    done = [words[4] for words in calls if words[0] == "gcloud"]
    assert done == [*expected, "scp", "ssh", "ssh"]


def test_failed_queued_resource_ends_the_command(stand_ins, tmp_path):
    variables = stand_ins(gcloud='[ "$4" != describe ] || echo FAILED')
    status, _, err = launch(*TPU, *PLACES, "--queued", **variables)
    assert status == 1
    assert "the queued resource is FAILED" in err.splitlines()
    assert " scp " not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (3, 0, False), (130, 99, True), (75, 9, True), (75, 10, False)],
)
def test_slurm_requeues_what_may_go_on(code, restarts, requeued, stand_ins, tmp_path):
    variables = stand_ins(srun=f"exit {code}", scontrol="")
    variables["SLURM_RESTART_COUNT"] = str(restarts)
    status, _, _ = launch(*SLURM, *PLACES, SLURM_JOB_ID="7", **variables)
    assert status == code
    assert ("scontrol requeue 7" in (tmp_path / "calls").read_text().splitlines()) == requeued


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--zonne=z"], "unknown flag --zonne;"),
        (["--zone"], "--zone needs a value"),
        (["--zone=z", "--name", "--logs"], "--name needs a value"),
        (["--zone="], "--zone needs a value"),
        (["--spot=yes"], "--spot takes no value"),
        (["distill"], "unexpected argument distill; flags of the program go after --"),
        (["--list", "--logs"], "--list and --logs exclude each other"),
        (["--env=A"], "--env must be NAME=VALUE, got A"),
        ([], "--zone is needed;"),
        (["--zone=z"], "--name is needed;"),
        (["--zone=z", "--name=Lift_1"], "--name must be of a-z, 0-9 and -"),
        (["--zone=z", "--name=a"], "--config is needed;"),
        ([*TPU[1:], "--config=no.py:a=1", "--workdir=/mnt/c"], "--config: no file no.py in"),
        ([*TPU[1:], CONFIG, "--workdir=runs/a"], "--workdir must be in a bucket, gs://..., or"),
        ([*TPU[1:], CONFIG, "--workdir=s3://a"], "--workdir must be in a bucket, gs://..., or"),
        (
            ["--zone=z", "--name=a", "--accelerator-type=v9-8", *PLACES],
            "--runtime-version is needed for --accelerator-type=v9-8;",
        ),
    ],
)
def test_refused_in_one_line(flags, complaint):
    status, out, err = launch("tpu_vm.sh", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {complaint}")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "slurm.sbatch"])
def test_help_names_every_flag(script):
    status, out, _ = launch(script, "--help")
    text = (ROOT / "launch" / script).read_text()
    known = text.split("parse_flags", 1)[1].split('"')[1].split()
    assert status == 0
    for name in [*known, "config", "workdir", "name", "env", "dry-run", "list", "logs", "delete"]:
        assert f"--{name.replace('_', '-')}" in out


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    files = sorted(path.name for path in (ROOT / "launch").glob("*.s*"))
    assert files == ["common.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh"]
    done = subprocess.run(
        [shellcheck, "--external-sources", *files],
        cwd=ROOT / "launch",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# The simulated pod.

PROGRAM = """
import os, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
me = int(flags["process_id"])
def stop(number, frame):
    print("stopped by", signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("process", me, "of", flags["num_processes"], os.environ["XLA_FLAGS"], flags["coordinator"])
if str(me) == flags.get("fails"):
    sys.exit(3)
time.sleep(float(flags.get("seconds", 0)))
print("done")
"""


@pytest.fixture
def program(tmp_path):
    (tmp_path / "tiny.py").write_text(PROGRAM)
    return tmp_path / "tiny.py"


@pytest.fixture
def pod(program, tmp_path):
    """Returns a function: flags of the program -> a Pod of two processes that has been started."""
    pods = []

    def start(*flags, **options):
        pods.append(Pod([sys.executable, str(program), *flags], 2, 3, tmp_path / "logs", **options))
        pod = pods[-1].start()
        wait_for(lambda: all("process" in pod.output(i) for i in range(2)))
        return pod

    yield start
    for each in pods:
        each.kill()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def local(program, *flags):
    """The command, in the folder of the program."""
    return subprocess.Popen(
        [sys.executable, ROOT / "launch" / "local.py", *flags],
        cwd=program.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_pod_runs_to_its_end(pod, capfd):
    """Every process knows its number, the coordinator and its devices, whatever was set before."""
    running = pod(port=12345)
    assert running.wait(timeout=30) == 0
    printed = capfd.readouterr().out.splitlines()
    for i in range(2):
        first, last = running.output(i).splitlines()
        assert first.startswith(f"process {i} of 2 ") and first.endswith(" localhost:12345")
        assert first.count("device_count") == 1 and "device_count=3 " in first
        assert last == "done"
        assert running.log(i).read_text() == running.output(i)
        assert {f"[{i}] {first}", f"[{i}] done"} <= set(printed)


def test_the_first_failure_gives_the_status_and_the_others_are_ended(pod, capfd):
    running = pod("--fails=1", "--seconds=60", grace=0.2)
    assert running.wait(timeout=30) == 3
    assert running.poll() == [130, 3]
    assert "stopped by SIGTERM" in running.output(0)
    assert "process 1 ended with status 3" in capfd.readouterr().err


def test_others_may_end_by_themselves(pod):
    running = pod("--fails=0", "--seconds=0.3", grace=30)
    assert running.wait(timeout=30) == 3
    assert "done" in running.output(1)


def test_kill_and_signal_reach_one_process(pod, capfd):
    running = pod("--seconds=60", grace=0.1)
    running.kill(1)
    assert running.poll() == [None, -signal.SIGKILL]
    with pytest.raises(TimeoutError, match=r"processes \[0\] run after 0 seconds"):
        running.wait(timeout=0)
    running.signal(signal.SIGTERM, 0)
    assert running.wait(timeout=30) == 137 == shell_status(-signal.SIGKILL)
    assert "process 1 was ended by SIGKILL" in capfd.readouterr().err


def test_logs_are_appended_to_and_a_pod_starts_once(pod):
    first = pod()
    first.wait(timeout=30)
    second = pod()
    second.wait(timeout=30)
    assert second.log(0).read_text() == first.output(0) + second.output(0)
    with pytest.raises(RuntimeError, match="starts once"):
        second.start()
    with pytest.raises(ValueError, match="at least 1 process and 1 device, got 0 and 4"):
        Pod(["true"], 0, 4, "logs")


def test_command_passes_signals_on_and_shows_lists_and_ends_a_pod(program):
    flags = ["--module=tiny", "--workdir=run/a", "--config=c.py"]
    process = local(program, *flags, "--", "--seconds=60")
    log = program.parent / "run" / "a-logs" / "process1.log"
    wait_for(lambda: log.exists() and "process 1" in log.read_text())
    shown, _ = local(program, *flags, "--list").communicate(timeout=30)
    assert [line.split()[0] for line in shown.splitlines()] == ["[0]", "[1]"]
    again = local(program, *flags)
    assert again.communicate(timeout=30)[1].startswith("error: a pod of run/a-logs runs;")
    assert again.returncode == 2
    assert local(program, *flags, "--delete").wait(timeout=30) == 0
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert {"[0] stopped by SIGTERM", "[1] stopped by SIGTERM"} <= set(out.splitlines())
    shown, _ = local(program, *flags, "--list").communicate(timeout=30)
    assert shown == "no pod of run/a-logs runs\n"
    shown, _ = local(program, *flags, "--logs").communicate(timeout=30)
    assert sorted(shown.splitlines()) == sorted(out.splitlines())


def test_command_dry_run(program):
    process = local(
        program,
        "--dry-run",
        "--processes=2",
        "--devices=1",
        "--port=4321",
        "--config=c.py:a=1",
        "--workdir=a b",
        "--",
        "--mode=all",
    )
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    flags = shlex.quote(
        " ".join(
            [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
            + ["--xla_force_host_platform_device_count=1"]
        )
    )
    line = (
        f"JAX_PLATFORMS=cpu XLA_FLAGS={flags} {sys.executable} -m liftplace_jax.main "
        "--config=c.py:a=1 '--workdir=a b' --mode=all --coordinator=localhost:4321 "
        "--num_processes=2 --process_id={0} >> 'a b-logs/process{0}.log' 2>&1 &\n"
    )
    assert out == "mkdir -p 'a b-logs'\n" + line.format(0) + line.format(1) + "wait\n"
    assert not (program.parent / "a b-logs").exists()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--confg=c.py"], "unrecognized arguments: --confg=c.py"),
        (["--workdir=a"], "--config is needed"),
        (["--config=c.py"], "--workdir is needed"),
        (["--config=c.py", "--workdir=gs://b/a"], "--logs_dir is needed, as the work directory is"),
        (["--workdir=a", "--config=c.py", "--devices=0"], "at least 1 process and 1 device"),
        (["--workdir=a", "--list", "--logs"], "argument --logs: not allowed with argument --list"),
    ],
)
def test_command_refuses_in_one_line(program, flags, complaint):
    process = local(program, *flags)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and complaint in err
