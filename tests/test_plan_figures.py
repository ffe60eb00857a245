"""The figures of `gsae plan` against what the stages do: packing, tars, whole stores, parameters, activations."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import small_settings, write_config, write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_gsae
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from gsae.config import Config, LLMConfig
from gsae.corpus.contexts import Packer
from gsae.corpus.documents import Piece
from gsae.llm.load import load
from gsae.llm.random import byte_tokenizer
from gsae.llm.site import capture, resolve_sites
from gsae.plan import text as plan_text
from gsae.plan.budget import Assumptions, budget
from gsae.plan.disk import rows_member_bytes, tar_bytes
from gsae.plan.llm import Shape, activation_bytes, read_shape
from gsae.plan.text import LanePacking, read_text
from gsae.settings import read_config
from gsae.store.encoding import encode
from gsae.store.manifest import load as load_manifest
from gsae.store.progress import read_records
from gsae.store.shards import ContextRows, open_tar

ROOT = Path(__file__).parents[1]
TOKENIZER, NO_BOS = byte_tokenizer(), byte_tokenizer()
NO_BOS.bos_token = None


def small_config(folder: Path, *words: str, **harvest) -> Config:
    """The small pipeline's config, with its text."""
    if not (folder / "text").exists():
        write_text(folder / "text")
    chosen = small_settings(folder)
    chosen["harvest"] |= harvest
    return read_config("plan", [str(write_config(folder / "config.yaml", chosen)), *words])


# text


@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    length=st.integers(4, 20),
    packed=st.booleans(),
    has_bos=st.booleans(),
    limit=st.none() | st.integers(1, 5),
)
@settings(deadline=None)
def test_packing_by_lengths_is_what_the_packer_does(lengths, length, packed, has_bos, limit):
    tokenizer = TOKENIZER if has_bos else NO_BOS
    packer = Packer(tokenizer, length, packed=packed)
    contexts = [c for number, size in enumerate(lengths) for c in packer.push(Piece(number, 0, "a" * size))] + packer.finish()
    found = LanePacking(length, int(has_bos), packed, limit)
    for size in lengths:
        found.push(size)
    found.finish()
    contexts = contexts[:limit]
    segments = sum(int(((c.positions == 0) & (c.documents >= 0)).sum()) for c in contexts)
    tokens = sum(int((c.documents >= 0).sum()) for c in contexts)
    assert (found.contexts, found.segments, found.text_tokens) == (len(contexts), segments, tokens - segments * has_bos)


