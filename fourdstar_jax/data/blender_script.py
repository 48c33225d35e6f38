"""Runs within Blender, or a Python that has `bpy`: draws what `data/blender.py` sends.

    blender --background --python blender_script.py -- SIZE SAMPLES THREADS
    python blender_script.py -- SIZE SAMPLES THREADS

It says `fourdstar-blender VERSION` on stdout. Then each message, on stdin and on stdout, is eight
bytes of its length (little-endian) and its bytes. A request is an .npz file: an asset, which is
answered by an empty message, or a pose of it and V cameras, answered by V PNG files. It ends with
its input, or with whoever started it.

The colour of a surface is that of `data/render.py`, as a formula in its material: ambient and three
lamps by Lambert's law. So a few samples of Cycles, which then only smooth edges, have no noise.
"""

import contextlib
import ctypes
import io
import os
import signal
import sys
import tempfile

import bpy  # pyright: ignore[reportMissingImports]
import numpy as np

AMBIENT = 0.40
LAMPS = ((0.45, (0.5, 0.8, 0.6)), (0.25, (-0.8, 0.3, 0.3)), (0.25, (0.2, 0.3, -0.9)))
NEAR, FAR = 0.01, 100.0
EXTENSIONS = {"repeat": "REPEAT", "mirror": "MIRROR", "clamp": "EXTEND"}
GPUS = ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI")  # the first that there is draws
OWN = "asset_"  # before names of attributes: Cycles reads a plain "color" as none
OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # Blender's cameras look along -z, y up


def new_scene(size, samples, threads):
    """An empty scene that Cycles draws: square pictures, transparent where nothing is."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.world = None
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    render.resolution_x = render.resolution_y = size
    render.resolution_percentage = 100
    render.film_transparent = True
    render.dither_intensity = 0.0
    render.use_persistent_data = True  # from one camera to the next
    if threads:
        render.threads_mode, render.threads = "FIXED", threads
    settings = render.image_settings
    settings.file_format, settings.color_mode, settings.color_depth = "PNG", "RGBA", "8"
    settings.compression = 0
    scene.display_settings.display_device = "sRGB"
    scene.view_settings.view_transform, scene.view_settings.look = "Standard", "None"
    scene.view_settings.exposure, scene.view_settings.gamma = 0.0, 1.0
    cycles.samples, cycles.seed = samples, 0
    cycles.use_adaptive_sampling = cycles.use_denoising = False
    cycles.pixel_filter_type = "BOX"
    cycles.max_bounces, cycles.transparent_max_bounces = 0, 64
    if use_gpu():
        cycles.device = "GPU"
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(scene.camera)
    scene.camera.data.clip_start, scene.camera.data.clip_end = NEAR, FAR
    scene.camera.data.sensor_fit = "HORIZONTAL"
    return scene


def use_gpu():
    """Whether Cycles has a GPU here, which it is told to use."""
    preferences = bpy.context.preferences.addons["cycles"].preferences
    for kind in GPUS:
        with contextlib.suppress(TypeError):  # this Blender was built without it
            preferences.compute_device_type = kind
            preferences.get_devices()
            for device in preferences.devices:
                device.use = device.type == kind
            if any(device.use for device in preferences.devices):
                return True
    return False


def new_object(scene, asset):
    """The asset's triangles in the scene, in place of those before."""
    for kind in (bpy.data.meshes, bpy.data.materials, bpy.data.images):
        for old in list(kind):
            kind.remove(old)  # an object goes with its mesh
    images = [new_image(asset, i) for i in range(len(asset["wraps"]))]
    mesh = bpy.data.meshes.new("asset")
    for surface in asset["surfaces"]:
        mesh.materials.append(new_material(surface, images, asset["wraps"]))
    a, b, c = asset["triangles"].T
    whole = (a != b) & (b != c) & (c != a)  # Blender's edges have two ends
    triangles = asset["triangles"][whole]
    mesh.vertices.add(len(asset["color"]))
    mesh.loops.add(3 * len(triangles))
    mesh.loops.foreach_set("vertex_index", triangles.ravel())
    mesh.polygons.add(len(triangles))
    mesh.polygons.foreach_set("loop_start", np.arange(0, 3 * len(triangles), 3, dtype=np.int32))
    mesh.polygons.foreach_set("material_index", asset["surface"][whole])
    mesh.update(calc_edges=True)
    for name, kind, values in (
        ("uv", "FLOAT2", "vector"),
        ("emissive_uv", "FLOAT2", "vector"),
        ("emission", "FLOAT_VECTOR", "vector"),
        ("color", "FLOAT_COLOR", "color"),
        ("normal", "FLOAT_VECTOR", ""),  # of each pose
    ):
        attribute = mesh.attributes.new(OWN + name, kind, "POINT")
        if values:
            attribute.data.foreach_set(values, asset[name].ravel())
    scene.collection.objects.link(bpy.data.objects.new("asset", mesh))
    return mesh


