"""Files of an object store, here one on this machine that speaks S3."""

import os
from pathlib import Path

import fsspec
import pytest
from helpers import store

from fourdstar_jax import folders, remote


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with store.started(tmp_path_factory.mktemp("cache")) as url:
        yield url


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_what_is_a_url():
    assert remote.url_of("s3://a/b/") == remote.url_of(Path("s3://a/b")) == "s3://a/b"
    assert remote.url_of("gs://a/b") == "gs://a/b"
    assert remote.url_of("/a/gs:/b") is None and remote.url_of("runs") is None
    assert remote.fetched("a/b") == Path("a/b")


def test_a_folder_is_fetched_once_and_again_where_it_has_changed(bucket, tmp_path, monkeypatch):
    url = f"{bucket}/set"
    write(tmp_path / "a" / "in", x="1", y="2")
    (tmp_path / "a" / "m.json").write_text("{}")
    remote.send(tmp_path / "a", url, ["m.json", "in/x", "in/y"])
    assert remote.names(url) == ["in/x", "in/y", "m.json"]
    found = remote.fetched(url)
    assert (
        found == remote.cache() / url.replace("://", "/")
        and (found / "in" / "y").read_text() == "2"
    )
    assert remote.fetched(f"{url}/in/x").read_text() == "1"

    fetched, fetch = [], remote._fetch
    monkeypatch.setattr(remote, "_fetch", lambda *a: (fetched.extend(a[3]), fetch(*a)))
    remote.fetched(url)
    assert fetched == []
    (tmp_path / "a" / "in" / "x").write_text("other")
    remote.send(tmp_path / "a", url, ["in/x"])
    remote.remove(f"{url}/in/y")
    assert sorted(p.name for p in (remote.fetched(url) / "in").iterdir()) == ["x"]
    assert fetched == ["in/x"] and (found / "in" / "x").read_text() == "other"


def test_what_is_not_there_and_what_cannot_be_reached(bucket, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"^{bucket}/none does not exist$"):
        remote.fetched(f"{bucket}/none")
    with pytest.raises(ValueError, match="^s3://nobucket/x cannot be written: .*bucket"):
        remote.send(write(tmp_path, x="1"), "s3://nobucket/x", ["x"])

    def missing(name):
        raise ImportError("Install s3fs to access S3", name="s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"^s3://a/b needs s3fs: pip install 'fourdstar-jax\[rem"):
        remote.fetched("s3://a/b")


def test_an_output_folder_is_sent_when_it_is_whole(bucket):
    kind, url = folders.Kind("test", "m.json", frozenset({"k"})), f"{bucket}/out"
    with pytest.raises(RuntimeError), folders.output_folder(url, kind) as partial:
        write(partial, x="1")
        raise RuntimeError
    assert remote.names(url) == [] and not partial.exists()
    with folders.output_folder(Path(url), kind) as partial:
        write(partial, **{"m.json": '{"k": 1}', "x": "1"})
    assert remote.names(url) == ["m.json", "x"] and not partial.exists()
    with pytest.raises(ValueError, match=f"^output folder {url} is not empty"):
        folders.output_folder(url, kind).__enter__()
    with folders.output_folder(url, kind, overwrite=True) as partial:
        write(partial, **{"m.json": '{"k": 2}', "y": "1"})
    assert remote.names(url) == ["m.json", "y"]
    other = folders.Kind("other", "m.json", frozenset({"z"}))
    with pytest.raises(ValueError, match="is no other folder that fourdstar_jax wrote"):
        folders.output_folder(url, other, overwrite=True).__enter__()


def test_a_cut_transfer_leaves_no_file(bucket, tmp_path, monkeypatch):
    url = f"{bucket}/cut"
    remote.send(write(tmp_path, x="1", y="2"), url, ["x", "y"])

    def get(sources, targets):
        Path(targets[0]).write_text("ha")
        raise OSError("connection lost")

    monkeypatch.setattr(remote.store_of(url), "get", get)
    with pytest.raises(ValueError, match=f"^{url} cannot be read: connection lost$"):
        remote.fetched(url)
    assert os.listdir(remote.cache() / url.replace("://", "/")) == []