def test_the_sample_is_spread_over_the_whole_text(tmp_path, monkeypatch):
    """Bytes are tokens: the first half has 1 a character, the second (9 x 3 + 1) / 10 = 2.8, so 1.9 on average."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(" ".join([("x" if number < 20 else "€") * 9] * 200))
    monkeypatch.setattr(plan_text, "SAMPLE_PIECES", 200)
    text = read_text(small_config(tmp_path), TOKENIZER)
    assert text.pieces > 500
    assert text.sampled_pieces == 200
    assert 1 / text.characters_per_token == pytest.approx(1.9, rel=0.15)


def test_what_max_tokens_takes_is_whole_shards_and_no_more_is_read(tmp_path):
    everything = read_text(small_config(tmp_path), TOKENIZER)
    limited = read_text(small_config(tmp_path, max_tokens=1000), TOKENIZER)
    assert [lane.contexts for lane in limited.lanes] == [8] * 4  # 1000 tokens are under a shard, 8 contexts of 32, of each of 4 lanes
    assert limited.documents < everything.documents
    huge = read_text(small_config(tmp_path, max_tokens=10**15), TOKENIZER)
    assert huge.contexts == everything.contexts


def test_the_first_row_of_a_segment_is_no_row_whether_it_is_bos_or_text(tmp_path):
    config = small_config(tmp_path)
    with_bos, without = read_text(config, TOKENIZER), read_text(config, NO_BOS)
    assert with_bos.rows == with_bos.text_tokens
    assert without.rows == without.text_tokens - without.segments


# disk


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "int8"])
@pytest.mark.parametrize(("contexts", "rows", "d_model"), [(1, 0, 4), (20, 7, 16), (5, 121, 64), (2, 1000, 48)])
def test_the_bytes_of_a_tar_are_exact(tmp_path, storage, contexts, rows, d_model):
    stored = encode(torch.randn(rows, d_model), storage)
    column = torch.zeros(rows, dtype=torch.int64)
    with open_tar(tmp_path / "0000-000000.tar", 0, 0) as writing:
        for _ in range(contexts):
            writing.add(ContextRows(stored.x, column, column, column, stored.row_scale))
    path = tmp_path / "0000-000000.tar"
    with tarfile.open(path) as tar:
        assert {member.size for member in tar if member.name.endswith("safetensors")} == {rows_member_bytes(rows, d_model, storage)}
    assert tar_bytes(contexts, rows, d_model, storage) == path.stat().st_size


def test_a_tar_ends_with_two_empty_blocks_in_whole_records(tmp_path):
    """Contexts without rows take 2,048 bytes each, so ten fill two records of 10,240 bytes, and the end takes a third."""
    none = ContextRows(torch.zeros(0, 4, dtype=torch.bfloat16), *[torch.zeros(0, dtype=torch.int64)] * 3)
    with open_tar(tmp_path / "0000-000000.tar", 0, 0) as writing:
        for _ in range(10):
            writing.add(none)
    assert tar_bytes(10, 0, 4, "bfloat16") == (tmp_path / "0000-000000.tar").stat().st_size == 30_720


def compare_with_store(config: Config) -> None:
    """Contexts and rows within a hundredth, bytes within a fiftieth; outliers may be missing of the rows.

    The contexts of one lane may be two or three off, which at the end of a shard is one shard more or less.
    """
    found, store = budget(config, Assumptions()), Path(config.store_directory)
    manifest = load_manifest(store)
    records = [record for lane in range(manifest.num_lanes) for record in read_records(store, lane)]
    assert found.harvest.contexts == pytest.approx(sum(record.contexts for record in records), rel=0.01)
    assert found.store.shards_per_site == pytest.approx(len(records), rel=0.02, abs=manifest.num_lanes / 4)
    for site in manifest.sites.values():
        candidates = site.rows + site.dropped["outlier"] + site.dropped["non_finite"]
        assert found.store.rows_per_site == pytest.approx(candidates, rel=0.01)
    tars = sum(tar.stat().st_size for tar in store.rglob("*.tar"))
    assert found.store.bytes == pytest.approx(tars, rel=0.02)
    assert found.store.bytes_present == tars


@pytest.mark.parametrize("harvest", [{}, {"storage_dtype": "int8", "packed": False}], ids=["packed", "int8 and unpacked"])
def test_a_harvested_store_has_the_planned_size(tmp_path, harvest):
    config = small_config(tmp_path, outlier_multiple=100.0, **harvest)
    run_gsae(1, ["harvest", tmp_path / "config.yaml"])
    compare_with_store(config)


@pytest.mark.demo
@pytest.mark.skipif(not (ROOT / "runs/demo/store/manifest.json").exists(), reason="no runs/demo/store: bash launch/demo.sh makes it")
def test_the_demo_s_store_has_the_planned_size(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read_config("plan", ["configs/demo.yaml"])
    characters = json.loads(Path("runs/demo/store/identity.json").read_text())["identity"]["corpus"]["max_document_characters"]
    compare_with_store(replace(config, corpus=replace(config.corpus, max_document_characters=characters)))


def test_of_a_corpus_in_parts_two_are_on_the_disk(tmp_path):
    whole = budget(small_config(tmp_path), Assumptions())
    found = budget(small_config(tmp_path, "--corpus.parts", "4"), Assumptions())
    assert found.store.bytes_at_once == 2 * found.store.bytes_per_part
    assert found.store.bytes_at_once == pytest.approx(whole.store.bytes / 2, rel=0.1)
    assert found.store.rows_per_site == whole.store.rows_per_site


def test_a_visit_gives_whole_batches(tmp_path):
    """A part of 3,486 rows has 3 batches of 1,024; the run's 13 batches take 5 visits. By rows alone it would be 4."""
    found = budget(small_config(tmp_path, "--corpus.parts", "4", "--train.batch_rows", "1024"), Assumptions())
    assert found.store.rows_per_site // 4 // 1024 == 3
    assert found.train.rows_per_run == 13 * 1024 < 4 * (found.store.rows_per_site // 4)
    assert found.train.visits == 5


# LLM


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def directory(request, tmp_path_factory) -> Path:
    """A saved Llama of three layers with grouped key-value heads, heads wider than d_model / heads, and biases."""
    shape = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=request.param,
    )
    folder = tmp_path_factory.mktemp("llm")
    LlamaForCausalLM(shape).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def compare_parameters(config: LLMConfig, last_layer: int) -> None:
    shape = read_shape(config)
    whole, cut = load(config, torch.device("cpu")).model, load(config, torch.device("cpu"), last_layer=last_layer).model
    assert shape.parameters == sum(p.numel() for p in whole.parameters())
    assert shape.parameters_up_to(last_layer) == sum(p.numel() for p in cut.parameters())
    assert shape.buffer_bytes == sum(buffer.nbytes for buffer in cut.buffers())


