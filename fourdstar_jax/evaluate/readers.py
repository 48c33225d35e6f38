"""What other systems' scripts write, read as objects to be scored.

Each reader follows the lines of the system's repository that write the files, named beside it.
Views go by azimuth; frames are as they were written, never resized, cut or turned. That a system's
azimuth 90 is the object's right side as here is by its code, not by a run of it. Animated meshes
are drawn by our own renderer at our cameras, in the middle and size that data sets have
(`posing.placing`).
"""

import dataclasses
import functools
import json
import os
import re
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from fourdstar_jax import geometry
from fourdstar_jax.data import gltf, posing, video
from fourdstar_jax.evaluate.clips import Entry, Frames, Source, View
from fourdstar_jax.evaluate.protocols import Protocol
from fourdstar_jax.types import Gaussians

Load = Callable[[tuple[int, int] | None], Frames]
Objects = dict[str, dict[float, Load]]  # views of an object by azimuth, degrees

MESH_FPS = 24.0  # Blender's, by which Motion 3-to-4 keys one frame a timestep
MESH_POINTS = 4096  # of a surface that stand for it in geometry
NAMES = "names.txt"  # names of objects that a system only numbers, a line each
SIDES = {"front": 0.0, "right": 90.0, "back": 180.0, "left": 270.0}
SV4D2 = {  # azimuths of the files v000, v001, ...
    4: (0.0, 60.0, 120.0, 180.0, 240.0),
    8: (0.0, 30.0, 75.0, 120.0, 165.0, 210.0, 255.0, 300.0, 330.0),
}
GVF_VIEWS = 128


class System(NamedTuple):
    """Where its files are written, and what finds them."""

    follows: str  # repository and file
    layout: str
    find: Callable[[Path], Objects]


def open_source(
    path: str | os.PathLike[str],
    system: str,
    protocol: Protocol,
    *,
    azimuths: tuple[float, ...] | None = None,
) -> Source:
    """The objects of a folder that another system wrote, as `clips.open_source` gives them.

    `azimuths` are those to be scored, by default the first that the protocol allows and the system
    renders, or all. Raises ValueError for a folder without its files, and for views it has not.
    """
    path, how = Path(path), SYSTEMS[system]
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder" if path.exists() else f"{path} does not exist")
    found = how.find(path)
    if not found:
        raise ValueError(f"{path} has nothing that {system} writes: {how.layout} ({how.follows})")
    allowed = (azimuths,) if azimuths else protocol.azimuths_deg
    entries, taken = {}, azimuths
    for name, views in found.items():
        wanted = [w for w in allowed or (tuple(views),) if all(_near(views, a) for a in w)]
        if not wanted:
            asked = " or ".join(", ".join(f"{a:g}" for a in w) for w in allowed)
            has = ", ".join(f"{a:g}" for a in list(views)[:9]) + (" ..." if len(views) > 9 else "")
            raise ValueError(f"{path}: {name}: views at {asked} degrees are scored; it has {has}")
        taken = wanted[0]
        chosen = tuple(View(f"azimuth {a:g}", views[_near(views, a)[0]]) for a in taken)
        entries[name] = Entry(name, name, chosen, named=False)
        mesh = getattr(views[_near(views, taken[0])[0]], "mesh", None)
        if mesh is not None:
            entries[name] = dataclasses.replace(entries[name], gaussians=mesh.surface)
    return Source(str(path), f"of {system}", entries, taken, {"follows": how.follows})


def _near(views: Iterable[float], azimuth: float) -> list[float]:
    return [a for a in views if abs((a - azimuth + 180) % 360 - 180) < 0.1]


def _frames(path: Path) -> np.ndarray:
    frames = video.read_frames(path)
    if frames[..., 3].min() < 255:
        raise ValueError(f"{path}: transparent, which these files are not")
    return frames[..., :3]


def _whole(path: Path, size: tuple[int, int] | None) -> Frames:
    return Frames(_frames(path), None)


def _pictures(paths: list[Path], size: tuple[int, int] | None) -> Frames:
    """Pictures of a view, which their names number."""
    with tempfile.TemporaryDirectory(prefix="fourdstar-") as folder:
        for path in paths:
            os.symlink(path.resolve(), Path(folder) / path.name)
        return Frames(_frames(Path(folder)), None)


