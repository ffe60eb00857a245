"""Other libraries' SAEs. In: an SAE on raw activations. Out: the tensors and the config object of SAELens or dictionary_learning, and back.

SAELens (sae_lens 6.54.12, SAE.load_from_disk): `sae_weights.safetensors`, `cfg.json`. Its SAEs subtract b_dec from their input when
`apply_b_dec_to_input` is true. dictionary_learning (0.1.0, dictionary.py): `ae.pt`, a state dict, and `config.json`.
All arithmetic is in float64; the callers choose the type that is stored.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gsae.errors import CheckpointError
from gsae.sae.contents import COUNT, FLAG, OBJECT, SIZE, TEXT, or_null, require_fields, require_weights
from gsae.sae.folded import jumprelu_weights
from gsae.sae.gated import GatedSAE
from gsae.sae.objective import SAE
from gsae.sae.relu import ReluSAE

FILES = {"saelens": ("sae_weights.safetensors", "cfg.json"), "dictionary_learning": ("ae.pt", "config.json")}
"""By library, the names of the weights and of the config."""
SAELENS_VERSION = "6.0.0"
"""What a cfg.json must call itself at least, not to be read as one of the older format."""
SAELENS_PARAMETERS = {"gated": ("b_gate", "b_mag", "r_mag"), "standard": ("b_enc",), "jumprelu": ("b_enc", "threshold")}
"""By architecture, the parameters beside W_enc, W_dec and b_dec."""
SAELENS_SETTINGS = {"normalize_activations": "none", "reshape_activations": "none", "activation_fn": "relu", "activation_fn_str": "relu"}
"""Settings of a cfg.json that may be absent, or say this and nothing else."""
DICTIONARY_PARAMETERS = {
    "GatedAutoEncoder": ("decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"),
    "AutoEncoder": ("bias", "encoder.weight", "encoder.bias", "decoder.weight"),
}
"""By class, the entries of ae.pt."""
SAELENS_FIELDS = {"architecture": TEXT, "apply_b_dec_to_input": FLAG, "d_in": SIZE, "d_sae": SIZE}
SAELENS_METADATA = {"model_name": or_null(TEXT), "hook_name": or_null(TEXT), "context_size": or_null(COUNT)}
DICTIONARY_METADATA = {"layer": or_null(COUNT), "lm_name": or_null(TEXT), "submodule_name": or_null(TEXT)}
"""What is read of a `cfg.json`, and of the `trainer` in a `config.json`."""
DICTIONARY_TRAINER = {"GatedAutoEncoder": "GatedSAETrainer", "AutoEncoder": "StandardTrainer"}


def saelens_architecture(sae: SAE) -> str:
    """SAELens' own name for an SAE's architecture."""
    return "standard" if isinstance(sae, ReluSAE) else "gated"


def saelens_tensors(sae: SAE, architecture: str) -> dict[str, Tensor]:
    """The content of `sae_weights.safetensors`.

    Args:
        sae: reads raw activations.
        architecture: that of `saelens_architecture`, or `jumprelu`, which every SAE can be.
    """
    if architecture == "jumprelu":
        return dict(vars(jumprelu_weights(sae)))
    return {"W_enc" if name == "W_gate" else name: value for name, value in sae.state_dict().items()}


def saelens_config(sae: SAE, architecture: str, description: Mapping[str, Any]) -> dict[str, Any]:
    """The object of `cfg.json`; `metadata.gsae` is the SAE's own description, masks and lambda among it."""
    layer = description.get("layer")
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": _llm_name(description),
        "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
        "hook_head_index": None,
        "context_size": description.get("context_length"),
        "prepend_bos": True,
        "seqpos_slice": [1, None],  # position 0 was never trained on
        "exclude_special_tokens": True,
        "dataset_path": (description.get("text") or {}).get("name"),
        "gsae": {key: value for key, value in description.items() if key != "results"},
    }
    return {
        "architecture": architecture,
        "d_in": sae.d_model,
        "d_sae": sae.num_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }


