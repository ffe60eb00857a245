import json

import pytest
import torch
from made_up_rows import statistics_of
from made_up_shards import SiteRows, write_shard

from gsae.corpus.contexts import Cursor
from gsae.errors import StoreError
from gsae.store.finish import finish, is_finished, read_calibration, warnings, write_calibration
from gsae.store.manifest import Share, fingerprint, load
from gsae.store.progress import ProgressLog
from gsae.store.shards import ContextRows

LANES = [[[3, 2], [4]], [[2], [5, 1]]]


def all_rows(stores, site):
    """The rows of a store of LANES at a site, in float64, from what wrote them."""
    parts = []
    for lane, shards in enumerate(LANES):
        for index, context_rows in enumerate(shards):
            first_row = sum(map(sum, shards[:index]))
            parts += [context.x for context in stores.shard(lane, first_row, context_rows)[site].contexts]
    return torch.cat(parts).double()


def write_rows(stores, store, candidates, kept, original=None):
    """A store of one lane with the same rows at both sites; the median norm is 100."""
    stores.begin(store, 1)
    x = candidates[kept]
    integers = torch.arange(len(x), dtype=torch.int32)
    rows = SiteRows(
        [ContextRows(x, integers, integers, integers)], statistics_of(candidates, kept, 100.0, {"special": 2}, original=original)
    )
    sites = {site.name: rows for site in stores.sites}
    write_shard(ProgressLog.open(store, 0), sites, Cursor(0, 0, 0), Cursor(1, 0, 0), last=True)
    return finish(store)


def test_scales_make_the_rows_of_a_whole_store_unit(stores, tmp_path):
    manifest = stores.build(tmp_path, LANES)
    for name, site in manifest.sites.items():
        x = all_rows(stores, name)
        assert site.rows == len(x)
        assert torch.allclose(site.mean, x.mean(dim=0), rtol=1e-12)
        assert float(((x - x.mean(dim=0)) * site.scale).square().sum(dim=1).mean()) == pytest.approx(1, rel=1e-12)
        assert float((x * site.scale_unit_mean_square).square().sum(dim=1).mean()) == pytest.approx(1, rel=1e-12)


def test_the_manifest_says_what_a_reader_needs(stores, tmp_path):
    manifest = stores.build(tmp_path, LANES, dtype="bfloat16")
    assert (manifest.d_model, manifest.num_lanes, manifest.context_length, manifest.dtype) == (4, 2, 16, "bfloat16")
    assert list(manifest.sites) == ["resid.0", "resid.2"]
    site = manifest.sites["resid.2"]
    assert (site.layer, site.module, site.median_norm, site.max_norm) == (2, "model.layers.2", 100.0, 300.0)
    assert site.dropped == {"position_0": 6, "outlier": 0, "non_finite": 0}
    assert [lane.shards for lane in manifest.lanes] == [2, 2]
    assert manifest.identity["corpus"] == {"seed": 0, "format": "text"}


def test_a_manifest_is_read_back_as_it_was_made(stores, tmp_path):
    made = stores.build(tmp_path, LANES)
    again = load(tmp_path)
    assert (again.fingerprint, again.identity, again.lanes) == (made.fingerprint, made.identity, made.lanes)
    for name, site in made.sites.items():
        assert torch.equal(again.sites[name].mean, site.mean)
        assert (again.sites[name].scale, again.sites[name].kept_above) == (site.scale, site.kept_above)


def test_the_order_in_which_lanes_were_written_leaves_no_trace(stores, tmp_path):
    stores.build(tmp_path / "a", LANES)
    stores.begin(tmp_path / "b", 2)
    for lane in (1, 0):
        stores.write_lane(tmp_path / "b", lane, LANES[lane])
    finish(tmp_path / "b")
    content = [
        {path.relative_to(store): path.read_bytes() for path in store.rglob("*.*") if path.is_file()}
        for store in (tmp_path / "a", tmp_path / "b")
    ]
    assert len(content[0]) == 3 + 2 + 8  # identity, calibration, manifest; logs; tars
    assert content[0] == content[1]


def test_shares_above_the_median_norm_by_hand(stores, tmp_path):
    # Norms 100, 100, 250, 400 x the median of 100; the last one is dropped.
    # Kept: 1 of 3 rows above 2x, with 6.25 of 8.25 of the squared norm. Candidates: 2 of 4 above 2x, with 22.25 of 24.25.
    x = torch.tensor([[100.0, 0, 0, 0], [0, 100, 0, 0], [0, 0, 250, 0], [0, 0, 0, 400]])
    site = write_rows(stores, tmp_path, x, torch.tensor([True, True, True, False])).sites["resid.0"]
    assert site.kept_above[2] == Share(1 / 3, 6.25 / 8.25)
    assert site.kept_above[3] == Share(0, 0)
    assert site.candidates_above[2] == Share(0.5, 22.25 / 24.25)
    assert site.candidates_above[3] == Share(0.25, 16 / 24.25)
    assert site.dropped == {"special": 2, "outlier": 1, "non_finite": 0}


