import subprocess
import sys

import pytest
import torch

from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.errors import ConfigError
from gsae.llm import site as site_module
from gsae.llm.load import load
from gsae.llm.site import Site, Tail, capture, resolve_site, resolve_sites, substitute

NUM_LAYERS = 4
ALL_SITES = resolve_sites(range(NUM_LAYERS), NUM_LAYERS)
SEGMENT_LENGTHS = [[5, 1, 9], [15], [1, 1, 13]]
"""Segments of each of three contexts of 15 tokens."""


@pytest.fixture
def tokens():
    return torch.randint(0, 256, (3, 15), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def positions():
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in SEGMENT_LENGTHS])


def load_small(**settings):
    config = LLMConfig(model="random", random=RandomLlamaConfig(num_layers=NUM_LAYERS, d_model=32), **settings)
    return load(config, torch.device("cpu")).model


def full_logits(model, tokens, positions):
    return model(input_ids=tokens, position_ids=positions, use_cache=False).logits


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]


def refuse(*args, **kwargs):
    raise RuntimeError("this part must not run")


@pytest.mark.parametrize(
    ("spec", "num_layers", "layer"),
    [(2, 32, 2), ("2", 32, 2), (-2, 32, 30), ("-2", 32, 30), ("middle", 32, 16), ("middle", 5, 2), ("resid.31", 32, 31), (0, 1, 0)],
)
def test_a_site_is_named_by_index_middle_or_name(spec, num_layers, layer):
    assert resolve_site(spec, num_layers) == Site(f"resid.{layer}", layer, f"model.layers.{layer}")


@pytest.mark.parametrize("spec", [32, -33, "32", "resid.32", "resid.-1", "last", "", "1.5", "resid.2 ", True, None])
def test_a_site_out_of_range_is_refused_with_the_range(spec):
    with pytest.raises(ConfigError, match=r"^site .* 32 layers; give an index from -32 to 31, 'middle', or 'resid\.0' to 'resid\.31'$"):
        resolve_site(spec, 32)


def test_sites_come_once_each_in_layer_order():
    assert [site.name for site in resolve_sites([-2, "middle", 2, "resid.2", 0], 4)] == ["resid.0", "resid.2"]


def test_captured_activations_are_the_hidden_states_of_transformers(model, tokens, positions):
    captured = capture(model, ALL_SITES, tokens, positions)
    hidden_states = model(input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True).hidden_states
    assert list(captured) == ["resid.0", "resid.1", "resid.2", "resid.3"]
    for layer in range(NUM_LAYERS - 1):
        assert torch.equal(captured[f"resid.{layer}"], hidden_states[layer + 1])
    # The last one is comparable only after the final norm.
    assert not torch.equal(captured["resid.3"], hidden_states[-1])
    assert torch.equal(model.model.norm(captured["resid.3"]), hidden_states[-1])


def test_capture_of_some_sites_equals_capture_of_all(model, tokens, positions):
    every = capture(model, ALL_SITES, tokens, positions)
    some = capture(model, [ALL_SITES[2], ALL_SITES[0]], tokens, positions)
    assert set(some) == {"resid.0", "resid.2"}
    assert all(torch.equal(some[name], every[name]) for name in some)


def test_capture_runs_neither_the_lm_head_nor_layers_above_the_last_site(model, tokens, positions):
    model.lm_head.forward = refuse
    model.model.layers[3].forward = refuse
    assert set(capture(model, ALL_SITES[1:3], tokens, positions)) == {"resid.1", "resid.2"}
    with pytest.raises(RuntimeError, match="must not run"):
        capture(model, ALL_SITES[1:4], tokens, positions)


def test_nothing_is_left_behind_in_the_model(model, tokens, positions):
    before = full_logits(model, tokens, positions)
    capture(model, ALL_SITES, tokens, positions)
    substitute(model, ALL_SITES[1], tokens, positions, torch.zeros_like)
    Tail(model, ALL_SITES[1]).logits(torch.zeros(3, 15, 32), positions)
    assert hooks_of(model) == []
    assert len(model.model.layers) == NUM_LAYERS
    assert torch.equal(full_logits(model, tokens, positions), before)


def test_hooks_are_removed_when_the_forward_raises(model, tokens, positions):
    model.model.layers[2].mlp.forward = refuse
    with pytest.raises(RuntimeError, match="must not run"):
        capture(model, ALL_SITES, tokens, positions)
    with pytest.raises(RuntimeError, match="must not run"):
        substitute(model, ALL_SITES[0], tokens, positions, torch.zeros_like)
    with pytest.raises(RuntimeError, match="must not run"):
        substitute(model, ALL_SITES[0], tokens, positions, refuse)
    with pytest.raises(AttributeError):
        capture(model, [ALL_SITES[0], Site("resid.9", 9, "model.layers.9")], tokens, positions)
    assert hooks_of(model) == []


