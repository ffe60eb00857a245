"""How much training text there is. In: the corpus. Out: its documents, pieces and characters, from one pass; an estimate of its tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from gsae.config import Config, CorpusConfig
from gsae.corpus.contexts import tokenise
from gsae.corpus.documents import read_pieces
from gsae.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CorpusSize:
    """The training text."""

    documents: int
    pieces: int
    characters: int


def measure(config: CorpusConfig) -> CorpusSize:
    """Count the training text.

    Raises:
        CorpusError: the text is missing, or a lane would be empty.
    """
    documents: set[int] = set()
    lane_pieces = [0] * config.num_lanes
    characters = 0
    for piece in read_pieces(config, "training"):
        documents.add(piece.document)
        lane_pieces[piece.lane(config.num_lanes)] += 1
        characters += len(piece.text)
    if 0 in lane_pieces:
        raise CorpusError(
            f"the training text has {sum(lane_pieces)} pieces for {config.num_lanes} lanes, and lane {lane_pieces.index(0)} gets none; "
            "lower corpus.num_lanes or corpus.piece_characters, or give more text"
        )
    return CorpusSize(len(documents), sum(lane_pieces), characters)


def tokens_per_character(config: CorpusConfig, tokenizer: "PreTrainedTokenizerBase", num_pieces: int = 200) -> float:
    """Tokens (BOS included) for each character of the first training pieces; for estimates."""
    texts = [piece.text for piece in islice(read_pieces(config, "training"), num_pieces)]
    return sum(1 + len(tokenise(tokenizer, text)) for text in texts) / max(1, sum(map(len, texts)))


def shards_a_lane(config: Config) -> int | None:
    """Shards to harvest of each lane; None for all of its text."""
    tokens_a_round = config.corpus.num_lanes * config.harvest.contexts_per_shard * config.harvest.context_length
    return None if config.harvest.max_tokens is None else -(-config.harvest.max_tokens // tokens_a_round)


def expected_tokens(config: Config, tokenizer: Callable[[], "PreTrainedTokenizerBase"]) -> int:
    """About how many tokens the LLM will compute: at most so many where harvest.max_tokens ends it, else from the length of the text."""
    limit = shards_a_lane(config)
    if limit is not None:
        return limit * config.corpus.num_lanes * config.harvest.contexts_per_shard * config.harvest.context_length
    return round(measure(config.corpus).characters * tokens_per_character(config.corpus, tokenizer()))