def _named(path: Path, numbers: Iterable[int]) -> dict[int, str]:
    """Names of numbered objects: the lines of NAMES, where it lies beside them."""
    numbers, names = sorted(set(numbers)), path / NAMES
    if not names.is_file():
        return {n: f"{n:06d}" for n in numbers}
    lines = names.read_text().split()
    if numbers and numbers[-1] >= len(lines):
        raise ValueError(f"{names}: {len(lines)} names; there is an object {numbers[-1]}, from 0")
    return {n: lines[n] for n in numbers}


def _l4gm(path: Path) -> Objects:
    """One strip a frame, the four sides from left to right; without interpolated frames."""

    def part(file: Path, place: int, size: tuple[int, int] | None) -> Frames:
        frames = _frames(file)
        height, width = frames.shape[1:3]
        if width != 4 * height:
            raise ValueError(f"{file}: {width}x{height} pixels, not four squares side by side")
        return Frames(frames[:, :, place * height : (place + 1) * height], None)

    return {
        file.name[len("wo_interp_") : -len("_fixed.mp4")]: {
            90.0 * place: functools.partial(part, file, place) for place in range(4)
        }
        for file in sorted(path.glob("wo_interp_*_fixed.mp4"))
    }


def _stag4d(path: Path) -> Objects:
    """The pictures of the last step that was rendered, not the video beside them."""
    found: Objects = {}
    for child in sorted(p for p in path.iterdir() if p.is_dir()):
        steps: dict[int, dict[str, Path]] = {}
        for folder in child.iterdir():
            if told := re.fullmatch(rf"(\d+)_({'|'.join(SIDES)})", folder.name):
                steps.setdefault(int(told[1]), {})[told[2]] = folder
        if steps:
            last = steps[max(steps)]
            found[child.name] = {
                SIDES[side]: functools.partial(
                    _pictures, sorted(last[side].glob("*.jpg"), key=lambda p: int(p.stem))
                )
                for side in SIDES
                if side in last
            }
    return found


def _sv4d2(path: Path) -> Objects:
    """A video a view; view 0 is the input as the script cut it out."""
    files: dict[int, dict[int, Path]] = {}
    for file in path.glob("*.mp4"):
        if told := re.fullmatch(r"(\d{6})_(?:v(\d{3})|process_input)\.mp4", file.name):
            files.setdefault(int(told[1]), {})[int(told[2] or 0)] = file
    names, found = _named(path, files), {}
    for number, views in sorted(files.items()):
        if max(views) not in SV4D2:
            raise ValueError(
                f"{path}: object {number:06d} has views up to {max(views)}, not 4 or 8"
            )
        azimuths = SV4D2[max(views)]
        found[names[number]] = {
            azimuths[v]: functools.partial(_whole, file) for v, file in sorted(views.items())
        }
    return found


def _gvfdiffusion(path: Path) -> Objects:
    """A picture a camera and timestep, 128 cameras around; other folders' objects are not read."""
    files: dict[int, dict[int, dict[int, Path]]] = {}
    ranks: dict[int, str] = {}
    pattern = re.compile(r"rank_(\d+)_render_(\d+)_cam_(\d+)_timesteps_(\d+)\.png")
    for file in path.glob("rank_*.png"):
        if told := pattern.fullmatch(file.name):
            number, camera, timestep = (int(x) for x in told.groups()[1:])
            if ranks.setdefault(number, told[1]) != told[1]:
                raise ValueError(
                    f"{path}: object {number:06d} is of ranks {ranks[number]} and {told[1]}, each "
                    "of which counts from 0: give each a folder"
                )
            files.setdefault(number, {}).setdefault(camera, {})[timestep] = file
    names = _named(path, files)
    return {
        names[number]: {
            360 * camera / GVF_VIEWS: functools.partial(
                _pictures, [frames[t] for t in sorted(frames)]
            )
            for camera, frames in sorted(cameras.items())
        }
        for number, cameras in sorted(files.items())
    }


