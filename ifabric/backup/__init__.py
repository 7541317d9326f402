"""Backups: etcd, the streams and the modules in one encrypted file, and the way back.

**The file.** `ifabric-20261128T183000Z-rev123456.tar.zst.age` is a tar, compressed with zstd, encrypted with age for every
recipient. It opens without us:

    age -d -i KEY FILE | zstd -d | tar x

In it, in this order: `manifest.json` (what this is, and the digest of every member), `etcd.db` (what `etcdctl snapshot
save` writes: `etcdutl snapshot restore etcd.db` takes it), and for each stream `streams/NAME.snapshot` (what
JetStream's snapshot API gave: a tar in S2) with `streams/NAME.json` (its configuration and state, as
`$JS.API.STREAM.RESTORE.NAME` takes them). Beside it lies `FILE.json`, its size, digest, revision and age, so that
backups can be listed without a key; nothing in it is secret. age hides a backup and finds every change of it, but it does
not sign: whoever has the public key can make one. Who may write to the place is what says where a backup comes from.

**Making one** (`making`). etcd first and the streams after it, so that the journal is never older than the state: what
was spent after the snapshot can be read there. What is not encrypted yet is only ever in a file without a name, which
is gone when the process is. The file appears whole or not at all.

**The way back** (`restoring`). Everything is decrypted and checked before anything is touched. Then the snapshot
becomes a *prepared* one: restored into a scratch etcd on loopback, given a new incarnation there, and saved again. Every
member is made of that same prepared snapshot, so no member was ever in the old incarnation, and no fence from before is
taken. How the new incarnation is found, and why no two restores get the same, is in `incarnations`.
"""
