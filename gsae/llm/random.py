"""A Llama without weights on disk. In: its shape and a seed. Out: a Llama of random weights, and a tokenizer whose tokens are bytes."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gsae.config import RandomLlamaConfig

NUM_BYTES = 256
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)


def random_llama(config: RandomLlamaConfig) -> LlamaForCausalLM:
    """A float32 Llama on the CPU, the same for the same config.

    Weights have the standard deviation d_model ** -0.5: products keep the size of their input, so that every layer matters.
    """
    bos, eos, pad = range(NUM_BYTES, VOCAB_SIZE)
    shape = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=config.d_model,
        intermediate_size=3 * config.d_model,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        initializer_range=config.d_model**-0.5,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(shape)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is the byte i of the text in UTF-8; BOS, EOS and PAD follow at 256, 257 and 258. It adds no special token by itself."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(NUM_BYTES)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    fast: type[Any] = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
    return wrapped
