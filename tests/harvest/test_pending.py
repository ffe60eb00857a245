from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.config import Config, CorpusConfig, HarvestConfig, TrainConfig
from gsae.corpus.documents import Piece
from gsae.errors import CorpusError
from gsae.harvest.pending import LaneShards, pending_shards, read_ahead
from gsae.llm.random import byte_tokenizer
from gsae.store.progress import ProgressLog, ShardRecord

TOKENIZER = byte_tokenizer()
TEXTS = st.lists(st.text(alphabet="abc ", min_size=1, max_size=40), min_size=1, max_size=12)


def config_of(size: int, packed: bool = True) -> Config:
    harvest = HarvestConfig(context_length=6, contexts_per_shard=size, batch_contexts=1, packed=packed)
    return Config(corpus=CorpusConfig(num_lanes=1), harvest=harvest, train=TrainConfig(batch_rows=64))


def log_of(records) -> ProgressLog:
    return ProgressLog(Path("nowhere"), 0, records)


def shards_of(records, texts, config, limit=None):
    lane = LaneShards(log_of(records), TOKENIZER, config, limit)
    return list(pending_shards([lane], ((0, Piece(number // 2, number % 2, text)) for number, text in enumerate(texts))))


def plain(shard):
    return (shard.index, shard.last, [(c.tokens.tolist(), c.positions.tolist(), c.start, c.end) for c in shard.contexts])


def record_of(shard) -> ShardRecord:
    """What the log says of a shard that was written."""
    ends = (shard.contexts[0].start, shard.contexts[-1].end)
    return ShardRecord(0, shard.index, len(shard.contexts), *ends, shard.last, {"resid.0": SimpleNamespace()})


@given(texts=TEXTS, size=st.integers(1, 4), limit=st.none() | st.integers(1, 4), packed=st.booleans(), data=st.data())
@settings(deadline=None)
def test_whatever_shards_are_missing_they_come_as_they_were(texts, size, limit, packed, data):
    config = config_of(size, packed)
    whole = shards_of([], texts, config, limit)
    written = data.draw(st.integers(0, len(whole)))
    lost = data.draw(st.sets(st.integers(0, written - 1))) if written else set()
    records = [replace(record_of(shard), sites={}) if shard.index in lost else record_of(shard) for shard in whole[:written]]
    again = shards_of(records, texts, config, limit)
    assert list(map(plain, again)) == [
        plain(shard) for shard in whole if shard.index in lost & set(range(written)) or shard.index >= written
    ]


@given(texts=TEXTS, size=st.integers(1, 4))
@settings(deadline=None)
def test_only_the_last_shard_of_a_lane_may_be_smaller(texts, size):
    shards = shards_of([], texts, config_of(size))
    assert [shard.last for shard in shards] == [False] * (len(shards) - 1) + [True]
    assert all(len(shard.contexts) == size for shard in shards[:-1])
    assert 1 <= len(shards[-1].contexts) <= size


def test_text_is_read_no_further_than_the_last_missing_shard():
    whole = shards_of([], ["abcdefghij"] * 20, config_of(2))
    records = [record_of(shard) for shard in whole]
    records[1] = replace(records[1], sites={})
    lane, read = LaneShards(log_of(records), TOKENIZER, config_of(2), None), []
    pieces = ((0, read.append(number) or Piece(number // 2, number % 2, "abcdefghij")) for number in range(20))
    assert [shard.index for shard in pending_shards([lane], pieces)] == [1]
    assert max(read) < 5


def test_text_that_went_missing_is_named():
    whole = shards_of([], ["abcdefghij"] * 6, config_of(2))
    records = [replace(record_of(shard), sites={}) for shard in whole]
    with pytest.raises(CorpusError, match="the text of shard 0000-000002 is not there any more"):
        shards_of(records, ["abcdefghij"] * 2, config_of(2))


def test_a_lane_without_text_is_named():
    with pytest.raises(CorpusError, match=r"lane 0 has no text; lower corpus.num_lanes \(1\)"):
        shards_of([], [""], config_of(2))


def test_items_read_ahead_are_the_same_and_one_is_made_before_it_is_asked_for():
    made = []
    with ThreadPoolExecutor(1) as thread:
        items = read_ahead((made.append(number) or number for number in range(5)), thread)
        assert next(items) == 0
        thread.submit(int).result()  # what was asked of the thread before is done
        assert made == [0, 1]
        assert [*items] == [1, 2, 3, 4]


def test_an_error_of_the_reader_is_raised_where_its_item_is_wanted():
    def broken():
        yield 1
        raise CorpusError("the text ends here")

    with ThreadPoolExecutor(1) as thread:
        items = read_ahead(broken(), thread)
        assert next(items) == 1
        with pytest.raises(CorpusError, match="the text ends here"):
            next(items)