def new_image(asset, number):
    pixels = asset[f"image_{number}"]  # row 0 at v = 0, as Blender's
    image = bpy.data.images.new("texture", pixels.shape[1], pixels.shape[0], alpha=True)
    image.colorspace_settings.name = "sRGB"
    image.alpha_mode = "CHANNEL_PACKED"  # alpha is no weight of the colour
    image.pixels.foreach_set((pixels.astype(np.float32) / 255).ravel())
    image.update()
    image.pack()  # else it is made anew, black, when it is next read
    return image


class Nodes:
    """Writes formulas as nodes of a material: arguments are numbers or outputs of others."""

    def __init__(self, tree):
        self.tree = tree
        tree.nodes.clear()

    def new(self, kind, *inputs, **properties):
        """A node's outputs."""
        node = self.tree.nodes.new(f"ShaderNode{kind}")
        for name, value in properties.items():
            setattr(node, name, value)
        for socket, value in zip(node.inputs, inputs):  # noqa: B905 (the rest is left alone)
            if isinstance(value, bpy.types.NodeSocket):
                self.tree.links.new(value, socket)
            else:
                socket.default_value = value
        return node.outputs

    def math(self, operation, *values):
        return self.new("Math", *values, operation=operation)["Value"]

    def vector(self, operation, *values):
        outputs = self.new("VectorMath", *values, operation=operation)
        return outputs["Value" if operation in ("DOT_PRODUCT", "LENGTH") else "Vector"]

    def attribute(self, name):
        return self.new("Attribute", attribute_name=OWN + name)

    def texture(self, uv, image, wrap_u, wrap_v, filtering):
        """The picture's linear colour and its alpha."""
        extension = EXTENSIONS[wrap_u]
        if wrap_u != wrap_v:  # a node has one way for both
            x, y, _ = self.new("SeparateXYZ", uv)
            uv = self.new("CombineXYZ", self.folded(x, wrap_u), self.folded(y, wrap_v), 0.0)[0]
            extension = "EXTEND"
        interpolation = "Linear" if filtering == "smooth" else "Closest"
        return self.new(
            "TexImage", uv, image=image, extension=extension, interpolation=interpolation
        )

    def folded(self, x, wrap):
        match wrap:
            case "repeat":
                return self.math("FRACT", x)
            case "mirror":
                return self.math("PINGPONG", x, 1.0)
        return x

    def lit(self):
        """How much light comes from the side that is seen."""
        geometry, normal = self.new("NewGeometry"), self.attribute("normal")["Vector"]
        none = self.math("LESS_THAN", self.vector("LENGTH", normal), 1e-10)
        normal = self.vector("ADD", normal, self.vector("MULTIPLY", geometry["True Normal"], none))
        normal = self.vector("NORMALIZE", normal)
        behind = self.math(
            "LESS_THAN", self.vector("DOT_PRODUCT", normal, geometry["Incoming"]), 0.0
        )
        side = self.math("MULTIPLY_ADD", behind, -2.0, 1.0)
        normal = self.vector("MULTIPLY", normal, side)
        light = AMBIENT
        for strength, way in LAMPS:
            towards = tuple(np.array(way) / np.linalg.norm(way))
            cosine = self.math("MAXIMUM", self.vector("DOT_PRODUCT", normal, towards), 0.0)
            light = self.math("MULTIPLY_ADD", cosine, strength, light)
        return light


