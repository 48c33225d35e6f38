#!/usr/bin/env bash
# For anybody with a TPU: the kernels' and trainers' checks there. launch/tpu/verify.sh [FILE]
#
# Leaves FILE (tpu_verify.json): device, versions, commit and the outcome of each test, to send in.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
file=${1:-tpu_verify.json}
./launch/setup.sh dev
.venv/bin/python -m pip install --quiet -e '.[tpu]'
report=$(mktemp --suffix=.xml)
trap 'rm -f "$report"' EXIT
code=0
JAX_PLATFORMS=tpu,cpu .venv/bin/python -m pytest -m "tpu or central" --junitxml="$report" || code=$?
JAX_PLATFORMS=tpu,cpu .venv/bin/python - "$report" "$file" <<'PYTHON'
import importlib.metadata, json, subprocess, sys
import xml.etree.ElementTree as xml
import jax

report, file = sys.argv[1:]
tests = {}
for case in xml.parse(report).iter("testcase"):
    outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
    tests[f"{case.get('classname')}::{case.get('name')}"] = outcome
device = jax.devices()[0]
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
content = {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "commit": commit,
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "fourdstar-jax")},
    "passed": sum(outcome == "passed" for outcome in tests.values()),
    "failed": sorted(name for name, outcome in tests.items() if outcome in ("failure", "error")),
    "skipped": sum(outcome == "skipped" for outcome in tests.values()),
}
with open(file, "w") as out:
    json.dump(content, out, indent=1)
print(f"{content['passed']} passed, {len(content['failed'])} failed on {device.device_kind}: {file}")
PYTHON
exit "$code"
