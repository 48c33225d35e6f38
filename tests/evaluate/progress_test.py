"""What is told of the time that is left."""

import pytest

from fourdstar_jax.evaluate import progress


def test_the_time_left_is_told_early_and_each_minute(monkeypatch):
    now, lines = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    one = progress.Progress(20, lines.append)
    for seconds in [100] + [30] * 19:  # the first one compiles
        now[0] += seconds
        one.step()
    assert lines[:2] == [
        "2 of 20 clips, about 9.0 minutes to go",
        "5 of 20 clips, about 7.5 minutes to go",
    ]
    counts = [int(line.split()[0]) for line in lines]
    assert counts == [2, 5, 8, 11, 14, 17]
    assert float(lines[-1].split()[-4]) == pytest.approx(1.5)