@pytest.mark.parametrize("last_layer", [0, 2])
def test_parameters_are_those_of_the_loaded_llm(directory, last_layer):
    compare_parameters(LLMConfig(model=str(directory), dtype="float32"), last_layer)


def test_parameters_of_a_random_llama():
    compare_parameters(LLMConfig(model="random", dtype="float32"), 0)


@pytest.mark.demo
@pytest.mark.skipif(not (ROOT / "runs/assets").exists(), reason="no SmolLM2: python launch/prepare_demo.py runs/assets")
def test_parameters_of_the_real_llama():
    compare_parameters(LLMConfig(model=str(ROOT / "runs/assets/SmolLM2-135M-Instruct")), 15)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("heads", "inner", "length"), [(8, 688, 128), (2, 1500, 128), (8, 256, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_llm_batch_takes_about_the_activations_that_are_planned(attention, heads, inner, length, dtype):
    """The peak of what torch allocates in a forward of three layers, two of them sites' (the third holds the peak)."""
    shape = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=heads
    )
    model = LlamaForCausalLM(shape).to(getattr(torch, dtype)).eval().requires_grad_(False)
    model.set_attn_implementation(attention)
    tokens, positions = torch.zeros(4, length, dtype=torch.int64), (torch.arange(length) % 40).repeat(4, 1)
    sites = resolve_sites([0, 1, 2], 3)
    capture(model, sites, tokens, positions)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        capture(model, sites, tokens, positions)
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    config = replace(Config(), llm=LLMConfig(dtype=dtype, attention=attention))
    config = replace(config, harvest=replace(config.harvest, context_length=length))
    planned = activation_bytes(config, Shape(3, 256, inner, 256, 8, 64, 0, 0, 0, 0, 0), num_sites=3, contexts=4)
    assert 0.95 * peak < planned < 1.4 * peak


def test_llama_2_70b_from_its_config_alone(tmp_path):
    """No weights. Its parameters are known; of two ranks each holds half and gathers a layer, and receives the other half."""
    folder = llama_2_70b(tmp_path)
    path = ROOT / "configs" / "llama2_70b_fever.yaml"
    write_text(tmp_path / "text")
    corpus = ["--corpus.format", "text", "--corpus.path", f"{tmp_path}/text/*.txt", "--corpus.held_out_fraction", "0.2"]
    small = [*corpus, "--corpus.num_lanes", "4", "--output", str(tmp_path / "runs"), "--llm.model", str(folder)]
    found = budget(read_config("plan", [str(path), *small]), Assumptions(ranks=2))
    assert found.llm.parameters == 68_976_648_192
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    loaded = 68_976_648_192 - layer - 32_000 * 8192
    assert found.llm.harvest_parameters == loaded
    assert found.llm.bytes_per_rank_replicate == pytest.approx(2 * loaded)
    assert found.llm.bytes_per_rank_zero3 == pytest.approx(loaded + 2 * layer)
    assert found.llm.bytes_received_per_forward_zero3 == loaded
    assert found.store.sites == ("resid.2", "resid.40", "resid.78")
    assert found.store.bytes_per_row == 8192 + 4 + 12
    offloaded = budget(read_config("plan", [str(path), *small, "--llm.offload", "true"]), Assumptions(ranks=2))
    assert offloaded.llm.bytes_per_rank_zero3 == pytest.approx(2 * layer)


def llama_2_70b(folder: Path) -> Path:
    """A directory with the config of Llama-2-70B and a tokenizer, but no weights."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    path = folder / "llama-2-70b"
    byte_tokenizer().save_pretrained(path)
    described = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False, **shape}
    (path / "config.json").write_text(json.dumps(described))
    return path