def from_saelens(tensors: Mapping[str, Tensor], cfg: Mapping[str, Any], where: str) -> SAE:
    """The same features and reconstructions by one of our SAEs, in float64.

    Ours subtract b_dec from the input; an SAE that does not gets b_dec W_enc, what is lost by that, added to its biases. JumpReLU is
    W_gate = W_enc;  r_mag = 0;  b_mag = b_enc;  b_gate = b_enc - threshold: f = relu(pre) * 1[pre > threshold] whatever its sign.

    Args:
        tensors: of `sae_weights.safetensors`.
        cfg: the object of `cfg.json`.
        where: the directory, for messages.

    Raises:
        CheckpointError: we have no such SAE, or the tensors are not those of the architecture.
    """
    cfg = {"architecture": "standard", "apply_b_dec_to_input": True, **cfg}
    require_fields(cfg, SAELENS_FIELDS, {"metadata": or_null(OBJECT)}, where)
    require_fields(saelens_metadata(cfg), {}, SAELENS_METADATA, where)
    architecture = cfg["architecture"]
    if architecture not in SAELENS_PARAMETERS:
        raise CheckpointError(
            f"{where}: architecture {architecture!r} cannot be imported exactly; give one of {', '.join(SAELENS_PARAMETERS)}"
        )
    for key, wanted in SAELENS_SETTINGS.items():
        if cfg.get(key) not in (wanted, None):
            raise CheckpointError(
                f"{where}: {key} {cfg[key]!r} cannot be imported exactly; fold it in SAELens first, so that it is {wanted!r}"
            )
    if "reshape_activations" not in cfg and "hook_z" in f"{cfg.get('hook_name')} {cfg.get('hook_point')}":
        raise CheckpointError(f"{where}: reshape_activations 'hook_z' cannot be imported exactly; give an SAE of the residual stream")
    require_weights(tensors, where)
    wide = {name: value.to(torch.float64) for name, value in tensors.items()}
    if bool((wide.pop("scaling_factor", torch.ones(())) != 1).any()):
        raise CheckpointError(f"{where}: scaling_factor (fine-tuned) cannot be imported exactly; fold it in SAELens first")
    d_model, num_features = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (d_model, num_features), "W_dec": (num_features, d_model), "b_dec": (d_model,)}
    _require_tensors(wide, shapes | dict.fromkeys(SAELENS_PARAMETERS[architecture], (num_features,)), where)
    shift = 0 if cfg["apply_b_dec_to_input"] else wide["b_dec"] @ wide["W_enc"]
    decoder = {"W_dec": wide["W_dec"], "b_dec": wide["b_dec"]}
    if architecture == "standard":
        return _sae(ReluSAE, W_enc=wide["W_enc"], b_enc=wide["b_enc"] + shift, **decoder)
    if architecture == "gated":
        r_mag, b_mag = wide["r_mag"], wide["b_mag"] + torch.exp(wide["r_mag"]) * shift
        return _sae(GatedSAE, W_gate=wide["W_enc"], r_mag=r_mag, b_mag=b_mag, b_gate=wide["b_gate"] + shift, **decoder)
    b_mag = wide["b_enc"] + shift
    return _sae(GatedSAE, W_gate=wide["W_enc"], r_mag=torch.zeros_like(b_mag), b_mag=b_mag, b_gate=b_mag - wide["threshold"], **decoder)


