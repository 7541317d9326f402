"""What is written by hand is what protobuf would write."""

from __future__ import annotations

from typing import Any

from aetcd import rpc
from hypothesis import given
from hypothesis import strategies as st

from ifabric.store.base import Compare, Delete, Get, Op, Put, Target, Txn
from ifabric.store.encoding import encode_txn

KEYS = st.binary(min_size=1, max_size=200)
NUMBERS = st.integers(0, 2**63 - 1) | st.integers(0, 300)
COMPARES = st.builds(
    Compare, KEYS, st.sampled_from([t for t in Target if t is not Target.VALUE]), st.sampled_from(Op), NUMBERS
) | st.builds(Compare, KEYS, st.just(Target.VALUE), st.sampled_from(Op), st.binary(max_size=300))
OPS = (
    st.builds(Put, KEYS, st.binary(max_size=20_000), NUMBERS)
    | st.builds(Delete, KEYS, st.binary(max_size=20))
    | st.builds(Get, KEYS, st.binary(max_size=20), NUMBERS)
)


def txns(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Txn]:
    ops = st.lists(inner, max_size=4).map(tuple)
    return st.builds(Txn, st.lists(COMPARES, max_size=4).map(tuple), ops, ops)


TXNS = txns(OPS | txns(OPS))
FIELDS = {
    Target.VALUE: "value",
    Target.CREATE: "create_revision",
    Target.MOD: "mod_revision",
    Target.VERSION: "version",
    Target.LEASE: "lease",
}


def message(txn: Txn) -> Any:
    """The same transaction, built from protobuf's own classes."""

    def op(one: Any) -> Any:
        if isinstance(one, Put):
            return rpc.RequestOp(request_put=rpc.PutRequest(key=one.key, value=one.value, lease=one.lease))
        if isinstance(one, Get):
            return rpc.RequestOp(request_range=rpc.RangeRequest(key=one.key, range_end=one.end, limit=one.limit))
        if isinstance(one, Delete):
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=one.key, range_end=one.end))
        return rpc.RequestOp(request_txn=message(one))

    return rpc.TxnRequest(
        compare=[
            rpc.Compare(key=c.key, target=c.target.name, result=c.op.name, **{FIELDS[c.target]: c.value})
            for c in txn.compares
        ],
        success=[op(one) for one in txn.then],
        failure=[op(one) for one in txn.otherwise],
    )


@given(TXNS)
def test_a_transaction_written_by_hand_is_read_as_the_same(txn: Txn) -> None:
    expected = message(txn)
    assert rpc.TxnRequest.FromString(encode_txn(txn)) == expected
    assert encode_txn(txn) == expected.SerializeToString(deterministic=True)
