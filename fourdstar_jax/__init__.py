"""4DSTAR in JAX: a video goes in, 3D Gaussians that move come out.

    import fourdstar_jax as fs
    model = fs.load("fourdstar_jax/models/small")
    object4d = model.generate("video.mp4", text=None, key=jax.random.key(0))
    fs.save(object4d, "out/video")

Names are imported where they are first used, so that `import fourdstar_jax` costs nothing and
needs nothing that only training uses.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Gaussians": "fourdstar_jax.types",
    "Cameras": "fourdstar_jax.types",
    "Rendered": "fourdstar_jax.types",
    "orbit_cameras": "fourdstar_jax.geometry",
    "rasterize": "fourdstar_jax.kernels.rasterize",
    "cluster_dpc_knn": "fourdstar_jax.kernels.dpc_knn",
    "Container": "fourdstar_jax.star.container",
    "read_video": "fourdstar_jax.data.video",
    "load": "fourdstar_jax.generate",
    "Model": "fourdstar_jax.generate",
    "Object4D": "fourdstar_jax.generate",
    "save": "fourdstar_jax.export",
}
__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from fourdstar_jax.data.video import read_video as read_video
    from fourdstar_jax.export import save as save
    from fourdstar_jax.generate import Model as Model
    from fourdstar_jax.generate import Object4D as Object4D
    from fourdstar_jax.generate import load as load
    from fourdstar_jax.geometry import orbit_cameras as orbit_cameras
    from fourdstar_jax.kernels.dpc_knn import cluster_dpc_knn as cluster_dpc_knn
    from fourdstar_jax.kernels.rasterize import rasterize as rasterize
    from fourdstar_jax.star.container import Container as Container
    from fourdstar_jax.types import Cameras as Cameras
    from fourdstar_jax.types import Gaussians as Gaussians
    from fourdstar_jax.types import Rendered as Rendered


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fourdstar_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
