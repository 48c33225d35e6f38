"""Draws posed meshes off-screen with OpenGL (moderngl over EGL): RGBA, depth and exact flow.

No display and no GPU are needed: Mesa's llvmpipe draws on the CPU. All views of a timestep are
tiles of one framebuffer, so that a timestep costs one upload and one read-back.

Light: a constant ambient term and three directional lights that are fixed in the world, Lambert's
law on the side that is seen, no view-dependent term: what Gaussians without spherical harmonics can
show. Triangles of one-sided surfaces are seen from their front only. `blender_script.py` has the
same light.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8

from fourdstar_jax.data.gltf import Asset
from fourdstar_jax.types import Cameras

NEAR, FAR = 0.01, 100.0
LOOK = 1  # rises when pictures of the same asset would look different, light and edges included

_VERTEX = """
#version 330
uniform mat4 world_to_clip;
uniform mat4 world_to_clip_next;
in vec3 position; in vec3 normal; in vec3 next_position;
in vec2 uv; in vec2 emissive_uv; in vec4 color; in vec3 emission;
out vec3 v_position; out vec3 v_normal; out vec2 v_uv; out vec2 v_emissive_uv;
out vec4 v_color; out vec3 v_emission; out vec4 v_next;
void main() {
    v_position = position; v_normal = normal; v_uv = uv; v_emissive_uv = emissive_uv;
    v_color = color; v_emission = emission;
    v_next = world_to_clip_next * vec4(next_position, 1.0);
    gl_Position = world_to_clip * vec4(position, 1.0);
}
"""

_SURFACE = """
#version 330
uniform sampler2D image; uniform bool textured; uniform vec2 mirrored; uniform float alpha_cutoff;
in vec3 v_position; in vec3 v_normal; in vec2 v_uv; in vec2 v_emissive_uv; in vec4 v_color;
in vec3 v_emission; in vec4 v_next;
vec4 look_up(sampler2D image, vec2 uv, vec2 mirrored) {
    vec2 folded = mix(uv, 1.0 - abs(mod(uv, 2.0) - 1.0), mirrored);
    return textureGrad(image, folded, dFdx(uv), dFdy(uv));
}
vec3 to_linear(vec3 c) {
    return mix(c / 12.92, pow((c + 0.055) / 1.055, vec3(2.4)), step(vec3(0.04045), c));
}
vec3 to_srgb(vec3 c) {
    return mix(c * 12.92, 1.055 * pow(c, vec3(1.0 / 2.4)) - 0.055, step(vec3(0.0031308), c));
}
vec4 base_color() {
    vec4 base = v_color;
    if (textured) { vec4 t = look_up(image, v_uv, mirrored); base *= vec4(to_linear(t.rgb), t.a); }
    if (base.a < alpha_cutoff) discard;
    return base;
}
"""

_COLOR = (
    _SURFACE
    + """
uniform vec3 eye;
uniform sampler2D emissive_image; uniform bool emissive_textured; uniform vec2 emissive_mirrored;
uniform bool unlit;
out vec4 result;
void main() {
    vec4 base = base_color();
    if (unlit) { result = vec4(to_srgb(base.rgb), 1.0); return; }
    vec3 emission = v_emission;
    if (emissive_textured)
        emission *= to_linear(look_up(emissive_image, v_emissive_uv, emissive_mirrored).rgb);
    vec3 n = v_normal;
    if (dot(n, n) < 1e-20) n = cross(dFdx(v_position), dFdy(v_position));
    n = normalize(n);
    if (dot(n, eye - v_position) < 0.0) n = -n;
    float light = 0.40
        + 0.45 * max(dot(n, normalize(vec3(0.5, 0.8, 0.6))), 0.0)
        + 0.25 * max(dot(n, normalize(vec3(-0.8, 0.3, 0.3))), 0.0)
        + 0.25 * max(dot(n, normalize(vec3(0.2, 0.3, -0.9))), 0.0);
    result = vec4(to_srgb(clamp(base.rgb * light + emission, 0.0, 1.0)), 1.0);
}
"""
)

_GEOMETRY = (
    _SURFACE
    + """
