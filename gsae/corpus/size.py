"""How much training text there is. In: the corpus. Out: its documents, pieces and characters, from one pass; an estimate of its tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from gsae.config import Config, CorpusConfig
from gsae.corpus.contexts import tokenise
from gsae.corpus.documents import CorpusPart, cut_at_whitespace, part_of_document, read_documents, read_pieces
from gsae.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PARTS_AT_ONCE = 2
"""Parts of a corpus whose stores may be on the disk together: one that is trained on, one that is harvested meanwhile."""


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
            + cure_of_empty_lane(config)
        )
    return CorpusSize(len(documents), sum(lane_pieces), characters)


def require_text_in_parts(config: CorpusConfig) -> None:
    """Refuse a corpus of which some part has no text for a lane; it is read only until every lane of every part has some.

    Raises:
        CorpusError: naming the part, before any is harvested.
    """
    empty = {(part, lane) for part in range(config.parts) for lane in range(config.num_lanes)}
    num_documents = [0] * config.parts
    for document in read_documents(config, "training"):
        part = part_of_document(config, document.id)
        for piece, _text in enumerate(cut_at_whitespace(document.text, config.piece_characters)):
            empty.discard((part, (num_documents[part] + piece) % config.num_lanes))
        num_documents[part] += 1
        if not empty:
            return
    part, lane = min(empty)
    raise CorpusError(f"lane {lane} of part {part} has no text; {cure_of_empty_lane(config)}")


def cure_of_empty_lane(config: CorpusConfig) -> str:
    """What to do about a lane without text."""
    parts = f"corpus.parts ({config.parts}), " if config.parts > 1 else ""
    return f"lower {parts}corpus.num_lanes ({config.num_lanes}) or corpus.piece_characters, or give more text"


def tokens_per_character(config: CorpusConfig, tokenizer: "PreTrainedTokenizerBase", num_pieces: int = 200) -> float:
    """Tokens (BOS included) for each character of the first training pieces; for estimates."""
    texts = [piece.text for piece in islice(read_pieces(config, "training"), num_pieces)]
    return sum(1 + len(tokenise(tokenizer, text)) for text in texts) / max(1, sum(map(len, texts)))


def shards_a_lane(config: Config) -> int | None:
    """Shards to harvest of each lane of a store; None for all of its text. With corpus.parts each of their stores takes an equal share."""
    tokens_a_round = config.corpus.num_lanes * config.harvest.contexts_per_shard * config.harvest.context_length * config.corpus.parts
    return None if config.harvest.max_tokens is None else -(-config.harvest.max_tokens // tokens_a_round)


def expected_tokens(config: Config, tokenizer: Callable[[], "PreTrainedTokenizerBase"]) -> int:
    """About how many tokens the LLM will compute: at most so many where harvest.max_tokens ends it, else from the length of the text.

    Of a corpus in parts all parts are counted once; of one part (CorpusPart), that part.
    """
    limit = shards_a_lane(config)
    if limit is not None:
        num_stores = 1 if isinstance(config.corpus, CorpusPart) else config.corpus.parts
        return num_stores * limit * config.corpus.num_lanes * config.harvest.contexts_per_shard * config.harvest.context_length
    return round(measure(config.corpus).characters * tokens_per_character(config.corpus, tokenizer()))


def most_bytes_at_once(store_bytes: int, parts: int) -> int:
    """Bytes on the disk at one time, of activations that take `store_bytes` in all: the stores of two parts at most."""
    return -(-store_bytes * min(PARTS_AT_ONCE, parts) // parts)
