"""Web addresses that labelfleet never fetches: where clouds hand out a machine's credentials.

A list of URLs comes from anywhere, and a web server may redirect to anywhere. Both are checked
where the connection is made, on the address that the name turned out to have.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import aiohttp
from aiohttp.abc import ResolveResult

from storage.errors import AccessDenied

# Beside link-local ones: AWS's by IPv6 (ULA), Alibaba's (in the carriers' range).
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200")))


def is_metadata(address: str) -> bool:
    """Return whether an IP address is, or may be, a cloud's metadata service."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_link_local or found in _METADATA


class _Connector(aiohttp.TCPConnector):
    async def _resolve_host(self, host: str, port: int, traces: Any = None) -> list[ResolveResult]:
        found = await super()._resolve_host(host, port, traces)
        for one in found:
            if is_metadata(one["host"]):
                raise AccessDenied(
                    f"{host} is an address at which clouds give out credentials; it is not fetched",
                    hint="take it out of the list; who wrote it, or redirected there, wants them",
                )
        return found


async def guarded_client(**options: Any) -> aiohttp.ClientSession:
    """Return the session for fsspec's HTTP driver; redirects also go through it."""
    return aiohttp.ClientSession(connector=_Connector(), **options)