uniform vec2 tile_origin; uniform vec2 tile_size;
out vec4 result;
void main() {
    base_color();
    vec2 next = (v_next.xy / v_next.w * 0.5 + 0.5) * tile_size;
    result = vec4(next - (gl_FragCoord.xy - tile_origin), 1.0 / gl_FragCoord.w, 1.0);
}
"""
)


class Frame(NamedTuple):
    """One timestep from V cameras. Row 0 is the top of the image."""

    rgba: UInt8[np.ndarray, "V h w 4"]  # sRGB, straight alpha: alpha is the mask
    depth: Float32[np.ndarray, "V h w"] | None  # camera z in scene units, 0 where empty
    flow: Float32[np.ndarray, "V h w 2"] | None  # (x, y) pixels to the next timestep, 0 where empty


class Renderer:
    """An OpenGL context with framebuffers for `views` images of `size` x `size` pixels.

    Colour is drawn `supersample` times as large and box-filtered (cheaper on llvmpipe than
    multisampling). Depth and flow are those of the surface at the pixel's centre.
    """

    def __init__(self, size: int, views: int, *, supersample: int | None = None):
        if size < 1 or views < 1:
            raise ValueError(f"{size=} and {views=} must be positive")
        self.size, self.views = size, views
        self.supersample = supersample or (3 if size <= 128 else 2)
        self.ctx = _context()
        ctx, wide = self.ctx, size * views
        big = (wide * self.supersample, size * self.supersample)
        limit = ctx.info["GL_MAX_TEXTURE_SIZE"]
        if max(big) > limit:
            raise ValueError(
                f"{size=} times {views=} passes the renderer's limit of {limit} pixels"
            )
        self._color_program: Any = ctx.program(vertex_shader=_VERTEX, fragment_shader=_COLOR)
        self._geometry_program: Any = ctx.program(vertex_shader=_VERTEX, fragment_shader=_GEOMETRY)
        self._color = ctx.framebuffer([ctx.renderbuffer(big, 4)], ctx.depth_renderbuffer(big))
        self._exact = ctx.framebuffer(
            [ctx.renderbuffer((wide, size), 4, dtype="f4")], ctx.depth_renderbuffer((wide, size))
        )
        self._loaded: list = []

    def load(self, asset: Asset) -> None:
        """Takes an asset's triangles, colours and textures; `draw` then needs positions only."""
        with self.ctx:  # there may be other contexts in this process
            self._load(asset)

    def _load(self, asset: Asset) -> None:
        self._release()
        ctx = self.ctx
        static = [asset.uvs, asset.emissive_uvs, asset.colors, asset.emission]
        static = np.concatenate(static, axis=1)
        self._static = ctx.buffer(np.ascontiguousarray(static, "f4").tobytes())
        self._index = ctx.buffer(np.ascontiguousarray(asset.triangles, "i4").tobytes())
        nbytes = asset.positions.shape[0] * 12
        self._moving = [ctx.buffer(reserve=nbytes, dynamic=True) for _ in range(3)]
        self._textures = []
        for image, wrap_u, wrap_v, smooth in asset.textures:
            texture = ctx.texture((image.shape[1], image.shape[0]), 4, image.tobytes())
            texture.build_mipmaps()
            texture.repeat_x, texture.repeat_y = wrap_u == "repeat", wrap_v == "repeat"
            if not smooth:
                texture.filter = (ctx.LINEAR_MIPMAP_LINEAR, ctx.NEAREST)
            self._textures.append(texture)
        self._mirrored = [(t.wrap_u == "mirror", t.wrap_v == "mirror") for t in asset.textures]
        self._draws = asset.draws
        self._arrays = [
            ctx.vertex_array(
                program,
                [
                    (self._moving[0], "3f", "position"),
                    *([(self._moving[1], "3f", "normal")] if "normal" in program else []),
                    *(
                        [(self._moving[2], "3f", "next_position")]
                        if "next_position" in program
                        else []
                    ),
                    (self._static, "2f 2f 4f 3f", "uv", "emissive_uv", "color", "emission")
                    if "emission" in program
                    else (self._static, "2f 2x4 4f 3x4", "uv", "color"),
                ],
                index_buffer=self._index,
                index_element_size=4,
            )
            for program in (self._color_program, self._geometry_program)
        ]
        self._loaded = [self._static, self._index, *self._moving, *self._textures, *self._arrays]
        self._num_vertices = len(asset.positions)

    def draw(
        self,
        positions: Float32[np.ndarray, "P 3"],
        normals: Float32[np.ndarray, "P 3"],
        cameras: Cameras,
        *,
        next_positions: Float32[np.ndarray, "P 3"] | None = None,
        depth: bool = False,
    ) -> Frame:
        """One timestep of the loaded asset; flow leads to `next_positions`, the cameras stay."""
        if not self._loaded:
            raise ValueError("draw needs an asset: call load first")
        if len(positions) != self._num_vertices:
            raise ValueError(f"{len(positions)=} but the asset has {self._num_vertices} vertices")
        viewmats, Ks = cameras
        if len(viewmats) > self.views:
            raise ValueError(f"{len(viewmats)} cameras, the renderer was made for {self.views}")
        with self.ctx:
            return self._draw(positions, normals, viewmats, Ks, next_positions, depth)

    def _draw(self, positions, normals, viewmats, Ks, next_positions, depth: bool) -> Frame:
        V, size, s = len(viewmats), self.size, self.supersample
        to_clip = _clip_matrices(viewmats, Ks, size)
        eyes = -np.einsum("vji,vj->vi", viewmats[:, :3, :3], viewmats[:, :3, 3])
        self._moving[0].write(np.ascontiguousarray(positions, "f4"))
        self._moving[1].write(np.ascontiguousarray(normals, "f4"))
        self.ctx.enable_only(self.ctx.DEPTH_TEST)
        self.ctx.front_face = "cw"  # row 0 is the top: seen from below, all turns round
        self._color.use()
        self._color.clear(0, 0, 0, 0, depth=1.0)
        for v in range(V):
            self._color.viewport = (v * size * s, 0, size * s, size * s)
            self._color_program["eye"].value = tuple(eyes[v])
            self._triangles(0, self._color_program, to_clip[v])
        raw = self._color.read((0, 0, V * size * s, size * s), components=4, alignment=1)
        raw = np.frombuffer(raw, np.uint8).reshape(size * s, V, size * s, 4).transpose(1, 0, 2, 3)
        rgba = _straight(raw, s)
        if next_positions is None and not depth:
            return Frame(rgba, None, None)
        program = self._geometry_program
        moved = positions if next_positions is None else next_positions
        self._moving[2].write(np.ascontiguousarray(moved, "f4"))
        self._exact.use()
        self._exact.clear(0, 0, 0, 0, depth=1.0)
        program["tile_size"].value = (size, size)
        for v in range(V):
            self._exact.viewport = (v * size, 0, size, size)
            program["tile_origin"].value = (v * size, 0)
            program["world_to_clip_next"].write(np.ascontiguousarray(to_clip[v].T))
            self._triangles(1, program, to_clip[v])
        raw = self._exact.read((0, 0, V * size, size), components=4, dtype="f4", alignment=1)
        raw = np.frombuffer(raw, np.float32).reshape(size, V, size, 4).transpose(1, 0, 2, 3)
        flow = None if next_positions is None else np.ascontiguousarray(raw[..., :2])
        return Frame(rgba, np.ascontiguousarray(raw[..., 2]) if depth else None, flow)

    def _triangles(self, which: int, program, to_clip: np.ndarray) -> None:
        program["world_to_clip"].write(np.ascontiguousarray(to_clip.T))  # column-major
        colors = program is self._color_program
        for draw in self._draws:
            surface = draw.surface
            self._use(program, "textured", "image", "mirrored", surface.texture, 0)
            program["alpha_cutoff"].value = surface.alpha_cutoff
            if colors:
                names = ("emissive_textured", "emissive_image", "emissive_mirrored")
                self._use(program, *names, surface.emissive_texture, 1)
                program["unlit"].value = surface.unlit
            if surface.double_sided:
                self.ctx.disable(self.ctx.CULL_FACE)
            else:
                self.ctx.enable(self.ctx.CULL_FACE)
            self._arrays[which].render(vertices=draw.count * 3, first=draw.first * 3)

    def _use(self, program, textured: str, image: str, mirrored: str, texture: int, unit: int):
        """Gives one of a program's samplers a texture, or none (-1)."""
        program[textured].value = texture >= 0
        if texture >= 0:
            program[image].value = unit
            program[mirrored].value = self._mirrored[texture]
            self._textures[texture].use(unit)

    def _release(self) -> None:
        for item in reversed(self._loaded):
            item.release()
        self._loaded = []

    def close(self) -> None:
        """Frees the context; the renderer cannot be used afterwards."""
        with self.ctx:
            self._release()
        self.ctx.release()


