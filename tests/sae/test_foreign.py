"""Other libraries' formats without these libraries: their formulas written out here, slowly. tests/interop has the real ones."""

import pytest
import torch

from gsae.errors import CheckpointError
from gsae.sae.foreign import (
    dictionary_config,
    dictionary_tensors,
    from_dictionary,
    from_saelens,
    saelens_architecture,
    saelens_config,
    saelens_tensors,
)
from gsae.sae.objective import SAE_CLASS, build

D_MODEL, FEATURES = 5, 30


def random_sae(name):
    sae = build(name, D_MODEL, FEATURES, seed=0, dtype=torch.float64)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return sae


def random_tensors(*names, threshold_shift=0.0):
    """Tensors of a SAELens SAE, by name."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D_MODEL, FEATURES), "W_dec": (FEATURES, D_MODEL), "b_dec": (D_MODEL,)}
    drawn = {name: torch.randn(shapes.get(name, (FEATURES,)), generator=generator) for name in ("W_enc", "W_dec", "b_dec", *names)}
    return drawn | ({"threshold": drawn["threshold"].abs() + threshold_shift} if "threshold" in names else {})


def cfg(architecture, **changes):
    return {"architecture": architecture, "d_in": D_MODEL, "d_sae": FEATURES, "metadata": {"sae_lens_version": "6.0.0"}, **changes}


def saelens_formula(w, architecture, x, subtracts=True):
    """f and x_hat as sae_lens 6 writes them."""
    w = {name: value.double() for name, value in w.items()}
    x = x - w["b_dec"] * subtracts
    if architecture == "gated":
        gate = (x @ w["W_enc"] + w["b_gate"] > 0).double()
        f = gate * torch.relu(x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"])
    else:
        pre = x @ w["W_enc"] + w["b_enc"]
        f = torch.relu(pre) * (pre > w.get("threshold", torch.zeros(()))).double()
    return f, f @ w["W_dec"] + w["b_dec"]


def dictionary_formula(w, x):
    """f and x_hat as dictionary_learning 0.1 writes them."""
    bias = w.get("decoder_bias", w.get("bias"))
    encoded = (x - bias) @ w["encoder.weight"].T
    if "gate_bias" in w:
        f = (encoded + w["gate_bias"] > 0).double() * torch.relu(w["r_mag"].exp() * encoded + w["mag_bias"])
    else:
        f = torch.relu(encoded + w["encoder.bias"])
    return f, f @ w["decoder.weight"].T + bias


def rows():
    return 3 * torch.randn(400, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 2


def assert_same(sae, f, x_hat):
    ours = sae.encode(rows())
    assert 0.02 < (ours > 0).double().mean() < 0.98
    torch.testing.assert_close(ours, f)
    torch.testing.assert_close(sae.decode(ours), x_hat)


@pytest.mark.parametrize("name", SAE_CLASS)
@pytest.mark.parametrize("as_jumprelu", [False, True])
def test_saelens_tensors_and_back(name, as_jumprelu):
    sae = random_sae(name)
    architecture = "jumprelu" if as_jumprelu else saelens_architecture(sae)
    assert architecture == ("jumprelu" if as_jumprelu else "standard" if name == "relu" else "gated")
    tensors, config = saelens_tensors(sae, architecture), saelens_config(sae, architecture, {"objective": name})
    assert_same(sae, *saelens_formula(tensors, architecture, rows()))
    assert_same(from_saelens(tensors, config, "here"), sae.encode(rows()), sae(rows()))


@pytest.mark.parametrize("name", SAE_CLASS)
def test_dictionary_learning_tensors_and_back(name):
    sae = random_sae(name)
    tensors, config = dictionary_tensors(sae), dictionary_config(sae, {"objective": name})
    assert config["trainer"]["dict_class"] == ("AutoEncoder" if name == "relu" else "GatedAutoEncoder")
    assert_same(sae, *dictionary_formula(tensors, rows()))
    assert_same(from_dictionary(tensors, config, "here"), sae.encode(rows()), sae(rows()))


@pytest.mark.parametrize(
    ("architecture", "names"), [("gated", ("b_gate", "b_mag", "r_mag")), ("standard", ("b_enc",)), ("jumprelu", ("b_enc", "threshold"))]
)
@pytest.mark.parametrize("subtracts", [True, False])
def test_a_saelens_sae_that_does_not_subtract_b_dec_is_imported_exactly(architecture, names, subtracts):
    tensors = random_tensors(*names)
    sae = from_saelens(tensors, cfg(architecture, apply_b_dec_to_input=subtracts), "here")
    assert_same(sae, *saelens_formula(tensors, architecture, rows(), subtracts))


def test_a_threshold_below_0_is_imported_exactly():
    tensors = random_tensors("b_enc", "threshold", threshold_shift=-1.0)
    assert (tensors["threshold"] < 0).any()
    assert_same(from_saelens(tensors, cfg("jumprelu"), "here"), *saelens_formula(tensors, "jumprelu", rows()))


def test_the_config_says_where_the_sae_belongs_and_what_was_masked():
    known = {"layer": 15, "llm": {"name": "owner/llama"}, "context_length": 128, "text": {"name": "pages"}, "lambda": 0.17}
    known |= {"mask": {"max_norm": 512.0}, "results": {"metrics": {}}, "objective": "gated"}
    config = saelens_config(random_sae("gated"), "gated", known)
    assert {key: config[key] for key in ("d_in", "d_sae", "apply_b_dec_to_input", "normalize_activations", "reshape_activations")} == {
        "d_in": D_MODEL,
        "d_sae": FEATURES,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    metadata = config["metadata"]
    assert (metadata["model_name"], metadata["hook_name"], metadata["context_size"]) == ("owner/llama", "blocks.15.hook_resid_post", 128)
    assert metadata["dataset_path"] == "pages"
    assert range(128)[slice(*metadata["seqpos_slice"])] == range(1, 128)
    assert metadata["gsae"] == {key: value for key, value in known.items() if key != "results"}
    config = dictionary_config(random_sae("gated"), known)
    assert (config["trainer"]["lm_name"], config["trainer"]["layer"], config["buffer"]["ctx_len"]) == ("owner/llama", 15, 128)
    assert config["gsae"]["mask"] == {"max_norm": 512.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "topk"}, "here: architecture 'topk' cannot be imported exactly; give one of gated, standard, jumprelu"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations 'layer_norm' cannot be imported exactly"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations 'expected_average_only_in'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z'"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "reshape_activations 'hook_z'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn_str 'tanh-relu'"),
        ({"d_in": None}, "d_in is None, not a whole number above 0"),
        ({"d_sae": 31}, r"tensor W_dec is \(30, 5\), its config asks for \(31, 5\)"),
        ({"architecture": "gated"}, "tensor b_enc is .*, its config asks for none of that name"),
    ],
)
def test_a_saelens_sae_that_is_not_ours_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        from_saelens(random_tensors("b_enc"), cfg("standard") | changes, "here")


def test_a_missing_tensor_and_a_fine_tuned_one_are_refused():
    tensors = random_tensors("b_enc")
    with pytest.raises(CheckpointError, match="tensor b_gate is missing"):
        from_saelens({**random_tensors("b_mag", "r_mag")}, cfg("gated"), "here")
    from_saelens({**tensors, "scaling_factor": torch.ones(FEATURES)}, cfg("standard"), "here")
    with pytest.raises(CheckpointError, match="scaling_factor"):
        from_saelens({**tensors, "scaling_factor": torch.full((FEATURES,), 1.5)}, cfg("standard"), "here")


def test_what_is_of_another_kind_is_called_so_before_its_parts_are_looked_at():
    counter = {"k": torch.tensor(3)}
    with pytest.raises(CheckpointError, match="architecture 'topk' cannot be imported exactly"):
        from_saelens(counter, cfg("topk"), "here")
    with pytest.raises(CheckpointError, match="dict_class 'AutoEncoderTopK' cannot be imported exactly"):
        from_dictionary(counter, {"trainer": {"dict_class": "AutoEncoderTopK"}}, "here")


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "AutoEncoderTopK"}, "dict_class 'AutoEncoderTopK' cannot be imported exactly; give one of GatedAutoEncoder"),
        ({"dict_class": None}, "dict_class is None, not a text"),
        ({"dict_class": "AutoEncoder"}, "tensor bias is missing"),
        ({"dict_size": 29}, r"tensor decoder.weight is \(5, 30\), its config asks for \(5, 29\)"),
        ({"activation_dim": "5"}, "activation_dim is '5', not a whole number above 0"),
    ],
)
def test_a_dictionary_that_is_not_ours_is_refused(trainer, message):
    sae = random_sae("gated")
    config = dictionary_config(sae, {})
    config["trainer"] |= trainer
    with pytest.raises(CheckpointError, match=message):
        from_dictionary(dictionary_tensors(sae), config, "here")
