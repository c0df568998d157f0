"""Commands as people type them: what is refused, in one line, and what --help says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict

from liftplace_jax import __main__ as listing
from liftplace_jax.experiment.config_flag import ConfigError, load_config
from liftplace_jax.host.flags import EXIT_BAD_INPUT

ROOT = Path(__file__).parent.parent
CONFIG = "--config=tests/tiny_config.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}


LATE = ("liftplace_jax.host.processes", "liftplace_jax.experiment")
"""What commands import late; once is enough where there are many of them."""


def commands(module, *arguments, imported=()):
    """[(exit status, stdout, stderr)] of a command with each list of arguments."""
    done = subprocess.run(
        [sys.executable, "tests/forked_commands.py", module, *imported],
        cwd=ROOT,
        env=ENVIRONMENT,
        input=json.dumps(arguments),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


REFUSED = {
    "liftplace_jax.main": {
        ("--config.seeds=abc",): r"config.seeds\[0\] must be a whole number in .*, got 'abc'",
        ("--config.seeds=0+x",): "flag --config.seeds=0.x: want a tuple, such as 0.1.2",
        ("--config.seeds=1.5",): r"config.seeds\[0\] must be a whole number in .*, got 1.5",
        ("--config.seeds=0+1+1",): "config.seeds must be different numbers",
        ("--config.seeds=None",): "config.seeds must be a sequence.*got None",
        ("--config.sharding_rules=(('kernel', ('fdsp',)),)",): r"config.sharding_rules\[0\]: ",
        ("--config.teacher.batch_size=1000000000000",): "config.teacher.batch_size must be a whole",
        ("--config.distill.batch_size=2000000000",): "config.distill.batch_size 2000000000: .*GiB",
        ("--config.distill.optimizer.learning_rate=nan",):
            "config.distill.optimizer.learning_rate must be a number in .*got nan",
        ("--config.evaluation.eta=nan",): "config.evaluation.eta must be a number in .*got nan",
        ("--config.teacher.steps=1e5",): "flag --config.teacher.steps=1e5: want a whole number",
        ("--config.teacher.steps=None",): "config.teacher.steps must be a whole number.* got None",
        ("--config.distill.scale=x",): "flag --config.distill.scale=x: want a number, got 'x'",
        ("--config.tensorboard=maybe",): "flag --config.tensorboard=maybe: want true or false",
        ("--config.method=None",): "config.method must be set, got None",
        ("--config.teacher=5",): "flag --config.teacher=5: Failed to parse",
        ("--config.teacher={}",): "config.teacher.accumulation is missing",
        ("--config.teacher.steps.x=1",): "unknown config field in --config.teacher.steps.x=1",
        ("--config.teacher.checkpoint.x=1",): "unknown config field in --config.teacher.checkpoi",
        ("--config.a-b=1",): "--config.a-b names no field: want --config.FIELD=VALUE",
        ("--config.=1",): "--config. names no field",
        ("--config.data.crop=0+0+9",): "config.data.crop must be .left, upper, right, lower.",
        ("--config.model.attn_resolutions=5",): r"config.model: attn_resolutions \[5\]: .*\[8\]",
        ("--confg=x",): "Unknown command line flag 'confg'",
        ("--heartbeat_timeout=0",): "flag --heartbeat_timeout=0: ",
        ("more",): r"unexpected arguments: \['more'\]",
    },
    "liftplace_jax.evaluate": {
        ("gen", "--guidance=nan", "--workdir=x", "--ref=y"): "--guidance must be a number in .*nan",
        ("gen", "--guidance=1e30", "--workdir=x", "--ref=y"): "--guidance must be a number in .*30",
        ("gen", "--num_samples=0", "--workdir=x", "--ref=y"): "flag --num_samples=0: ",
        ("gen", f"--num_samples={10**12}", "--workdir=x", "--ref=y"): "flag --num_samples=10000",
        ("ref", "--batch_size=0"): "flag --batch_size=0: ",
        ("ref", "--image_size=1000000"): "flag --image_size=1000000: ",
        ("ref", "--num_images=2.5"): "flag --num_images=2.5: ",
        ("gen", "--seed=-1"): "flag --seed=-1: ",
        ("gem",): "want one of the verbs ref, gen, calc",
    },
    "liftplace_jax.convert": {
        ("--model=x", "--to=onnx", "--out=y"): "flag --to=onnx: ",
        ("--model=x", "--to=published", "--out=y", CONFIG, "--config.model.ch=-1"):
            "config.model: ch must be a whole number in 4..*, got -1",
        ("--model=x", "--to=published", "--out=y", "--config=README.md"):
            "--config=README.md is no Python file",
    },
    "liftplace_jax.benchmark": {
        ("--suite=sizes", "--repeats=1"): "flag --repeats=1: ",
        ("--suite=compression", CONFIG, "--ratios=nan"): r"--ratios must be a number in \[0, 1\)",
        ("--suite=compression", CONFIG, "--ratios=0.5,1"): r"--ratios must be a number in \[0, 1\)",
        ("--suite=compression", CONFIG, "--batch_size=0"): "flag --batch_size=0: ",
        ("--suite=compression", CONFIG, "--config.distill.scale=nan"): "config.distill.scale must",
        ("--suite=sizes", "more"): "unexpected arguments",
    },
    "liftplace_jax.encode": {
        (CONFIG, "--config.data.image_size=0"): "config.data.image_size must be a whole number",
        (CONFIG, "--batch_size=0"): "flag --batch_size=0: ",
    },
}  # fmt: skip


@pytest.mark.parametrize("module", REFUSED)
def test_what_is_no_setting_is_one_line_and_status_2(module, tmp_path):
    arguments = [list(given) for given in REFUSED[module]]
    if module == "liftplace_jax.main":
        arguments = [[CONFIG, *given, f"--workdir={tmp_path / 'run'}"] for given in arguments]
    done = commands(module, *arguments, imported=LATE)
    for given, message, (status, out, err) in zip(
        arguments, REFUSED[module].values(), done, strict=True
    ):
        assert (status, out) == (EXIT_BAD_INPUT, ""), (given, err)
        assert re.match(f"error: {message}", err), (given, err)
        assert len(err.splitlines()) == 1, err
    assert list(tmp_path.iterdir()) == []


def test_fields_are_spelt_as_after_the_colon_and_can_be_unset(tmp_path):
    teacher = "--config.teacher.checkpoint=/nowhere"  # the config is taken, then this refused
    spellings = {
        "a": [f"{CONFIG}:seeds=0+1+2", "--config.evaluation.clip=None"],
        "b": [CONFIG, "--config.seeds=0+1+2", "--config.evaluation.clip=None"],
        "c": [
            CONFIG,
            "--config.seeds=(0, 1, 2)",
            "--config.data.crop=0+0+8+8",
            "--config.data.crop=None",
            "--config.evaluation.features=None",
            "--config.teacher.optimizer.grad_clip=None",
            "--noconfig.tensorboard",
        ],
    }
    arguments = [
        [*given, teacher, f"--workdir={tmp_path / name}"] for name, given in spellings.items()
    ]
    for status, _, err in commands("liftplace_jax.main", *arguments, imported=LATE):
        assert status == EXIT_BAD_INPUT and "/nowhere" in err, err
    found = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in spellings}
    assert found["a"] == found["b"]
    assert found["a"]["seeds"] == found["c"]["seeds"] == [0, 1, 2]
    assert found["b"]["evaluation"]["clip"] is None and found["c"]["evaluation"]["clip"] == 1.0
    assert found["c"]["data"]["crop"] is found["c"]["evaluation"]["features"] is None
    assert found["c"]["teacher"]["optimizer"]["grad_clip"] is None


FILES = {
    "def get_config(arg=None)\n    return 1\n": "FILE, line 1 is no Python: expected ':'",
    "x = 1\n": r"FILE is no config file: it has no function get_config\(arg=None\)",
    "get_config = 3\n": "FILE is no config file: it has no function get_config",
    "def get_config():\n    return None\n": "FILE: get_config must return a ConfigDict, not None",
    "def get_config():\n    return {}\n": "FILE: get_config must return a ConfigDict, not dict",
    "\n\ndef get_config():\n    return nothing\n":
        r"NameError: name 'nothing' is not defined \(FILE, line 4\)",
    "def get_config():\n    raise ValueError('so\\nlong')\n": r"so long \(FILE, line 2\)",
    "import no_such_module\n": r"ModuleNotFoundError: .*'no_such_module' \(FILE, line 1\)",
    "raise SystemExit(7)\n": r"SystemExit: 7 \(FILE, line 1\)",
    "def get_config(a, b):\n    pass\n": r"TypeError: .*missing 2 required .*\(FILE\)",
    "from liftplace_jax.experiment.configuration import default_config\ndef get_config():\n"
    "    c = default_config()\n    c.teacher.steps = 1.5\n":
        r"TypeError: Could not override field 'steps' .*\(FILE, line 4\)",
    "\0": "FILE is no Python: .*null bytes",
}  # fmt: skip


@pytest.mark.parametrize("text, message", FILES.items())
def test_a_config_file_that_is_none_is_one_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match="^" + message.replace("FILE", re.escape(str(path)))) as e:
        load_config(str(path))
    assert "\n" not in str(e.value) and issubclass(ConfigError, flags.Error)
    assert [found.name for found in tmp_path.iterdir()] == ["mine.py"]


def test_a_path_that_is_no_config_file_is_one_line(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.py")
    for path, message in {
        "README.md": "README.md is no Python file",
        "configs": "configs is a folder: give one of its .py files",
        "": "--config is empty",
        "configs/digit.py": r"there is no such file; did you mean configs/digits.py\?",
        "configs/nothing_like_it.py": "configs/nothing_like_it.py: there is no such file$",
        "gs://bucket/digits.py": "must be a file of this machine",
        str(tmp_path / "pipe.py"): "is no Python file",
        "tests/tiny_dit_config.py:seed=1": "takes no arguments after a colon, got 'seed=1'",
        "configs/digits.py:ratio=x": "'ratio=x': expected ratio=<float> .configs/digits.py, line ",
    }.items():
        monkeypatch.chdir(ROOT)
        with pytest.raises(ConfigError, match=message):
            load_config(path)
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
    )
    with pytest.raises(ConfigError, match="configs/digits.py cannot be read: Permission denied"):
        load_config("configs/digits.py")


def test_a_good_config_file_leaves_nothing_behind(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(arg=None):\n    return ConfigDict({'arg': arg})\n"
    )
    assert load_config(f"{path}:a:b") == ConfigDict({"arg": "a:b"})
    assert load_config(str(path)).arg is None
    assert [found.name for found in tmp_path.iterdir()] == ["mine.py"]


def test_help_says_what_a_command_does_its_flags_and_its_config():
    plain, given, bad, full = commands(
        "liftplace_jax.main",
        ["--help"],
        ["-h", "--config=configs/digits.py:ratio=0.5"],
        ["--help", "--config=README.md"],
        ["--helpfull"],
    )
    assert plain[0] == given[0] == full[0] == 0 and plain[2] == given[2] == ""
    for text in (
        "Trains a teacher",
        "python -m liftplace_jax.main --config=configs/digits.py",
        "--workdir",
        "--config.FIELD=VALUE",
        "FILE.py:KEY=VALUE",
        "--config=FILE.py --help",
    ):
        assert text in plain[1], text
    for text in (
        "Arguments after a colon",
        "seeds=0+1+2",
        "--config.compress.ratio=0.5",
        "--config.teacher.steps=2400",
        "(a whole number in 1..2^31 - 1)",
        "--config.model.ch=32",
    ):
        assert text in given[1], text
    assert bad[0] == EXIT_BAD_INPUT and bad[2].startswith("error: --config=README.md is no Python")
    assert "--coordinator" in full[1] and "--coordinator" not in plain[1]


@pytest.mark.parametrize("name", listing.COMMANDS)
def test_every_listed_command_has_help(name):
    ((status, out, err),) = commands(f"liftplace_jax.{name}", ["--help"])
    assert (status, err) == (0, "")
    assert f"python -m liftplace_jax.{name}" in out and "Flags:" in out
    assert ("--config.FIELD=VALUE" in out) == (name != "evaluate")
    first = out.splitlines()[0]
    assert f"python -m liftplace_jax.{name:<14}{first}" in listing.commands()


def test_the_package_lists_its_commands():
    def ask(*arguments):
        # Neither the backend of JAX nor anything else heavy is started.
        program = "import runpy, sys; runpy.run_module('liftplace_jax', run_name='__main__')"
        program += "; assert not {'flax', 'optax', 'tensorflow', 'orbax'} & set(sys.modules)"
        return subprocess.run(
            [sys.executable, "-c", program, *arguments],
            env=ENVIRONMENT,
            text=True,
            capture_output=True,
            timeout=60,
        )

    for arguments in ((), ("--help",)):
        done = ask(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert all(f"python -m liftplace_jax.{name}" in done.stdout for name in listing.COMMANDS)
    done = ask("evaluate", "gen")
    assert (done.returncode, done.stdout) == (EXIT_BAD_INPUT, "")
    assert done.stderr.endswith("did you mean python -m liftplace_jax.evaluate?\n")
