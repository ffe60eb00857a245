"""What evaluation costs beside whole forwards. In: the demo's config, store and runs. Out: one JSON line.

    bash launch/demo.sh
    .venv/bin/python benchmarks/evaluate.py

- What has to be computed is counted: layers and LM heads (one clean forward for all; at each site its two ablations and each run's splice
  run the layers above it and a head; an ablation of all rows needs one row of one context). `ratio_to_layers` is the time of a whole
  evaluation batch by that of these layers and heads; `ratio_to_work` counts the losses over the vocabulary and the SAEs' products too.
- `times_faster_than_full_forwards`: the time of the same losses by a whole forward each, SAEs included, by that of the batch.
- `peak_megabytes`: peak megabytes of the process after some batches, and after four times as many.

Medians of rounds in which all are timed in turn.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gsae.corpus.contexts import held_out_contexts
from gsae.evaluate.batch import SplicedSite, cut_batches, evaluate_batch
from gsae.evaluate.reconstruction import reconstruct
from gsae.evaluate.results import find_trained_runs
from gsae.evaluate.run import load_sites
from gsae.evaluate.splice import EvaluationBatch, Targets, cross_entropy, find_targets, spliced_losses
from gsae.llm.load import LLM, load
from gsae.llm.site import capture, substitute
from gsae.settings import read_config
from gsae.store.manifest import load as load_manifest
from gsae.store.opening import store_of


def seconds_of(work: Callable[[], Any]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def count_work(llm: LLM, sites: Sequence[SplicedSite]) -> tuple[int, int]:
    """Layers and LM heads that an evaluation batch has to compute."""
    num_layers = llm.model.config.num_hidden_layers
    tails = [num_layers - 1 - each.site.layer for each in sites]
    splices = [2 + len(each.runs) for each in sites]
    return num_layers + sum(tail * count for tail, count in zip(tails, splices, strict=True)), 1 + sum(splices)


def time_of_layers(llm: LLM, sites: Sequence[SplicedSite], batch: EvaluationBatch, x: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds of a layer and of the LM head."""
    low, high = sites[0], sites[-1]
    first, last = (seconds_of(lambda each=each: each.tail.logits(x[each.site.name], batch.positions)) for each in (low, high))
    layer = (first - last) / (high.site.layer - low.site.layer)
    return layer, last - layer * (llm.model.config.num_hidden_layers - 1 - high.site.layer)


def time_beside_layers(sites: Sequence[SplicedSite], x: dict[str, torch.Tensor], clean: torch.Tensor, targets: Targets) -> float:
    """Seconds of all losses over the vocabulary, and of the SAEs' encodings and decodings."""

    def work() -> None:
        for each in sites:
            rows = x[each.site.name].flatten(0, 1)
            for run in each.runs:
                reconstruct(run.sae, rows, run.scale, torch.ones(len(rows), dtype=torch.bool, device=rows.device))
                spliced_losses(clean, clean, targets)
            for _ in ("zero", "mean", "zero at all rows", "mean at all rows"):
                cross_entropy(clean, targets)
        cross_entropy(clean, targets)

    return seconds_of(work)


def full_forwards(llm: LLM, sites: Sequence[SplicedSite], batch: EvaluationBatch) -> None:
    """All losses of the batch, by whole forwards."""
    targets = find_targets(batch)

    def logits(each: SplicedSite, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return substitute(llm.model, each.site, batch.tokens, batch.positions, change)

    clean = logits(sites[0], lambda x: x)
    cross_entropy(clean, targets)
    for each in sites:
        for vector in (torch.zeros_like(each.mean), each.mean):
            for _ in ("kept rows", "all rows"):
                cross_entropy(logits(each, lambda x, vector=vector: vector.to(x.dtype).expand_as(x)), targets)
        for run in each.runs:

            def spliced(x: torch.Tensor, run: Any = run) -> torch.Tensor:
                rows = x.flatten(0, 1)
                return reconstruct(run.sae, rows, run.scale, torch.ones(len(rows), dtype=torch.bool, device=x.device)).x_hat.view_as(x)

            spliced_losses(logits(each, spliced), clean, targets)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?", default="configs/demo.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-contexts", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2, help="before the first look at memory")
    options = parser.parse_args()
    config = read_config("evaluate", [options.config])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest, llm = load_manifest(store_of(config)), load(config.llm, device)
    sites = load_sites(manifest, find_trained_runs(Path(config.output), manifest), llm, device)
    contexts = held_out_contexts(config.corpus, config.evaluate, llm.tokenizer, manifest.context_length)
    batches = [batch.to(device) for batch in cut_batches(contexts, options.batch_contexts) if len(batch.tokens) == options.batch_contexts]
    (layers, heads), batch, found = count_work(llm, sites), batches[0], []
    evaluate_batch(llm, sites, batch, check=False)
    with torch.no_grad():
        x = capture(llm.model, [each.site for each in sites], batch.tokens, batch.positions)
        clean, targets = sites[-1].tail.logits(x[sites[-1].site.name], batch.positions), find_targets(batch)
        for _ in range(options.rounds):
            layer, head = time_of_layers(llm, sites, batch, x)
            ours = seconds_of(lambda: evaluate_batch(llm, sites, batch, check=False))
            full = seconds_of(lambda: full_forwards(llm, sites, batch))
            found.append((layers * layer + heads * head, time_beside_layers(sites, x, clean, targets), ours, full))
    print(
        json.dumps(
            {
                "benchmark": "evaluate",
                "device": str(device),
                "sites": len(sites),
                "runs": sum(len(each.runs) for each in sites),
                "rows": batch.tokens.numel(),
                "layers": layers,
                "heads": heads,
                "layers_and_heads_seconds": round(median(each[0] for each in found), 3),
                "losses_and_saes_seconds": round(median(each[1] for each in found), 3),
                "batch_seconds": round(median(each[2] for each in found), 3),
                "ratio_to_layers": round(median(ours / of_layers for of_layers, _, ours, _ in found), 3),
                "ratio_to_work": round(median(ours / (of_layers + beside) for of_layers, beside, ours, _ in found), 3),
                "times_faster_than_full_forwards": round(median(full / ours for *_, ours, full in found), 2),
                "peak_megabytes": measure_memory(llm, sites, batches, options.batches),
            }
        )
    )


def measure_memory(llm: LLM, sites: Sequence[SplicedSite], batches: Sequence[EvaluationBatch], count: int) -> list[int]:
    """Peak of the process after `count` batches, and after four times as many."""
    peaks = []
    for number in range(4 * count):
        evaluate_batch(llm, sites, batches[number % len(batches)], check=False)
        if number + 1 in (count, 4 * count):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return peaks


if __name__ == "__main__":
    main()
