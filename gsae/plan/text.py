"""How the training text will be cut into contexts. In: a config, the LLM's tokenizer. Out: its size, and what each lane will hold.

One pass takes the length of every piece and keeps a sample of their texts. The sample is tokenised, so that a piece's tokens follow
from its characters; the lengths then go through the harvest's own packing, without tokens.
"""

import random
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gsae.config import Config
from gsae.corpus.contexts import tokenise
from gsae.corpus.documents import read_pieces
from gsae.corpus.size import shards_a_lane
from gsae.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_PIECES = 1000
"""Pieces that are tokenised; a smaller corpus is tokenised whole."""
CHARACTERS_A_TOKEN = 8
"""More than any text has: reading ends where harvest.max_tokens is reached even so."""
_MIN_SEGMENT_TOKENS = 2
"""As the packer has it."""


@dataclass
class LanePacking:
    """What packing makes of the pieces of one lane, counted from their numbers of tokens alone."""

    context_length: int
    prefix_tokens: int
    """Tokens that every segment begins with: 1 where the tokenizer has BOS."""
    packed: bool
    max_contexts: int | None = None
    """Contexts at which the lane ends."""
    contexts: int = 0
    segments: int = 0
    text_tokens: int = 0
    used: int = 0
    """Tokens of the context that is being filled."""

    @property
    def is_full(self) -> bool:
        """Whether the lane takes no more text."""
        return self.max_contexts is not None and self.contexts >= self.max_contexts

    def push(self, num_tokens: int) -> None:
        """Add the next piece."""
        while num_tokens and not self.is_full:
            taken = min(num_tokens, self.context_length - self.used - self.prefix_tokens)
            num_tokens -= taken
            self.text_tokens += taken
            self.segments += 1
            self.used += self.prefix_tokens + taken
            if not self.packed or self.context_length - self.used - self.prefix_tokens < _MIN_SEGMENT_TOKENS:
                self.finish()

    def finish(self) -> None:
        """Close the context that is being filled, if anything is in it."""
        self.contexts += self.used > 0
        self.used = 0


@dataclass(frozen=True)
class TrainingText:
    """The training text, or as much of it as harvest.max_tokens takes."""

    documents: int
    pieces: int
    characters: int
    sampled_pieces: int
    """Pieces that were tokenised."""
    characters_per_token: float
    prefix_tokens: int
    lanes: tuple[LanePacking, ...]

    @property
    def contexts(self) -> int:
        """Contexts of all lanes."""
        return sum(lane.contexts for lane in self.lanes)

    @property
    def segments(self) -> int:
        """Segments of all lanes."""
        return sum(lane.segments for lane in self.lanes)

    @property
    def text_tokens(self) -> int:
        """Tokens of text of all lanes, BOS not included."""
        return sum(lane.text_tokens for lane in self.lanes)

    @property
    def rows(self) -> int:
        """Rows of a site: all of the text but the first row of each segment, which is BOS where there is one."""
        return self.text_tokens - (0 if self.prefix_tokens else self.segments)


def read_text(config: Config, tokenizer: "PreTrainedTokenizerBase") -> TrainingText:
    """Read the training text, as far as it is needed, and pack its lengths.

    Raises:
        CorpusError: the text is missing or damaged.
    """
    harvest, limit = config.harvest, shards_a_lane(config)
    max_contexts = None if limit is None else limit * harvest.contexts_per_shard * config.corpus.parts
    lengths, sample, documents = _read_lengths(config, max_contexts)
    if not sample:
        raise CorpusError(f"the training text of {config.corpus.path!r} is empty; check corpus.path and corpus.format")
    sampled_tokens = sum(len(tokenise(tokenizer, text)) for text in sample)
    tokens_per_character = sampled_tokens / sum(map(len, sample))
    prefix_tokens = int(tokenizer.bos_token_id is not None)
    lanes = []
    for lane in lengths:
        packing = LanePacking(harvest.context_length, prefix_tokens, harvest.packed, max_contexts)
        for characters in lane:
            packing.push(max(1, round(characters * tokens_per_character)))
        packing.finish()
        lanes.append(packing)
    pieces, characters = sum(map(len, lengths)), sum(map(sum, lengths))
    return TrainingText(documents, pieces, characters, len(sample), 1 / tokens_per_character, prefix_tokens, tuple(lanes))


def _read_lengths(config: Config, max_contexts: int | None) -> tuple[list["array[int]"], list[str], int]:
    """The characters of the pieces of each lane, the texts of a fair sample of them, and the number of documents."""
    # All of the text, whatever part of it a store will hold.
    corpus, generator = replace(config.corpus, parts=1), random.Random(0)
    lanes = [array("I") for _ in range(corpus.num_lanes)]
    missing = None if max_contexts is None else [max_contexts * config.harvest.context_length * CHARACTERS_A_TOKEN] * len(lanes)
    num_missing, sample, documents = len(lanes), list[str](), set[int]()
    for number, piece in enumerate(read_pieces(corpus, "training")):
        lane = piece.lane(len(lanes))
        lanes[lane].append(len(piece.text))
        documents.add(piece.document)
        if number < SAMPLE_PIECES:
            sample.append(piece.text)
        elif (place := generator.randrange(number + 1)) < SAMPLE_PIECES:
            sample[place] = piece.text
        if missing is not None and missing[lane] > 0:
            missing[lane] -= len(piece.text)
            num_missing -= missing[lane] <= 0
            if not num_missing:
                break
    return lanes, sample, len(documents)
