"""Downloads: an http(s) URL → a cached local file, bounded in time, size and redirects.

Every hop of a redirect is checked again. The address connected to is the one that was checked, so a name that resolves
differently the second time gains nothing. Behind a proxy (`https_proxy` and its kin) the proxy resolves names.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import socket
import ssl
import string
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

try:  # it comes with huggingface-hub
    import httpcore2 as httpcore
except ImportError:
    import httpcore

from ivl.data.cache import default_cache, written
from ivl.options.media import FetchPolicy
from ivl.storage.files import atomic_file
from ivl.types import UserError

_HEADERS = {"User-Agent": "ivl", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}


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
    return written(cached_path(url, policy), lambda place: _download(url, policy, check, place))


def _download(url: str, policy: FetchPolicy, check: Callable[[Path], None] | None, place: Path) -> Path:
    """Download to `place` unless the file is there. Raises OSError where it cannot be written."""
    if os.path.isfile(place):
        return place
    _check_url(url, url)
    try:
        with atomic_file(place) as out:
            _with_retries(url, policy, out)
            out.flush()
            if check is not None:
                check(Path(out.name))
    except _DiskFault as fault:
        raise fault.error from None
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
    end = time.monotonic() + policy.total_timeout
    out.seek(0)
    out.truncate()
    try:
        _follow(url, policy, end, out)
    except (OSError, httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
        reason = error.args[0] if error.args else None  # the library wraps the error of the socket
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise UserError(f"{url}: its certificate is not valid ({reason.verify_message})") from None
        if time.monotonic() >= end:
            raise _TemporaryFault(f"not complete after {policy.total_timeout:g} seconds") from None
        raise _TemporaryFault(f"no whole answer ({str(error) or type(error).__name__})") from None


def _follow(url: str, policy: FetchPolicy, end: float, out: BinaryIO) -> None:
    """Request, follow redirects within the limit, write the body to `out`."""
    hop = url
    timeouts = dict.fromkeys(("connect", "read", "write"), policy.timeout)
    for _ in range(policy.max_redirects + 1):
        address = urllib.parse.quote(hop, safe=string.punctuation)
        with (
            _connections(address, url, policy, end) as connections,
            connections.stream("GET", address, headers=_HEADERS, extensions={"timeout": timeouts}) as response,
        ):
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status == 200:
                return _copy(url, response, headers, policy, out)
            location = headers.get("location")
            if response.status not in (301, 302, 303, 307, 308) or not location:
                reason = response.extensions.get("reason_phrase", b"").decode("latin-1")
                answer = f"the server answered {response.status} {reason}"
                if response.status == 429 or response.status >= 500:
                    after = headers.get("retry-after", "")
                    raise _TemporaryFault(answer, float(after) if after.isdecimal() else 0.0)
                raise UserError(f"{url}: {answer}; check the address")
        hop = urllib.parse.urljoin(hop, location)
        _check_url(hop, url)
    raise UserError(f"{url}: more than {policy.max_redirects} redirects, the last to {hop} (max_redirects)")


def _copy(url: str, response: Any, headers: dict[str, str], policy: FetchPolicy, out: BinaryIO) -> None:
    encoding = headers.get("content-encoding") or "identity"
    if encoding != "identity":
        raise UserError(f"{url}: sent with Content-Encoding {encoding}, although identity was asked for")
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > policy.max_bytes:
        raise UserError(f"{url}: {length} bytes, above the limit of {policy.max_bytes} (max_bytes)")
    count = 0
    for chunk in response.iter_stream():
        count += len(chunk)
        if count > policy.max_bytes:
            raise UserError(f"{url}: more bytes than the limit of {policy.max_bytes} (max_bytes)")
        try:
            out.write(chunk)
        except OSError as error:
            raise _DiskFault(error) from None
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


def _connections(address: str, origin: str, policy: FetchPolicy, end: float) -> Any:
    """Connections for a URL that passed `_check_url`: to its host, or to the proxy of the environment."""
    parts = urllib.parse.urlsplit(address)
    scheme, host = parts.scheme.lower(), parts.hostname or ""
    port = parts.port or (443 if scheme == "https" else 80)
    context = ssl.create_default_context() if scheme == "https" else None
    proxy = urllib.request.getproxies().get(scheme)
    if not proxy or urllib.request.proxy_bypass(f"{host}:{port}"):
        return httpcore.ConnectionPool(ssl_context=context, network_backend=_Network(end, policy))
    with contextlib.suppress(socket.gaierror):  # some names only the proxy can resolve
        _check_public(host, port, policy)
    through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if through.scheme != "http" or not through.hostname:
        raise UserError(f"{origin}: the proxy {through.scheme}://{through.hostname} is not supported; expected http://")
    proxy = f"http://{through.netloc.rpartition('@')[2]}"
    return httpcore.HTTPProxy(proxy, ssl_context=context, network_backend=_Network(end))


class _Network(httpcore.SyncBackend):
    """Network of one attempt: it connects to addresses that were checked, and ends at `end` on the clock.

    `policy` None: to a proxy, whose address is the user's.
    """

    def __init__(self, end: float, policy: FetchPolicy | None = None) -> None:
        self.end, self.policy = end, policy

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, *args: Any, **settings: Any) -> Any:
        hosts = [host] if self.policy is None else [row[4][0] for row in _check_public(host, port, self.policy)]
        fault: Exception = OSError(f"{host} has no address")
        for address in hosts:
            try:
                return _Stream(super().connect_tcp(address, port, timeout, *args, **settings), self.end)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                fault = error
        raise fault


class _Stream(httpcore.NetworkStream):
    """Connection that ends at `end` on the clock, also where bytes still trickle in."""

    def __init__(self, stream: Any, end: float) -> None:
        self.stream, self.end = stream, end
        self.close, self.get_extra_info = stream.close, stream.get_extra_info

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self.stream.read(max_bytes, self._left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.stream.write(buffer, self._left(timeout))

    def start_tls(self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None) -> Any:
        return _Stream(self.stream.start_tls(ssl_context, server_hostname, self._left(timeout)), self.end)

    def _left(self, timeout: float | None) -> float:
        left = self.end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("timed out")
        return left if timeout is None else min(timeout, left)
