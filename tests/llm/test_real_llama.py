"""SmolLM2-135M: 30 layers, grouped key-value heads, tied embeddings, bfloat16."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gsae.config import LLMConfig
from gsae.llm.load import load
from gsae.llm.site import Tail, capture, resolve_sites, substitute

CPU = torch.device("cpu")
PREPARE = Path(__file__).parents[2] / "launch" / "prepare_demo.py"

pytestmark = [pytest.mark.demo]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    assets = tmp_path_factory.mktemp("assets")
    subprocess.run([sys.executable, PREPARE, assets], check=True)
    (directory,) = (path for path in assets.iterdir() if path.is_dir())
    return directory


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_real_llama_is_cut_captured_and_spliced_exactly(directory, dtype):
    config = LLMConfig(model=str(directory), dtype=dtype)
    whole = load(config, CPU)
    sites = resolve_sites([2, "middle", -2], whole.info.num_layers)
    assert [site.name for site in sites] == ["resid.2", "resid.15", "resid.28"]
    tokens = torch.randint(3, whole.info.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(20), torch.arange(44)]), torch.arange(64)])

    activations = capture(whole.model, sites, tokens, positions)
    cut = capture(load(config, CPU, sites[-1].layer).model, sites, tokens, positions)
    with torch.no_grad():
        logits = whole.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    for site in sites:
        assert torch.equal(cut[site.name], activations[site.name])
        assert torch.equal(Tail(whole.model, site).logits(activations[site.name], positions), logits)
        assert torch.equal(substitute(whole.model, site, tokens, positions, lambda x: x), logits)
    # The first row of a segment is an attention sink (norms of about 20,000 where other rows have 150 to 650).
    norms = activations["resid.15"].float().norm(dim=-1)
    assert norms[positions == 0].min() > 10 * norms[positions > 0].median()
