import torch

from gsae.config import RandomLlamaConfig
from gsae.llm.random import byte_tokenizer, random_llama


def weights(config):
    return torch.cat([weight.flatten() for weight in random_llama(config).parameters()])


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first = weights(RandomLlamaConfig(seed=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(weights(RandomLlamaConfig(seed=3)), first)
    assert not torch.equal(weights(RandomLlamaConfig(seed=4)), first)


def test_tokens_are_bytes_and_special_tokens_follow_them():
    tokenizer = byte_tokenizer()
    text = "Hé <0x41>, 漢\n\t ab"
    tokens = tokenizer(text)["input_ids"]
    assert tokens == list(text.encode())
    assert tokenizer.decode(tokens) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (256, 257, 258, 259)
    assert random_llama(RandomLlamaConfig()).config.vocab_size == 259
