"""The processes of one run: all come before the first step, and none goes unnoticed.

`jax.distributed` joins processes, but where one of them is missing or dies the others end late,
with a stack trace and without its name. So process 0 calls the roll at the coordinator's address
before JAX listens there, and keeps the connections: the system closes those of a process that dies.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fourdstar_jax import folders, signals

JOIN_S = 240.0  # until all have come
GRACE_S = 5.0  # for a process to end by itself, with its own words, once another one is gone
EXIT_FAILED = 1  # of a process with an error of its own
EXIT_LOST = 75  # another process is gone: start again (EX_TEMPFAIL)
_LINE = 1 << 12  # bytes of a message at most


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands in its run."""

    index: int
    count: int
    coordinator: str  # host:port, of process 0
    devices: tuple[int, ...] | None = None  # of this machine's, that are its own; None: all


def find() -> Place | None:
    """This process's place by its environment; None for a run of one process.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (or the index of a
    Kubernetes job's pod, `JOB_COMPLETION_INDEX`) come first. Without them JAX recognises a TPU pod,
    a Slurm step, Open MPI and a Kubernetes job. Raises ValueError for what does not go together.
    """
    environ = os.environ
    if "JAX_NUM_PROCESSES" in environ:
        return _told(environ)
    if "SLURM_STEP_NODELIST" not in environ and _number("SLURM_NTASKS", "1") > 1:
        raise ValueError(
            f"this is a Slurm job of {environ['SLURM_NTASKS']} tasks, but not one of its tasks: "
            "start it by `srun fourdstar train ...`"
        )
    from jax._src import clusters

    address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(JOIN_S)
    )
    if address is None or count in (None, 1):
        return None
    assert index is not None
    if "SLURM_STEP_NODELIST" in environ and devices is not None and _has_them_all(environ):
        devices = None
    return Place(index, count, address, tuple(devices) if devices is not None else None)


def _told(environ: Any) -> Place | None:
    count = _number("JAX_NUM_PROCESSES")
    if count == 1:
        return None
    name = "JAX_PROCESS_ID" if "JAX_PROCESS_ID" in environ else "JOB_COMPLETION_INDEX"
    if name not in environ:
        raise ValueError(f"JAX_NUM_PROCESSES is {count}, but JAX_PROCESS_ID is not set")
    index = _number(name)
    if not 0 <= index < count:
        raise ValueError(f"{name} is {index}, and JAX_NUM_PROCESSES {count}: it goes from 0")
    address = environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}; it must be HOST:PORT, of process 0"
        )
    return Place(index, count, address)


def _number(name: str, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None or not text.isdigit() or len(text) > 9:
        raise ValueError(f"{name} is {text!r}, which is no count")
    return int(text)


def _has_them_all(environ: Any) -> bool:
    """Whether a Slurm task is alone on its machine, or has been given its own devices alone."""
    tasks = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    return tasks.partition("(")[0] == "1" or (visible is not None and "," not in visible)


@contextlib.contextmanager
def joined(place: Place | None, *, timeout_s: float = JOIN_S) -> Iterator[None]:
    """Around all that uses devices: the processes of this run as one.

    If one is lost the others say which, and end with EXIT_LOST. Raises ValueError if not all come.
    """
    if place is None:
        yield
        return
    roll = Roll(place, timeout_s=timeout_s)
    import jax

    jax.distributed.initialize(
        place.coordinator,
        place.count,
        place.index,
        list(place.devices) if place.devices is not None else None,
        initialization_timeout=int(timeout_s),
    )
    signals.take_back()
    try:
        yield
    except signals.Stopped:  # all of them, after a last save
        roll.close()
        raise
    except BaseException:
        # What JAX says of a connection that broke is not the cause: the roll knows it in a moment.
        if words := roll.wait(GRACE_S / 5):
            leave(words, after_s=0)
        roll.drop()
        atexit.register(_fail)  # before JAX' own, which would wait for the others
        raise
    roll.close()


class Roll:
    """The connections between process 0 and the others; made when all are there.

    Raises ValueError that names those who are not, within `timeout_s`. `lost` is what happens when
    one of them goes before `close`: it is called with a sentence, in a thread.
    """

    def __init__(
        self, place: Place, *, timeout_s: float, lost: Callable[[str], None] | None = None
    ):
        self._place = place
        self._lost = lost if lost is not None else leave
        self._told = threading.Event()
        self._words: str | None = None
        self._closing = False
        host, _, port = place.coordinator.rpartition(":")
        address = host.strip("[]"), int(port)
        if place.index == 0:
            self._peers = _call(place, address, timeout_s)
        else:
            self._peers = {0: _answer(place, address, timeout_s)}
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()

    def wait(self, seconds: float) -> str | None:
        """The sentence about somebody who is lost, if it is known after `seconds`."""
        self._told.wait(seconds)
        return self._words

    def close(self) -> None:
        """Says that this process has done its part: its end is no loss."""
        self._closing = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sock.sendall(b'{"done": true}\n')

    def drop(self) -> None:
        """Breaks the connections, as the end of this process would."""
        self._closing = True
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sock.shutdown(socket.SHUT_RDWR)

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, peer in self._peers.items():
                selector.register(peer.sock, selectors.EVENT_READ, index)
            while selector.get_map():
                for key, _ in selector.select():
                    peer = self._peers[key.data]
                    message = peer.read()
                    if message.get("done"):
                        selector.unregister(peer.sock)
                    elif "lost" in message:  # by process 0
                        return self._tell(str(message["lost"]))
                    elif not message:
                        words = f"process {key.data} of {self._place.count} ({peer.name}) is gone"
                        return self._tell(words)

    def _tell(self, words: str) -> None:
        for peer in self._peers.values() if self._place.index == 0 else ():
            with contextlib.suppress(OSError):
                peer.sock.sendall(json.dumps({"lost": words}).encode() + b"\n")
        self._words = words
        self._told.set()
        if not self._closing:
            self._lost(words)


class Peer:
    """A connection over which lines of JSON go."""

    def __init__(self, sock: socket.socket, name: str = ""):
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(AttributeError, OSError):  # a machine that is lost says nothing
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self.sock, self.name = sock, name
        self._file = sock.makefile("rb")

    def read(self) -> dict[str, Any]:
        """The next message; {} at the end of the connection, and for what is none."""
        try:
            message = json.loads(self._file.readline(_LINE))
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}