def _context():
    import moderngl

    create: Any = moderngl.create_standalone_context
    try:
        return create(backend="egl", require=330)
    except Exception as error:  # moderngl raises bare Exceptions, glcontext others
        raise RuntimeError(
            "the renderer found no EGL with OpenGL 3.3 (libegl1 or libgl1-mesa-dri is missing): "
            "apt-get install libegl1 libgl1-mesa-dri"
        ) from error


def _clip_matrices(viewmats: Float[np.ndarray, "V 4 4"], Ks: Float[np.ndarray, "V 3 3"], size: int):
    """World to clip space, [V, 4, 4] float32. Row 0 of the framebuffer is the image's top row."""
    to_clip = np.zeros((len(Ks), 4, 4))
    to_clip[:, 0, :3] = 2 * Ks[:, 0] / size
    to_clip[:, 1, :3] = 2 * Ks[:, 1] / size
    to_clip[:, :2, 2] -= 1
    to_clip[:, 2, 2] = (FAR + NEAR) / (FAR - NEAR)
    to_clip[:, 2, 3] = -2 * FAR * NEAR / (FAR - NEAR)
    to_clip[:, 3, 2] = 1
    return (to_clip @ viewmats).astype(np.float32)


def _straight(raw: UInt8[np.ndarray, "V H W 4"], s: int) -> UInt8[np.ndarray, "V h w 4"]:
    """Box-filters s x s samples and divides the colour by the coverage."""
    total = np.zeros((len(raw), raw.shape[1] // s, raw.shape[2] // s, 4), np.uint16)
    for y in range(s):
        for x in range(s):
            total += raw[:, y::s, x::s]
    total = total.astype(np.float32) / (s * s)
    alpha = total[..., 3:]
    color = np.where(alpha > 0, total[..., :3] * 255 / np.maximum(alpha, 1e-6), 0)
    return np.rint(np.concatenate([np.minimum(color, 255), alpha], -1)).astype(np.uint8)