class _Mesh:
    """A surface that moves, drawn once for all views of a size."""

    def __init__(self, read: Callable[[], tuple[gltf.Asset, np.ndarray, np.ndarray]]):
        self.read = read
        self.lock, self.drawn = threading.Lock(), {}
        self.surface = functools.cache(self._surface)

    @functools.cached_property
    def placed(self) -> tuple[gltf.Asset, np.ndarray, np.ndarray]:
        asset, positions, normals = self.read()
        center, scale, _ = posing.placing(positions)
        return asset, ((positions - center) * scale).astype(np.float32), normals

    def pictures(self, size: tuple[int, int]) -> UInt8[np.ndarray, "T V h w 4"]:
        """RGBA of all azimuths of MESH_AZIMUTHS."""
        from fourdstar_jax.data import render  # needs OpenGL, only for these

        if size[0] != size[1]:
            raise ValueError(f"meshes are drawn as squares, not {size[0]}x{size[1]} pixels")
        with self.lock:
            if size not in self.drawn:
                asset, positions, normals = self.placed
                cameras = geometry.orbit_cameras(list(MESH_AZIMUTHS), width=size[0], height=size[1])
                renderer = render.Renderer(size[0], len(MESH_AZIMUTHS))
                try:
                    renderer.load(asset)
                    frames = [
                        renderer.draw(p, n, cameras).rgba
                        for p, n in zip(positions, normals, strict=True)
                    ]
                finally:
                    renderer.close()
                self.drawn = {size: np.stack(frames)}
            return self.drawn[size]

    def _surface(self) -> Gaussians:
        """Points of it that keep their places, as Gaussians that are opaque."""
        asset, positions, _ = self.placed
        points = posing.track(
            positions, asset.triangles, MESH_POINTS, np.random.default_rng(0)
        ).points
        shape = points.shape[:2]
        return Gaussians(
            points,
            np.tile(np.array([1, 0, 0, 0], np.float32), (*shape, 1)),
            np.zeros((*shape, 3), np.float32),
            np.ones(shape, np.float32),
            np.zeros((*shape, 3), np.float32),
        )


class _MeshView:
    def __init__(self, mesh: _Mesh, place: int):
        self.mesh, self.place = mesh, place

    def __call__(self, size: tuple[int, int] | None) -> Frames:
        rgba = self.mesh.pictures(size or (256, 256))[:, self.place]
        return Frames(rgba[..., :3], rgba[..., 3], on_white=False)


MESH_AZIMUTHS = (0.0, 90.0, 180.0, 270.0, -75.0, 15.0, 105.0, 195.0)


def _views(read: Callable[[], tuple[gltf.Asset, np.ndarray, np.ndarray]]) -> dict[float, Load]:
    mesh = _Mesh(read)
    return {azimuth: _MeshView(mesh, place) for place, azimuth in enumerate(MESH_AZIMUTHS)}


def _animated(path: Path) -> tuple[gltf.Asset, np.ndarray, np.ndarray]:
    """A GLB's first animation, a frame every 1 / MESH_FPS s, the last one included."""
    try:
        asset = gltf.load(path)
        if not asset.clips:
            raise gltf.MalformedAsset("no animation")
        count = int(round(asset.clips[0].duration_s * MESH_FPS)) + 1
        # Keys are float32 and may be steps: a hair after each is its own frame, not the one before.
        posed = asset.pose(asset.clips[0].index, np.arange(count) / MESH_FPS + 1e-5)
    except gltf.MalformedAsset as error:
        raise ValueError(f"{path}: {error}") from error
    assert posed.normals is not None
    return asset, posed.positions, posed.normals


