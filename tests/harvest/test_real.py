"""The harvest of the real thing: SmolLM2's layers over real Wikipedia articles."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REAL_LLM_DTYPE, write_config
from ranks import run_gsae
from torch import Tensor
from trees import tree

from gsae.store.manifest import load
from gsae.store.progress import read_records
from gsae.store.shards import read_tar, tar_path

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "runs" / "assets"

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(not ASSETS.exists(), reason="the demo's LLM and text are not prepared: python launch/prepare_demo.py runs/assets"),
]


def config_of(folder: Path, **harvest) -> Path:
    settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    settings["output"] = str(folder / "runs")
    for section, key in (("corpus", "path"), ("llm", "model")):
        settings[section][key] = str(ROOT / settings[section][key])
    settings["llm"]["dtype"] = REAL_LLM_DTYPE
    settings["corpus"] |= {"num_lanes": 4, "max_document_characters": None}
    settings["harvest"] |= {"batch_contexts": 4, "contexts_per_shard": 4, "calibration_contexts": 4, "max_tokens": 4096} | harvest
    return write_config(folder / "config.yaml", settings)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> Path:
    """The store of one rank."""
    folder = tmp_path_factory.mktemp("one")
    run_gsae(1, ["harvest", config_of(folder)], timeout_seconds=300)
    return folder / "runs/store"


def rows_by_place(store: Path) -> dict[tuple[int, int, int, int], Tensor]:
    """Rows at resid.15 by lane, document, position and token, as far as that names one."""
    rows: dict[tuple[int, int, int, int], Tensor] = {}
    for lane in range(load(store).num_lanes):
        for record in read_records(store, lane):
            for member in read_tar(tar_path(store, "resid.15", lane, record.shard)):
                each = member.rows
                for place in zip(each.document.tolist(), each.position.tolist(), each.token.tolist(), each.x.float(), strict=True):
                    rows[lane, *place[:3]] = place[3] if (lane, *place[:3]) not in rows else torch.full_like(place[3], torch.nan)
    return {place: x for place, x in rows.items() if not x.isnan().any()}


@pytest.mark.parametrize("options", [[], ["--llm.sharding", "zero3"]], ids=["replicated", "zero3"])
def test_two_ranks_harvest_the_same_bytes(one_rank, tmp_path, options):
    """Also where each holds half of the parameters: products of the same batches are the same."""
    run_gsae(2, ["harvest", config_of(tmp_path), *options], timeout_seconds=300)
    assert tree(tmp_path / "runs/store") == tree(one_rank)


def test_nearly_all_tokens_that_are_computed_are_real(one_rank):
    manifest = load(one_rank)
    contexts = sum(record.contexts for lane in range(manifest.num_lanes) for record in read_records(one_rank, lane))
    for site in manifest.sites.values():
        assert site.rows + sum(site.dropped.values()) >= 0.98 * contexts * manifest.context_length


def test_packed_and_unpacked_rows_agree(one_rank, tmp_path):
    """The same tokens at the same positions of the same documents, most of them in the same segments; attention across segments would
    move half of each row."""
    run_gsae(2, ["harvest", config_of(tmp_path, packed=False, max_tokens=8192)], timeout_seconds=300)
    assert json.loads((tmp_path / "runs/store/manifest.json").read_text())["identity"]["packed"] is False
    packed, alone = (rows_by_place(store) for store in (one_rank, tmp_path / "runs/store"))
    shared = packed.keys() & alone.keys()
    assert len(shared) > 1000
    differences = [float((packed[place] - alone[place]).norm() / packed[place].norm()) for place in shared]
    assert sorted(differences)[len(differences) // 2] < 0.02  # bfloat16
