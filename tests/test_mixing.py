"""How well windows mix: against numbers worked out by hand, and against the batches that training takes."""

from collections import Counter
from itertools import islice
from unittest.mock import patch

import numpy as np
import pytest
import torch
from made_up_rows import statistics_of
from made_up_shards import SiteRows, write_shard

from gsae.corpus.contexts import Cursor
from gsae.errors import ConfigError
from gsae.inspect import mixing
from gsae.inspect.mixing import Batching, MixingMeter
from gsae.llm.site import Site
from gsae.store.finish import finish, write_calibration
from gsae.store.manifest import Layout, begin
from gsae.store.progress import ProgressLog, read_records
from gsae.store.shards import ContextRows
from gsae.store.stream import Stream

SITE = "resid.0"


def build(store, lanes):
    """A store from the documents of the rows: of each context of each shard of each lane."""
    site = Site(name=SITE, layer=0, module="model.layers.0")
    begin(store, Layout((site,), 2, len(lanes), context_length=16, dtype="float32", outlier_multiple=3.0), {"corpus": {"seed": 0}})
    write_calibration(store, {SITE: 1.0})
    for lane, shards in enumerate(lanes):
        log = ProgressLog.open(store, lane)
        for index, contexts in enumerate(shards):
            rows = []
            for documents in contexts:
                zeros = torch.zeros(len(documents), dtype=torch.int32)
                rows.append(ContextRows(torch.eye(2)[zeros], zeros, zeros, torch.tensor(documents, dtype=torch.int32)))
            x = torch.cat([context.x for context in rows])
            statistics = statistics_of(x + torch.arange(len(x))[:, None] / 100, torch.ones(len(x), dtype=torch.bool), 1.0, {"first": 1})
            last = index == len(shards) - 1
            write_shard(log, {SITE: SiteRows(rows, statistics)}, Cursor(index, 0, 0), Cursor(index + 1, 0, 0), last)
    finish(store)


def measure(store, lanes, batching):
    num_rows = sum(len(documents) for lane in lanes for shard in lane for documents in shard)
    meter = MixingMeter(store, SITE, num_rows, len(lanes), batching)
    for lane in range(len(lanes)):
        meter.add(lane, [record.sites[SITE].tar for record in read_records(store, lane)])
    return meter.result()


def built_and_measured(store, lanes, batching):
    with patch("os.fsync"):
        build(store, lanes)
    return measure(store, lanes, batching)


def test_numbers_worked_out_by_hand(tmp_path):
    # Two rows of each lane's 4. Pairs within lane 0: 2 x 1 x 2 / (4 x 3) = 1/3, as many within lane 1; between the lanes, only of
    # document 0: 2 x (2 x 2/4) x (2 x 1/4) = 1. By the 4 rows of the batch: 5/12. Shuffled: 3 x (3 x 2 + 2 x 1) / (8 x 7) = 3/7.
    found = built_and_measured(tmp_path, [[[[0, 0, 1, 2]]], [[[0, 3], [3, 4]]]], Batching(4, 8, 0))
    assert found.same_document_rows == pytest.approx(5 / 12, rel=1e-12)
    assert found.perfect_same_document_rows == pytest.approx(3 / 7, rel=1e-12)
    assert found.ratio == pytest.approx(35 / 36, rel=1e-12)
    assert found.perfect_from_rows == 8


def test_rows_of_a_document_that_lies_in_two_lanes_meet(tmp_path):
    # One row of each lane: they are of the same of the 4 documents in one case of 4.
    found = built_and_measured(tmp_path, [[[[0, 1, 2, 3]]], [[[0, 1, 2, 3]]]], Batching(2, 8, 0))
    assert found.same_document_rows == pytest.approx(1 / 4, rel=1e-12)


def test_a_window_of_one_context_gives_batches_of_one_document_a_lane(tmp_path):
    lanes = [[[[100 * lane + context] * 6 for context in range(4)]] for lane in range(3)]
    found = built_and_measured(tmp_path, lanes, Batching(9, 18, 0))  # 3 rows of each lane, from one context each
    assert found.same_document_rows == pytest.approx(3 - 1, rel=1e-12)
    assert found.perfect_same_document_rows == pytest.approx(8 * 5 / 71, rel=1e-12)
    assert found.ratio > 3


def test_rows_of_no_document_meet_where_each_row_has_its_own(tmp_path):
    found = built_and_measured(tmp_path, [[[[0, 2, 4]]], [[[1, 3, 5]]]], Batching(2, 6, 0))
    assert (found.same_document_rows, found.perfect_same_document_rows, found.ratio) == (0, 0, None)


LANES = [
    [[[0, 0, 0, 1], [1, 1, 2]], [[2, 2, 2, 5, 5]], [[5, 6], [6, 6, 6, 7, 7]]],
    [[[0, 0, 1, 1, 1]], [[3, 3, 3, 3, 5, 5], [5]], [[6, 7, 7, 7], [7, 8, 8]]],
    [[[0, 4, 4, 4, 4]], [[4, 4, 6, 6]], [[6, 7]]],
]
"""Unequal lanes (19, 19, 11 rows) over which documents are spread; shards are unequal, too."""


