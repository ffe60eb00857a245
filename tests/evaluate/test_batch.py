"""A batch against an independent slow evaluation: whole forwards one context at a time, python loops over tokens."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch

from gsae.config import LLMConfig, RandomLlamaConfig
from gsae.corpus.contexts import Context, Packer
from gsae.corpus.documents import Piece
from gsae.errors import GsaeError
from gsae.evaluate import batch as batch_module
from gsae.evaluate import strata
from gsae.evaluate.batch import BatchResult, SplicedRun, SplicedSite, cut_batches, documents_of_blocks, evaluate_batch
from gsae.evaluate.reconstruction import reconstruction_metrics
from gsae.evaluate.splice import splice_metrics
from gsae.llm.load import LLM, load
from gsae.llm.rows import candidates, special_tokens
from gsae.llm.site import Site, Tail, capture
from gsae.sae.objective import SAE, build
from gsae.store.encoding import encode

D_MODEL, NUM_FEATURES, SCALE = 16, 48, 0.4
SITES = [Site(f"resid.{layer}", layer, f"model.layers.{layer}") for layer in (0, 2)]
TEXTS = {3: "the gate is open, the magnitude small", 7: "rows of a lane", 8: "a window holds many rows, and is shuffled as a whole"}


@dataclass(frozen=True)
class Bench:
    """An LLM, contexts, and two sites with two SAEs each."""

    llm: LLM
    contexts: list[Context]
    sites: list[SplicedSite]


def make_bench(dtype: str) -> Bench:
    torch_dtype = getattr(torch, dtype)
    shape = RandomLlamaConfig(num_layers=4, d_model=D_MODEL, num_heads=2)
    llm = load(LLMConfig(model="random", dtype=dtype, random=shape), torch.device("cpu"))
    packer = Packer(llm.tokenizer, 24)
    contexts = [context for number, text in TEXTS.items() for context in packer.push(Piece(number, 0, text))] + packer.finish()
    contexts[1].tokens[5] = llm.tokenizer.eos_token_id
    assert any((context.documents == -1).any() for context in contexts)
    tokens, positions = (torch.stack([torch.from_numpy(getattr(c, name)).long() for c in contexts]) for name in ("tokens", "positions"))
    x = capture(llm.model, SITES, tokens, positions)
    sites = []
    for site in SITES:
        norms = x[site.name].norm(dim=-1).flatten().sort().values
        mean = x[site.name].double().mean((0, 1)) + 0.1
        runs = tuple(SplicedRun(f"{site.name}/{name}", make_sae(name, torch_dtype), SCALE) for name in ("relu", "gated"))
        sites.append(SplicedSite(site, Tail(llm.model, site), mean, float(norms[-8:-6].mean()), "float32", runs))
    return Bench(llm, contexts, sites)


def make_sae(objective: str, dtype: torch.dtype) -> SAE:
    """Random directions and biases; a third of the features is on."""
    sae = build(objective, D_MODEL, NUM_FEATURES, 0, dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, value in sae.named_parameters():
        if value.ndim == 1:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(0.3 * noise - (0.3 if name in ("b_enc", "b_gate") else 0))
    return sae


@pytest.fixture(scope="module")
def bench() -> Bench:
    return make_bench("float64")


def residual_stream(llm: LLM, layer: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The output of a layer in a whole forward of one context, by transformers' own means."""
    with torch.no_grad():
        found = llm.model(input_ids=tokens, position_ids=positions, use_cache=False, output_hidden_states=True)
    return found.hidden_states[layer + 1][0]


