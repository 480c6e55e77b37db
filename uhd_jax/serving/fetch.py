"""Images by http(s), from hosts that the server's owner has named and from nowhere else.

What is known to get around such lists, and why it does not here:

- another reading of the URL when it is fetched than when it is checked (backslashes, user@host, spaces, letters that
  look alike): one expression reads it, refuses all but the plainest form, and what it found is what is connected to;
- an allowed host whose name leads to a private address, at once or the second time it is asked for (DNS rebinding):
  the name is resolved once, every address must be a public one, and the connection goes to that address;
- redirects: none are followed;
- other ports, other schemes: refused unless the list has the port; only http and https;
- an answer that never ends, or is huge: limits for time and bytes, also while it arrives; no compression is accepted.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
import time

from uhd_jax.serving.errors import ApiError
from uhd_jax.serving.settings import Settings

_LABEL = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_URL = re.compile(rf"(https?)://({_LABEL}(?:\.{_LABEL})*)(?::([0-9]{{1,5}}))?(/[!-\[\]-~]*)?", re.IGNORECASE)
_PORTS = {"http": 80, "https": 443}


def fetch(url: str, settings: Settings) -> bytes:
    """The bytes behind a URL.

    Raises:
      ApiError: the URL or its host is not allowed, or what is there is no answer of 200, too large or too slow.
    """
    match = _URL.fullmatch(url)
    if not match:
        raise _refused("is not a plain URL: scheme://host/path, without user, spaces, backslashes or other scripts")
    scheme, host, given_port, path = match[1].lower(), match[2].lower(), match[3], match[4] or "/"
    port = int(given_port or _PORTS[scheme])
    allowed = {entry if ":" in entry else f"{entry}:{_PORTS[scheme]}" for entry in settings.fetch_hosts}
    if f"{host}:{port}" not in allowed:
        raise _refused(f"host {host}:{port} is not among those from which this server fetches images")
    deadline = time.monotonic() + settings.fetch_seconds
    try:
        return _get(scheme, host, port, path.partition("#")[0], deadline, settings)
    except (OSError, http.client.HTTPException) as error:
        raise _refused(f"host {host}:{port} could not be read ({type(error).__name__})") from None


def resolve(host: str, port: int) -> str:
    """The address to connect to.

    Raises:
      ApiError: the name leads, also, to an address that is not a public one.
    """
    found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if not address.is_global or address.is_multicast:
            raise _refused(f"host {host} has an address that is not a public one")
    return sorted(found)[0]


def _get(scheme: str, host: str, port: int, path: str, deadline: float, settings: Settings) -> bytes:
    def left() -> float:
        if (seconds := deadline - time.monotonic()) <= 0:
            raise _refused(f"took longer than {settings.fetch_seconds:g} seconds")
        return seconds

    connection = socket.create_connection((resolve(host, port), port), timeout=left())
    try:
        if scheme == "https":
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=host)
        client = http.client.HTTPConnection(host, port)
        client.sock = connection  # so that it connects nowhere else
        client.auto_open = 0
        connection.settimeout(left())
        client.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"})
        answer = client.getresponse()
        if answer.status != 200:
            raise _refused(f"answered with status {answer.status}; redirects are not followed")
        content = b""
        while True:
            connection.settimeout(left())
            piece = answer.read1(65_536)
            content += piece
            if len(content) > settings.fetch_bytes:
                raise _refused(f"has more than {settings.fetch_bytes} bytes")
            if not piece:
                return content
    finally:
        connection.close()


def _refused(problem: str) -> ApiError:
    return ApiError(400, f"the image's URL {problem}", "invalid_image_url")
