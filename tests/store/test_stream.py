import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import safetensors.torch
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.errors import ConfigError, StoreError
from gsae.store.progress import read_records
from gsae.store.shards import tar_path
from gsae.store.stream import Stream

SITE = "resid.0"
LANES = [[[3, 0, 4], [5]], [[1], [2, 2], [1]], [[6, 6], []], [[0, 1]]]  # rows: 12, 6, 12, 1
NUM_ROWS = [12, 6, 12, 1]

lane_rows = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=3).filter(lambda lane: sum(map(sum, lane)) > 0)
layouts = st.lists(lane_rows, min_size=4, max_size=4)


def rows_of_lanes(store, lanes, num_batches, batch_rows=8, window_rows=20, seed=0, site=SITE):
    """The ordinals that a stream hands out, lane by lane, after checking that every x is the row it is said to be."""
    handed_out = {lane: [] for lane in lanes}
    with Stream(store, site, lanes, batch_rows, window_rows, seed, verify_shards=True) as stream:
        for batch in islice(stream, num_batches):
            assert torch.equal(batch.x[:, 0].long(), batch.lane)
            assert torch.equal(batch.x[:, 1].long(), batch.row)
            for lane, row in zip(batch.lane.tolist(), batch.row.tolist(), strict=True):
                handed_out[lane].append(row)
    return handed_out


def batches(store, lanes, num_batches, seek=None, window_rows=20, seed=0, batch_rows=8):
    with Stream(store, SITE, lanes, batch_rows, window_rows, seed, verify_shards=False) as stream:
        if seek is not None:
            stream.seek(seek)
        return [batch.clone() for batch in islice(stream, num_batches)]


