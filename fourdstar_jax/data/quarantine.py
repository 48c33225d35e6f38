"""Records that cannot be read: left out and counted, up to a share of the dataset."""

import sys
from typing import Any, Protocol, runtime_checkable

LIMIT = 0.001  # of a split's records
NAMED = 5  # of them in an error


class CorruptRecord(ValueError):
    """What a source raises for a record that cannot be read or holds what no record may."""


class Quarantine:
    """Counts the records of a split that are left out, and says so on stderr.

    `place` names the split in messages, `total` is the number of its records.
    """

    def __init__(self, place: str, total: int):
        self.place, self.total = place, total
        self.count, self._reasons = 0, []

    def add(self, reason: str, count: int = 1) -> None:
        """Leaves `count` more records out. Raises ValueError if that is more than LIMIT of all."""
        self.count += count
        self._reasons.append(reason)
        print(f"quarantined ({self.count} of {self.total}): {reason}", file=sys.stderr, flush=True)
        self.check()

    def check(self) -> None:
        """Raises ValueError if more than LIMIT of all records are left out."""
        if self.count > LIMIT * self.total:
            some = "; ".join(self._reasons[:NAMED])
            raise ValueError(
                f"{self.place}: {self.count} of {self.total} records cannot be read, more than "
                f"{LIMIT:.1%}: {some}"
            )


@runtime_checkable
class Source(Protocol):
    """Random access to records, some of which may be corrupt."""

    quarantine: Quarantine

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Any: ...


class Readable:
    """A source in which the record after it stands for each that is corrupt.

    So the same files give the same batches, whichever thread reads first. A grain random-access
    source.
    """

    def __init__(self, source: Source):
        self._source = source
        self._corrupt: set[int] = set()

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:  # grain stores it beside the iterator's state
        return repr(self._source)

    def __getitem__(self, i: int) -> Any:
        for j in range(len(self)):
            index = (int(i) + j) % len(self)
            if index in self._corrupt:
                continue
            try:
                return self._source[index]
            except CorruptRecord as error:
                if index not in self._corrupt:
                    self._corrupt.add(index)
                    self._source.quarantine.add(str(error))
        self._source.quarantine.check()
        raise ValueError(f"{self._source.quarantine.place} holds no records")
