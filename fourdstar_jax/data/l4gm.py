"""Renders in L4GM's layout to records, for those who have pictures and no GLB files.

What `blender_scripts/render_objaverse.py` of github.com/nv-tlabs/L4GM-official writes: a folder a
clip, and in it one a camera, which stays where it is:

    036/uid/000/              the third animation of the object `uid` would be 036/uid/002
        000/img/000.jpg       camera 0 at frame 0, on white
        000/mask/000.png      its alpha
        000/camera/rotation.npy, elevation.npy    degrees, of each frame
        001/ ... 015/         fifteen more, evenly around at elevation 0

Such clips lie in the folder that is given, or in its `fixed_16_clip`; then the same path below
`random_clip`, where there is one, has cameras at random places. There is neither depth nor flow nor
a surface, and the sizes are L4GM's: the clip's longest side, over all frames, is one scene unit.

Its camera of rotation 0 looks at the back of what glTF calls the front, and elevations count
upwards; both turn into this project's here, so that an object faces as its GLB file would.
"""

import hashlib
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from fourdstar_jax.geometry import orbit_cameras
from fourdstar_jax.types import Cameras

FIXED, RANDOM = "fixed_16_clip", "random_clip"
TURN_DEG = 180.0  # from L4GM's rotation to an azimuth
ANGLE_DEG = 0.01  # that a camera may move, or be beside a place of the rig
MAX_SIDE, MAX_FILE = 4096, 64 << 20  # pixels; bytes
_CAMERA, _CLIP = re.compile(r"\d{3}"), re.compile(r"\d+")
_ORBITS = re.compile(r"(multi|multi_static|front)_?frame0\.png")  # of Diffusion4D


class Malformed(ValueError):
    """What is not right in a clip's folder, in one line."""


def clips(folder: Path) -> list[str]:
    """Paths of all clips below a folder, in order.

    Raises ValueError for Diffusion4D's renders, which this project cannot use.
    """
    fixed = _fixed(folder)
    found = []
    for place, folders, files in fixed.walk():
        if orbit := next((name for name in files if _ORBITS.fullmatch(name)), None):
            raise ValueError(
                f"{place / orbit} is of Diffusion4D, whose camera moves while the object does: "
                "there are no views of one moment to train on; render its GLB files (--assets)"
            )
        if (place / "000" / "camera").is_dir():
            found.append(place.relative_to(fixed).as_posix())
            folders.clear()
    return sorted(found)


def places(folder: Path, clip: str) -> tuple[Path, Path]:
    """Where a clip's fixed cameras are, and where its random ones would be."""
    return _fixed(folder) / clip, folder / RANDOM / clip


def identity(clip: str) -> tuple[str, int]:
    """The object's id and the number of its animation, of a clip's path."""
    parent, _, last = clip.rpartition("/")
    return (parent, int(last)) if parent and _CLIP.fullmatch(last) else (clip, 0)


def _fixed(folder: Path) -> Path:
    return folder / FIXED if (folder / FIXED).is_dir() else folder