def saelens_metadata(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a `cfg.json` says of the LLM; older formats have it beside the rest."""
    return cfg.get("metadata") or cfg


def dictionary_class(sae: SAE) -> str:
    """dictionary_learning's class of an SAE."""
    return "AutoEncoder" if isinstance(sae, ReluSAE) else "GatedAutoEncoder"


def dictionary_tensors(sae: SAE) -> dict[str, Tensor]:
    """The content of `ae.pt`, of an SAE that reads raw activations."""
    encoder = {"encoder.weight": sae.encoder.detach().T, "decoder.weight": sae.W_dec.detach().T}
    if isinstance(sae, ReluSAE):
        return {"bias": sae.b_dec.detach(), **encoder, "encoder.bias": sae.b_enc.detach()}
    biases = {"r_mag": sae.r_mag.detach(), "gate_bias": sae.b_gate.detach(), "mag_bias": sae.b_mag.detach()}
    return {"decoder_bias": sae.b_dec.detach(), **encoder, **biases}


def dictionary_config(sae: SAE, description: Mapping[str, Any]) -> dict[str, Any]:
    """The object of `config.json`; `gsae` is the SAE's own description, masks and lambda among it."""
    name = dictionary_class(sae)
    trainer = {
        "dict_class": name,
        "trainer_class": DICTIONARY_TRAINER[name],
        "activation_dim": sae.d_model,
        "dict_size": sae.num_features,
        "lr": description.get("learning_rate"),
        "l1_penalty": description.get("lambda"),
        "seed": description.get("seed"),
        "device": "cpu",
        "layer": description.get("layer"),
        "lm_name": _llm_name(description),
        "submodule_name": description.get("site"),
    }
    own = {key: value for key, value in description.items() if key != "results"}
    return {"trainer": trainer, "buffer": {"ctx_len": description.get("context_length")}, "gsae": own}


def from_dictionary(tensors: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> SAE:
    """The same features and reconstructions by one of our SAEs, in float64.

    Args:
        tensors: of `ae.pt`.
        config: the object of `config.json`.
        where: the directory, for messages.

    Raises:
        CheckpointError: we have no such SAE, or the tensors are not those of the class.
    """
    require_fields(config, {"trainer": OBJECT}, {"buffer": or_null(OBJECT)}, where)
    trainer = config["trainer"]
    require_fields(trainer, {"dict_class": TEXT}, DICTIONARY_METADATA, where)
    require_fields(config.get("buffer") or {}, {}, {"ctx_len": or_null(COUNT)}, where)
    name = trainer["dict_class"]
    if name not in DICTIONARY_PARAMETERS:
        raise CheckpointError(f"{where}: dict_class {name!r} cannot be imported exactly; give one of {', '.join(DICTIONARY_PARAMETERS)}")
    require_fields(trainer, {"activation_dim": SIZE, "dict_size": SIZE}, {}, where)
    require_weights(tensors, where)
    d_model, num_features = trainer["activation_dim"], trainer["dict_size"]
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (num_features, d_model), "decoder.weight": (d_model, num_features)}
    shapes |= {"bias": (d_model,), "decoder_bias": (d_model,)}
    _require_tensors(tensors, {key: shapes.get(key, (num_features,)) for key in DICTIONARY_PARAMETERS[name]}, where)
    wide = {key: value.to(torch.float64) for key, value in tensors.items()}
    W_enc, W_dec = wide["encoder.weight"].T, wide["decoder.weight"].T
    if name == "AutoEncoder":
        return _sae(ReluSAE, W_enc=W_enc, b_enc=wide["encoder.bias"], W_dec=W_dec, b_dec=wide["bias"])
    biases = {"r_mag": wide["r_mag"], "b_mag": wide["mag_bias"], "b_gate": wide["gate_bias"], "b_dec": wide["decoder_bias"]}
    return _sae(GatedSAE, W_gate=W_enc, W_dec=W_dec, **biases)


def _llm_name(description: Mapping[str, Any]) -> str | None:
    name: str | None = (description.get("llm") or {}).get("name")
    return name


def _sae(kind: type[ReluSAE] | type[GatedSAE], **parameters: Tensor) -> SAE:
    num_features, d_model = parameters["W_dec"].shape
    sae = kind(d_model, num_features, parameters["W_dec"].dtype)
    sae.load_state_dict(parameters)
    return sae


def _require_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    for name in sorted(tensors.keys() | shapes.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        wanted = shapes.get(name, "none of that name")
        if found != wanted:
            raise CheckpointError(f"{where}: tensor {name} is {found}, its config asks for {wanted}; fetch it again")
