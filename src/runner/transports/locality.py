"""Where a server is: plain HTTP is for this host and the network around it."""

from __future__ import annotations

import ipaddress
import logging
from urllib.parse import urlsplit

_log = logging.getLogger(__name__)

_LOCAL_DOMAINS = ("localhost", "local", "internal", "lan", "home.arpa")

_warned: set[str] = set()


def warn_of_plain_http(api_base: str) -> None:
    """Warn, once for each host, of an ``http://`` address of a host that is not local, before anything is sent there.

    The key, where there is one, the prompts and the answers can be read and changed on the way. So the warning does
    not ask whether there is a key.
    """
    host = urlsplit(api_base).hostname or "" if api_base.startswith("http://") else ""
    if host and host not in _warned and not is_local(host):
        _warned.add(host)
        _log.warning(
            "http://%s is not encrypted, and not on the local network: the key, prompts and answers can be read on"
            " the way. Use https://, or a tunnel.",
            host,
        )


def is_local(host: str) -> bool:
    """Whether ``host`` is this machine or on its network, as far as its name tells.

    Local are loopback, private, link-local and shared addresses (127/8, 10/8, 172.16/12, 192.168/16, 169.254/16,
    100.64/10, ::1, fc00::/7, fe80::/10), names without a dot, and names below ``localhost``, ``local``, ``internal``,
    ``lan`` and ``home.arpa``. Other names are not looked up.
    """
    host = host.rstrip(".").lower()
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_global
    except ValueError:
        return "." not in host or host.endswith(tuple(f".{domain}" for domain in _LOCAL_DOMAINS))
