"""A drill: a whole fabric on loopback is lost under load and comes back from its backup, and what that cost is measured.

Nothing in it stands for something else. etcd and NATS are clusters of real processes, the agents speak NATS through the
SDK, the cluster is lost by SIGKILL and by deleting its data, and it comes back by the verbs that an operator types
(`backup run`, `backup verify`, `restore`, `reconcile`), as processes of their own. Everything is below one scratch
folder and on loopback; this machine's own daemon is neither asked nor found.

What is compared is what the *agents* were told with what the fabric knows afterwards: every grant, completion, submission
and charge that was acknowledged is remembered here, in this process, which is not lost. A request whose answer never
came is *unknown*: it may have been carried out or not, and either is right.

`verdict` judges what was measured, and does nothing else.
"""
