from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gsae.config import CorpusConfig
from gsae.corpus.documents import Document, read_documents


@pytest.fixture(scope="session")
def dump() -> Path:
    """A real piece of English Wikipedia, 106 articles, which the package gensim carries among its own tests' data."""
    package = find_spec("gensim")
    if package is None or not package.submodule_search_locations:
        pytest.skip("no Wikipedia dump: pip install --no-deps gensim")
    return next(Path(package.submodule_search_locations[0]).glob("test/test_data/enwiki-latest-pages-articles1*.bz2"))


@pytest.fixture(scope="session")
def real_documents(dump) -> list[Document]:
    """The dump's training documents."""
    return list(read_documents(CorpusConfig(path=str(dump), held_out_fraction=0.2), "training"))


def byte_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", "<pad>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    return byte_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer_without_bos() -> PreTrainedTokenizerFast:
    """One token a byte, no BOS and no padding token, as GPT-2's family has it."""
    return byte_tokenizer(eos_token="</s>")
