"""Bars and clocks tell those who wait that work goes on."""

import io
import time

import pytest

from fourdstar_jax import bars


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_estimate_leaves_out_the_first_step(monkeypatch):
    """One that compiles for a minute, then a second each: two seconds are left, not forty."""
    now = [100.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    text = io.StringIO()
    with bars.steps(5, desc="timesteps", file=text, mininterval=0) as step:
        for seconds in (60, 1, 1):
            now[0] += seconds
            step()
    assert "1/5 [00:00<?" in text.getvalue() and "2/5 [00:01<00:03" in text.getvalue()
    assert text.getvalue().split("\r")[-1].strip().startswith("timesteps:  60%")
    assert "3/5 [00:02<00:02,  1.00it/s]" in text.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_wait_is_told(stream, monkeypatch):
    text = stream()
    monkeypatch.setattr("sys.stderr", text)
    monkeypatch.setattr(bars, "TICK_S", 0.05)
    monkeypatch.setattr(bars, "LOG_S", 0.1)
    with bars.waiting("loading"):
        time.sleep(0.6)
    drawn = text.getvalue().split("\r")
    signs = [line for line in drawn if line.startswith("loading: 00:0")]
    assert len(signs) > 3
    if text.isatty():  # its line is wiped out in the end
        assert drawn[-2:] == [" " * len("loading: 00:00"), ""]
    else:
        assert drawn[-1].startswith("loading: 00:0") and drawn[-1].endswith("\n")


def test_a_log_gets_fewer_signs_the_longer_it_takes(monkeypatch):
    monkeypatch.setattr(bars, "LOG_S", 0.01)
    monkeypatch.setattr(bars, "LOG_SHARE", 1.0)
    text = io.StringIO()
    with bars.steps(2, desc="timesteps", file=text) as step:
        time.sleep(0.7)
        step()
        before = text.getvalue()
        time.sleep(0.1)
        assert text.getvalue() == before  # the first step is over
    assert 3 <= before.count("0/2") <= 10


def test_what_is_quick_or_not_shown_is_not_told(capsys):
    with pytest.raises(KeyError), bars.waiting("loading"):
        raise KeyError
    with bars.waiting("loading", disable=True), bars.steps(3, disable=True) as step:
        step()
    assert capsys.readouterr().err == ""