@pytest.fixture(scope="module")
def store(stores, tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    stores.build(directory, LANES)
    return directory


@settings(max_examples=15, deadline=None)
@given(layout=layouts, window_rows=st.integers(4, 60), batch_rows=st.sampled_from([4, 8, 12]))
def test_one_epoch_of_a_lane_yields_each_of_its_rows_exactly_once(stores, layout, window_rows, batch_rows):
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory)
        stores.build(store, layout)
        num_rows = [sum(map(sum, lane)) for lane in layout]
        num_batches = -(-2 * max(num_rows) // (batch_rows // 4))  # two epochs of the longest lane
        for num_ranks in (1, 2, 4):
            for rank in range(num_ranks):
                handed_out = rows_of_lanes(store, range(rank, 4, num_ranks), num_batches, batch_rows, window_rows)
                for lane, rows in handed_out.items():
                    epochs = [rows[begin : begin + num_rows[lane]] for begin in range(0, len(rows), num_rows[lane])]
                    assert all(sorted(epoch) == list(range(num_rows[lane])) for epoch in epochs[:-1])
                    assert len(set(epochs[-1])) == len(epochs[-1])


def test_what_the_ranks_see_together_does_not_depend_on_how_many_they_are(store):
    alone = batches(store, range(4), 12)
    for num_ranks in (2, 4):
        ranks = [batches(store, range(rank, 4, num_ranks), 12) for rank in range(num_ranks)]
        for step, batch in enumerate(alone):
            for lane in range(4):
                part = ranks[lane % num_ranks][step]
                assert torch.equal(part.row[part.lane == lane], batch.row[batch.lane == lane])
                assert torch.equal(part.x[part.lane == lane], batch.x[batch.lane == lane])


IDENTITY_LANES = [[[5, 0, 3], [4]], [[2], [2, 2]], [[7, 6], []], [[1, 1]]] * 4  # 16 lanes of 12, 6, 13, 2 rows


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_epoch_has_each_document_and_position_once_and_the_same_batches_on_1_to_16_ranks(stores, tmp_path, seed):
    # Documents are a lane's own here, so (document, position) names a row: the store says position = row + 1, document = row // 3.
    stores.build(tmp_path, IDENTITY_LANES)
    names = {lane: identities(tmp_path, lane) for lane in range(16)}
    alone = None
    for num_ranks in (1, 2, 4, 8, 16):
        ranks = [batches(tmp_path, range(rank, 16, num_ranks), 13, batch_rows=32, seed=seed, window_rows=80) for rank in range(num_ranks)]
        together = [by_lane(step) for step in zip(*ranks, strict=True)]
        alone = alone or together
        for one, other in zip(alone, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for lane, expected in names.items():
            handed_out = [names[lane][row] for _, lanes, rows in together for row in rows[lanes == lane].tolist()]
            assert len(expected) == len(set(expected))
            for epoch in range(len(handed_out) // len(expected)):
                assert Counter(handed_out[epoch * len(expected) : (epoch + 1) * len(expected)]) == Counter(expected)


def identities(store, lane):
    """(document, position) of each row of a lane, as another reader of the tars finds them."""
    found = []
    for path in sorted((store / SITE).glob(f"{lane:04d}-*.tar")):
        for member in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
            rows = safetensors.torch.load(member["rows.safetensors"])
            found += zip(rows["document"].tolist(), rows["position"].tolist(), strict=True)
    return found


def by_lane(parts):
    """The ranks' parts of a batch, put together in the order of lanes."""
    x, lane, row = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "lane", "row"))
    order = torch.argsort(lane, stable=True)
    return x[order], lane[order], row[order]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_rest_of_the_stream_is_the_same_from_any_stop_on_on_any_ranks(stores, data):
    """Any store: lanes, shards, uneven rows, windows smaller and larger than a lane, batches larger than a window."""
    layout = data.draw(st.lists(lane_rows, min_size=1, max_size=6).filter(lambda lanes: sum(sum(map(sum, lane)) for lane in lanes) > 1))
    num_lanes = len(layout)
    lane_batch = data.draw(st.integers(1, 6))
    window_rows = data.draw(st.integers(num_lanes, 30 * num_lanes))
    seed = data.draw(st.integers(0, 5))
    stops = sorted(data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=3)))
    rest = 6
    with tempfile.TemporaryDirectory() as directory:
        stores.build(Path(directory), layout)
        given_to = {"batch_rows": lane_batch * num_lanes, "window_rows": window_rows, "seed": seed}
        straight = batches(Path(directory), range(num_lanes), stops[-1] + rest, **given_to)
        for stop in stops:
            num_ranks = data.draw(st.sampled_from([n for n in range(1, num_lanes + 1) if num_lanes % n == 0]))
            lanes_of_ranks = [range(rank, num_lanes, num_ranks) for rank in range(num_ranks)]
            seek = stop * lane_batch * num_lanes
            ranks = [batches(Path(directory), lanes, rest, seek=seek, **given_to) for lanes in lanes_of_ranks]
            for step, parts in enumerate(zip(*ranks, strict=True)):
                expected = by_lane([straight[stop + step]])
                assert all(torch.equal(a, b) for a, b in zip(expected, by_lane(parts), strict=True))


def test_a_stream_that_moves_from_1_to_2_to_4_ranks_goes_on(store):
    straight = batches(store, range(4), 12)
    moved = []
    for num_ranks, first, count in ((1, 0, 3), (2, 3, 4), (4, 7, 5)):
        ranks = [batches(store, range(rank, 4, num_ranks), count, seek=first * 8) for rank in range(num_ranks)]
        moved += [by_lane(parts) for parts in zip(*ranks, strict=True)]
    for one, other in zip(straight, moved, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(by_lane([one]), other, strict=True))


def test_max_rows_takes_the_first_rows_of_each_lane_evenly(store):
    # Lanes of 12, 6, 12 and 1 rows; 22 rows are 6, 6, 5 and 5 of them.
    def used(max_rows, num_batches=24):
        with Stream(store, SITE, range(4), 8, 20, seed=0, verify_shards=True, max_rows=max_rows) as stream:
            batch_of = [batch.clone() for batch in islice(stream, num_batches)]
        return [sorted(set(torch.cat([batch.row[batch.lane == lane] for batch in batch_of]).tolist())) for lane in range(4)]

    assert used(22) == [list(range(6)), list(range(6)), list(range(5)), [0]]
    assert used(4) == [[0], [0], [0], [0]]
    assert used(1000) == [list(range(rows)) for rows in NUM_ROWS] == used(None)
    with pytest.raises(ConfigError, match=r"train\.max_rows \(3\) is under one row a lane; set it to at least 4"):
        used(3)


