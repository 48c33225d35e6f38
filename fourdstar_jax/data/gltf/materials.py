"""Materials of a glTF file, as far as they are drawn, and their textures.

Section numbers refer to the glTF 2.0 specification (3.9 materials, 3.8.3 samplers).
"""

import io
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from fourdstar_jax.data.gltf.asset import Texture, Wrap
from fourdstar_jax.data.gltf.container import Container, MalformedAsset, data_uri

MAX_TEXTURES = 64
MAX_TEXTURE_PIXELS = 4096 * 4096
DRAWN_TEXTURE_SIDE = 1024  # larger textures are reduced when read

_WRAPS: dict[int, Wrap] = {10497: "repeat", 33648: "mirror", 33071: "clamp"}
_NEAREST = 9728
# maps of the core specification that Gaussians without a view-dependent term cannot show
_UNDRAWN_MAPS = {"normalTexture": "normal", "occlusionTexture": "occlusion"}


class Notes:
    """What a reader of the result should know: warnings, and what was left out how often."""

    def __init__(self):
        self._warnings: dict[str, None] = {}
        self._left_out: dict[str, int] = {}

    def warn(self, what: str) -> None:
        """Says something once."""
        self._warnings[what] = None

    def leave_out(self, what: str) -> None:
        """Counts one more that is not drawn."""
        self._left_out[what] = self._left_out.get(what, 0) + 1

    def lines(self) -> list[str]:
        """Everything, a line each."""
        return [*self._warnings, *(f"{what} ({n})" for what, n in self._left_out.items())]


class Map(NamedTuple):
    """A texture of a material, and where on it a vertex lies."""

    texture: int = -1  # index into `Asset.textures`, -1 for none
    texcoord: int = 0  # set of UVs
    transform: np.ndarray = np.eye(3)  # of the UVs


@dataclass
class Material:
    """The parts of a material that are drawn; these are the values without one."""

    factor: np.ndarray = field(default_factory=lambda: np.ones(4))  # base colour, linear RGBA
    emission: np.ndarray = field(default_factory=lambda: np.zeros(3))  # linear RGB
    base: Map = Map()
    emissive: Map = Map()
    cutoff: float = 0.0  # of alpha
    unlit: bool = False
    double_sided: bool = False