# Lane windows of 7, 2 and 40 rows: batches lie in one window, in several, over the end of an epoch, or take a lane twice.
@pytest.mark.parametrize(("batch_rows", "window_rows"), [(9, 21), (9, 6), (9, 120), (36, 21)])
def test_it_is_what_the_stream_s_batches_have_on_average(tmp_path, batch_rows, window_rows):
    with patch("os.fsync"):
        build(tmp_path, LANES)
    documents = [[document for shard in lane for context in shard for document in context] for lane in LANES]
    num_batches = sum(map(len, documents)) // batch_rows
    differences, expected = [], []
    with patch.object(mixing, "MAX_BATCHES", 1000), patch.object(mixing, "MIN_BATCHES", 1000):
        for seed in range(120):
            found = measure(tmp_path, LANES, Batching(batch_rows, window_rows, seed))
            assert found.num_batches == num_batches
            expected.append(found.same_document_rows)
            with Stream(tmp_path, SITE, range(3), batch_rows, window_rows, seed, verify_shards=False) as stream:
                differences.append(np.mean([others(batch, documents) for batch in islice(stream, num_batches)]) - expected[-1])
    # For each seed the difference has mean 0, whatever the order of shards; seeds are independent. Their mean passes 3.5 of its standard
    # errors once in 2,000 times; those are under 8 % of what is measured, and each term of the formula is more.
    bound = 3.5 * np.std(differences) / np.sqrt(len(differences))
    assert bound < 0.08 * np.mean(expected)
    assert abs(np.mean(differences)) < bound


def others(batch, documents):
    """The mean over the rows of a batch of how many of the others are of the same document."""
    rows = Counter(documents[lane][row] for lane, row in zip(batch.lane.tolist(), batch.row.tolist(), strict=True))
    return sum(count * (count - 1) for count in rows.values()) / len(batch.row)


def alike(num_documents):
    """Documents of 6 rows over two lanes, of which one is twice as long, in shards of two contexts."""
    rows = [[document for document in range(num_documents) for _ in range(in_lane)] for in_lane in (4, 2)]
    contexts = [[lane[begin : begin + 5] for begin in range(0, len(lane), 5)] for lane in rows]
    return [[lane[begin : begin + 2] for begin in range(0, len(lane), 2)] for lane in contexts]


def test_the_first_rows_of_a_large_store_stand_for_all(tmp_path):
    lanes = alike(60)
    whole = built_and_measured(tmp_path, lanes, Batching(10, 40, 0))
    with patch.object(mixing, "MAX_SHUFFLED_ROWS", 90):
        part = measure(tmp_path, lanes, Batching(10, 40, 0))
    # 45 rows of each lane: in the longer one all of documents 0 to 10, of which all is in the other one's, too.
    assert (whole.perfect_from_rows, part.perfect_from_rows) == (360, 11 * 6)
    assert whole.perfect_same_document_rows == pytest.approx(9 * 5 / 359, rel=1e-12)
    assert part.perfect_same_document_rows == pytest.approx(whole.perfect_same_document_rows, rel=1e-12)
    assert part.same_document_rows == whole.same_document_rows


def test_a_lane_that_is_read_to_its_end_cuts_no_document_off(tmp_path):
    # 80 rows of each lane: all of the second one, whose last document 39 is whole there; of the first one documents 0 to 18 are.
    lanes = alike(40)
    with patch.object(mixing, "MAX_SHUFFLED_ROWS", 160):
        assert built_and_measured(tmp_path, lanes, Batching(10, 40, 0)).perfect_from_rows == 19 * 6
    with patch.object(mixing, "MAX_SHUFFLED_ROWS", 320):
        assert measure(tmp_path, lanes, Batching(10, 40, 0)).perfect_from_rows == 240


def test_a_document_that_is_longer_than_what_is_read_counts_as_far_as_it_is(tmp_path):
    lanes = [[[[0] * 50]], [[[0] * 50]]]
    with patch.object(mixing, "MAX_SHUFFLED_ROWS", 20):
        found = built_and_measured(tmp_path, lanes, Batching(10, 40, 0))
    assert (found.perfect_from_rows, found.perfect_same_document_rows) == (20, pytest.approx(9 * 19 / 99))


@pytest.mark.parametrize(("window_rows", "most"), [(20, 16), (160, 8), (10_000, 8)])
def test_few_large_windows_or_more_small_ones_are_looked_at(tmp_path, window_rows, most):
    with patch.object(mixing, "MAX_WINDOWS_ROWS", 320):
        found = built_and_measured(tmp_path, alike(60), Batching(10, window_rows, 0))
    assert found.num_batches == most


@pytest.mark.parametrize(
    ("batching", "words"),
    [
        (Batching(10, 64, 0), r"--batch-rows \(10\) is not a multiple of the store's 4 lanes; give 8 or 12"),
        (Batching(3, 64, 0), r"--batch-rows \(3\) .* give 4"),
        (Batching(8, 3, 0), r"--window-rows \(3\) .* at least 4"),
    ],
)
def test_what_does_not_fit_the_lanes_is_refused(batching, words):
    with pytest.raises(ConfigError, match=words):
        batching.rows_of(4)


def test_the_default_batch_fits_any_number_of_lanes():
    assert [Batching().rows_of(num_lanes) for num_lanes in (64, 12, 5000)] == [4096, 4092, 5000]