def new_material(surface, images, wraps):
    """A row of `surfaces` as a material that gives off the colour that is to be seen."""
    texture, emissive, cutoff, unlit, double_sided = surface
    material = bpy.data.materials.new("surface")
    material.use_nodes = True
    nodes = Nodes(material.node_tree)
    color = nodes.attribute("color")
    base, alpha = color["Color"], color["Alpha"]
    if texture >= 0:
        i = int(texture)
        found = nodes.texture(nodes.attribute("uv")["Vector"], images[i], *wraps[i])
        base = nodes.vector("MULTIPLY", base, found["Color"])
        alpha = nodes.math("MULTIPLY", alpha, found["Alpha"])
    seen = base
    if not unlit:
        emission = nodes.attribute("emission")["Vector"]
        if emissive >= 0:
            i = int(emissive)
            found = nodes.texture(nodes.attribute("emissive_uv")["Vector"], images[i], *wraps[i])
            emission = nodes.vector("MULTIPLY", emission, found["Color"])
        seen = nodes.vector("ADD", nodes.vector("MULTIPLY", base, nodes.lit()), emission)
    seen = nodes.vector("MINIMUM", seen, (1.0, 1.0, 1.0))
    shader = nodes.new("Emission", seen, 1.0)["Emission"]
    clear = []
    if cutoff > 0:
        clear.append(nodes.math("LESS_THAN", alpha, float(cutoff)))
    if not double_sided:
        clear.append(nodes.new("NewGeometry")["Backfacing"])
    for share in clear:
        nothing = nodes.new("BsdfTransparent")["BSDF"]
        shader = nodes.new("MixShader", share, shader, nothing)["Shader"]
    nodes.new("OutputMaterial", shader)
    return material


def pictures(scene, mesh, pose, path):
    """Draws a pose as each camera sees it; yields PNG files. Needs square pixels."""
    mesh.vertices.foreach_set("co", pose["positions"].ravel())
    mesh.attributes[OWN + "normal"].data.foreach_set("vector", pose["normals"].ravel())
    mesh.update()
    mesh.update_tag()
    size, lens = scene.render.resolution_x, scene.camera.data
    for viewmat, K in zip(pose["viewmats"], pose["Ks"]):  # noqa: B905
        scene.camera.matrix_world = (np.linalg.inv(viewmat.astype(float)) @ OPENCV).T.tolist()
        lens.lens = K[0, 0] * lens.sensor_width / size
        lens.shift_x, lens.shift_y = 0.5 - K[0, 2] / size, K[1, 2] / size - 0.5
        scene.render.filepath = path
        bpy.ops.render.render(write_still=True)
        with open(path, "rb") as file:
            yield file.read()


def end_with_parent(at_once):
    """Whether the system kills this process when the one that began it ends (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL) if at_once else 0)  # PR_SET_PDEATHSIG


def messages(stream):
    while len(head := stream.read(8)) == 8:
        yield stream.read(int.from_bytes(head, "little"))


def main():
    size, samples, threads = map(int, sys.argv[sys.argv.index("--") + 1 :])
    scene, mesh = new_scene(size, samples, threads), None
    answers = os.fdopen(os.dup(1), "wb")
    answers.write(f"\nfourdstar-blender {bpy.app.version_string}\n".encode())
    answers.flush()
    os.dup2(2, 1)  # what Blender prints is no answer
    with tempfile.TemporaryDirectory(prefix="fourdstar-") as folder:
        for message in messages(sys.stdin.buffer):
            with np.load(io.BytesIO(message), allow_pickle=False) as stored:
                request = dict(stored)
            if "triangles" in request:
                mesh = new_object(scene, request)
                made = [b""]
            else:
                made = pictures(scene, mesh, request, os.path.join(folder, "picture.png"))
            end_with_parent(True)
            for content in made:
                answers.write(len(content).to_bytes(8, "little") + content)
                answers.flush()
            end_with_parent(False)  # but with its input, and clear up


if __name__ == "__main__":
    main()
