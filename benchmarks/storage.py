"""What int8 storage loses of real rows, and what equal steps would lose. In: a store of bfloat16 rows. Out: one JSON line.

    .venv/bin/python benchmarks/storage.py --store runs/demo/store

Lost is the sum of |x - stored x|^2 by that of |x - mean|^2, over the first rows of each site. Equal steps are x ~ q * max|x| / 127.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gsae.store import manifest as manifests
from gsae.store.encoding import encode
from gsae.store.stream import Stream


def read_rows(store: Path, site: str, num_rows: int) -> Float[Tensor, "rows d_model"]:
    """Rows of all lanes, in float32."""
    lanes = manifests.load(store).num_lanes
    batch_rows = lanes * -(-num_rows // lanes)
    with Stream(store, site, range(lanes), batch_rows, batch_rows, seed=0, verify_shards=False) as stream:
        return stream.next_batch().decode(torch.device("cpu"), torch.float32)


def in_equal_steps(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    """The plain code that gsae does not use."""
    step = x.abs().amax(dim=1, keepdim=True) / 127
    return (x / step).round() * step


def lost(x: Float[Tensor, "rows d_model"], stored: Float[Tensor, "rows d_model"]) -> float:
    """Share of the variance."""
    return float((x - stored).double().square().sum() / (x - x.mean(dim=0)).double().square().sum())


def main() -> None:
    """Measure every site."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    given = parser.parse_args()
    found = {}
    for site in manifests.load(given.store).sites:
        x = read_rows(given.store, site, given.rows)
        largest = float((x.abs().amax(dim=1) / x.square().mean(dim=1).sqrt()).median())
        int8, equal = lost(x, encode(x, "int8").decode()), lost(x, in_equal_steps(x))
        found[site] = {"int8": int8, "equal_steps": equal, "ratio": equal / int8, "largest_by_root_mean_square": largest}
    sys.stdout.write(json.dumps({"benchmark": "storage", "rows": given.rows, "sites": found}) + "\n")


if __name__ == "__main__":
    main()