def leave(words: str, after_s: float | None = None) -> None:
    """Ends this process, which can do nothing without the others."""
    time.sleep(GRACE_S if after_s is None else after_s)
    print(f"fourdstar: {words}: this one ends, start again", file=sys.stderr, flush=True)
    folders.abandon()
    os._exit(EXIT_LOST)


def _fail() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(EXIT_FAILED)


def _call(place: Place, address: tuple[str, int], timeout_s: float) -> dict[int, Peer]:
    """Process 0 waits for the others."""
    end = time.monotonic() + timeout_s
    try:
        server = socket.create_server(("", address[1]), backlog=place.count)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at port {address[1]}, where the others look for it: "
            f"{error.strerror}"
        ) from error
    peers: dict[int, Peer] = {}
    with server:
        while len(peers) < place.count - 1:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                missing = [str(i) for i in range(1, place.count) if i not in peers]
                here = ", ".join(f"{i} on {peers[i].name}" for i in sorted(peers)) or "nobody"
                words = (
                    f"processes {', '.join(missing)} of {place.count} did not come to "
                    f"{place.coordinator} within {timeout_s:.0f} s (came: {here})"
                )
                raise _refused(peers, words) from None
            sock.settimeout(10)
            peer = Peer(sock)
            said = peer.read()
            index, count = said.get("index"), said.get("count")
            if not isinstance(index, int) or not isinstance(count, int):
                sock.close()  # somebody else
                continue
            peer.name = str(said.get("host"))[:100]
            words = None
            if count != place.count:
                words = f"process {index} on {peer.name} says that there are {count} processes"
                words += f", process 0 that there are {place.count}"
            elif index in peers or not 0 < index < count:
                other = peers[index].name if index in peers else socket.gethostname()
                words = f"there are two processes {index}: on {other} and on {peer.name}"
            if words is not None:
                raise _refused(peers | {-1: peer}, words)
            peers[index] = peer
        for peer in peers.values():
            peer.sock.sendall(json.dumps({"all": place.count, "host": _name()}).encode() + b"\n")
    return peers


def _refused(peers: dict[int, Peer], words: str) -> ValueError:
    for peer in peers.values():
        with contextlib.suppress(OSError):
            peer.sock.sendall(json.dumps({"refused": words}).encode() + b"\n")
            peer.sock.close()
    return ValueError(words)


def _answer(place: Place, address: tuple[str, int], timeout_s: float) -> Peer:
    """One of the others finds process 0 and waits for all."""
    end, error = time.monotonic() + timeout_s, None
    me = f"process {place.index} of {place.count}"
    while (left := end - time.monotonic()) > 0:
        try:
            sock = socket.create_connection(address, timeout=min(left, 10))
        except OSError as found:
            error = found
            time.sleep(0.2)
            continue
        peer = Peer(sock, address[0])
        said = {"index": place.index, "count": place.count, "host": _name()}
        sock.settimeout(left + 10)  # process 0 is the one to name who is missing
        with contextlib.suppress(OSError):
            sock.sendall(json.dumps(said).encode() + b"\n")
            answer = peer.read()
            if "refused" in answer:
                raise ValueError(str(answer["refused"]))
            if "all" in answer:
                sock.settimeout(None)
                peer.name = str(answer.get("host"))[:100]
                return peer
        sock.close()
        time.sleep(0.2)
    raise ValueError(
        f"{me} found no process 0 at {place.coordinator} within {timeout_s:.0f} s "
        f"({error.strerror or error if error else 'it does not answer'}): does it run there, and "
        "is the port open?"
    )


def _name() -> str:
    return f"{socket.gethostname()}, pid {os.getpid()}"
