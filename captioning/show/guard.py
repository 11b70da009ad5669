"""Who gets an answer from the page in the browser and from `POST /caption`."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Answers requests to this page alone, and from it alone: ASGI middleware.

    A site that the user visits may send requests to the page (another origin), or may let its own name lead to this
    machine (DNS rebinding), and then read what the page answers. The browser tells both.

    Args:
        app: what answers the others.
        host: what the page listens on.
    """

    def __init__(self, app, host: str):
        self.app = app
        self.open = host not in LOOPBACK
        self.names = {"localhost", host.lower()}
        if self.open:
            own = socket.gethostname().lower()
            self.names |= {own, f"{own.partition('.')[0]}.local", socket.getfqdn().lower()}

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket") or self.allows(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"This page answers to its own address only."})

    def allows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a request names this page, and comes from it or from no page."""
        told = [(name.lower(), value.decode("latin-1").strip().lower()) for name, value in headers]

        def values(wanted: bytes) -> list[str]:
            return [value for name, value in told if name == wanted]

        hosts = values(b"host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return False
        if any(origin.partition("://")[2] != hosts[0] for origin in values(b"origin")):
            return False
        # Somebody else's page may link to this one, and do no more.
        linked = values(b"sec-fetch-mode") == ["navigate"]
        return linked or all(site in ("same-origin", "none") for site in values(b"sec-fetch-site"))

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            if name in self.names:
                return True
            # A number is nobody's name. Any other name may be somebody's, and lead here.
            return ipaddress.ip_address(name).is_loopback or self.open
        except ValueError:
            return False