def _deformed(folder: Path) -> tuple[gltf.Asset, np.ndarray, np.ndarray]:
    """The arrays that ActionMesh always writes, which are (-z, x, y) of its meshes.

    That is a mirror image; as (-z, y, x) they are its meshes again, turned from +x, where its first
    camera stands, to our azimuth 0.
    """
    arrays = []
    for part, kind in (("vertices", "f"), ("faces", "iu")):
        path = folder / f"deformations_{part}.npy"
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: no array: {error}") from error
        if (
            array.ndim != 5 - len(arrays) - 2
            or array.shape[-1] != 3
            or array.dtype.kind not in kind
        ):
            raise ValueError(f"{path}: {array.dtype} {array.shape}, not of {part}")
        arrays.append(array)
    positions, faces = arrays[0].astype(np.float32)[..., [0, 2, 1]], arrays[1].astype(np.uint32)
    if faces.size == 0 or faces.max() >= positions.shape[1]:
        raise ValueError(f"{folder}: faces of other vertices than the {positions.shape[1]} there")
    normals = np.zeros_like(positions)
    for frame, out in zip(positions, normals, strict=True):
        a, b, c = np.moveaxis(frame[faces], 1, 0)
        for corner in range(3):
            np.add.at(out, faces[:, corner], np.cross(b - a, c - a))
    lengths = np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    return gltf.load(_still(positions[0], faces), name=folder.name), positions, normals


def _still(positions: np.ndarray, faces: np.ndarray) -> bytes:
    """A GLB of a mesh in one blue, as ActionMesh's own has without a texture."""
    parts = positions.tobytes(), faces.tobytes()
    data = b"".join(parts)
    scene = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorFactor": [0.2, 0.4, 0.8, 1.0]}}],
        "buffers": [{"byteLength": len(data)}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": len(parts[0])},
            {"buffer": 0, "byteOffset": len(parts[0]), "byteLength": len(parts[1])},
        ],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": 5126,
                "count": len(positions),
                "type": "VEC3",
                "min": positions.min(axis=0).tolist(),
                "max": positions.max(axis=0).tolist(),
            },
            {"bufferView": 1, "componentType": 5125, "count": faces.size, "type": "SCALAR"},
        ],
    }
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    chunks += struct.pack("<II", len(data), 0x004E4942) + data
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _actionmesh(path: Path) -> Objects:
    """A folder an object: the deformed vertices. The GLB that Blender makes of them is not read: it
    is compressed, and mirrored in depth as they are."""
    found: Objects = {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        if (folder / "deformations_vertices.npy").is_file():
            found[folder.name] = _views(functools.partial(_deformed, folder))
        elif (folder / "animated_mesh.glb").is_file():
            raise ValueError(
                f"{folder}: animated_mesh.glb is not read; deformations_vertices.npy and _faces.npy"
                " were written beside it"
            )
    return found


def _motion324(path: Path) -> Objects:
    """A folder an object. From a video alone the system writes FBX, which is not read."""
    found: Objects = {}
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        if (file := folder / "output_animation.glb").is_file():
            found[folder.name] = _views(functools.partial(_animated, file))
        elif next(folder.rglob("output_animation.fbx"), None) is not None:
            raise ValueError(
                f"{folder}: FBX is not read; Blender exports it as output_animation.glb"
            )
    return found


SYSTEMS = {
    "l4gm": System(
        "nv-tlabs/L4GM-official infer_4d.py", "WORKSPACE/wo_interp_OBJECT_fixed.mp4", _l4gm
    ),
    "stag4d": System(
        "zeng-yifei/STAG4D main.py: save_renderings",
        "valid/OBJECT/STEP_front/00.jpg, and back, right, left where they were rendered",
        _stag4d,
    ),
    "sv4d2": System(
        "Stability-AI/generative-models scripts/sampling/simple_video_sample_4d2.py",
        "outputs/sv4d2/000000_v001.mp4 ... and 000000_process_input.mp4",
        _sv4d2,
    ),
    "gvfdiffusion": System(
        "ForeverFancy/GVFDiffusion utils/inference_utils.py: render_and_save_images",
        "inference_images/rank_00_render_000000_cam_000_timesteps_00.png",
        _gvfdiffusion,
    ),
    "actionmesh": System(
        "facebookresearch/actionmesh inference/video_to_animated_mesh.py, actionmesh/io",
        "outputs/OBJECT/deformations_vertices.npy and deformations_faces.npy",
        _actionmesh,
    ),
    "motion324": System(
        "Inception3D/Motion324 scripts/inference_with_video_mesh.py",
        "OBJECT/output_animation.glb",
        _motion324,
    ),
}
