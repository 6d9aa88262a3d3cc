"""Downloads: an http(s) URL → a cached local file, bounded in time, size and redirects.

Every hop of a redirect is checked again. The address connected to is the one that was checked, so a name that resolves
differently the second time gains nothing. Behind a proxy (`https_proxy` and its kin) the proxy resolves names.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
import string
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from ivl.data.cache import default_cache, go_without, temporary, writable
from ivl.files import whole_file
from ivl.types import UserError

Socket = TypeVar("Socket", bound=socket.socket)

_CHUNK = 1 << 16
_HEADERS = {"User-Agent": "ivl", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}


@dataclass(frozen=True)
class FetchPolicy:
    """Limits of a download. Times in seconds, sizes in bytes."""

    timeout: float = 20.0
    """Longest silence of the server"""
    total_timeout: float = 300.0
    """Longest time of one attempt"""
    max_bytes: int = 512 * 1024 * 1024
    """Largest file that is fetched"""
    max_redirects: int = 5
    """Most redirections that are followed, each checked like a new address"""
    retries: int = 3
    """Further attempts after a time-out, a broken connection, or the answers 429 and 5xx"""
    backoff: float = 0.5
    """Pause before the first further attempt; it doubles each time"""
    allow_private: bool = False
    """Allow addresses that are not public (loopback, private, link-local)"""
    cache_dir: str | None = None
    """Folder of fetched files; None: ~/.cache/ivl/media. A file is fetched once: delete it to fetch it again"""


class _TemporaryFault(Exception):
    """Fault that may be gone at the next attempt. `after`: seconds the server asked to wait."""

    def __init__(self, reason: str, after: float = 0.0) -> None:
        super().__init__(reason)
        self.after = after


class _DiskFault(Exception):
    """Fault of the cache's disk, not of the connection."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def cached_path(url: str, policy: FetchPolicy | None = None) -> Path:
    """Path of the file of `url` in the cache, downloaded or not."""
    directory = policy and policy.cache_dir
    folder = Path(directory) if directory else default_cache() / "media"
    name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return folder / name[:2] / name


def fetch(url: str, policy: FetchPolicy | None = None, check: Callable[[Path], None] | None = None) -> Path:
    """Local file of an http(s) URL, from the cache or downloaded.

    `check` gets the downloaded file before it enters the cache, and raises UserError where the content is wrong.
    Raises UserError with the URL and what failed.
    """
    policy = policy or FetchPolicy()
    path = cached_path(url, policy)
    place = writable(path)
    try:
        return _download(url, policy, check, place)
    except _DiskFault as fault:
        if place != path:
            raise fault.error from None
        go_without(path, fault.error)
        return _download(url, policy, check, temporary(path))


def _download(url: str, policy: FetchPolicy, check: Callable[[Path], None] | None, place: Path) -> Path:
    """Download to `place` unless the file is there. Raises _DiskFault where it cannot be written."""
    if os.path.isfile(place):
        return place
    _check_url(url, url)
    try:
        with whole_file(place) as out:
            _with_retries(url, policy, out)
            out.flush()
            if check is not None:
                check(Path(out.name))
    except OSError as error:
        raise _DiskFault(error) from None
    return place


def _with_retries(url: str, policy: FetchPolicy, out: BinaryIO) -> None:
    for attempt in range(policy.retries + 1):
        try:
            return _attempt(url, policy, out)
        except _TemporaryFault as fault:
            if attempt == policy.retries:
                raise UserError(
                    f"{url}: {fault}, {attempt + 1} times; try again later, or save it and give the path"
                ) from None
            time.sleep(max(policy.backoff * 2**attempt, min(fault.after, policy.timeout)))
    raise AssertionError("the last attempt returns or raises")


def _attempt(url: str, policy: FetchPolicy, out: BinaryIO) -> None:
    deadline = _Deadline(policy.total_timeout)
    out.seek(0)
    out.truncate()
    try:
        _follow(url, policy, deadline, out)
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"{url}: its certificate is not valid ({error.verify_message})") from None
    except (OSError, http.client.HTTPException) as error:
        if deadline.passed:
            raise _TemporaryFault(f"not complete after {policy.total_timeout:g} seconds") from None
        raise _TemporaryFault(f"no answer ({str(error) or type(error).__name__})") from None
    finally:
        deadline.cancel()


def _follow(url: str, policy: FetchPolicy, deadline: _Deadline, out: BinaryIO) -> None:
    """Request, follow redirects within the limit, write the body to `out`."""
    hop = url
    for _ in range(policy.max_redirects + 1):
        connection, target = _connection(hop, url, policy, deadline)
        try:
            connection.request("GET", target, headers=_HEADERS)
            response = connection.getresponse()
            if response.status == 200:
                return _copy(url, response, policy, deadline, out)
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                answer = f"the server answered {response.status} {response.reason}"
                if response.status == 429 or response.status >= 500:
                    after = response.headers.get("Retry-After", "")
                    raise _TemporaryFault(answer, float(after) if after.isdecimal() else 0.0)
                raise UserError(f"{url}: {answer}; check the address")
        finally:
            connection.close()
        hop = urllib.parse.urljoin(hop, location)
        _check_url(hop, url)
    raise UserError(f"{url}: more than {policy.max_redirects} redirects, the last to {hop} (max_redirects)")