def test_heavy_kept_rows_and_rows_that_are_not_finite_are_warned_of(stores, tmp_path):
    x = torch.tensor([[100.0, 0, 0, 0], [0, 100, 0, 0], [0, 0, 250, 0], [0, 0, 0, torch.inf]])
    lines = warnings(write_rows(stores, tmp_path, x, torch.tensor([True, True, True, False])))
    assert lines[0].startswith("resid.0: kept rows above 2 x the median norm hold 76% of the squared norm")  # 6.25 / 8.25
    assert lines[1].startswith("resid.0: 1 rows were NaN or infinite")
    assert len(lines) == 4


def test_rows_that_storing_changed_much_are_warned_of(stores, tmp_path):
    # Rows +-100 in one dimension: variance 100^2 a row. Storing moved both by 10 (1 %), or a little more (1.03 %).
    x, kept = torch.tensor([[100.0, 0, 0, 0], [-100, 0, 0, 0]]), torch.tensor([True, True])
    for name, offset, words in (("fine", 10.0, []), ("lossy", 10.125, ["resid.0: 1.0% of the variance", "resid.2: 1.0% of the variance"])):
        manifest = write_rows(stores, tmp_path / name, x, kept, original=x + torch.tensor([0, 0, offset, 0]))
        assert manifest.sites["resid.0"].storage_fvu == pytest.approx(offset**2 / 100**2, rel=1e-12)
        assert [line[:29] for line in warnings(manifest)] == words


def test_a_manifest_of_before_the_cost_of_storing_was_recorded_is_read(stores, tmp_path):
    stores.build(tmp_path, LANES)
    content = json.loads((tmp_path / "manifest.json").read_text())
    del content["digest"]
    for site in content["sites"].values():
        del site["storage_fvu"]
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "digest": fingerprint(content)}))
    assert load(tmp_path).sites["resid.2"].storage_fvu == 0


def test_a_healthy_store_has_no_warnings(stores, tmp_path):
    assert warnings(stores.build(tmp_path, LANES)) == []


def test_a_store_that_is_not_whole_cannot_be_finished(stores, tmp_path):
    stores.begin(tmp_path, 2)
    stores.write_lane(tmp_path, 0, LANES[0])
    stores.write_lane(tmp_path, 1, LANES[1], stop_after=1)
    with pytest.raises(StoreError, match="is not whole: lane 1 ends after 1 shards; run gsae harvest again"):
        finish(tmp_path)
    stores.write_lane(tmp_path, 1, LANES[1])
    (tmp_path / "calibration.json").unlink()
    with pytest.raises(StoreError, match=r"calibration\.json is missing"):
        finish(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("name", ["manifest.json", "progress/0001.jsonl", "resid.2/0000-000001.tar"])
@pytest.mark.parametrize(
    "spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-2])], ids=["missing", "short"]
)
def test_a_harvest_run_again_repairs_a_finished_store(stores, tmp_path, name, spoil):
    stores.build(tmp_path, LANES)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert is_finished(tmp_path)
    spoil(tmp_path / name)
    assert not is_finished(tmp_path)
    stores.build(tmp_path, LANES)
    assert is_finished(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_a_lane_without_rows_names_the_cure(stores, tmp_path):
    with pytest.raises(StoreError, match=r"lane 1 has no rows at resid\.0; lower corpus\.num_lanes \(2\) or give more text"):
        stores.build(tmp_path, [[[3]], [[0], []]])


def test_rows_that_are_all_equal_have_no_scale(stores, tmp_path):
    with pytest.raises(StoreError, match=r"resid\.0: all kept rows are equal"):
        write_rows(stores, tmp_path, torch.ones(3, 4), torch.ones(3, dtype=torch.bool))


def test_calibration_is_absent_then_kept_and_never_nonsense(tmp_path):
    assert read_calibration(tmp_path) is None
    write_calibration(tmp_path, {"resid.0": 12.5})
    assert read_calibration(tmp_path) == {"resid.0": 12.5}
    for norm in (float("nan"), 0.0):
        with pytest.raises(StoreError, match=r"resid\.2: the median norm of the calibration sample is"):
            write_calibration(tmp_path, {"resid.2": norm})
    assert json.loads((tmp_path / "calibration.json").read_text())["median_norms"] == {"resid.0": 12.5}