def test_no_gradient_is_kept(model, tokens, positions):
    model.requires_grad_(True)
    (hidden,) = capture(model, ALL_SITES[:1], tokens, positions).values()
    assert not hidden.requires_grad
    assert not Tail(model, ALL_SITES[0]).logits(hidden, positions).requires_grad
    assert not substitute(model, ALL_SITES[0], tokens, positions, torch.zeros_like).requires_grad


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_segments_equal_separate_forwards(tokens, positions, attention):
    model = load_small(dtype="float32", attention=attention)
    packed = capture(model, ALL_SITES, tokens, positions)
    for row, lengths in enumerate(SEGMENT_LENGTHS):
        first = 0
        for length in lengths:
            span = slice(first, first + length)
            alone = capture(model, ALL_SITES, tokens[row : row + 1, span], torch.arange(length)[None])
            for name, x in alone.items():
                torch.testing.assert_close(packed[name][row : row + 1, span], x, rtol=0, atol=1e-5)
            first += length


def test_contexts_laid_end_to_end_give_the_same_as_a_batch(model, tokens, positions, monkeypatch):
    """As flash attention needs them; a context that begins where another ends does not see it."""
    noise = torch.randn(3, 15, 32, generator=torch.Generator().manual_seed(1))

    def everything():
        x = capture(model, ALL_SITES, tokens, positions)
        tail = Tail(model, ALL_SITES[1]).logits(x["resid.1"] + noise, positions)
        return [*x.values(), tail, substitute(model, ALL_SITES[1], tokens, positions, lambda x: x + noise)]

    expected, widths = everything(), []
    monkeypatch.setattr(site_module, "_attends_in_one_row", lambda model: True)
    model.model.layers[0].register_forward_pre_hook(lambda layer, args: widths.append(args[0].shape[:2]))
    for value, other in zip(everything(), expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5)
    assert set(widths) == {(1, 45)}


@pytest.mark.parametrize(("attention", "in_one_row"), [("sdpa", False), ("eager", False), ("flash_attention_2", True)])
def test_contexts_are_laid_end_to_end_for_flash_attention_only(model, attention, in_one_row):
    model.config._attn_implementation_internal = attention  # its setter wants the package
    assert model.config._attn_implementation == attention
    assert site_module._attends_in_one_row(model) == in_one_row


def test_positions_of_any_integer_type_are_the_same(model, tokens, positions):
    wide, narrow = (capture(model, ALL_SITES, tokens.to(t), positions.to(t))["resid.3"] for t in (torch.int64, torch.int32))
    assert torch.equal(wide, narrow)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("site", ALL_SITES, ids=lambda site: site.name)
def test_the_tail_gives_exactly_the_models_logits(tokens, positions, site, attention, dtype):
    model = load_small(dtype=dtype, attention=attention)
    hidden = capture(model, [site], tokens, positions)[site.name]
    difference = Tail(model, site).logits(hidden, positions) - full_logits(model, tokens, positions)
    assert difference.abs().max().item() == 0.0


def test_the_tail_is_exact_with_grouped_heads_and_tied_embeddings(directory, tokens, positions):
    model = load(LLMConfig(model=str(directory), dtype="float32"), torch.device("cpu")).model
    for site in ALL_SITES:
        hidden = capture(model, [site], tokens, positions)[site.name]
        assert torch.equal(Tail(model, site).logits(hidden, positions), full_logits(model, tokens, positions))


@pytest.mark.parametrize("site", ALL_SITES, ids=lambda site: site.name)
def test_substituting_the_identity_changes_nothing(model, tokens, positions, site):
    assert torch.equal(substitute(model, site, tokens, positions, lambda x: x), full_logits(model, tokens, positions))


@pytest.mark.parametrize("site", ALL_SITES, ids=lambda site: site.name)
def test_substituting_equals_the_tail_on_the_replaced_activations(model, tokens, positions, site):
    noise = torch.randn(3, 15, 32, generator=torch.Generator().manual_seed(1))
    x = capture(model, [site], tokens, positions)[site.name]
    spliced = substitute(model, site, tokens, positions, lambda x: x + noise)
    assert torch.equal(spliced, Tail(model, site).logits(x + noise, positions))
    assert not torch.allclose(spliced, full_logits(model, tokens, positions), atol=0.1)


def test_replacements_are_converted_to_the_llms_type(tokens, positions):
    model, site = load_small(dtype="bfloat16"), ALL_SITES[1]
    expected = full_logits(model, tokens, positions)
    assert torch.equal(substitute(model, site, tokens, positions, lambda x: x.float()), expected)
    assert torch.equal(Tail(model, site).logits(capture(model, [site], tokens, positions)[site.name].float(), positions), expected)


def test_importing_the_module_does_not_import_transformers():
    code = "import sys, gsae.llm.site; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
