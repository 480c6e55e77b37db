"""Images by http(s), from hosts that the server's owner has named and from nowhere else.

What is known to get around such lists, and why it does not here:

- another reading of the URL when it is fetched than when it is checked (backslashes, user@host, spaces, letters that
  look alike): one expression reads it, refuses all but the plainest form, and what it found is what is connected to;
- an allowed host whose name leads to a private address, at once or the second time it is asked for (DNS rebinding):
  the name is resolved once, every address must be a public one, and the connection goes to that address;
- redirects: none are followed;
- other ports, other schemes: refused unless the list has the port; only http and https;
- private addresses of version 4 inside of those of version 6 (mapped, 6to4, Teredo, NAT64): looked at, or refused;
- numbers for a name (octal, hexadecimal, one number): only a name on the list passes, letter by letter;
- an answer that never ends, comes a byte at a time, or is huge: limits for its time as a whole and its bytes; no
  compression is accepted.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
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
        if time.monotonic() >= deadline:
            raise _refused(f"took longer than {settings.fetch_seconds:g} seconds") from None
        raise _refused(f"host {host}:{port} could not be read ({type(error).__name__})") from None


def resolve(host: str, port: int) -> str:
    """The address to connect to.

    Raises:
      ApiError: the name leads, also, to an address that is not a public one.
    """
    found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    if not all(_public(ipaddress.ip_address(text.partition("%")[0])) for text in found):
        raise _refused(f"host {host} has an address that is not a public one")
    return sorted(found)[0]


def _public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Also of the addresses of version 4 that stand in one of version 6: mapped, 6to4, Teredo; NAT64's are reserved."""
    if address.version == 6:
        if address.ipv4_mapped:
            return _public(address.ipv4_mapped)
        if address.sixtofour or address.teredo or address.is_site_local:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _get(scheme: str, host: str, port: int, path: str, deadline: float, settings: Settings) -> bytes:
    address = resolve(host, port), port
    connection = socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001))
    twin = connection.dup()
    # A timeout of the socket begins anew with every byte that comes, so a clock of its own cuts it off.
    clock = threading.Timer(max(deadline - time.monotonic(), 0), _cut, [twin])
    clock.start()
    try:
        if scheme == "https":
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=host)
        client = http.client.HTTPConnection(host, port)
        client.sock = connection  # so that it connects nowhere else
        client.auto_open = 0
        client.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"})
        answer = client.getresponse()
        if answer.status != 200:
            raise _refused(f"answered with status {answer.status}; redirects are not followed")
        content = b""
        while piece := answer.read1(65_536):
            content += piece
            if len(content) > settings.fetch_bytes:
                raise _refused(f"has more than {settings.fetch_bytes} bytes")
        if time.monotonic() >= deadline:
            raise TimeoutError
        return content
    finally:
        clock.cancel()
        twin.close()
        connection.close()


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself meanwhile
        connection.shutdown(socket.SHUT_RDWR)


def _refused(problem: str) -> ApiError:
    return ApiError(400, f"the image's URL {problem}", "invalid_image_url")