@pytest.mark.parametrize("window_rows", [4, 12, 20, 1000])
def test_seeking_equals_continuing(store, window_rows):
    straight = batches(store, range(4), 30, window_rows=window_rows)
    for taken in (0, 1, 2, 7, 13, 29):
        resumed = batches(store, range(4), 30 - taken, seek=taken * 8, window_rows=window_rows)
        assert all(torch.equal(a.x, b.x) and torch.equal(a.row, b.row) for a, b in zip(straight[taken:], resumed, strict=True))


def test_a_used_stream_can_be_sent_back(store):
    with Stream(store, SITE, range(4), 8, 20, seed=0, verify_shards=True) as stream:
        first = [stream.next_batch().clone().row for _ in range(9)]
        assert stream.rows_taken == 72
        stream.seek(16)
        again = [stream.next_batch().clone().row for _ in range(7)]
    assert all(torch.equal(a, b) for a, b in zip(first[2:], again, strict=True))


def test_the_position_is_the_same_number_on_every_number_of_ranks(store):
    straight = batches(store, [1, 3], 9)
    with Stream(store, SITE, [1, 3], 8, 20, seed=0, verify_shards=True) as stream:
        stream.seek(5 * 8)
        resumed = [stream.next_batch().clone() for _ in range(4)]
        assert stream.rows_taken == 9 * 8
    assert all(torch.equal(a.x, b.x) for a, b in zip(straight[5:], resumed, strict=True))
    with pytest.raises(ValueError, match="10 rows are not as many from each of 4 lanes"):
        Stream(store, SITE, [1], 8, 20, seed=0, verify_shards=True).seek(10)


def test_every_epoch_window_lane_and_seed_has_an_order_of_its_own(stores, tmp_path):
    # Two lanes of one shard of 40 rows, windows of 20: an epoch is two windows, rows 0..19 and rows 20..39.
    stores.build(tmp_path, [[[40]], [[40]]])
    orders = []
    for seed in (0, 1):
        for rows in rows_of_lanes(tmp_path, [0, 1], 120, batch_rows=2, window_rows=40, seed=seed).values():
            orders += [tuple(row % 20 for row in rows[begin : begin + 20]) for begin in range(0, 120, 20)]
    assert len(orders) == len(set(orders)) == 2 * 2 * 6


