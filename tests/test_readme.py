"""The README's code, run as it stands: on a small Llama under the names that it uses, and on the demo's where they are."""

import re
from pathlib import Path

import pytest
import torch
from made_up_run import D_MODEL, FEATURES, MadeUpRun, as_trained

from gsae.config import RandomLlamaConfig
from gsae.llm.random import byte_tokenizer, random_llama

ROOT = Path(__file__).parents[1]
CODE = re.search(r"## Use an SAE\n.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
RUN, LLM = re.search(r'load_sae\("(.*?)"\)', CODE)[1], re.search(r'from_pretrained\("(.*?)"\)', CODE)[1]


def run_code() -> dict:
    names: dict = {}
    exec(CODE, names)
    return names


def test_using_an_sae(tmp_path, monkeypatch):
    output, site, name = Path(RUN).parents[1], Path(RUN).parent.name, Path(RUN).name
    run = MadeUpRun(layer=int(site.removeprefix("resid."))).write(tmp_path / output, name)
    assert run == tmp_path / RUN
    random_llama(RandomLlamaConfig(num_layers=17, d_model=D_MODEL, num_heads=2)).save_pretrained(tmp_path / LLM)
    byte_tokenizer().save_pretrained(tmp_path / LLM)
    monkeypatch.chdir(tmp_path)
    names = run_code()
    text = b"Paris is the capital of France."
    assert names["tokens"]["input_ids"].tolist() == [[256, *text]]
    seen = []
    names["model"].model.layers[15].register_forward_hook(lambda _, __, output: seen.append(output))
    names["model"](**names["tokens"])
    torch.testing.assert_close(names["x"], seen[0][:, 1:])
    f = as_trained(run, names["x"][0])[0]
    assert names["f"].shape == (1, len(text), FEATURES)
    torch.testing.assert_close(names["f"][0].double(), f, rtol=1e-5, atol=1e-3)


@pytest.mark.demo
@pytest.mark.skipif(not ((ROOT / RUN).exists() and (ROOT / LLM).exists()), reason=f"{RUN} is not there: bash launch/demo.sh makes it")
def test_using_the_demo_s_sae(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = run_code()
    x, sae = names["x"], names["sae"]
    fvu = (sae(x) - x).square().sum() / (x - x.mean(dim=1, keepdim=True)).square().sum()
    assert 5 < (names["f"] > 0).sum(dim=-1).float().mean() < 200
    assert fvu < 0.5
