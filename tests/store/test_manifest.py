import json
from dataclasses import replace

import pytest

from gsae.errors import StoreError
from gsae.store.manifest import begin, check_identity, complete_identity, fingerprint, load

LANES = [[[3, 2], [4]], [[2], [5, 1]]]
SETTINGS = {"corpus": {"seed": 0, "format": "text"}, "llm": {"model": "tiny"}}


@pytest.fixture
def store(stores, tmp_path):
    stores.build(tmp_path, LANES)
    return tmp_path


def files(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_fingerprint_follows_values_not_the_order_of_keys():
    one = fingerprint({"a": 1, "b": {"c": [1, 2]}})
    assert one == fingerprint({"b": {"c": [1, 2]}, "a": 1})
    assert len({one, fingerprint({"a": 1, "b": {"c": [2, 1]}}), fingerprint({"a": 1, "b": {"c": [1, 2]}, "d": None})}) == 3


def test_the_same_harvest_may_begin_again(stores, tmp_path):
    begin(tmp_path, stores.layout(2), SETTINGS)
    before = (tmp_path / "identity.json").read_bytes()
    begin(tmp_path, stores.layout(2), SETTINGS)
    assert (tmp_path / "identity.json").read_bytes() == before
    assert complete_identity(stores.layout(2), SETTINGS)["sites"] == {
        "resid.0": {"layer": 0, "module": "model.layers.0"},
        "resid.2": {"layer": 2, "module": "model.layers.2"},
    }


@pytest.mark.parametrize(
    ("layout", "settings", "difference"),
    [
        ({"context_length": 32}, SETTINGS, "context_length 16, this config has 32;"),
        ({}, {**SETTINGS, "corpus": {"seed": 1, "format": "text"}}, r"corpus\.seed 0, this config has 1;"),
        ({}, {"corpus": SETTINGS["corpus"]}, r'llm\.model "tiny", this config has absent;'),
        ({}, {**SETTINGS, "revision": None}, "revision absent, this config has null;"),
        ({"num_lanes": 4, "dtype": "bfloat16"}, SETTINGS, r'dtype "float32", this config has "bfloat16" \(also different: num_lanes\);'),
        ({"sites": ()}, SETTINGS, r"sites\.resid\.0\.layer 0, this config has absent \(also different: "),
    ],
)
def test_a_harvest_with_other_settings_is_refused_before_anything_is_written(stores, tmp_path, layout, settings, difference):
    begin(tmp_path, stores.layout(2), SETTINGS)
    before = files(tmp_path)
    with pytest.raises(StoreError, match=f"was harvested with {difference}.* give harvest.store another directory"):
        begin(tmp_path, replace(stores.layout(2), **layout), settings)
    assert files(tmp_path) == before


def test_progress_without_an_identity_is_not_adopted(stores, tmp_path):
    stores.write_lane(tmp_path, 0, LANES[0])
    with pytest.raises(StoreError, match=r"holds progress logs but no identity\.json"):
        check_identity(tmp_path, complete_identity(stores.layout(2), SETTINGS))


def test_settings_may_not_repeat_the_layout(stores):
    with pytest.raises(ValueError, match="num_lanes"):
        complete_identity(stores.layout(2), {"num_lanes": 3})


def test_no_store_an_unfinished_one_and_one_without_manifest_are_told_apart(stores, tmp_path):
    with pytest.raises(StoreError, match=r"there is no activation store at .*; run gsae harvest first"):
        load(tmp_path)
    stores.begin(tmp_path, 3)
    stores.write_lane(tmp_path, 0, LANES[0])
    stores.write_lane(tmp_path, 1, LANES[1], stop_after=1)
    with pytest.raises(StoreError, match="is not whole: lane 1 and 1 of the 3 others are not harvested to the end; run gsae harvest again"):
        load(tmp_path)
    stores.write_lane(tmp_path, 1, LANES[1])
    stores.write_lane(tmp_path, 2, LANES[1])
    with pytest.raises(StoreError, match=r"is not whole: manifest\.json is missing; run gsae harvest again"):
        load(tmp_path)


def test_a_missing_shard_is_named(store):
    (store / "resid.2" / "0001-000001.tar").unlink()
    with pytest.raises(StoreError, match=r"shard resid\.2/0001-000001\.tar is missing in .*; run gsae harvest again"):
        load(store)
    (store / "resid.2" / "0000-000000.tar").unlink()
    with pytest.raises(StoreError, match=r"shard resid\.2/0000-000000\.tar and 1 others are missing"):
        load(store)


@pytest.mark.parametrize("name", ["manifest.json", "identity.json"])
def test_a_changed_json_file_is_found(store, name):
    content = json.loads((store / name).read_text())
    content["identity"]["context_length"] = 17
    (store / name).write_text(json.dumps(content))
    if name == "identity.json":
        (store / "manifest.json").unlink()
    with pytest.raises(StoreError, match=f"{name} was changed after it was written"):
        load(store)


def test_another_format_and_broken_json_are_refused(store):
    path = store / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2', 1))
    with pytest.raises(StoreError, match="has format 2, this version of gsae reads 1"):
        load(store)
    path.write_text(path.read_text()[:100])
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        load(store)
