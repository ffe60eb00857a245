"""What each part of a training step could be made of, measured. In: sizes. Out: one JSON line an alternative.

    python benchmarks/choices.py --features 9216 --l0 60

The parts are those of gsae/sae/active.py: the dense product with the choice of active entries, a decode, the products at the entries,
a weight's gradient; then whole steps. Rows are normal, directions random unit vectors, one bias opens the stated number of gates.
`relative` is the median of the rounds' times over those of the alternative that gsae takes.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from gsae.sae.active import ActiveSet, find_active
from gsae.sae.gated import GatedSAE
from gsae.sae.objective import build, objective
from gsae.sae.sparse import sparse_objective

Alternatives = dict[str, Callable[[], object]]
"""By name; the first is the one that gsae takes."""


def encodes(x: Tensor, sae: GatedSAE) -> Alternatives:
    """Finding the active entries."""
    W, b = sae.W_gate.detach(), sae.b_gate.detach()
    return {
        "proposed in bfloat16, decided in float32": lambda: find_active(x, W, b, in_bfloat16=True),
        "float32": lambda: find_active(x, W, b, in_bfloat16=False),
        "float32 product alone": lambda: x @ W,
        "bfloat16 product alone": lambda: x.bfloat16() @ W.bfloat16(),
    }


def decodes(active: ActiveSet, sae: GatedSAE) -> Alternatives:
    """One decode."""
    W = sae.W_dec.detach()
    size = (active.num_rows, active.num_features)
    dense = torch.zeros(size).index_put_((active.row, active.feature), active.a)

    def csr() -> Tensor:
        return torch.sparse_csr_tensor(active.row_offsets, active.feature, active.a, size, check_invariants=False) @ W

    return {
        "embedding_bag": lambda: active.sums_over_features(active.a, W),
        "sparse CSR product": csr,
        "dense float32": lambda: dense @ W,
        "dense bfloat16": lambda: dense.bfloat16() @ W.bfloat16(),
    }


def products(active: ActiveSet, x: Tensor, sae: GatedSAE) -> Alternatives:
    """The gradient of one decode's features."""
    W = sae.W_dec.detach()
    return {
        "sampled_addmm": lambda: active.products(x, W),
        "gathered rows": lambda: (x[active.row] * W[active.feature]).sum(dim=1),
        "dense float32": lambda: x @ W.T,
        "dense bfloat16": lambda: x.bfloat16() @ W.T.bfloat16(),
    }


def gradients(active: ActiveSet, x: Tensor) -> Alternatives:
    """One weight's gradient, the sort by feature included."""
    size = (active.num_features, active.num_rows)
    dense = torch.zeros(size).index_put_((active.feature, active.row), active.a)

    def fresh() -> ActiveSet:
        return ActiveSet(active.num_rows, active.num_features, active.row, active.feature, active.a)

    def csr() -> Tensor:
        own = fresh()
        values = own.a[own.feature_order]
        return torch.sparse_csr_tensor(own.feature_offsets, own.row_by_feature, values, size, check_invariants=False) @ x

    return {
        "embedding_bag by feature": lambda: fresh().sums_over_rows(active.a, x),
        "sparse CSR product": csr,
        "index_add of gathered rows": lambda: torch.zeros(size[0], x.shape[1]).index_add_(
            0, active.feature, x[active.row] * active.a[:, None]
        ),
        "dense float32": lambda: dense @ x,
        "dense bfloat16": lambda: dense.bfloat16() @ x.bfloat16(),
    }


def steps(x: Tensor, sae: GatedSAE) -> Alternatives:
    """Forward and backward, without the optimizer."""

    def step(forward: Callable[[GatedSAE, Tensor], Tensor], *, autocast: bool = False) -> Callable[[], None]:
        def run() -> None:
            sae.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = forward(sae, x)
            torch.autograd.backward(loss)

        return run

    def dense(sae: GatedSAE, x: Tensor) -> Tensor:
        return objective("gated")(sae, x).losses.total(0.1)

    return {
        "sparse": step(lambda sae, x: sparse_objective("gated")(sae, x).losses.total(0.1)),
        "sparse, float32 encode": step(lambda sae, x: sparse_objective("gated", in_bfloat16=False)(sae, x).losses.total(0.1)),
        "dense": step(dense),
        "dense, bfloat16 autocast": step(dense, autocast=True),
        "dense, torch.compile": step(torch.compile(dense)),
        "dense, torch.compile, bfloat16 autocast": step(torch.compile(dense), autocast=True),
    }


def compare(part: str, alternatives: Alternatives, case: dict[str, int], num_rounds: int) -> None:
    """Print a line for each, timed in turn."""
    for run in alternatives.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(num_rounds):
        for name, run in alternatives.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    own = next(iter(times.values()))
    for name, found in times.items():
        relative = median(other / ours for other, ours in zip(found, own, strict=True))
        line = {"part": part, "alternative": name, **case, "milliseconds": round(1e3 * median(found), 1), "relative": round(relative, 2)}
        print(json.dumps(line), flush=True)


def main() -> None:
    """All parts at each L0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=9216)
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--l0", type=int, nargs="+", default=[20, 60])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps-only", action="store_true", help="whole steps only, without torch.compile; for many values of L0")
    options = parser.parse_args()
    x = torch.randn(options.rows, options.d_model, generator=torch.Generator().manual_seed(0)) / options.d_model**0.5
    sae = build("gated", options.d_model, options.features, seed=0)
    assert isinstance(sae, GatedSAE)
    for l0 in options.l0:
        with torch.no_grad():
            a = (x @ sae.W_gate).flatten()
            sae.b_gate.fill_(-float(a.topk(l0 * options.rows + 1).values[-1]))
        case = {
            "features": options.features,
            "d_model": options.d_model,
            "rows": options.rows,
            "l0": l0,
            "threads": torch.get_num_threads(),
        }
        whole = steps(x, sae)
        if options.steps_only:
            compare("step", {name: run for name, run in whole.items() if "compile" not in name}, case, options.rounds)
            continue
        active = find_active(x, sae.W_gate.detach(), sae.b_gate.detach())
        parts = {"encode": encodes(x, sae), "decode": decodes(active, sae), "products": products(active, x, sae)}
        for part, alternatives in {**parts, "weight gradient": gradients(active, x), "step": whole}.items():
            compare(part, alternatives, case, options.rounds)


if __name__ == "__main__":
    main()