def test_shards_come_in_another_order_in_every_epoch(stores, tmp_path):
    # Four shards of 10 rows and windows of 10: each window is one whole shard. Six epochs, 24 possible orders.
    stores.build(tmp_path, [[[10], [10], [10], [10]]])
    rows = rows_of_lanes(tmp_path, [0], 240, batch_rows=1, window_rows=10)[0]
    orders = {tuple(row // 10 for row in rows[begin : begin + 40 : 10]) for begin in range(0, 240, 40)}
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(orders) > 1


def test_a_window_holds_rows_that_are_neighbours_in_the_shard_order(stores, tmp_path):
    # Shards of 30 rows and windows of 30: the first 30 rows handed out are one whole shard, permuted.
    stores.build(tmp_path, [[[30], [30], [30]]])
    first = rows_of_lanes(tmp_path, [0], 30, batch_rows=1, window_rows=30)[0]
    assert {row // 30 for row in first} == {first[0] // 30}
    assert first != sorted(first)


def test_every_lane_gives_as_many_rows_in_lane_order(store):
    batch = batches(store, [3, 1], 1)[0]
    assert batch.lane.tolist() == [1, 1, 3, 3]
    assert batch.x.dtype == torch.float32


def test_rows_keep_the_storage_type(stores, tmp_path):
    stores.build(tmp_path, [[[9], [3]]], dtype="bfloat16")
    with Stream(tmp_path, SITE, [0], 6, 6, seed=0, verify_shards=True) as stream:
        batch = stream.next_batch()
    assert batch.x.dtype == torch.bfloat16
    assert torch.equal(batch.x[:, 1].long(), batch.row)


def test_int8_rows_come_with_their_scales(stores, tmp_path):
    # Of these rows the largest value is the row's ordinal; windows of 6 rows, so that they begin within contexts.
    stores.build(tmp_path, [[[4, 0, 5], [7]]], dtype="int8")
    with Stream(tmp_path, SITE, [0], 4, 6, seed=0, verify_shards=True) as stream:
        for batch in islice(stream, 12):
            assert (batch.x.dtype, batch.row_scale.dtype) == (torch.int8, torch.float32)
            decoded = batch.decode(torch.device("cpu"), torch.float64)
            assert decoded.dtype == torch.float64
            assert torch.allclose(decoded[:, 1], batch.row.double(), rtol=1e-6)


def test_a_rank_opens_only_the_tars_of_its_lanes_and_site(stores, tmp_path):
    stores.build(tmp_path, LANES)
    for path in (*tmp_path.glob("resid.0/000[13]-*.tar"), *tmp_path.glob("resid.2/*.tar")):
        path.write_bytes(b"")
    rows = rows_of_lanes(tmp_path, [0, 2], 6)
    assert Counter(rows[0]) == Counter(range(12))


def test_a_flipped_byte_is_found_at_first_read(stores, tmp_path):
    stores.build(tmp_path, LANES)
    path = tar_path(tmp_path, SITE, 2, 0)
    content = bytearray(path.read_bytes())
    content[read_records(tmp_path, 2)[0].sites[SITE].tar.offsets[1] + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"resid\.0/0002-000000\.tar: its SHA-256 differs"):
        rows_of_lanes(tmp_path, range(4), 6)
    with Stream(tmp_path, SITE, range(4), 8, 20, seed=0, verify_shards=False) as stream:
        stream.next_batch()


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-512])])
def test_a_missing_or_short_shard_is_refused_by_name_before_the_first_batch(stores, tmp_path, spoil):
    stores.build(tmp_path, LANES)
    spoil(tar_path(tmp_path, SITE, 0, 1))
    with pytest.raises(StoreError, match=r"resid\.0/0000-000001\.tar .*gsae harvest"):
        Stream(tmp_path, SITE, [0], 8, 20, seed=0, verify_shards=True)


def test_a_shard_that_vanishes_later_is_named(stores, tmp_path):
    stores.build(tmp_path, [[[4], [4], [4]]])
    with Stream(tmp_path, SITE, [0], 4, 4, seed=0, verify_shards=True) as stream:
        for path in (tmp_path / SITE).iterdir():
            path.unlink()
        with pytest.raises(StoreError, match=r"resid\.0/0000-00000\d\.tar is missing"):
            stream.next_batch()


def test_a_log_that_the_manifest_was_not_made_from_is_refused(stores, tmp_path):
    stores.build(tmp_path, LANES)
    log = tmp_path / "progress" / "0001.jsonl"
    log.write_text(log.read_text().replace('"contexts": 1', '"contexts": 2'))
    with pytest.raises(StoreError, match=r"progress log of lane 1 .* was changed"):
        Stream(tmp_path, SITE, [1], 8, 20, seed=0, verify_shards=True)


def test_settings_that_do_not_fit_the_lanes_name_values_that_do(store):
    with pytest.raises(ConfigError, match=r"train\.batch_rows \(10\) .* 4 lanes; set it to 8 or 12"):
        Stream(store, SITE, [0], 10, 20, seed=0, verify_shards=True)
    with pytest.raises(ConfigError, match=r"train\.window_rows \(3\) .* at least 4"):
        Stream(store, SITE, [0], 8, 3, seed=0, verify_shards=True)
    with pytest.raises(StoreError, match=r"has no site resid\.1, only resid\.0, resid\.2"):
        Stream(store, "resid.1", [0], 8, 20, seed=0, verify_shards=True)
