"""Serves one page over HTTP, to this machine unless told otherwise."""

import errno
import http.server
import ipaddress
import urllib.parse
from http import HTTPStatus

TIMEOUT_S = 30.0  # for a request to arrive
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class Server(http.server.ThreadingHTTPServer):
    """A server of `page` at / and nothing else; `serve_forever` runs it.

    On an address of this machine's own it answers only requests that name such an address, so that
    no other site's page can read it by a name of that site (DNS rebinding).

    Raises ValueError if the address cannot be had; port 0 takes any that is free.
    """

    daemon_threads = True

    def __init__(self, page: bytes, *, host: str = "127.0.0.1", port: int = 0):
        self.page = page
        self.private = _is_loopback(host)
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            remedy = " (port 0 takes a free one)" if error.errno == errno.EADDRINUSE else ""
            raise ValueError(
                f"{host} port {port} cannot be served: {error.strerror}{remedy}"
            ) from error

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        host, port = self.server_address[:2]
        return f"http://{host}:{port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def _answer(self, *, head: bool = False) -> None:
        server = self.server
        assert isinstance(server, Server)
        name = urllib.parse.urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if server.private and not (name and _is_loopback(name)):
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        if urllib.parse.urlsplit(self.path).path != "/":
            return self.send_error(HTTPStatus.NOT_FOUND)
        self.send_response(HTTPStatus.OK)
        for header, value in HEADERS.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(server.page)))
        self.end_headers()
        self.wfile.write(b"" if head else server.page)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal shows the address."""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
