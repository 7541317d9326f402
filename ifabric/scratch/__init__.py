"""Whole clusters on loopback, to be thrown away: real etcd, nats-server and daemons as children, on free ports.

Drills and tests hurt them: each can be killed, wiped and started again. They end with this process, however it ends.
"""
