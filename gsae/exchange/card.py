"""Model cards. In: an SAE and its description. Out: the text of the README.md that stands beside an export."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gsae import __version__
from gsae.sae.foreign import dictionary_class, saelens_architecture
from gsae.sae.objective import SAE
from gsae.sae.relu import ReluSAE

CARD_FILE = "README.md"
LIBRARIES = {"gsae": "gsae", "saelens": "saelens", "jumprelu": "saelens", "dictionary_learning": "dictionary_learning"}
"""By target of an export, the library that reads it."""
NUMBERS = ("l0", "fvu", "gamma", "loss_recovered", "delta_ce", "ce_clean", "ce_spliced", "ce_zero", "ce_mean", "kl")
"""Metrics of results.json that a card shows."""


@dataclass(frozen=True)
class Number:
    """A line of a card's table."""

    name: str
    value: str
    interval: str
    definition: str


def model_card(sae: SAE, description: Mapping[str, Any], target: str, address: str | None) -> str:
    """The text of a model card, the same for the same arguments.

    Args:
        sae: the SAE that was written.
        description: what is known of it.
        target: the format it was written in, a key of LIBRARIES.
        address: the hub repository that it goes to; None where it stays a directory.
    """
    llm = description.get("llm") or {}
    on_hub = llm.get("name") if "revision" in llm else None
    kind = "plain" if isinstance(sae, ReluSAE) else "gated"
    front = {
        "license": "unknown",
        "library_name": LIBRARIES[target],
        "tags": ["sparse-autoencoder", "mechanistic-interpretability", *([] if kind == "plain" else ["gated-sae"]), "gsae"],
        **({"base_model": on_hub} if on_hub else {}),
    }
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("card.md")
    return template.render(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        version=__version__,
        sae=sae,
        kind=kind,
        known=defaultdict(lambda: None, description),
        origin=description.get("imported_from"),
        place=" of ".join(text for text in (description.get("site"), llm.get("name")) if text),
        revision=llm.get("revision"),
        pre_activation_loss=_with_pre_activation_loss(description),
        format=_format(sae, target),
        snippet=_snippet(sae, target, address),
        address=address,
        mask=defaultdict(lambda: None, description.get("mask") or {}),
        results=description.get("results"),
        numbers=_numbers(description.get("results") or {}),
    )


def _with_pre_activation_loss(description: Mapping[str, Any]) -> str:
    weight = description.get("pre_activation_loss")
    return f" with pre-activation loss (weight {weight})" if weight else ""


def _format(sae: SAE, target: str) -> str:
    if target == "gsae":
        return "gsae"
    if target == "dictionary_learning":
        return f"dictionary_learning, class {dictionary_class(sae)}"
    return f"SAELens 6, architecture {'jumprelu' if target == 'jumprelu' else saelens_architecture(sae)}"


def _snippet(sae: SAE, target: str, address: str | None) -> str:
    """Code that loads the SAE: from the hub, or from the directory in which it runs."""
    if target == "gsae":
        return f'import gsae\n\nsae = gsae.load_sae("{address or "."}")'
    if target == "dictionary_learning":
        name = dictionary_class(sae)
        fetch = f'hf_hub_download("{address}", "ae.pt")' if address else '"ae.pt"'
        lines = [f"from dictionary_learning import {name}", "", f"sae = {name}.from_pretrained({fetch})"]
        return "\n".join([*lines[:1], *(["from huggingface_hub import hf_hub_download"] if address else []), *lines[1:]])
    fetch = f'snapshot_download("{address}")' if address else '"."'
    first = ["from huggingface_hub import snapshot_download"] if address else []
    return "\n".join([*first, "from sae_lens import SAE", "", f"sae = SAE.load_from_disk({fetch})"])


def _numbers(results: Mapping[str, Any]) -> list[Number]:
    metrics, intervals, definitions = (results.get(name, {}) for name in ("metrics", "intervals", "definitions"))
    lines = []
    for name in NUMBERS:
        if metrics.get(name) is not None:
            pair = intervals.get(name)
            span = "" if pair is None else f"{pair[0]:.4g} to {pair[1]:.4g}"
            lines.append(Number(name, f"{metrics[name]:.4g}", span, definitions.get(name, "").replace("|", r"\|")))
    return lines