def _copy(
    url: str, response: http.client.HTTPResponse, policy: FetchPolicy, deadline: _Deadline, out: BinaryIO
) -> None:
    encoding = response.headers.get("Content-Encoding") or "identity"
    if encoding != "identity":
        raise UserError(f"{url}: sent with Content-Encoding {encoding}, although identity was asked for")
    length = response.headers.get("Content-Length", "")
    expected = int(length) if length.isdecimal() else None
    if expected is not None and expected > policy.max_bytes:
        raise UserError(f"{url}: {expected} bytes, above the limit of {policy.max_bytes} (max_bytes)")
    count = 0
    while chunk := response.read1(_CHUNK):
        count += len(chunk)
        if count > policy.max_bytes:
            raise UserError(f"{url}: more bytes than the limit of {policy.max_bytes} (max_bytes)")
        try:
            out.write(chunk)
        except OSError as error:
            raise _DiskFault(error) from None
    if deadline.passed:
        raise _TemporaryFault(f"not complete after {policy.total_timeout:g} seconds")
    if expected is not None and count != expected:
        raise _TemporaryFault(f"the connection broke after {count} of {expected} bytes")
    if count == 0:
        raise UserError(f"{url}: the server sent nothing (0 bytes)")


def _check_url(url: str, origin: str) -> None:
    """Refuse all but http and https with a host. `origin`: the row's URL, named in errors after a redirect."""
    led = "" if url == origin else f" (redirected to {url})"
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{origin}: not a valid URL{led} ({error})") from None
    if parts.scheme.lower() not in ("http", "https"):
        raise UserError(f"{origin}: only http and https are fetched{led}; give a local file by its path")
    if not host or not host.isascii() or any(c <= " " for c in host):
        raise UserError(f"{origin}: not a valid URL{led}; expected a host of ASCII letters")
    if parts.username is not None:
        raise UserError(f"{origin.split('://')[0]}://…: a user name in a URL is not sent{led}; fetch the file yourself")


def _check_public(host: str, port: int, policy: FetchPolicy) -> list[tuple]:
    """Addresses of a host, as from getaddrinfo. Raises UserError where one is not public and that is not allowed."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, address in addresses:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        ip = getattr(ip, "ipv4_mapped", None) or ip
        if not policy.allow_private and (not ip.is_global or ip.is_multicast):
            raise UserError(
                f"{host}: its address {ip} is not public; such a host is asked only where allow_private is set"
            )
    return addresses


def _connection(
    hop: str, origin: str, policy: FetchPolicy, deadline: _Deadline
) -> tuple[http.client.HTTPConnection, str]:
    """Connection, not opened, for a URL that passed `_check_url`, and the target to request."""
    parts = urllib.parse.urlsplit(urllib.parse.quote(hop, safe=string.punctuation))
    tls, host = parts.scheme.lower() == "https", parts.hostname or ""
    port = parts.port or (443 if tls else 80)
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    proxy = urllib.request.getproxies().get("https" if tls else "http")
    if not proxy or urllib.request.proxy_bypass(f"{host}:{port}"):
        return _DirectConnection(host, port, tls, policy, deadline), target
    with contextlib.suppress(socket.gaierror):  # some names only the proxy can resolve
        _check_public(host, port, policy)
    through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if through.scheme != "http" or not through.hostname:
        raise UserError(f"{origin}: the proxy {through.scheme}://{through.hostname} is not supported; expected http://")
    connection = _ProxyConnection(through.hostname, through.port or 80, tls, policy, deadline)
    if not tls:
        return connection, hop
    connection.set_tunnel(host, port)
    return connection, target


class _DirectConnection(http.client.HTTPConnection):
    """Connection to an address that was checked."""

    def __init__(self, host: str, port: int, tls: bool, policy: FetchPolicy, deadline: _Deadline) -> None:
        super().__init__(host, port, timeout=policy.timeout)
        self.default_port = 443 if tls else 80
        self.name, self.tls, self.policy, self.deadline = host, tls, policy, deadline

    def connect(self) -> None:
        addresses = _check_public(self.host, self.port, self.policy)
        fault = OSError(f"{self.host} has no address")
        for family, kind, protocol, _, address in addresses:
            sock = socket.socket(family, kind, protocol)
            sock.settimeout(self.policy.timeout)
            try:
                sock.connect(address)
            except OSError as error:
                sock.close()
                fault = error
                continue
            self.sock = _secured(sock, self.host, self.deadline) if self.tls else self.deadline.watch(sock)
            return
        raise fault


class _ProxyConnection(http.client.HTTPConnection):
    """Connection to the proxy, which connects to the host; TLS goes through its tunnel."""

    def __init__(self, host: str, port: int, tls: bool, policy: FetchPolicy, deadline: _Deadline) -> None:
        super().__init__(host, port, timeout=policy.timeout)
        self.tls, self.deadline, self.name = tls, deadline, host

    def set_tunnel(self, host: str, port: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().set_tunnel(host, port, headers)
        self.name = host

    def connect(self) -> None:
        super().connect()
        self.sock = _secured(self.sock, self.name, self.deadline) if self.tls else self.deadline.watch(self.sock)


def _secured(sock: socket.socket, host: str, deadline: _Deadline) -> socket.socket:
    context = ssl.create_default_context()
    secured = deadline.watch(context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False))
    secured.do_handshake()
    return secured


class _Deadline:
    """Timer that shuts a connection's socket down when an attempt's time is up, also where bytes still trickle in."""

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def watch(self, sock: Socket) -> Socket:
        self._sockets.append(sock)
        return sock

    def cancel(self) -> None:
        self._timer.cancel()

    def _expire(self) -> None:
        self.passed = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not SSLSocket's own, which takes its state apart
