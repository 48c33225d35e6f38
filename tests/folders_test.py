"""Output folders: whole or not at all, and nobody else's is ever replaced."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fourdstar_jax import folders
from fourdstar_jax.folders import DATASET, OBJECT, TOKENS, output_folder

pytestmark = pytest.mark.central

MANIFEST = {"timesteps": 1, "gaussians": 2, "files": {}}


def write(folder, **more):
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | more))


def read(folder):
    return json.loads((folder / "manifest.json").read_text())


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_all_or_nothing(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError), output_folder(out, OBJECT) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not out.exists() and names(out.parent) == []
    with output_folder(out, OBJECT) as folder:
        write(folder, made=1)
    with pytest.raises(ValueError, match="not empty"), output_folder(out, OBJECT):
        pass
    with pytest.raises(RuntimeError), output_folder(out, OBJECT, overwrite=True):
        raise RuntimeError
    assert read(out)["made"] == 1  # a failure keeps the old one
    with output_folder(out, OBJECT, overwrite=True) as folder:
        write(folder, made=2)
    assert names(out.parent) == ["out"] and read(out)["made"] == 2


@pytest.mark.parametrize(
    "content",
    [
        None,  # no manifest at all
        "[1, 2]",
        "{",
        "[" * 200_000,
        '{"name": "an app", "icons": []}',  # a web application's manifest.json
        json.dumps(MANIFEST),  # ours, of another kind
    ],
)
@pytest.mark.parametrize("kind", [DATASET, TOKENS])
def test_others_folders_are_spared(tmp_path, content, kind):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    if content is not None:
        (tmp_path / "out" / "manifest.json").write_text(content)
    before = names(tmp_path / "out")
    with pytest.raises(ValueError, match="not overwritten") as error:
        with output_folder(tmp_path / "out", kind, overwrite=True):
            pass
    assert kind.name in str(error.value)
    assert names(tmp_path / "out") == before and names(tmp_path) == ["out"]
    with pytest.raises(ValueError, match="is a file"):
        with output_folder(tmp_path / "out" / "thesis.tex", kind, overwrite=True):
            pass


def test_every_writer_spares_them(tmp_path, objects_dir, dataset_dir, tiny_bundle):
    """What the commands call, with overwrite, on a folder that holds somebody's work."""
    from fourdstar_jax import export
    from fourdstar_jax.data import features, prepare, tokens
    from fourdstar_jax.generate import Object4D
    from fourdstar_jax.geometry import Rig
    from fourdstar_jax.types import Gaussians, TokenizerSpec

    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    spec = TokenizerSpec("a", 17, 4, 2, vocab_size=5, code_dim=6, weights_sha256="")
    books = np.zeros((2, 5, 3), np.float32)
    shapes = dict(means=(3,), quats=(4,), scales=(3,), opacities=(), colors=(3,))
    gaussians = Gaussians(*(np.ones((1, 2, *shape), np.float32) for shape in shapes.values()))
    object4d = Object4D(gaussians, Rig.around(2, fps=8.0), np.zeros((1, 4, 2), np.int32), {})
    quiet = dict(overwrite=True, log=lambda line: None)
    writers = [
        lambda: prepare.prepare(objects_dir, out, workers=0, **quiet),
        lambda: tokens.tokenize(dataset_dir, out, len, spec=spec, codebooks=books, **quiet),
        lambda: features.write(dataset_dir, out, len, encoder={"sha256": ""}, **quiet),
        lambda: export.save(object4d, out, overwrite=True),
    ]
    for writer in writers:
        with pytest.raises(ValueError, match="not overwritten"):
            writer()
        assert names(out) == ["thesis.tex"] and names(tmp_path) == ["thesis"]


def gone() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_processes_left_is_removed(tmp_path):
    host, dead, alive = folders._HOST, gone(), os.getppid()
    spared = [f".out.partial-{alive}", f".out.partial-elsewhere.{dead}", f".other.partial-{dead}"]
    for name in (f".out.partial-{dead}", f".out.partial-{host}.{dead}", *spared):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    with output_folder(tmp_path / "out", OBJECT) as folder:
        write(folder)
    assert names(tmp_path) == sorted([*spared, "out"])


def test_two_processes_do_not_write_the_same_folder(tmp_path):
    left = tmp_path / f".out.partial-{folders._HOST}.{os.getppid()}"
    left.mkdir()
    with pytest.raises(ValueError, match=f"another process: .*{left.name}$"):
        with output_folder(tmp_path / "out", OBJECT, overwrite=True):
            pass
    left.rmdir()
    with pytest.raises(ValueError, match="meanwhile"):
        with output_folder(tmp_path / "out", OBJECT) as folder:
            write(folder)
            (tmp_path / "out").mkdir()  # by a process of another machine
            write(tmp_path / "out", made=1)
    assert names(tmp_path) == ["out"] and read(tmp_path / "out")["made"] == 1


def test_a_folder_put_aside_by_a_killed_process_comes_back(tmp_path):
    aside = tmp_path / f".out.replaced-{gone()}"
    aside.mkdir()
    write(aside, made=1)
    with pytest.raises(ValueError, match="not empty"), output_folder(tmp_path / "out", OBJECT):
        pass
    assert names(tmp_path) == ["out"] and read(tmp_path / "out")["made"] == 1


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    folders.replace_file(path, b"1")
    folders.replace_file(path, b"22")
    assert path.read_bytes() == b"22" and names(tmp_path) == ["a.json"]
    assert folders.file_sha256(path).startswith("785f3ec7eb32f30b90cd0fcf3657d388b5ff4297f2f9716")


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    """Also with a name that a glob pattern would take for more; what was left is removed."""
    path = tmp_path / "new" / "a[1]*.json"
    with folders.output_file(path) as partial:
        partial.write_text("old")
    left = path.with_name(f".{path.name}.partial-{2**30}")
    left.write_text("of a process that is gone")
    with pytest.raises(RuntimeError), folders.output_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_what_is_unfinished_can_be_abandoned(tmp_path):
    with folders.output_folder(tmp_path / "a", folders.OBJECT) as partial:
        (partial / "b").write_text("b")
        folders.abandon()
        assert list(tmp_path.iterdir()) == []
        partial.mkdir()  # for the end of the block


def test_an_error_names_what_was_asked_for(tmp_path):
    """Not the temporary sibling that it was about."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/out cannot be made: Not a directory$"):
        with output_folder(tmp_path / "file" / "out", OBJECT):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as raised, folders.output_file(tmp_path / "folder") as partial:
        partial.write_text("")
    assert raised.value.filename == str(tmp_path / "folder") and names(tmp_path / "folder") == []
    assert names(tmp_path) == ["file", "folder"]
