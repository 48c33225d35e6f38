"""Assets in processes of their own: killed, hanging and crashing ones cost nobody else."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.glb import moving_box

from fourdstar_jax import shards
from fourdstar_jax.data import assets, prepare, workers
from fourdstar_jax.data.settings import Limits, Settings
from fourdstar_jax.shards import Shard

OPTIONS = dict(image_size=9, views=1, extra_views=0, max_frames=2, flow=False)
QUIET = dict(log=lambda line: None)
LIMIT_S = 8


def boxes(folder, count):
    """So many assets that move, no two alike, listed in `list.txt` beside the folder."""
    folder.mkdir()
    names = [f"box_{i:03}.glb" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(moving_box(0.3 + 0.01 * i))
    folder.with_name("list.txt").write_text("\n".join(names) + "\n")
    return names


def shard(tmp_path, part, count):
    flags = [f"--{name}={value}" for name, value in OPTIONS.items() if name != "flow"]
    argv = ["prepare", "--assets", "in", "--list", "list.txt", "--work", "work", "--no-flow"]
    argv += ["--shard", part, "--workers", count, "--timeout", LIMIT_S, *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "fourdstar_jax.cli", *map(str, argv)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def at_work(work):
    """Keys of the assets that are being written, and the processes that do it."""
    for place in (work / "partial").glob("*"):
        key, *_, pid = place.name.split(".")
        yield key, int(pid)


def kill(pid, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


@pytest.mark.parametrize(
    "count, parts, whole_shards",
    [(20, 2, False), pytest.param(200, 4, True, marks=pytest.mark.slow)],
)
def test_two_killed_one_that_hangs_and_one_that_crashes(tmp_path, count, parts, whole_shards):
    """All others are there, once, as one process makes them; the two are named."""
    names = boxes(tmp_path / "in", count)
    hangs, crashes = names[3], names[8]
    shutil.copytree(tmp_path / "in", tmp_path / "sound")
    for name in (hangs, crashes):  # a pipe that nobody writes to, as a dead file server
        (tmp_path / "sound" / name).unlink()
        (tmp_path / "in" / name).unlink()
        os.mkfifo(tmp_path / "in" / name)
    spared = {workers._key(name) for name in (hangs, crashes)}
    work = tmp_path / "work"
    running = [shard(tmp_path, f"{i}/{parts}", 1 if whole_shards else 2) for i in range(parts)]
    killed, start = set(), time.monotonic()
    try:
        while any(p.poll() is None for p in running):
            assert time.monotonic() - start < 60 + count
            shards_own = {p.pid for p in running}  # which write what is said of quarantined assets
            for key, pid in at_work(work):
                if pid in shards_own:
                    continue
                if key == workers._key(crashes):
                    kill(pid, signal.SIGSEGV)
                elif not whole_shards and len(killed) < 2 and key not in spared | killed:
                    if kill(pid, signal.SIGKILL):
                        killed.add(key)
            done = len(list(work.glob("done/*/*")))
            if whole_shards and done > count // 8 * (1 + len(killed)) and len(killed) < 2:
                pid = running[2 * len(killed)].pid
                assert kill(pid, signal.SIGKILL)
                killed.add(pid)
            time.sleep(0.01)
        codes = [p.returncode for p in running]
        said = [p.communicate()[0] for p in running]
    finally:
        for process in running:
            process.kill()
    assert len(killed) == 2 and codes.count(-9) == (2 if whole_shards else 0), (codes, said)
    assert set(codes) <= {0, -9}, said
    options = OPTIONS | QUIET | {"work_dir": work, "limits": Limits(LIMIT_S)}
    options |= {"list_file": tmp_path / "list.txt", "workers": 1}
    manifest = prepare.prepare(tmp_path / "in", tmp_path / "out", **options)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    reasons = {q["file"]: q["reason"] for q in report["quarantined"]}
    assert reasons == {
        hangs: f"not done within {LIMIT_S} s",
        crashes: "its process ended with SIGSEGV, 2 times",
    }
    clips = [c["clip_id"] for c in manifest["clips"]]
    assert len(clips) == len(set(clips)) == count - 2
    alone = prepare.prepare(tmp_path / "sound", tmp_path / "alone", workers=0, **OPTIONS, **QUIET)
    assert alone == manifest
    assert whole_shards or not list((work / "claims").iterdir())


@pytest.fixture
def begun(tmp_path):
    """Four assets, a work folder with the first two, and the options to go on with."""
    names = boxes(tmp_path / "in", 4)
    options = OPTIONS | QUIET | {"workers": 0, "list_file": tmp_path / "list.txt"}
    (tmp_path / "half.txt").write_text("\n".join(names[:2]))
    half = options | {"list_file": tmp_path / "half.txt"}
    prepare.render(tmp_path / "in", tmp_path / "work", shard=Shard(0, 1), **half)
    return tmp_path, names, options | {"work_dir": tmp_path / "work"}


def test_a_second_run_does_what_is_missing(begun, monkeypatch):
    folder, names, options = begun
    rendered = []

    def render(job, place, original=assets.render_asset):
        rendered.append(job.file)
        return original(job, place)

    monkeypatch.setattr(workers, "render_asset", render)
    first = prepare.prepare(folder / "in", folder / "a", **options)
    assert rendered == names[2:]
    again = prepare.prepare(folder / "in", folder / "b", **options)
    assert rendered == names[2:] and again == first
    (folder / "in" / names[1]).unlink()  # what is rendered needs no asset any more
    assert prepare.prepare(folder / "in", folder / "c", **options) == first


def test_shards_with_folders_of_their_own_are_read_together(begun):
    folder, names, options = begun
    whole = prepare.prepare(folder / "in", folder / "a", **options | {"work_dir": None})
    both = options | {"work_dir": folder / "rest", "more_work": [folder / "work"]}
    assert prepare.prepare(folder / "in", folder / "b", **both) == whole
    assert len(list(folder.glob("rest/done/*/*"))) == len(list(folder.glob("work/done/*/*"))) == 2


def test_what_is_not_there_is_named_and_tried_again_when_told(begun):
    folder, names, options = begun
    data = (folder / "in" / names[3]).read_bytes()
    (folder / "in" / names[3]).unlink()
    for retry, clips in ((False, 3), (True, 4)):
        prepare.prepare(folder / "in", folder / f"out{retry}", retry=retry, **options)
        report = json.loads((folder / f"out{retry}" / "report.json").read_text())
        assert report["clips_kept"] == clips
        assert report["missing"] == ([] if retry else names[3:])
        (folder / "in" / names[3]).write_bytes(data)


def test_other_settings_and_damaged_records_are_told(begun):
    folder, names, options = begun
    with pytest.raises(ValueError, match="work was begun with views=1, not 2"):
        prepare.prepare(folder / "in", folder / "out", **options | {"views": 2})
    record = next((folder / "work" / "done").glob("*/*/*.npz"))
    record.write_bytes(record.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"0-0.npz is damaged: remove its folder"):
        prepare.prepare(folder / "in", folder / "out", **options)
    with pytest.raises(ValueError, match="holds other things"):
        prepare.prepare(folder / "in", folder / "out", **options | {"work_dir": folder / "in"})
    assert not (folder / "out").exists()


@pytest.mark.parametrize("line", ["/box.glb", "../box.glb", "box.obj", "s3://x/box.glb"])
def test_lists_stay_below_the_assets(begun, line):
    folder, names, options = begun
    (folder / "list.txt").write_text(f"# the first\n\n{names[0]}\n{line}\n")
    with pytest.raises(ValueError, match=f"list.txt, line 4: '{line}' is (no path|a URL)"):
        prepare.prepare(folder / "in", folder / "out", **options)


def test_too_much_memory_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "small.glb").write_bytes(moving_box())
    big = tmp_path / "in" / "big.glb"
    big.write_bytes(moving_box())
    os.truncate(big, 255 << 20)  # zeros behind its end, which are read
    limits = Limits(60, memory=128 << 20)
    prepare.prepare(tmp_path / "in", tmp_path / "out", workers=1, limits=limits, **OPTIONS, **QUIET)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (told,) = report["quarantined"]
    assert told == {"file": "big.glb", "reason": "needs more than 128 MiB of memory"}
    assert report["clips_kept"] == 1


def test_claims_of_the_dead_and_of_long_ago_end(tmp_path):
    work = workers.Work(tmp_path / "work", Settings(), Limits(10))
    assert work.take("a") and not work.take("a")
    other = workers.Work(tmp_path / "work", Settings(), Limits(10))  # as after a restart
    assert other.take("a")
    claim = tmp_path / "work" / "claims" / workers._key("b")
    process = subprocess.Popen(["sleep", "60"])
    claim.write_text(shards._identity(process.pid))
    assert not work.take("b")
    process.kill()
    process.wait()
    assert work.take("b")
    claim.write_text("another machine 17.5")
    assert not work.take("b")
    old = time.time() - work.claims.lasts_s - 1
    os.utime(claim, (old, old))
    assert work.take("b")


@pytest.mark.parametrize("text", ["1", "4/4", "-1/4", "1/0", "a/b", "0/4/2"])
def test_shards_are_numbered_from_zero(text):
    with pytest.raises(ValueError, match="must be I/N"):
        Shard.parse(text)


def test_shards_part_a_list():
    three = [Shard(i, 3) for i in range(3)]
    assert sorted(i for s in three for i in s.own(11)) == list(range(11))
    for s in three:
        assert sorted([*s.own(11), *s.others(11)]) == list(range(11))
    assert list(Shard(2, 3).others(7)) == [6, 3, 0, 4, 1]
    assert Shard.parse("0/1") == Shard()
