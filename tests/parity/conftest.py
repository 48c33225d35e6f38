import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def parity(request):
    """The script that a `<name>_test.py` is of, `<name>.py`, which imports `common` beside it."""
    path = Path(request.path)
    script = path.with_name(path.name.replace("_test", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec = importlib.util.spec_from_file_location(f"parity_{script.stem}", script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
        sys.modules.pop("common", None)


@pytest.fixture(scope="module")
def rows(parity):
    """Its comparison with what the original left in `fixtures/<name>`, by block."""
    folder = Path(parity.__file__).parent / "fixtures" / Path(parity.__file__).stem
    return {row.block: row for row in parity.compare(folder)}
