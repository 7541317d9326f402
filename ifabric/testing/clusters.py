"""The clusters of `ifabric.scratch`, as tests know them."""

from __future__ import annotations

from ifabric.scratch.clusters import CLIENTS, HOSTS, Certificates, Members, etcd_cluster, nats_cluster

__all__ = ["CLIENTS", "HOSTS", "Certificates", "Members", "etcd_cluster", "nats_cluster"]