class Materials:
    """The materials of a file, and the textures that those asked for use."""

    def __init__(self, file: Container, notes: Notes):
        self.file, self.notes = file, notes
        self.textures: list[Texture] = []
        self.images: dict[int, np.ndarray | None] = {}
        self.texture_of: dict[int, int] = {}  # a texture of the file to one of `textures`

    def material(self, index: int | None) -> Material:
        """What is drawn of one of the file's materials, or of none."""
        out = Material()
        if index is None:
            return out
        material = self.file.item("materials", index)
        extensions = material.get("extensions", {})
        glossy = extensions.get("KHR_materials_pbrSpecularGlossiness")
        pbr = material.get("pbrMetallicRoughness", {})
        if glossy is not None:
            factor, base = glossy.get("diffuseFactor", [1, 1, 1, 1]), glossy.get("diffuseTexture")
        else:
            factor, base = pbr.get("baseColorFactor", [1, 1, 1, 1]), pbr.get("baseColorTexture")
        out.factor = np.clip(np.asarray(factor, float), 0, 1)
        emission = np.clip(np.asarray(material.get("emissiveFactor", [0, 0, 0]), float), 0, 1)
        strength = extensions.get("KHR_materials_emissive_strength", {}).get("emissiveStrength", 1)
        out.emission = emission * max(0.0, float(strength))
        if out.factor.shape != (4,) or out.emission.shape != (3,):
            raise MalformedAsset(f"material {index} has colours of the wrong length")
        if not np.isfinite(out.factor).all() or not np.isfinite(out.emission).all():
            raise MalformedAsset(f"material {index} has colours that are not finite")
        match material.get("alphaMode", "OPAQUE"):
            case "MASK":
                out.cutoff = float(material.get("alphaCutoff", 0.5))
            case "BLEND":
                out.cutoff = 0.1
                self.notes.leave_out("blended transparency is drawn opaque from alpha 0.1 on")
            case _:
                out.factor[3] = 1.0
        out.unlit = "KHR_materials_unlit" in extensions
        out.double_sided = bool(material.get("doubleSided", False))
        out.base, out.emissive = self._map(base), self._map(material.get("emissiveTexture"))
        for key, what in _UNDRAWN_MAPS.items():
            if key in material:
                self.notes.leave_out(f"{what} maps are not drawn")
        if "metallicRoughnessTexture" in pbr or "specularGlossinessTexture" in (glossy or {}):
            self.notes.leave_out("maps of metal and roughness are not drawn")
        return out

    def _map(self, info: dict | None) -> Map:
        """A reference of a material to a texture, with KHR_texture_transform."""
        if info is None:
            return Map()
        texture, texcoord = self._texture(info["index"]), int(info.get("texCoord", 0))
        transform = info.get("extensions", {}).get("KHR_texture_transform")
        if transform is None:
            return Map(texture, texcoord)
        return Map(texture, int(transform.get("texCoord", texcoord)), _uv_transform(transform))

    def _texture(self, index: int) -> int:
        """Index of the texture in `textures`, -1 where there is no picture to draw it with."""
        if index in self.texture_of:
            return self.texture_of[index]
        texture = self.file.item("textures", index)
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {}).get("source")
        source = texture.get("source") if webp is None else webp
        image = None
        if source is None:
            self.notes.warn(f"texture {index} has no picture that is read: drawn without it")
        else:
            image = self._image(source)
        result = -1
        if image is not None:
            if len(self.textures) >= MAX_TEXTURES:
                raise MalformedAsset(f"more than {MAX_TEXTURES} textures")
            sampler = texture.get("sampler")
            sampler = {} if sampler is None else self.file.item("samplers", sampler)
            wrap_s, wrap_t = sampler.get("wrapS", 10497), sampler.get("wrapT", 10497)
            if wrap_s not in _WRAPS or wrap_t not in _WRAPS:
                raise MalformedAsset(f"texture {index} has the wrap modes {wrap_s} and {wrap_t}")
            smooth = sampler.get("magFilter") != _NEAREST
            self.textures.append(Texture(image, _WRAPS[wrap_s], _WRAPS[wrap_t], smooth))
            result = len(self.textures) - 1
        self.texture_of[index] = result
        return result

    def _image(self, index: int) -> np.ndarray | None:
        """A decoded picture; None where it lies outside the file."""
        if index in self.images:
            return self.images[index]
        image = self.file.item("images", index)
        if "bufferView" in image:
            data, start, length, _ = self.file.view(image["bufferView"])
            data = data[start : start + length]
        else:
            data = data_uri(image["uri"])
        if data is None:
            self.notes.warn(f"image {index} lies outside the file: drawn without it")
        self.images[index] = None if data is None else _decode_image(data, index)
        return self.images[index]


def _decode_image(data: bytes, index: int) -> np.ndarray:
    from PIL import Image

    from fourdstar_jax.data import pictures

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            if width * height > MAX_TEXTURE_PIXELS:
                raise MalformedAsset(f"image {index} is {width}x{height}, too large")
            image = pictures.to_rgba(image)
            if max(image.size) > DRAWN_TEXTURE_SIDE:
                image.thumbnail((DRAWN_TEXTURE_SIDE, DRAWN_TEXTURE_SIDE))
            return np.asarray(image)
    except Image.DecompressionBombError as error:
        raise MalformedAsset(f"image {index} is too large") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise MalformedAsset(f"image {index} cannot be read") from error


def _uv_transform(transform: dict) -> np.ndarray:
    """KHR_texture_transform: translation * rotation * scale, as 3x3."""
    ox, oy = transform.get("offset", (0, 0))
    sx, sy = transform.get("scale", (1, 1))
    angle_rad = float(transform.get("rotation", 0.0))
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    move = np.array([[1, 0, ox], [0, 1, oy], [0, 0, 1]], float)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return move @ turn @ np.diag([sx, sy, 1.0])
