"""Reads and poses animated GLB files (glTF 2.0 binary) with numpy and json alone.

Files come from anywhere, so every length, index and offset is checked before use, nothing outside
the file is opened (external URIs), and sizes are capped. What cannot be read raises
`MalformedAsset` with one line that says why.

What is drawn: triangles of the default scene, with vertex colours, base (or diffuse) colour and
emission, their textures as the samplers say, unlit or lit, one side or both; node transforms,
instances, skins (any number of joint sets) and morph targets, moved by any clip of the file (STEP,
LINEAR, CUBICSPLINE). What a file has beyond that is named in `Asset.warnings`.
"""

from fourdstar_jax.data.gltf.asset import Asset, Clip, Draw, Posed, Surface, Texture
from fourdstar_jax.data.gltf.container import MalformedAsset
from fourdstar_jax.data.gltf.read import load

__all__ = ["Asset", "Clip", "Draw", "MalformedAsset", "Posed", "Surface", "Texture", "load"]
