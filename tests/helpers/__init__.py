"""What several tests make their inputs with; `tests` is on the path of the test run."""

from pathlib import Path

# A trained model of size tiny, of when that was built on a UniTok: quick, and no quality.
TINY = Path(__file__).parents[1] / "models" / "tiny"
