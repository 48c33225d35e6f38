"""Mutates archives of torch.save: they are read, or refused with one line, and nothing else.

python tests/convert/torch_file_fuzz.py --cases 100000 --seed 0
"""

import argparse
import importlib.util
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from fourdstar_jax.convert import torch_file

HERE = Path(__file__).parent
LIMIT_S = 2.0  # of processor time, one case


def _archives():
    spec = importlib.util.spec_from_file_location("torch_archives", HERE / "torch_archives.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


archives = _archives()
INTERESTING = [0, 1, 2, 7, 8, 22, 63, 64, 127, 128, 255, 256, 1 << 15, 65535, 1 << 16]
INTERESTING += [1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63]
OPCODES = [bytes([i]) for i in range(256)] + [b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b")R", b"Q"]
OPCODES += [b"tR", b"}b", b"(", b"h\x00", b"q\x00", b"q\x01h\x01", b"]", b"}", b"K\x00", b"J" * 5]
OPCODES += [archives.name(*n.rsplit(".", 1)) for n in ("os.system", "torch.float32")]
OPCODES += [archives.ORDERED, archives.name("torch", "FloatStorage"), b"0", b"2", b"\x93", b"\x94"]


def bases():
    """(name, entries, whole file) of the archives that are mutated."""
    tree, storages = archives.sample()
    entries = archives.entries(archives.pickled(tree), storages)
    small = archives.entries(archives.pickled({"a": [1, "b"]}))
    real = (HERE / "fixtures" / "real_torch.pth").read_bytes()
    return [
        (entries, archives.zipped(entries)),
        (entries, archives.zipped(entries, zip64=True)),
        (small, archives.zipped(small, flags=0)),
        (None, real),
    ]


def bits(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def number(data, rng):
    """An integer of 1, 2, 4 or 8 bytes replaced by an interesting one."""
    width = rng.choice([1, 2, 4, 8])
    value = rng.choice(INTERESTING) + rng.choice([-1, 0, 0, 1])
    at = rng.randrange(len(data))
    if rng.random() < 0.5:  # at a signature of the zip
        at = max(0, data.find(b"PK", at)) + rng.randrange(60)
    raw = (value % (1 << 64)).to_bytes(8, "little")[:width]
    return data[:at] + raw + data[at + width :]


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def remove(data, rng):
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.randrange(1, 40) :]


def repeat(data, rng):
    at, size, to = rng.randrange(len(data)), rng.randrange(1, 200), rng.randrange(len(data))
    return data[:to] + data[at : at + size] * rng.choice([1, 1, 2, 50]) + data[to:]


def overwrite(data, rng):
    at, size, to = rng.randrange(len(data)), rng.randrange(1, 100), rng.randrange(len(data))
    chunk = data[at : at + size]
    return data[:to] + chunk + data[to + len(chunk) :]


def opcodes(data, rng):
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.choice(OPCODES) * rng.choice([1, 1, 1, 3, 500]) + data[at:]
    return data


MUTATIONS = [bits, number, cut, remove, repeat, overwrite]


def mutant(seed, originals):
    """The file of one case, which its seed alone decides."""
    rng = random.Random(seed)
    entries, data = rng.choice(originals)
    if entries is None or rng.random() < 0.4:
        for _ in range(rng.choice([1, 1, 2])):
            data = rng.choice(MUTATIONS)(data or b"\0", rng)
        return data
    entries = list(entries)  # inside, with the zip made anew around it
    for _ in range(rng.choice([1, 1, 2])):
        which = 0 if rng.random() < 0.8 else rng.randrange(len(entries))
        name, content = entries[which]
        change = opcodes if which == 0 and rng.random() < 0.5 else rng.choice(MUTATIONS)
        entries[which] = (name, change(content or b"\0", rng))
    return archives.zipped(entries, zip64=rng.random() < 0.2)


def touch(value):
    """Reads every array to its last element; returns how many there are."""
    if isinstance(value, dict):
        return sum(touch(key) + touch(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(touch, value))
    if isinstance(value, np.ndarray):
        assert not value.flags.writeable
        if value.size:
            value.astype(np.float64).min(), value.astype(np.float64).max()
        return 1
    assert value is None or type(value) in (str, int, float, bool) or isinstance(value, np.dtype)
    return 0


def run(cases, seed=0):
    """Counts of outcomes, and the seeds that failed with what happened."""
    originals, outcomes, failures = bases(), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutant.pth"
        for case in range(seed, seed + cases):
            path.unlink(missing_ok=True)  # a new file: arrays of the last one keep theirs
            path.write_bytes(mutant(case, originals))
            start = time.process_time()
            try:
                touch(torch_file.read(path))
                outcome = "returned"
            except ValueError as error:
                line = str(error)
                outcome = "refused"
                if not line.startswith(f"{path}: ") or "\n" in line.removeprefix(str(path)):
                    failures.append((case, f"message {line!r}"))
            except Exception as error:  # whatever else it is, it is what this looks for
                outcome = "failed"
                failures.append((case, f"{type(error).__name__}: {error}"))
            if time.process_time() - start > LIMIT_S:
                failures.append((case, "slow"))
            outcomes[outcome] += 1
    return outcomes, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next adds one")
    arguments = parser.parse_args()
    np.seterr(all="ignore")
    start = time.perf_counter()
    outcomes, failures = run(arguments.cases, arguments.seed)
    print(dict(outcomes), f"{time.perf_counter() - start:.1f} s")
    for case, reason in failures:
        print(f"seed {case}: {reason}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
