"""Who may talk to the server: its name in the request, the page that a request comes from, the
key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from apt_plugins.serve.api_errors import ApiError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Access:
    """Checks requests to a server at the address ``host``, which was asked for as ``asked``.

    A page of a stranger can send requests from a browser on this machine, and its name may be made
    to resolve to this machine: the first has another Origin, the second another Host. A server on
    loopback answers only to names of it, and to ``names``; elsewhere to any name if there are no
    ``names``, for there the ``key`` is needed.
    """

    def __init__(self, host: str, asked: str, names: Sequence[str], key: str | None) -> None:
        own = {*LOOPBACK_NAMES, host, asked} if is_loopback(host) else {host, asked}
        known = {name.strip("[]").lower() for name in (*own, *names)}
        self._names = known if is_loopback(host) or names else None
        self._key = None if key is None else key.encode()

    @property
    def has_key(self) -> bool:
        """Whether a key is needed."""
        return self._key is not None

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError (403) for a request of a stranger's page."""
        host = headers.get("host", "")
        if self._names is not None and host_name(host) not in self._names:
            raise ApiError(
                403,
                "this server does not answer to the name in the Host header; "
                "apt-serve --allow-host NAME lets it",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            raise ApiError(
                403, "requests of other pages are not answered", code="origin_not_allowed"
            )

    def check_key(self, headers: Mapping[str, str]) -> None:
        """Raise ApiError (401) for a request without the key."""
        if self._key is None:
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            what = "is wrong" if given else "is missing (Authorization: Bearer KEY)"
            raise ApiError(
                401,
                f"the API key {what}",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


def host_name(header: str) -> str:
    """The name in a Host header, without its port.

    >>> host_name("LocalHost:8000"), host_name("[::1]:8000"), host_name("::1")
    ('localhost', '::1', '::1')
    """
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header if header.count(":") > 1 else header.partition(":")[0]


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
