"""Which addresses a guest's request may go to. Pure.

A name says nothing about where it leads: whoever answers for it in DNS chooses, and may choose the daemon's own
loopback, a neighbour in its network, or the address at which clouds hand out credentials. So each address is judged
when a connection is made to it, by the registries of special addresses (RFC 6890 and what IANA added since), and not
by `ipaddress`, whose opinion changed between releases of Python. Of IPv6 only global unicast is left (2000::/3).

An address that carries an IPv4 address is judged by that one, since that is where packets go: mapped, compatible and
translated ones, NAT64, 6to4, Teredo (server and client) and ISATAP (and that by its prefix, too).

A network that the operator grants takes precedence, except at the addresses of instance metadata: they hand out the
machine's own identity to whoever asks, so a grant has to name each by itself, as in 169.254.169.254/32.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: where clouds hand out credentials and settings to their machines, some of them at addresses that look public
METADATA: dict[Address, str] = {
    ipaddress.ip_address(text): whose
    for text, whose in (
        ("169.254.169.254", "of most clouds"),
        ("fd00:ec2::254", "of AWS"),
        ("169.254.170.2", "of AWS, for containers"),
        ("169.254.170.23", "of AWS, for pods"),
        ("fd00:ec2::23", "of AWS, for pods"),
        ("169.254.42.42", "of Scaleway"),
        ("fd00:42::42", "of Scaleway"),
        ("fd20:ce::254", "of Google"),
        ("fe80::a9fe:a9fe", "of OpenStack"),
        ("168.63.129.16", "of Azure"),
        ("100.100.100.200", "of Alibaba"),
        ("192.0.0.192", "of Oracle"),
    )
}

#: the first that an address is in says what it is
_SPECIAL: tuple[tuple[Network, str], ...] = tuple(
    (ipaddress.ip_network(network), what)
    for network, what in (
        ("0.0.0.0/32", "unspecified"),
        ("0.0.0.0/8", "of this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by a carrier's customers"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "reserved for protocols"),
        ("192.0.2.0/24", "for documentation"),
        ("192.88.99.0/24", "reserved for 6to4 relays"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "broadcast"),
        ("240.0.0.0/4", "reserved"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("fe80::/10", "link-local"),
        ("fc00::/7", "unique-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
        ("64:ff9b:1::/48", "of a local NAT64"),
        ("100::/64", "discarded"),
        ("2001:2::/48", "for benchmarks"),
        ("2001:db8::/32", "for documentation"),
        ("3fff::/20", "for documentation"),
        ("2001::/23", "reserved for protocols"),
    )
)
_GLOBAL = ipaddress.ip_network("2000::/3")

_COMPATIBLE = ipaddress.ip_network("::/96")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_TRANSLATED = ipaddress.ip_network("::ffff:0:0:0/96")
#: the upper half of an interface identifier that ends with an IPv4 address, private or global (RFC 5214, 6.1)
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


def refused(ip: str | Address, granted: Iterable[Network] = ()) -> str | None:
    """Why nothing is sent to this address, as in "127.0.0.1 is loopback"; None: it may be.

    `granted` are the networks that the endpoint's configuration allows besides public addresses.
    """
    try:
        address = ipaddress.ip_address(ip)
    except ValueError:
        return f"{ip!r} is not an IP address"
    granted = tuple(granted)
    for judged in _judged(address):
        why = _special(judged, granted)
        if why is not None:
            return f"{address} is {why}" if judged is address else f"{address} leads to {judged}, which is {why}"
    return None


def _judged(address: Address) -> Iterator[Address]:
    """The addresses that have to be allowed, all of them: where packets to this one go."""
    if address.version == 4:
        yield address
        return
    last = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    if int(address) >> 32 & 0xFFFF_FFFF in _ISATAP or (address in _COMPATIBLE and int(address) > 1):
        yield last
    if address.ipv4_mapped is not None or address in _NAT64 or address in _TRANSLATED:
        yield last
    elif address.sixtofour is not None:
        yield address.sixtofour
    elif address.teredo is not None:
        yield from address.teredo
    else:
        yield address


def _special(address: Address, granted: tuple[Network, ...]) -> str | None:
    if address.version == 6:
        address = ipaddress.IPv6Address(int(address))  # without its zone ("fe80::1%eth0"): no table knows of any
    whose = METADATA.get(address)
    if whose is not None:
        alone = any(address in network and network.num_addresses == 1 for network in granted)
        return None if alone else f"the metadata service {whose}"
    if any(address in network for network in granted):
        return None
    found = next((what for network, what in _SPECIAL if address in network), None)
    if found is None and address.version == 6 and address not in _GLOBAL:
        return "reserved"
    return found
