"""The server of the page: one page, for this machine."""

import http.client
import json
import socket
import threading

import numpy as np
import pytest
from export.compact_test import moving

from fourdstar_jax import cli, export, generate, geometry, serve
from fourdstar_jax.export import page


@pytest.fixture
def server():
    with serve.Server(b"<!doctype html>hello") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path="/", method="GET", **headers):
    connection = http.client.HTTPConnection(*server.server_address, timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_one_page_and_nothing_else(server):
    status, headers, body = ask(server, "/?t=3")
    assert (status, body) == (200, b"<!doctype html>hello")
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ask(server, method="HEAD")[0::2] == (200, b"")
    for path in ("/etc/passwd", "/../../etc/passwd", "/viewer.js"):
        assert ask(server, path)[0] == 404
    assert ask(server, method="POST")[0] == 501


def test_only_this_machine_reaches_it_by_its_own_names(server):
    assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")
    for name in ("localhost", "127.0.0.1:99", "[::1]:80"):
        assert ask(server, Host=name)[0] == 200
    for name in ("evil.example", "127.0.0.1.evil.example:80", ""):
        assert ask(server, Host=name)[0] == 421


def test_a_port_that_is_taken_is_told():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(
            ValueError, match=r"Address already in use \(port 0 takes a free one\)$"
        ):
            serve.Server(b"", port=other.getsockname()[1])


def test_objects_of_folders_come_with_and_without_their_page(tmp_path, monkeypatch, capsys):
    pages = []
    monkeypatch.setattr(serve.Server, "serve_forever", lambda self: pages.append(self.page))
    gaussians = moving(2, 7)
    object4d = generate.Object4D(
        gaussians=gaussians,
        rig=geometry.Rig((0.0,), fps=8.0),
        tokens=np.zeros((2, 4, 1), np.int32),
        meta={"seed": 0},
        frames=np.ones((2, 8, 8, 3), np.float32),
    )
    for name in "ab":
        (tmp_path / name).mkdir()
        export.write_splats(tmp_path / name / "splats.safetensors", gaussians, fps=8.0)
        manifest = export.manifest(object4d, tmp_path / name)
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    shown = page.describe("input", gaussians, object4d.rig, frames=object4d.frames)
    page.write_page(tmp_path / "a" / "viewer.html", [shown])
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert cli.main(["view", *folders, "--port", "0"]) == 0
    assert capsys.readouterr().out.startswith("a, b: http://127.0.0.1:")
    (tmp_path / "both.html").write_bytes(pages[0])
    first, second = page.objects_in(tmp_path / "both.html")
    assert first == shown | {"name": "a"} and second == shown | {"name": "b", "input": []}

    page.write_page(tmp_path / "a" / "viewer.html", [shown, shown])
    assert cli.main(["view", folders[0]]) == 2
    assert "holds 2 objects" in capsys.readouterr().err
    assert cli.main(["view", *17 * folders[1:]]) == 2
    assert "17 folders: a page shows at most 16" in capsys.readouterr().err
    assert cli.main(["view", str(tmp_path)]) == 2
    assert "is no output of" in capsys.readouterr().err
    assert cli.main(["view", str(tmp_path / "nowhere")]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert cli.main(["inspect", folders[0]]) == 2
    assert "is an object: `fourdstar view` shows it" in capsys.readouterr().err
