"""Compares our masks with Blender's. Run once by hand; figures in masks_blender.md.

Blender (`bpy`) is no dependency of the project: give it an environment of its own with
`python3.13 -m venv DIR && DIR/bin/pip install bpy==5.2.3`. Then, from the repository root,

    python tests/parity/masks_blender.py ours --assets DIR --out masks.npz
    DIR/bin/python tests/parity/masks_blender.py blender --assets DIR --out masks.npz

The first command poses and draws with this package and stores masks, cameras and normalisation.
The second imports the same file into Blender, which animates, skins and rasterizes it on its own,
moves the camera to match, and prints the intersection over union of each pair of masks. A pixel
is inside where more than half of its 4x4 samples are: Blender's own anti-aliasing is wider than a
pixel and would eat thin legs.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

SIZE, SAMPLES = 256, 4
CASES = [  # file, clip, seconds: a skin, a skin with textures and props, morph targets
    ("quaternius/animals_pack__Bull.glb", 4, (0.125, 0.5)),
    ("kaykit/Knight.glb", 10, (0.25, 0.75)),
    ("khronos/AnimatedMorphSphere.glb", 0, (0.5, 1.25)),
]
AZIMUTHS, ELEVATIONS = (0.0, 60.0, 215.0), (0.0, -25.0, 5.0)


def ours(assets: Path, out: Path) -> None:
    from fourdstar_jax import geometry
    from fourdstar_jax.data import gltf, posing, render

    cameras = geometry.orbit_cameras(AZIMUTHS, ELEVATIONS, width=SIZE, height=SIZE)
    renderer = render.Renderer(SIZE, len(AZIMUTHS), supersample=SAMPLES)
    stored = {"viewmats": cameras.viewmats, "Ks": cameras.Ks}
    for i, (file, clip, times_s) in enumerate(CASES):
        asset = gltf.load(assets / file)
        renderer.load(asset)
        posed = asset.pose(clip, np.array(times_s))
        center, scale, _ = posing.placing(posed.positions)
        masks = [
            renderer.draw((p - center) * scale, n, cameras).rgba[..., 3]
            > 128  # half of the samples is 128
            for p, n in zip(posed.positions, posed.normals, strict=True)
        ]
        stored |= {f"masks{i}": np.stack(masks), f"center{i}": center, f"scale{i}": scale}
        stored[f"name{i}"] = asset.clips[clip].name
        stored[f"start{i}"] = asset.clips[clip].start_s
    np.savez(out, **stored)


def blender(assets: Path, out: Path) -> None:
    import bpy
    from mathutils import Matrix

    stored = np.load(out, allow_pickle=False)
    to_blender = Matrix(((1, 0, 0, 0), (0, 0, -1, 0), (0, 1, 0, 0), (0, 0, 0, 1)))  # y up to z up
    flip = Matrix.Diagonal((1, -1, -1, 1))  # OpenCV camera to Blender's
    print("| file | clip | seconds | azimuth | IoU |\n| --- | --- | --- | --- | --- |")
    worst = 1.0
    for i, (file, clip, times_s) in enumerate(CASES):
        bpy.ops.wm.read_factory_settings(use_empty=True)
        bpy.ops.import_scene.gltf(filepath=str(assets / file))
        scene = bpy.context.scene
        scene.render.engine = "BLENDER_WORKBENCH"
        scene.render.film_transparent = True
        scene.render.resolution_x = scene.render.resolution_y = SIZE * SAMPLES
        scene.render.resolution_percentage = 100
        scene.render.image_settings.file_format = "PNG"
        scene.render.image_settings.color_mode = "RGBA"
        scene.display.render_aa = "OFF"
        scene.display.shading.show_backface_culling = False
        fps = scene.render.fps / scene.render.fps_base
        _choose_clip(bpy, str(stored[f"name{i}"]))
        center, scale = stored[f"center{i}"], float(stored[f"scale{i}"])
        data = bpy.data.cameras.new("camera")
        data.sensor_fit, data.sensor_width, data.clip_start = "HORIZONTAL", 1.0, 0.001 / scale
        data.clip_end = 100 / scale
        camera = bpy.data.objects.new("camera", data)
        scene.collection.objects.link(camera)
        scene.camera = camera
        for t, seconds in enumerate(times_s):
            frame = (seconds + float(stored[f"start{i}"])) * fps
            scene.frame_set(int(np.floor(frame)), subframe=float(frame % 1))
            for v in range(len(AZIMUTHS)):
                data.lens = float(stored["Ks"][v, 0, 0]) / SIZE
                c2w = np.linalg.inv(stored["viewmats"][v].astype(float))
                c2w[:3, 3] = c2w[:3, 3] / scale + center  # the camera into the file's units
                camera.matrix_world = to_blender @ Matrix(c2w.tolist()) @ flip
                path = out.with_suffix(".png")
                scene.render.filepath = str(path)
                bpy.ops.render.render(write_still=True)
                image = bpy.data.images.load(str(path))
                flat = np.empty(SIZE * SAMPLES * SIZE * SAMPLES * 4, np.float32)
                image.pixels.foreach_get(flat)
                bpy.data.images.remove(image)
                hit = flat.reshape(SIZE, SAMPLES, SIZE, SAMPLES, 4)[::-1, ..., 3] > 0.5
                theirs, mine = hit.mean((1, 3)) > 0.5, stored[f"masks{i}"][t, v]
                iou = (theirs & mine).sum() / (theirs | mine).sum()
                worst = min(worst, iou)
                print(f"| {file} | {clip} | {seconds} | {AZIMUTHS[v]:g} | {iou:.4f} |")
    print(f"\nworst {worst:.4f} (wanted: at least 0.98), bpy {bpy.app.version_string}")


def _choose_clip(bpy, name: str) -> None:
    """Plays one animation: the importer stacks all of them as muted tracks, shifted by a frame."""
    chosen, names = False, set()
    for owner in [*bpy.data.objects, *bpy.data.shape_keys]:
        animation = owner.animation_data
        if animation is None:
            continue
        animation.action = None
        for track in animation.nla_tracks:
            track.mute = True
            names.add(track.name)
            if track.name == name:
                animation.action = track.strips[0].action
                animation.action_slot = track.strips[0].action_slot
                chosen = True
    if not chosen:
        sys.exit(f"Blender has no clip {name!r} among {sorted(names)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("who", choices=("ours", "blender"))
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (ours if args.who == "ours" else blender)(args.assets, args.out)
