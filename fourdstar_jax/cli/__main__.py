"""`python -m fourdstar_jax.cli`."""

import sys

from fourdstar_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
