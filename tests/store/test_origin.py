"""Rows of a stream found again in the tars."""

from itertools import islice

import pytest
import torch

from gsae.errors import StoreError
from gsae.store.origin import find_origins
from gsae.store.shards import read_tar, tar_path
from gsae.store.stream import Stream

LANES = [[[3, 0, 4], [], [5]], [[1], [2, 2], [1]], [[6, 6], []], [[0, 1]]]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_origins_of_a_batch_are_where_its_rows_stand(stores, tmp_path, dtype):
    stores.build(tmp_path, LANES, dtype=dtype)
    for site in ("resid.0", "resid.2"):
        with Stream(tmp_path, site, [3, 0, 1], 32, 20, seed=0, verify_shards=True) as stream:
            for batch in islice(stream, 6):
                origins = stream.origins(batch)
                assert [origin.lane for origin in origins] == batch.lane.tolist()
                for x, origin in zip(batch.decode("cpu", torch.float32), origins, strict=True):
                    assert origin.tar == tar_path(tmp_path, site, origin.lane, origin.shard)
                    member = list(read_tar(origin.tar))[origin.context]
                    assert member.key == origin.key
                    assert torch.equal(member.rows.encoded.decode()[origin.row], x)
                    assert member.rows.document[origin.row] == origin.document


def test_a_row_that_a_lane_does_not_have_is_said(stores, tmp_path):
    stores.build(tmp_path, LANES)
    assert str(find_origins(tmp_path, "resid.0", torch.tensor([0]), torch.tensor([11]))[0]) == (
        "row 4 of context 0 in resid.0/0000-000002.tar (lane 0, document 3)"
    )
    with pytest.raises(StoreError, match=r"lane 0 of resid\.0 in .* has no row 12"):
        find_origins(tmp_path, "resid.0", torch.tensor([0, 0]), torch.tensor([3, 12]))
