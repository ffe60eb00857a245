"""The proof that packed segments do not see each other: it must pass where they do not, and fail where they do."""

from pathlib import Path

import pytest
import ranks
import torch
from llm.conftest import save_llama
from transformers import masking_utils

from gsae import world
from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.errors import ModelError
from gsae.llm import packing, site
from gsae.llm.load import load
from gsae.llm.packing import prove_packing
from gsae.llm.site import resolve_site

CPU = torch.device("cpu")
REAL = Path(__file__).parents[2] / "runs" / "assets" / "SmolLM2-135M-Instruct"
DTYPES = ["bfloat16", "float16", "float32", "float64"]


def leak(monkeypatch):
    """Let transformers make the mask of a context without looking at where positions begin anew."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)


def random_llm(num_layers=4, **settings):
    llm = load(LLMConfig(model="random", random=RandomLlamaConfig(num_layers, 32, 4), **settings), CPU)
    return llm, resolve_site(-1, num_layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("num_layers", [1, 24])
def test_segments_that_are_kept_apart_pass(dtype, attention, num_layers):
    prove_packing(*random_llm(num_layers, dtype=dtype, attention=attention), packed=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_layers", [1, 24])
def test_attention_across_segments_is_found(monkeypatch, dtype, num_layers):
    leak(monkeypatch)
    with pytest.raises(ModelError, match=r"'sdpa' does not keep the segments of a context apart here: .* resid\.\d+ are off by") as caught:
        prove_packing(*random_llm(num_layers, dtype=dtype), packed=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [True, False])
def test_attention_across_contexts_that_are_laid_end_to_end_is_found(monkeypatch, packed):
    monkeypatch.setattr(site, "_attends_in_one_row", lambda model: True)
    llm, last = random_llm()
    prove_packing(llm, last, packed)
    leak(monkeypatch)
    with pytest.raises(ModelError, match="segments"):
        prove_packing(llm, last, packed)


def test_what_follows_the_only_segment_of_a_context_is_no_fault(monkeypatch):
    llm, last = random_llm()
    leak(monkeypatch)
    prove_packing(llm, last, packed=False)


@pytest.mark.parametrize(
    ("attention", "cure"), [("sdpa", "llm.attention: eager, or harvest.packed: false"), ("eager", "llm.attention: sdpa")]
)
def test_the_error_names_the_attention_and_what_to_set(monkeypatch, attention, cure):
    leak(monkeypatch)
    with pytest.raises(ModelError, match=f"^llm.attention '{attention}' .*; set {cure}$"):
        prove_packing(*random_llm(attention=attention), packed=True)


def test_activations_that_are_not_finite_prove_nothing():
    llm, last = random_llm()
    llm.model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="off by nan"):
        prove_packing(llm, last, packed=True)


def test_every_context_of_the_proof_has_three_segments_and_is_full():
    assert all(len(lengths) >= 3 for lengths in packing.SEGMENT_LENGTHS)
    assert len({sum(lengths) for lengths in packing.SEGMENT_LENGTHS}) == 1


def check_split(directory):
    with world.start("cpu") as here:
        llm = load(LLMConfig(model=str(directory), sharding="zero3"), here.device, 2, here.everyone)
        prove_packing(llm, resolve_site(2, 4), packed=True)
        masking_utils.find_packed_sequence_indices = lambda positions: None
        with pytest.raises(ModelError):
            prove_packing(llm, resolve_site(2, 4), packed=True)


def test_the_proof_runs_on_an_llm_that_is_split_over_ranks(tmp_path):
    ranks.run(2, check_split, save_llama(tmp_path / "llama"))


@pytest.mark.demo
@pytest.mark.skipif(not REAL.exists(), reason="the demo's LLM is not prepared: python launch/prepare_demo.py runs/assets")
def test_in_a_real_llama_at_every_depth_and_in_bfloat16(monkeypatch):
    llm = load(LLMConfig(model=str(REAL)), CPU)
    places = [resolve_site(layer, 30) for layer in (0, 2, 15, 29)]
    for place in places:
        prove_packing(llm, place, packed=True)
    leak(monkeypatch)
    for place in places:
        with pytest.raises(ModelError, match="segments"):
            prove_packing(llm, place, packed=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flash_attention_keeps_segments_apart_and_agrees_with_sdpa():
    pytest.importorskip("flash_attn", reason="needs the package flash-attn")
    shape, cuda = RandomLlamaConfig(4, 256, 4), torch.device("cuda")
    flash, sdpa = (load(LLMConfig(model="random", attention=name, random=shape), cuda) for name in ("flash_attention_2", "sdpa"))
    prove_packing(flash, resolve_site(-1, 4), packed=True)
    tokens, positions = packing._batch(flash)
    (x, expected) = (site.capture(llm.model, [resolve_site(-1, 4)], tokens, positions)["resid.3"].float() for llm in (flash, sdpa))
    assert (x - expected).norm() < 0.02 * expected.norm()
