import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.llm.load import load
from gsae.llm.random import byte_tokenizer

NUM_LAYERS = 4


@pytest.fixture
def config() -> LLMConfig:
    return LLMConfig(model="random", dtype="float32", random=RandomLlamaConfig(num_layers=NUM_LAYERS, d_model=32, num_heads=4))


@pytest.fixture
def model(config) -> LlamaForCausalLM:
    """A fresh Llama of four layers: a test may break it."""
    return load(config, torch.device("cpu")).model


def save_llama(path, num_layers=NUM_LAYERS, tied=True):
    """Save a Llama as small ones are: grouped key-value heads, tied embeddings unless told, two weight files; and its tokenizer."""
    shape = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        llama = LlamaForCausalLM(shape)
    llama.save_pretrained(path, max_shard_size=sum(4 * weight.numel() for weight in llama.parameters()) * 6 // 10)
    byte_tokenizer().save_pretrained(path)
    assert len(list(path.glob("model-*.safetensors"))) == 2
    return path


@pytest.fixture
def directory(tmp_path):
    """A saved Llama of four layers."""
    return save_llama(tmp_path / "little-llama")