class Clip:
    """A clip's cameras; `pictures` reads what they see.

    Raises Malformed for a folder that is not as the layout says, and if the fixed cameras are not
    at `views` places evenly around or there are fewer than `extra_views` others: random ones, or
    else those of the ring that are left.
    """

    def __init__(self, fixed: Path, random: Path, views: int, extra_views: int):
        if not fixed.is_dir():
            raise Malformed("cannot be read: No such file or directory")
        self._digest = hashlib.sha256()
        ring = {camera: self._angles(camera) for camera in _cameras(fixed)}
        self.rig = []
        for view in range(views):
            azimuth = 360.0 * view / views
            at = (c for c, (a, e) in ring.items() if _apart(a, azimuth) + abs(e) < ANGLE_DEG)
            if (camera := next(at, None)) is None:
                raise Malformed(
                    f"no camera at azimuth {azimuth:g}, elevation 0, as --views {views} wants: "
                    f"{len(ring)} are there"
                )
            self.rig.append(camera)
        others = _cameras(random) if random.is_dir() else [c for c in ring if c not in self.rig]
        if len(others) < extra_views:
            raise Malformed(f"{len(others)} cameras besides the rig's, --extra_views {extra_views}")
        chosen = np.linspace(0, len(others), extra_views, endpoint=False).astype(int)
        self.extra = [others[i] for i in chosen]
        extra = [ring.get(camera) or self._angles(camera) for camera in self.extra]
        self._angles_deg = np.array([ring[c] for c in self.rig] + extra)
        self.num_frames = min(len(_names(c / "img")) for c in [*self.rig, *self.extra])

    def cameras(self, size: int) -> tuple[Cameras, Cameras]:
        """Those of the rig, and the extra ones."""
        angles, V = self._angles_deg.reshape(-1, 2), len(self.rig)
        of = [orbit_cameras(*part.T, width=size, height=size) for part in (angles[:V], angles[V:])]
        return of[0], of[1]

    def pictures(self, frames: int, size: int) -> Iterator[UInt8[np.ndarray, "V h w 4"]]:
        """Of each frame what all cameras see, the rig's first: sRGB with straight alpha."""
        for frame in range(frames):
            yield np.stack([self._picture(c, frame, size) for c in [*self.rig, *self.extra]])

    def sha256(self) -> str:
        """Hash of all that was read so far."""
        return self._digest.hexdigest()

    def _angles(self, camera: Path) -> tuple[float, float]:
        """Azimuth and elevation in this project's frame, in degrees."""
        found = []
        for name in ("rotation", "elevation"):
            path = camera / "camera" / f"{name}.npy"
            shown = f"{camera.name}/camera/{path.name}"
            values = _numbers(self._bytes(path, shown), shown)
            if np.ptp(values) > ANGLE_DEG:
                raise Malformed(
                    f"the camera {camera.name} moves: its {name} goes from {values.min():g} to "
                    f"{values.max():g} degrees; there are no views of one moment"
                )
            found.append(float(values.flat[0]))
        rotation, elevation = found
        if abs(elevation) > 89:
            raise Malformed(f"camera {camera.name} has elevation {elevation:g}, not -89 to 89")
        return (rotation + TURN_DEG) % 360, -elevation

    def _picture(self, camera: Path, frame: int, size: int) -> UInt8[np.ndarray, "h w 4"]:
        names = f"img/{frame:03}.jpg", f"mask/{frame:03}.png"
        color, mask = (self._open(camera, name) for name in names)
        if color.size != mask.size or color.width != color.height:
            raise Malformed(f"{camera.name}/{names[0]} is {color.size}, its mask {mask.size}")
        if color.width < size:
            raise Malformed(f"{camera.name}/{names[0]} is {color.width} pixels, fewer than {size}")
        on_white, alpha = _smaller(color.convert("RGB"), size), _smaller(mask.convert("L"), size)
        return straight(on_white, alpha)

    def _open(self, camera: Path, name: str):
        from PIL import Image

        shown = f"{camera.name}/{name}"
        try:
            picture = Image.open(
                io.BytesIO(self._bytes(camera / name, shown)), formats=("JPEG", "PNG")
            )
            if max(picture.size) > MAX_SIDE:
                raise Malformed(f"{shown} is {picture.size}, more than {MAX_SIDE} pixels a side")
            picture.load()
        except (Malformed, MemoryError):
            raise
        except Exception as error:  # Pillow meets damage with exceptions of every kind
            found = " ".join(str(error).split()) or type(error).__name__
            raise Malformed(f"{shown} cannot be read: {found}") from error
        return picture

    def _bytes(self, path: Path, shown: str) -> bytes:
        try:
            if path.stat().st_size > MAX_FILE:
                raise Malformed(f"{shown} is larger than {MAX_FILE >> 20} MiB")
            data = path.read_bytes()
        except OSError as error:
            raise Malformed(f"{shown} cannot be read: {error.strerror}") from error
        self._digest.update(f"{shown} {len(data)} ".encode() + data)
        return data


def straight(
    on_white: Float[np.ndarray, "h w 3"], alpha: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 4"]:
    """Straight colours of what lies on white, both in [0, 255]: black where there is nothing."""
    a = alpha[..., None] / 255
    color = np.where(a > 0, (on_white - 255 * (1 - a)) / np.maximum(a, 1 / 255), 0)
    return np.rint(np.concatenate([color.clip(0, 255), alpha[..., None]], -1)).astype(np.uint8)


def _numbers(data: bytes, shown: str) -> np.ndarray:
    """The finite numbers of an .npy file; nothing is made before header and size agree."""
    file = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize != len(data) - file.tell():
            raise ValueError
    except Exception as error:  # NumPy's own parser raises several kinds
        raise Malformed(f"{shown} is no NumPy file of numbers") from error
    values = np.frombuffer(data, dtype, offset=file.tell())
    if not values.size or not np.isfinite(values).all():
        raise Malformed(f"{shown} holds no finite numbers")
    return values


def _smaller(picture, size: int) -> np.ndarray:
    from PIL import Image

    if picture.width != size:
        picture = picture.resize((size, size), Image.Resampling.BOX)
    return np.asarray(picture).astype(np.float64)


def _cameras(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.iterdir()) if _CAMERA.fullmatch(p.name) and p.is_dir()]


def _names(folder: Path) -> list[str]:
    """Frames 0, 1, ... without a gap."""
    there = {p.name for p in folder.glob("*.jpg")} if folder.is_dir() else set()
    names = []
    while (name := f"{len(names):03}.jpg") in there:
        names.append(name)
    return names


def _apart(a_deg: float, b_deg: float) -> float:
    return abs((a_deg - b_deg + 180) % 360 - 180)
