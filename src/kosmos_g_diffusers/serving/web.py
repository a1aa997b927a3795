"""A web server in a thread of its own, which is known to answer before anyone is told its address."""

import http.client
import logging
import os
import socket
import threading
import time
from typing import Any

import uvicorn

from .access import ANY_ADDRESS

STARTING = 60.0  # seconds that a busy machine may take until the first answer
ENDING = 5.0  # seconds that answers have to end in


class WebServer:
    """uvicorn for an ASGI application.

    Args:
        app: the application.
        host, port: where it listens.
        trusted_proxies: addresses of reverse proxies that may say whose a request is; also the variable FORWARDED_ALLOW_IPS.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, app: Any, host: str, port: int, trusted_proxies: str = ""):
        self._host, self._port = host, port
        self._socket = _listen(host, port)
        trusted = os.environ.get("FORWARDED_ALLOW_IPS") or trusted_proxies
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                http="h11",  # which limits the headers of a request; httptools, where it is installed, holds any
                # whoever may name an address is not limited by it
                proxy_headers=bool(trusted),
                forwarded_allow_ips=trusted,
                server_header=False,
            )
        )
        # a daemon: Ctrl-C must not wait for answers
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="web server", daemon=True
        )

    @property
    def url(self) -> str:
        """Where a browser of this machine finds it."""
        host = "localhost" if self._host in ANY_ADDRESS else self._host
        return f"http://{f'[{host}]' if ':' in host else host}:{self._port}/"

    def start(self) -> None:
        """Return when it has answered a request. Raises OSError if it does not for `STARTING` seconds."""
        self._thread.start()
        end = time.monotonic() + STARTING
        while time.monotonic() < end and self._thread.is_alive():
            if self._server.started and self._answers(end - time.monotonic()):
                return
            time.sleep(0.01)
        self.close()
        raise OSError(f"The server at {self.url} did not answer within {STARTING:.0f} seconds.")

    def _answers(self, seconds):
        """One request, past all proxies: they may not know this machine."""
        host = self._host.strip("[]")
        if host in ANY_ADDRESS:
            host = "::1" if self._socket.family == socket.AF_INET6 else "127.0.0.1"
        connection = http.client.HTTPConnection(host, self._port, timeout=max(1.0, seconds))
        try:
            connection.request("HEAD", "/", headers={"Host": f"localhost:{self._port}"})
            return connection.getresponse().status < 500
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def close(self, ending: float = ENDING) -> None:
        """End it; answers that take longer than `ending` seconds are cut off."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout=ending)
        if self._thread.is_alive():
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # that they are cut off is expected
            self._server.force_exit = True
            self._thread.join(timeout=ENDING)
        self._socket.close()


def _listen(host, port):
    host = host.strip("[]")
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return socket.create_server(address[:2], family=family, backlog=2048)
