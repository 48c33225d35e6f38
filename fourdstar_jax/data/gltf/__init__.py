"""Reads and poses animated GLB files (glTF 2.0 binary) with numpy and json alone.

Files come from anywhere, so every length, index and offset is checked before use, nothing outside
the file is opened (external URIs), and sizes are capped. What cannot be read raises
`MalformedAsset` with one line that says why.

What is drawn: triangles of the default scene, with vertex colours, base colours, base colour
textures and emission; node transforms, skins (any number of joint sets) and morph targets, moved
by any clip of the file (STEP, LINEAR, CUBICSPLINE). Cameras, lights and materials' other maps are
left aside.
"""

from fourdstar_jax.data.gltf.asset import Asset, Clip, Draw, Posed
from fourdstar_jax.data.gltf.container import MalformedAsset
from fourdstar_jax.data.gltf.read import load

__all__ = ["Asset", "Clip", "Draw", "MalformedAsset", "Posed", "load"]
