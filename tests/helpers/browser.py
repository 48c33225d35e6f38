"""Debian's Chromium without a window, spoken to by the DevTools protocol through two pipes."""

import base64
import contextlib
import io
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time

import numpy as np
import pytest
from PIL import Image

FLAGS = [
    *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-sync"),
    *("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-component-update", "--disable-extensions", "--mute-audio", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


class Page:
    """One page of a browser; every call waits for its answer."""

    def __init__(self, write: int, read: int):
        self._write, self._read, self._buffer = write, read, b""
        self._ids = itertools.count(1)
        self._session = None
        self.events = []  # what the page said by itself: console, errors, requests
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, *, timeout_s=30.0, **params):
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout_s
        while True:
            answer = self._next(end, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self, end, method):
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(method)
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError(f"the browser ended during {method}")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, url, *, width, height, offline=False):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setDeviceMetricsOverride", **size)
        rates = dict(latency=0, downloadThroughput=-1, uploadThroughput=-1)
        self.call("Network.emulateNetworkConditions", offline=offline, **rates)
        self.call("Page.navigate", url=url)

    def eval(self, code, timeout_s=30.0):
        """The value of a JavaScript expression; promises are awaited."""
        options = dict(expression=code, awaitPromise=True, returnByValue=True)
        result = self.call("Runtime.evaluate", timeout_s=timeout_s, **options)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"])[:2000])
        return result["result"].get("value")

    def until(self, code, timeout_s=30.0):
        """Waits until an expression is true."""
        end = time.monotonic() + timeout_s
        while not self.eval(code):
            if time.monotonic() > end:
                raise TimeoutError(f"{code}; errors: {self.errors()}")
            time.sleep(0.05)

    def errors(self):
        """Exceptions of the page, and what it or the browser has logged as an error."""
        found = []
        for event in self.events:
            match event:
                case {"method": "Runtime.exceptionThrown", "params": params}:
                    found.append(params)
                case {"method": "Runtime.consoleAPICalled", "params": {"type": "error"} as params}:
                    found.append(params)
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error"} as entry}}:
                    found.append(entry)
        return found

    def screenshot(self):
        """The page's pixels, [h, w, 3] in [0, 1]."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        return np.asarray(picture, np.float32) / 255

    def key(self, key, code=None):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code or key)


@contextlib.contextmanager
def page():
    """A page of a new browser with a home of its own; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        # The browser reads from 3 and writes to 4; a shell puts them there, for Python may not fork
        # into code of its own while JAX has threads.
        start = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'
        process = subprocess.Popen(
            ["bash", "-c", start, program, *FLAGS, f"--user-data-dir={home}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(to_read, from_write), start_new_session=True,
            env={**os.environ, "HOME": home},
        )  # fmt: skip
        os.close(to_read)
        os.close(from_write)
        try:
            yield Page(to_write, from_read)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(to_write)
            os.close(from_read)
