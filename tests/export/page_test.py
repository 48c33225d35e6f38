"""viewer.html in a real browser: what it shows is what `rasterize` draws; hands on everything."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import browser

from fourdstar_jax import geometry
from fourdstar_jax.export import compact, page
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.types import Gaussians

DEMO = Path(__file__).parent / "fixtures" / "demo.4dg"
RIG = geometry.Rig((30.0, 120.0), fps=8.0)
SIZE = 256
LEAST_PSNR = 35.0  # dB; measured 42 to 50


def object4d():
    """What the demo makes, and in front of it three opaque Gaussians that move."""
    gaussians, _ = compact.decode(DEMO.read_bytes())
    t = np.arange(4)[:, None] + np.zeros(3)
    means = np.stack([0.3 - 0.2 * t, 0.1 * t + [-0.3, 0.0, 0.3], 0 * t + 0.3], axis=-1)
    more = Gaussians(
        means=means.astype(np.float32),
        quats=np.tile(np.float32([1, 0.4, 0.3, 0.2]), (4, 3, 1)),
        scales=np.tile(np.float32([0.05, 0.02, 0.03]), (4, 3, 1)),
        opacities=np.full((4, 3), 1, np.float32),
        colors=np.tile(np.eye(3, dtype=np.float32), (4, 1, 1)),
    )
    return Gaussians(*(np.concatenate(x, axis=1) for x in zip(gaussians, more, strict=True)))


def input_frames():
    frames = np.zeros((4, 32, 32, 3), np.float32)
    frames[..., 0] = np.arange(4)[:, None, None] / 4
    frames[:, :16, :, 1] = 0.9  # the upper half
    return frames


def drawn(gaussians, t, azimuth, elevation, *, near=1.0, scaling=1.0, background=1.0):
    one = Gaussians(*(x[t] for x in gaussians))
    cameras = geometry.orbit_cameras(
        [RIG.azimuths_deg[0] + azimuth], [elevation], radius=RIG.radius / near, fov_deg=RIG.fov_deg,
        width=SIZE, height=SIZE,
    )  # fmt: skip
    one = one._replace(scales=one.scales * np.float32(scaling))
    behind = np.full(3, background, np.float32)
    return np.asarray(
        rasterize(one, cameras, width=SIZE, height=SIZE, background=behind).renders[0]
    )


def psnr(a, b):
    return -10 * np.log10(np.mean((a - b) ** 2) + 1e-12)


def settled(page_):
    """The page's pixels once it has drawn all that it was told."""
    page_.eval("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page_.screenshot()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "viewer.html"
    name = "a</script><b>"
    assert page.write_page(path, [page.describe(name, object4d(), RIG, frames=input_frames())])
    return path


@pytest.fixture(scope="module")
def opened(written):
    with browser.page() as page_:
        address = f"file://{written}#ui=0&input=0&play=0"
        page_.open(address, width=SIZE, height=SIZE, offline=True)
        page_.until("window.viewer && viewer.ready")
        yield page_


def test_it_draws_what_the_rasterizer_draws(opened):
    gaussians = object4d()
    views = [
        dict(t=0, azimuth=0, elevation=0),
        dict(t=1, azimuth=100, elevation=-35),
        dict(t=3, azimuth=-60, elevation=20, near=2.5, scaling=0.5),
        dict(t=2, azimuth=180, elevation=0, background=0.0),
    ]
    for view in views:
        shown = {"t": view["t"], "az": view["azimuth"], "el": view["elevation"]}
        shown |= {"near": view.get("near", 1), "size": view.get("scaling", 1)}
        shown |= {"bg": "000000" if view.get("background") == 0 else "ffffff"}
        words = "&".join(f"{k}={v}" for k, v in shown.items())
        opened.eval(f"location.hash = {words!r}")
        found, wanted = settled(opened), drawn(gaussians, **view)
        assert found.shape == wanted.shape and wanted.std() > 0.02
        assert psnr(found, wanted) > LEAST_PSNR, view
        other = drawn(gaussians, **(view | {"t": (view["t"] + 1) % 4}))
        assert psnr(found, other) < 30, view  # so that it tells one timestep from another


def test_it_plays_and_steps_and_slides(opened):
    opened.eval("location.hash = 't=0&az=0&el=0&near=1&size=1&bg=ffffff&play=0'")
    first = settled(opened)
    opened.key(" ", "Space")
    opened.until("viewer.state.playing && Math.floor(viewer.state.frame) >= 2")
    opened.key("ArrowLeft")
    assert not opened.eval("viewer.state.playing")
    at = opened.eval("Math.floor(viewer.state.frame)")
    assert psnr(settled(opened), drawn(object4d(), at, 0, 0)) > LEAST_PSNR
    opened.key("ArrowRight")
    assert opened.eval("viewer.state.frame") == (at + 1) % 4
    slide = "time.value = 0; time.dispatchEvent(new Event('input'))"
    opened.eval(f"{{ const time = document.getElementById('time'); {slide} }}")
    assert psnr(settled(opened), first) > 60


def test_a_drag_turns_the_wheel_and_two_fingers_come_nearer(opened):
    opened.eval("location.hash = 't=0&az=0&el=0&near=1&over=0'")
    mouse = "Input.dispatchMouseEvent"
    place = dict(button="left", clickCount=1)
    opened.call(mouse, type="mousePressed", x=100, y=100, **place)
    opened.call(mouse, type="mouseMoved", x=50, y=90, buttons=1, **place)
    opened.call(mouse, type="mouseReleased", x=50, y=90, **place)
    turned = opened.eval("[viewer.state.azimuth, viewer.state.elevation]")
    assert turned == pytest.approx([20, 4])
    assert psnr(settled(opened), drawn(object4d(), 0, 20, 4)) > LEAST_PSNR
    opened.call(mouse, type="mouseWheel", x=100, y=100, deltaX=0, deltaY=-200)
    opened.until("viewer.state.nearness < 0.85")
    points = [[dict(x=128 - d, y=100, id=0), dict(x=128 + d, y=100, id=1)] for d in (20, 40)]
    before = opened.eval("viewer.state.nearness")
    touch = "Input.dispatchTouchEvent"
    opened.call(touch, type="touchStart", touchPoints=points[0])
    opened.call(touch, type="touchMove", touchPoints=points[1])
    opened.call(touch, type="touchEnd", touchPoints=[])
    opened.until(f"Math.abs(viewer.state.nearness / {before} - 0.5) < 0.05")
    opened.key("r")
    assert opened.eval("[viewer.state.azimuth, viewer.state.nearness]") == [0, 1]


def test_the_result_lies_over_the_input(opened):
    opened.eval("location.hash = 't=2&az=77&el=30&near=3&over=1&mix=0.25'")
    shown = settled(opened)
    seen = input_frames()[2].repeat(SIZE // 32, axis=0).repeat(SIZE // 32, axis=1)
    wanted = 0.75 * seen + 0.25 * drawn(object4d(), 2, 0, 0)
    away = np.abs(np.arange(SIZE) - SIZE / 2) > 8  # from the edge, which is smoothed
    assert psnr(shown[away], wanted[away]) > 30
    opened.key("o")
    assert not opened.eval("viewer.state.over")


def test_controls_and_the_input_beside_it(written, opened):
    address = f"file://{written}#ui=1&input=1&over=0&t=2&az=0&el=0&play=0"
    opened.open("about:blank", width=900, height=500)
    opened.open(address, width=900, height=500)
    opened.until("window.viewer && viewer.ready")
    shown = settled(opened)
    title = opened.eval("document.querySelector('.pane p').textContent")
    assert title.startswith("a</script><b>: 1,027 Gaussians, ") and title.endswith(" seen, 8 fps")
    box = opened.eval("document.querySelector('.seen').getBoundingClientRect().toJSON()")
    middle = round(box["x"] + box["width"] / 2), round(box["y"] + box["height"] / 2)
    np.testing.assert_allclose(shown[middle[1] - 40, middle[0]], [0.5, 0.9, 0], atol=0.05)
    np.testing.assert_allclose(shown[middle[1] + 40, middle[0]], [0.5, 0, 0], atol=0.05)
    canvas = opened.eval("document.querySelector('canvas').getBoundingClientRect().toJSON()")
    assert 1.8 < canvas["width"] / box["width"] < 2.2 and canvas["height"] > 350
    opened.key("i")
    assert opened.eval("document.querySelector('.seen').hidden || !viewer.state.beside")
    opened.key("h")
    opened.until("document.querySelector('#controls').offsetHeight === 0")


def test_a_still_and_a_video_come_from_the_page(opened):
    opened.key("s")
    opened.until("viewer.saved?.name.endsWith('.png')")
    assert opened.eval("viewer.saved.size") > 1000
    opened.key("v")
    opened.eval("location.hash = 'play=1'")
    opened.until(f"viewer.draws > {opened.eval('viewer.draws')} + 10")
    opened.key("v")
    opened.until("/[.](mp4|webm)$/.test(viewer.saved.name)")
    assert opened.eval("viewer.saved.size") > 1000


def test_it_asks_for_nothing_and_says_nothing(opened):
    """After all of that: no error, no message, no request but for the page."""
    assert opened.errors() == []
    asked = [e["params"]["request"]["url"] for e in opened.events
             if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
    assert {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}


def test_several_objects_stand_side_by_side(written, opened, tmp_path):
    both = page.objects_in(written) * 2
    both[1] = both[1] | {"name": "second", "input": []}
    assert page.write_page(tmp_path / "two.html", both)
    address = f"file://{tmp_path}/two.html#ui=0&input=0&play=0&t=1"
    opened.open(address, width=2 * 320 + 2, height=SIZE)
    opened.until("window.viewer && viewer.ready && viewer.panes.length === 2")
    shown, wanted = settled(opened), drawn(object4d(), 1, 0, 0)
    for left in (32, 322 + 32):  # the middle of each
        assert psnr(shown[:, left : left + SIZE], wanted) > LEAST_PSNR


def test_a_page_gives_back_its_objects(written):
    (found,) = page.objects_in(written)
    assert found == page.describe("a</script><b>", object4d(), RIG, frames=input_frames())
    assert written.stat().st_size < 120_000


@pytest.mark.parametrize(
    "change, why",
    [
        (None, "no page"),
        (lambda objects: "{", "not JSON"),
        (lambda objects: json.dumps({"objects": [5]}), "objects"),
        (lambda objects: json.dumps({"objects": [objects[0] | {"rig": {}}]}), "azimuths_deg"),
        (lambda objects: json.dumps({"objects": [objects[0] | {"data": "<"}]}), "data"),
        (lambda objects: json.dumps({"objects": [objects[0] | {"input": ["http://x"]}]}), "input"),
    ],
)
def test_other_pages_are_told_in_a_line(written, tmp_path, change, why):
    path = tmp_path / "x.html"
    text = "<html>"
    if change is not None:
        text = page._OPEN + change(page.objects_in(written)).replace("</", "") + page._CLOSE
    path.write_text(text)
    with pytest.raises(ValueError, match=why) as error:
        page.objects_in(path)
    assert str(path) in str(error.value)


def test_a_page_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_BYTES", 1000)
    assert not page.write_page(tmp_path / "x.html", [])
    assert not (tmp_path / "x.html").exists()
