"""How much training text there is. In: the corpus. Out: an estimate of its tokens; shards, and parts that fit on the disk."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from gsae.config import Config, CorpusConfig
from gsae.corpus.contexts import tokenise
from gsae.corpus.documents import CorpusPart, cut_at_whitespace, part_of_document, read_documents, read_pieces
from gsae.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SAMPLE_CHARACTERS = 4_000_000
SAMPLE_PIECES = 200
PARTS_AT_ONCE = 2
"""Parts of a corpus whose stores may be on the disk together: one that is trained on, one that is harvested meanwhile."""


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


def shards_a_lane(config: Config) -> int | None:
    """Shards to harvest of each lane of a store; None for all of its text. With corpus.parts each of their stores takes an equal share."""
    tokens_a_round = config.corpus.num_lanes * config.harvest.contexts_per_shard * config.harvest.context_length * config.corpus.parts
    return None if config.harvest.max_tokens is None else -(-config.harvest.max_tokens // tokens_a_round)


def expected_tokens(config: Config, tokenizer: Callable[[], "PreTrainedTokenizerBase"]) -> int | None:
    """About how many tokens the LLM will compute, BOS included; None where that would take reading a large corpus.

    At most so many where harvest.max_tokens ends it. Else the text is read up to SAMPLE_CHARACTERS: if that is not all of it, the
    number of documents follows from corpus.max_documents, or is not known. Of a corpus in parts all parts are counted once; of one
    part (CorpusPart), that part.
    """
    corpus, limit = config.corpus, shards_a_lane(config)
    if limit is not None:
        num_stores = 1 if isinstance(corpus, CorpusPart) else corpus.parts
        return num_stores * limit * corpus.num_lanes * config.harvest.contexts_per_shard * config.harvest.context_length
    characters, documents, texts, is_all = 0, set[int](), list[str](), True
    for piece in read_pieces(corpus, "training"):
        characters += len(piece.text)
        documents.add(piece.document)
        if len(texts) < SAMPLE_PIECES:
            texts.append(piece.text)
        if characters > SAMPLE_CHARACTERS:
            is_all = False
            break
    if not is_all and corpus.max_documents is None:
        return None
    tokens = sum(1 + len(tokenise(tokenizer(), text)) for text in texts) * characters / max(1, sum(map(len, texts)))
    if is_all or corpus.max_documents is None:
        return round(tokens)
    num_documents = corpus.max_documents * (1 - corpus.held_out_fraction) / (corpus.parts if isinstance(corpus, CorpusPart) else 1)
    return round(tokens * num_documents / len(documents))


def most_bytes_at_once(store_bytes: int, parts: int) -> int:
    """Bytes on the disk at one time, of activations that take `store_bytes` in all: the stores of two parts at most."""
    return -(-store_bytes * min(PARTS_AT_ONCE, parts) // parts)
