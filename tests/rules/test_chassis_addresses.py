"""Which addresses a guest's request may go to."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifabric_actors.chassis.addresses import METADATA, refused

#: documented, and public
PUBLIC = ["1.1.1.1", "8.8.8.8", "93.184.216.34", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0"]
PUBLIC += ["11.0.0.0", "172.15.255.255", "172.32.0.0", "192.167.255.255", "192.169.0.0", "198.17.255.255", "198.20.0.0"]
PUBLIC += ["169.253.255.255", "169.255.0.0", "192.0.1.0", "192.0.3.0", "223.255.255.255", "2001:4860:4860::8888"]
PUBLIC += ["2606:4700:4700::1111", "2a00:1450:4001::1", "2001:200::1", "2001:db7::1", "2001:db9::1", "3ffe::1"]
#: they carry an address that is public
PUBLIC += [
    "::ffff:8.8.8.8",
    "::ffff:0:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "2002:808:808::1",
    "2001:0:808:808:0:63bf:f7f7:f7f7",
]
PUBLIC += ["2a00:1450::5efe:808:808"]


@pytest.mark.parametrize("ip", PUBLIC)
def test_a_public_address_is_no_matter(ip: str) -> None:
    assert refused(ip) is None


@pytest.mark.parametrize(
    ("ip", "what"),
    [
        ("0.0.0.0", "unspecified"),
        ("0.0.0.1", "of this network"),
        ("0.255.255.255", "of this network"),
        ("10.0.0.0", "private"),
        ("10.255.255.255", "private"),
        ("100.64.0.0", "shared by a carrier's customers"),
        ("100.127.255.255", "shared by a carrier's customers"),
        ("127.0.0.1", "loopback"),
        ("127.255.255.255", "loopback"),
        ("169.254.0.1", "link-local"),
        ("172.16.0.0", "private"),
        ("172.31.255.255", "private"),
        ("192.0.0.1", "reserved for protocols"),
        ("192.0.2.1", "for documentation"),
        ("192.88.99.1", "reserved for 6to4 relays"),
        ("192.168.0.0", "private"),
        ("192.168.255.255", "private"),
        ("198.18.0.0", "for benchmarks"),
        ("198.19.255.255", "for benchmarks"),
        ("198.51.100.7", "for documentation"),
        ("203.0.113.7", "for documentation"),
        ("224.0.0.1", "multicast"),
        ("239.255.255.255", "multicast"),
        ("240.0.0.1", "reserved"),
        ("255.255.255.254", "reserved"),
        ("255.255.255.255", "broadcast"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("fe80::1", "link-local"),
        ("fe80::1%eth0", "link-local"),
        ("febf::1", "link-local"),
        ("fc00::1", "unique-local"),
        ("fdff::1", "unique-local"),
        ("fec0::1", "site-local"),
        ("ff02::1", "multicast"),
        ("64:ff9b:1::1", "of a local NAT64"),
        ("100::1", "discarded"),
        ("2001:2::1", "for benchmarks"),
        ("2001:db8::1", "for documentation"),
        ("3fff::1", "for documentation"),
        ("2001:10::1", "reserved for protocols"),
        ("2001:1ff:ffff::1", "reserved for protocols"),
        ("1::1", "reserved"),
        ("4000::1", "reserved"),
        ("5f00::1", "reserved"),
    ],
)
def test_a_special_address_is_refused_by_what_it_is(ip: str, what: str) -> None:
    assert refused(ip) == f"{ipaddress.ip_address(ip)} is {what}"


@pytest.mark.parametrize(
    ("ip", "leads_to", "what"),
    [
        ("::ffff:127.0.0.1", "127.0.0.1", "loopback"),
        ("::ffff:10.1.2.3", "10.1.2.3", "private"),
        ("::ffff:169.254.169.254", "169.254.169.254", "the metadata service of most clouds"),
        ("::127.0.0.1", "127.0.0.1", "loopback"),
        ("::ffff:0:192.168.1.1", "192.168.1.1", "private"),
        ("64:ff9b::127.0.0.1", "127.0.0.1", "loopback"),
        ("64:ff9b::a9fe:a9fe", "169.254.169.254", "the metadata service of most clouds"),
        ("2002:7f00:1::", "127.0.0.1", "loopback"),
        ("2002:a9fe:a9fe::1", "169.254.169.254", "the metadata service of most clouds"),
        ("2002:c0a8:101::1", "192.168.1.1", "private"),
        ("2001:0:7f00:1:0:63bf:f7f7:f7f7", "127.0.0.1", "loopback"),  # Teredo: its server
        ("2001:0:808:808:0:63bf:80ff:fffe", "127.0.0.1", "loopback"),  # its client, whose bits are inverted
        ("2a00:1450::5efe:7f00:1", "127.0.0.1", "loopback"),
        ("2a00:1450::200:5efe:a00:1", "10.0.0.1", "private"),
    ],
)
def test_an_address_that_carries_another_is_judged_by_that(ip: str, leads_to: str, what: str) -> None:
    assert refused(ip) == f"{ipaddress.ip_address(ip)} leads to {leads_to}, which is {what}"


@pytest.mark.parametrize("ip", ["fe80::5efe:808:808", "::8.8.8.8", "fd00::200:5efe:808:808"])
def test_a_public_address_in_a_special_one_does_not_excuse_it(ip: str) -> None:
    assert refused(ip) is not None


@pytest.mark.parametrize("ip", ["", "localhost", "127.1", "0x7f000001", "2130706433", "1.1.1.1/32", "::1]", "1.1.1.01"])
def test_what_is_no_address_is_refused(ip: str) -> None:
    assert refused(ip) == f"{ip!r} is not an IP address"


@pytest.mark.parametrize(
    ("ip", "granted", "allowed"),
    [
        ("10.1.2.3", "10.1.0.0/16", True),
        ("10.2.2.3", "10.1.0.0/16", False),
        ("127.0.0.1", "127.0.0.0/8", True),
        ("::1", "127.0.0.0/8", False),
        ("::1", "::1/128", True),
        ("::ffff:10.1.2.3", "10.1.0.0/16", True),
        ("64:ff9b::10.1.2.3", "10.1.0.0/16", True),
        ("64:ff9b::10.1.2.3", "64:ff9b::/96", False),  # a grant is of the address that it leads to
        ("::ffff:127.0.0.1", "::/0", False),
        ("fd12::1", "fd12::/64", True),
        ("fe80::1%eth0", "fe80::/64", True),
        ("224.0.0.1", "224.0.0.0/4", True),
        ("8.8.8.8", "10.0.0.0/8", True),
        ("fd12::5efe:a00:1", "fd12::/64", False),
    ],
)
def test_a_granted_network_is_allowed_and_no_other(ip: str, granted: str, allowed: bool) -> None:
    assert (refused(ip, [ipaddress.ip_network(granted)]) is None) == allowed


def test_the_metadata_services_that_are_known() -> None:
    known = "169.254.169.254 169.254.170.2 169.254.170.23 169.254.42.42 168.63.129.16 100.100.100.200 192.0.0.192 "
    known += "fd00:ec2::254 fd00:ec2::23 fd00:42::42 fd20:ce::254 fe80::a9fe:a9fe"
    assert {str(address) for address in METADATA} == set(known.split())
    assert refused("fe80::a9fe:a9fe%eth0", [ipaddress.ip_network("fe80::/10")]) is not None


@pytest.mark.parametrize("metadata", METADATA)
def test_a_metadata_service_is_allowed_only_when_it_is_named_alone(metadata: ipaddress.IPv4Address) -> None:
    whole = ipaddress.ip_network(metadata)
    wide = [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"), whole.supernet()]
    said = f"{metadata} is the metadata service {METADATA[metadata]}"
    assert refused(metadata) == said
    assert refused(metadata, wide) == said
    assert refused(metadata, [*wide, whole]) is None


@given(st.ip_addresses(v=4), st.sampled_from(["::ffff:{}", "::ffff:0:{}", "64:ff9b::{}"]))
def test_no_way_to_write_an_ipv4_address_makes_it_another(address: ipaddress.IPv4Address, written: str) -> None:
    assert (refused(written.format(address)) is None) == (refused(address) is None)
    assert (refused(ipaddress.ip_address(f"2002:{int(address) >> 16:x}:{int(address) & 0xFFFF:x}::1")) is None) == (
        refused(address) is None
    )


@given(st.ip_addresses())
def test_nothing_that_python_calls_special_is_let_through(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    special = special or address.is_reserved or address.is_unspecified
    carries = address.version == 6 and (
        address.ipv4_mapped is not None or address.teredo is not None or int(address) >> 32 == 0x64_FF9B << 64
    )
    if special and not carries:
        assert refused(address) is not None