def logits_with(llm: LLM, layer: int, tokens: torch.Tensor, positions: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The logits of a whole forward in which a layer's output is another, by torch's own hook."""
    handle = llm.model.model.layers[layer].register_forward_hook(lambda module, args, output: value[None].to(output.dtype))
    try:
        with torch.no_grad():
            return llm.model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    finally:
        handle.remove()


def slow_metrics(bench: Bench, site: SplicedSite, run: SplicedRun) -> dict[str, float]:
    """All metrics of one run, from whole forwards and loops."""
    special = {bench.llm.tokenizer.bos_token_id, bench.llm.tokenizer.eos_token_id, bench.llm.tokenizer.pad_token_id}
    kept_x, kept_x_hat, dropped_x, dropped_x_hat, l0 = [], [], [], [], []
    losses = dict.fromkeys(("clean", "spliced", "zero", "mean", "zero_all_rows", "mean_all_rows", "kl"), 0.0)
    num_targets = 0
    for context in bench.contexts:
        tokens, positions = (torch.from_numpy(array).long()[None] for array in (context.tokens, context.positions))
        x = residual_stream(bench.llm, site.site.layer, tokens, positions)
        replaced = {name: x.clone() for name in ("spliced", "zero", "mean")}
        for t in range(len(x)):
            if context.documents[t] < 0:
                continue
            f = run.sae.encode(SCALE * x[t : t + 1])
            x_hat = run.sae.decode(f)[0] / SCALE
            norm = math.sqrt(sum(value * value for value in x[t].tolist()))
            if context.positions[t] > 0 and int(context.tokens[t]) not in special and norm <= site.max_norm:
                kept_x.append(x[t].double())
                kept_x_hat.append(x_hat.double())
                l0.append(sum(value > 0 for value in f[0].tolist()))
                replaced["spliced"][t], replaced["zero"][t], replaced["mean"][t] = x_hat, 0, site.mean
            else:
                dropped_x.append(x[t].double())
                dropped_x_hat.append(x_hat.double())
        replaced |= {"clean": x, "zero_all_rows": torch.zeros_like(x), "mean_all_rows": site.mean.to(x).expand_as(x)}
        log_p = {}
        for name, value in replaced.items():
            logits = logits_with(bench.llm, site.site.layer, tokens, positions, value)
            log_p[name] = logits[0].double().log_softmax(-1)
        for t in range(len(x) - 1):
            if context.documents[t + 1] >= 0 and context.positions[t + 1] > 0:
                num_targets += 1
                for name, value in log_p.items():
                    losses[name] -= value[t, int(context.tokens[t + 1])].item()
                p = log_p["clean"][t].exp()
                losses["kl"] += (p * (log_p["clean"][t] - log_p["spliced"][t])).sum().item()
    assert len(dropped_x) > len({segment for context in bench.contexts for segment in context.documents if segment >= 0})
    assert num_targets > 50
    ce = {name: total / num_targets for name, total in losses.items()}
    x, x_hat = torch.stack(kept_x), torch.stack(kept_x_hat)
    error = sum((a - b).square().sum().item() for a, b in zip(x, x_hat, strict=True))
    error_dropped = sum((a - b).square().sum().item() for a, b in zip(dropped_x, dropped_x_hat, strict=True))
    return {
        "l0": sum(l0) / len(l0),
        "fvu": error / sum((row - x.mean(0)).square().sum().item() for row in x),
        "fvu_dropped": error_dropped / sum((row - site.mean).square().sum().item() for row in dropped_x),
        "mse": error / len(x),
        "mse_scaled": error / len(x) * SCALE**2,
        "cosine": sum(torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(x, x_hat, strict=True)) / len(x),
        "gamma": x_hat.square().sum().item() / (x * x_hat).sum().item(),
        **{f"ce_{name}": value for name, value in ce.items() if name != "kl"},
        "kl": ce["kl"],
        "delta_ce": ce["spliced"] - ce["clean"],
        "loss_recovered": 1 - (ce["spliced"] - ce["clean"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean": 1 - (ce["spliced"] - ce["clean"]) / (ce["mean"] - ce["clean"]),
        "loss_recovered_all_rows": 1 - (ce["spliced"] - ce["clean"]) / (ce["zero_all_rows"] - ce["clean"]),
        "loss_recovered_mean_all_rows": 1 - (ce["spliced"] - ce["clean"]) / (ce["mean_all_rows"] - ce["clean"]),
    }


def run_batches(bench: Bench, batch_contexts: int) -> list[BatchResult]:
    return [evaluate_batch(bench.llm, bench.sites, batch, check=True) for batch in cut_batches(bench.contexts, batch_contexts)]


def metrics(results: list[BatchResult], site: SplicedSite, run: SplicedRun) -> dict[str, float]:
    num_blocks = 1 + max(int(result.sums.blocks.max()) for result in results)
    site_sums = results[0].sums.sites[site.site.name].zeros(num_blocks)
    run_sums = results[0].sums.runs[run.name].zeros(num_blocks)
    for result in results:
        site_sums.add(result.sums.blocks, result.sums.sites[site.site.name])
        run_sums.add(result.sums.blocks, result.sums.runs[run.name])
    totals = site_sums.total(), run_sums.total()
    found = {**vars(reconstruction_metrics(*totals, run.scale)), **vars(splice_metrics(*totals))}
    return {name: value.item() for name, value in found.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_every_metric_agrees_with_a_slow_evaluation(dtype, tolerance):
    bench = make_bench(dtype)
    results = run_batches(bench, 2)
    for site in bench.sites:
        for run in site.runs:
            assert metrics(results, site, run) == pytest.approx(slow_metrics(bench, site, run), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_another_batch_size_gives_the_same_numbers(dtype, tolerance):
    bench = make_bench(dtype)
    of_size = {size: run_batches(bench, size) for size in (1, 7, 32)}
    for site in bench.sites:
        for run in site.runs:
            one, *others = (metrics(results, site, run) for results in of_size.values())
            assert all(other == pytest.approx(one, rel=tolerance, abs=tolerance) for other in others)
            for count in ("features", "l0_histogram", "gates"):
                first, *others = (sum(getattr(r.firing[run.name], count) for r in results) for results in of_size.values())
                assert dtype == "float32" or all(other.equal(first) for other in others)


def test_firing_counts_and_histogram_agree_with_l0(bench):
    (result,) = run_batches(bench, 100)
    for name, sums in result.sums.runs.items():
        counts = result.firing[name]
        total = int(sums.total().l0)
        assert total == counts.features.sum() == (counts.l0_histogram * torch.arange(NUM_FEATURES + 1)).sum() > 0
        assert counts.l0_histogram.sum() == result.sums.sites[name.partition("/")[0]].total().kept_rows


def test_sums_stand_at_their_document(bench):
    (result,) = run_batches(bench, 100)
    kept = result.sums.sites["resid.0"].kept_rows + result.sums.sites["resid.0"].dropped_rows
    every = [document for context in bench.contexts for document in context.documents.tolist()]
    assert result.sums.blocks.tolist() == [0, 1, 2]
    assert kept.tolist() == [every.count(number) for number in TEXTS]


def test_strata_and_gates_agree_with_loops(bench):
    """Position 1 alone, 2 and 3, 4 to 7, ...; every row in the norm bin that its own norm says."""
    results = run_batches(bench, 2)
    for site in bench.sites:
        for run in site.runs:
            by_position, by_bin, gates = {}, {}, [0, 0, 0]
            for context in bench.contexts:
                tokens, positions = (torch.from_numpy(array).long()[None] for array in (context.tokens, context.positions))
                x = capture(bench.llm.model, [site.site], tokens, positions)[site.site.name][0]
                special = special_tokens(bench.llm.tokenizer)
                kept = candidates(tokens, positions, torch.from_numpy(context.documents)[None], special).rows[0]
                for t in kept.nonzero()[:, 0].tolist():
                    if x[t].norm() > site.max_norm:
                        continue
                    f = run.sae.encode(SCALE * x[t : t + 1])
                    error = (x[t] - run.sae.decode(f)[0] / SCALE).square().sum().item()
                    sums = [1, (x[t] - site.mean).square().sum().item(), error, (f > 0).sum().item()]
                    values = torch.tensor(sums, dtype=torch.float64)
                    stratum = len(bin(int(context.positions[t]))) - 3
                    number = strata.NORM_BINS - 1 - math.floor(-strata.BINS_AN_OCTAVE * math.log2(x[t].norm().item() / site.max_norm))
                    by_position[stratum] = by_position.get(stratum, 0) + values
                    by_bin[number] = by_bin.get(number, 0) + values
                    if hasattr(run.sae, "pre_activations"):
                        pre = run.sae.pre_activations(SCALE * x[t : t + 1])
                        for gate, magnitude in zip((pre.pi_gate[0] > 0).tolist(), (pre.pi_mag[0] > 0).tolist(), strict=True):
                            gates = [gates[0] + gate, gates[1] + magnitude, gates[2] + (gate and magnitude)]
            of_site, of_run = (sum_all(result.sums.strata[name] for result in results) for name in (site.site.name, run.name))
            for found, wanted in (
                (torch.cat([of_site.position, of_run.position]), by_position),
                (torch.cat([of_site.norm, of_run.norm]), by_bin),
            ):
                assert {number for number in range(found.shape[1]) if found[0, number]} == set(wanted)
                for number, values in wanted.items():
                    torch.testing.assert_close(found[:, number], values, rtol=1e-9, atol=1e-9)
            assert sum(result.firing[run.name].gates for result in results).tolist() == gates
            assert (gates[0] > gates[2] > 0) == ("gated" in run.name)


def sum_all(parts: Iterable[strata.StratumSums]) -> strata.StratumSums:
    first, *others = parts
    return sum(others, first)


def test_blocks_are_a_documents_tokens_so_many_at_a_time(bench, monkeypatch):
    monkeypatch.setattr(batch_module, "BLOCK_TOKENS", 8)
    batches = cut_batches(bench.contexts, 2)
    documents, blocks = (torch.cat([getattr(batch, name).flatten() for batch in batches]).tolist() for name in ("documents", "blocks"))
    seen, wanted = {}, {}
    for document, block in zip(documents, blocks, strict=True):
        if document < 0:
            assert block == -1
            continue
        number = seen[document] = seen.get(document, -1) + 1
        assert wanted.setdefault((document, number // 8), block) == block
    assert sorted(wanted.values()) == list(range(len(wanted)))
    assert len(wanted) > 2 * len(seen)
    of_blocks = documents_of_blocks(batches).tolist()
    assert all(of_blocks[block] == document for (document, _), block in wanted.items())
    whole = metrics(run_batches(bench, 2), bench.sites[0], bench.sites[0].runs[0])
    monkeypatch.undo()
    assert metrics(run_batches(bench, 2), bench.sites[0], bench.sites[0].runs[0]) == pytest.approx(whole, rel=1e-12)


def test_the_mask_is_that_of_the_values_an_int8_store_holds(bench):
    site = bench.sites[0]
    tokens, positions = (
        torch.stack([torch.from_numpy(getattr(c, name)).long() for c in bench.contexts]) for name in ("tokens", "positions")
    )
    documents = torch.stack([torch.from_numpy(context.documents) for context in bench.contexts])
    x = capture(bench.llm.model, [site.site], tokens, positions)[site.site.name]
    exact, stored = x.norm(dim=-1), encode(x, "int8").decode().norm(dim=-1)
    may_be_kept = candidates(tokens, positions, documents, special_tokens(bench.llm.tokenizer)).rows
    # The bound lies between the two norms of the row that int8 lengthens most.
    place = torch.where(may_be_kept, stored - exact, -1.0).argmax()
    bound = float((stored.flatten()[place] + exact.flatten()[place]) / 2)
    kept = {
        storage: evaluate_batch(bench.llm, [replace(site, storage=storage, max_norm=bound)], batch, check=False)
        for storage in ("int8", "float32")
        for batch in cut_batches(bench.contexts, 100)
    }
    found = {storage: int(result.sums.sites[site.site.name].total().kept_rows) for storage, result in kept.items()}
    assert found == {"int8": int((may_be_kept & (stored <= bound)).sum()), "float32": int((may_be_kept & (exact <= bound)).sum())}
    assert found["int8"] < found["float32"]


def test_the_identity_recovers_all_and_zero_nothing(bench):
    result = run_batches(bench, 2)[0]
    for checks in result.checks.values():
        assert (checks.identity_loss_recovered, checks.zero_loss_recovered) == (1.0, 0.0)
    assert list(result.checks) == ["resid.0", "resid.2"]


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({3: 1 + 1e-6, 1: 1}, r"resid\.0: splicing in the activations themselves gives losses that are"),
        ({3: 1 + 1e-6, 1: 1 + 1e-6}, r"the layers above resid\.2 give clean losses that are"),
    ],
)
def test_a_tail_that_is_not_the_llms_is_found(bench, monkeypatch, factors, message):
    right = Tail.logits

    def wrong(tail: Tail, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return right(tail, hidden * factors[len(tail._upper.layers)], positions)

    monkeypatch.setattr(Tail, "logits", wrong)
    with pytest.raises(GsaeError, match=message):
        run_batches(bench, 2)


def test_no_hook_is_left_behind(bench):
    run_batches(bench, 2)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in bench.llm.model.modules())
