"""How fast this machine runs the LLM. In: a config. Out: tokens a second, of this process alone, over the corpus's own first contexts."""

import time
from collections.abc import Iterator, Sequence
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from gsae.config import Config
from gsae.corpus.contexts import Context, Packer
from gsae.corpus.documents import read_pieces
from gsae.errors import ConfigError
from gsae.llm.load import LLM, load
from gsae.llm.site import Site, capture

MEASURED_SECONDS = 5.0
SAMPLE_BATCHES = 4
"""LLM batches that are read, and run in turns."""


def measure_tokens_per_second(config: Config, sites: Sequence[Site]) -> float:
    """Tokens a second that the LLM computes here, up to the last site; nothing is stored.

    Raises:
        ConfigError: `llm.sharding` is not `replicate`: one process cannot tell the speed of ranks that share an LLM.
        CorpusError, ModelError: as in the harvest.
    """
    if config.llm.sharding != "replicate":
        raise ConfigError("--measure holds the LLM whole on one rank; give --tokens-per-second, or --llm.sharding replicate")
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("--measure finds no CUDA device here, and device is 'cuda'; give --tokens-per-second, or --device cpu")
    device = torch.device("cuda" if config.device != "cpu" and has_gpu else "cpu")
    llm = load(config.llm, device, last_layer=sites[-1].layer)
    batches = cycle(list(_batches(config, llm)))
    _forward(llm, sites, next(batches))  # the first one is slower
    start, tokens = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < MEASURED_SECONDS or not tokens:
        tokens += _forward(llm, sites, next(batches))
    return tokens / seconds


def _batches(config: Config, llm: LLM) -> Iterator[Int[Tensor, "2 contexts length"]]:
    """Tokens and positions of the first LLM batches."""
    size = config.harvest.batch_contexts
    contexts = list(islice(_contexts(config, llm), SAMPLE_BATCHES * size))
    for start in range(0, len(contexts), size):
        batch = [(context.tokens, context.positions) for context in contexts[start : start + size]]
        yield torch.from_numpy(np.stack(batch, axis=1)).to(llm.model.device, torch.int64)


def _contexts(config: Config, llm: LLM) -> Iterator[Context]:
    packer = Packer(llm.tokenizer, config.harvest.context_length, packed=config.harvest.packed)
    for piece in read_pieces(config.corpus, "training"):
        yield from packer.push(piece)
    yield from packer.finish()


def _forward(llm: LLM, sites: Sequence[Site], batch: Int[Tensor, "2 contexts length"]) -> int:
    """Run one batch to its end; its tokens, padding included."""
    tokens: Tensor
    tokens, positions = batch
    capture(llm.model, sites, tokens, positions)
    if tokens.is_cuda:
        torch.cuda.synchronize(tokens.device)
    return tokens.numel()
