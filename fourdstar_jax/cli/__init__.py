"""The `fourdstar` command: a subcommand a module, its flags above the function that reads them."""

from fourdstar_jax.cli.common import BUNDLED_MODEL
from fourdstar_jax.cli.main import main
from fourdstar_jax.cli.train import read_config

__all__ = ["BUNDLED_MODEL", "main", "read_config"]
