"""The authority, and what is built on it.

A daemon starts other programs and never forks itself: gRPC's handlers around a fork, which look at it and complain on
stderr, are off.

gRPC has no option for the least version of TLS. It has one for the cipher suites of TLS 1.2 and before, and those of 1.3
are always on: with nothing but a suite that needs a secret which both sides know beforehand, and we have none, TLS 1.3
is all that is left to offer. And what it prints about each handshake that fails goes to stderr, around the log: the
error says it (`ifabric.tls.diagnosis`).

All of it is read when grpc is first imported, so a process that has imported it already goes without.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-AES128-CBC-SHA")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
