"""The native format: a round trip, damage, and the scale folded into the weights."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save

from gsae.errors import CheckpointError
from gsae.sae.formats import fold_scale, read_sae, save_sae
from gsae.sae.objective import SAE_CLASS, build

DESCRIPTION = {"objective": "gated", "site": "resid.2", "scale": 0.125}


def random_sae(name, dtype=torch.float64):
    sae = build(name, 4, 9, seed=0, dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return sae


@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_saved_is_loaded(tmp_path, name, dtype):
    sae = random_sae(name, dtype)
    save_sae(tmp_path / "new" / "directory", sae, {**DESCRIPTION, "objective": name})
    loaded, description = read_sae(tmp_path / "new" / "directory")
    assert type(loaded) is type(sae)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in sae.state_dict().items())
    assert loaded.b_dec.dtype == dtype
    assert description.items() >= {**DESCRIPTION, "objective": name, "d_model": 4, "num_features": 9}.items()


@pytest.fixture
def saved(tmp_path):
    save_sae(tmp_path, random_sae("gated"), DESCRIPTION)
    return tmp_path


def test_a_flipped_byte_is_found(saved):
    data = bytearray((saved / "sae.safetensors").read_bytes())
    data[-5] ^= 1
    (saved / "sae.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        read_sae(saved)


@pytest.mark.parametrize("name", ["sae.safetensors", "sae.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: No such file"):
        read_sae(saved)


def test_a_cut_description_is_refused(saved):
    text = (saved / "sae.json").read_text()
    (saved / "sae.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match="not JSON"):
        read_sae(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3, this version reads 1 and 2"),
        ({"format": 2}, "format 2 and 'parts' do not go together"),
        ({"format": 2, "parts": []}, "has no 'file'"),
        ({"format": 2, "parts": [{"file": "../a", "features": 96, "sha256": ""}]}, "is at '../a', not beside it"),
        ({"format": 2, "parts": [{"file": "a", "features": 1, "sha256": ""}]}, "the features of its parts are not num_features, 9"),
        ({"objective": "topk"}, "objective 'topk' is none of relu, gated"),
        ({"objective": "relu"}, "does not fit sae.json"),
        ({"num_features": 8}, "does not fit sae.json"),
        ({"num_features": 2**30}, "does not fit sae.json"),
        ({"objective": ["gated"]}, r"objective is \['gated'\], not a text"),
        ({"d_model": "x"}, "d_model is 'x', not a whole number above 0"),
        ({"d_model": 10**30}, "d_model is 10*, not a whole number above 0"),
        ({"num_features": True}, "num_features is True, not a whole number above 0"),
        ({"sha256": 3}, "sha256 is 3, not a text"),
        ({"scale": "abc"}, "scale is 'abc', not a number above 0"),
        ({"scale": 0}, "scale is 0, not a number above 0"),
        ({"scale": None}, "scale is None, not a number above 0"),
        ({"scale": 1e999}, "not JSON"),
        ({"lambda": float("nan")}, "not JSON"),
        ({"folded": "false"}, "folded is 'false', not true or false"),
        ({"llm": "gpt2"}, "llm is 'gpt2', not an object with name"),
        ({"llm": {}}, "llm is {}, not an object with name"),
        ({"site": 3}, "site is 3, not a text"),
        ({"layer": True}, "layer is True, not a whole number"),
        ({"rows": "many"}, "rows is 'many', not a whole number"),
        ({"pre_activation_loss": "x"}, "pre_activation_loss is 'x', not a number"),
        ({"text": "x"}, "text is 'x', not an object"),
        ({"mask": {"max_norm": "x"}}, "mask is .*, not an object"),
        ({"results": {"metrics": {}, "intervals": {}, "definitions": {}}}, "results is .*, not an object with metrics, intervals, counts"),
        (
            {"results": {"metrics": {"l0": "x"}, "intervals": {}, "definitions": {}, "counts": {"kept_rows": 1, "documents": 1}}},
            "results is",
        ),
        ({"imported_from": "x"}, "imported_from is 'x', not an object with library"),
    ],
)
def test_another_description_is_refused(saved, change, message):
    path = saved / "sae.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_sae(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tensors", [{}, {"W_dec": torch.ones(9, 4, dtype=torch.int64)}, b"no tensors"])
def test_weights_with_the_right_hash_that_are_none_are_refused(saved, tensors):
    data = tensors if isinstance(tensors, bytes) else save(tensors)
    (saved / "sae.safetensors").write_bytes(data)
    path = saved / "sae.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}))
    with pytest.raises(CheckpointError, match=r"sae.safetensors does not fit sae.json: "):
        read_sae(saved)


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "not a JSON object"), ("[" * 100_000, "not JSON"), ('{"format": 1}', "has no 'objective'")]
)
def test_a_description_without_the_needed_keys_is_refused(saved, text, message):
    (saved / "sae.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_sae(saved)


@pytest.mark.parametrize("name", SAE_CLASS)
def test_a_folded_sae_does_on_raw_rows_what_the_sae_does_on_scaled_ones(name):
    sae, scale = random_sae(name), 0.37
    x = 4 * torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    folded = fold_scale(sae, scale)
    f = sae.encode(scale * x)
    torch.testing.assert_close(folded(x), sae(scale * x) / scale)
    torch.testing.assert_close(folded.encode(x), f * sae.W_dec.norm(dim=1) / scale)
    assert 0 < (f > 0).double().mean() < 1
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones(9, dtype=torch.float64))


def test_folding_leaves_the_sae_itself_and_a_zero_decoder_row_alone():
    sae = random_sae("gated")
    with torch.no_grad():
        sae.W_dec[3] = 0
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    folded = fold_scale(sae, 2.0)
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())
    assert folded.W_dec[3].abs().max() == 0
    assert all(value.isfinite().all() for value in folded.state_dict().values())
