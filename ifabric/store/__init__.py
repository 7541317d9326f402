"""The authority, and what is built on it.

A daemon starts other programs and never forks itself: gRPC's handlers around a fork, which look at it and complain on
stderr, are off. It reads this before it is first imported.
"""

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
