"""The live line: what compiles is said, and is not part of rate and ETA."""

import threading
import time

import pytest

from liftplace_jax.training.metrics_io import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when told to."""

    class Clock:
        now = 1e9

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    return clock


@pytest.mark.parametrize("done", [0, 200])
def test_the_first_step_compiles_and_is_not_part_of_the_eta(clock, capsys, done):
    with progress("teacher", done + 101, done) as bar:
        clock.now += 100
        assert str(bar) == "teacher: compiling ... 100 s"
        bar.update()
        for _ in range(10):
            clock.now += 2
            bar.update()
        assert "[00:20<03:00" in str(bar) and f"{done + 11}/{done + 101}" in str(bar)
    err = capsys.readouterr().err
    assert "teacher: compiling ... 0 s" in err
    assert "teacher: compiled, and did the first step, in 100 s\n" in err
    assert err.endswith("\n"), "what is printed next begins a line"


def test_a_program_later_on_compiles_and_is_not_part_either(clock, capsys):
    with progress("samples", 256, unit="image") as bar:
        for _ in range(2):
            bar.compiles()  # of the first one it says nothing new
            assert str(bar) == "samples: compiling ... 0 s"
            clock.now += 40
            bar.update(64)
            clock.now += 4
            bar.update(64)
    err = capsys.readouterr().err
    assert err.count("samples: compiled, and did the first 64 images, in 40 s\n") == 2
    assert "256/256 [00:08<00:00, 16.00image/s]" in err


def test_what_is_quickly_there_says_nothing_of_compilation(clock, capsys):
    with progress("samples", 64, unit="image") as bar:
        clock.now += 0.5
        bar.update(64)
    assert "compiled" not in capsys.readouterr().err


def test_a_line_that_an_error_ends_leaves_no_thread(capsys):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), progress("teacher", 10):
        assert threading.active_count() == before + 1
        raise ZeroDivisionError
    assert threading.active_count() == before
    capsys.readouterr()


def test_seconds_go_on_while_one_waits(capsys):
    with progress("teacher", 10) as bar:
        shown = threading.Event()
        bar._stop()
        bar._over, bar.mininterval, bar.refresh = threading.Event(), 1, shown.set
        bar._show_seconds()
        assert shown.wait(60)
    capsys.readouterr()
