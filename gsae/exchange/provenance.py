"""What a run knows of its SAE beside the weights. In: a run directory. Out: plain data for a description: LLM, text, mask, results.

Nothing here is needed to use the SAE: what is missing, or of other weights or another store, is left out.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gsae.store.manifest import MANIFEST_FILE
from gsae.store.runs import RESULTS_FILE

RESULTS = ("metrics", "intervals", "counts", "definitions")
"""Parts of results.json that describe the SAE."""


def provenance(run: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """What the run's config, store and results add to a checkpoint's description; no absolute path is among it.

    Keys, where they are known: `module` (the site's path in the LLM), `llm` (name, with the hub's commit or hashes of the files),
    `context_length` (tokens), `text`, `mask` (which rows were kept), `results` (see RESULTS; only of these very weights).
    """
    config = _read_config(run / "config.yaml")
    manifest = _find_manifest(run, config, description.get("store_fingerprint"))
    results = _read_object(run / RESULTS_FILE)
    identity = results.get("identity", {})
    harvest, corpus = config.get("harvest", {}), config.get("corpus", {})
    known = manifest.get("identity", {})
    site = manifest.get("sites", {}).get(description["site"], {})
    mask = {
        "position_0": "dropped",
        "special_tokens": "dropped",
        "outlier_multiple": known.get("outlier_multiple", harvest.get("outlier_multiple")),
        "max_norm": site.get("max_norm"),
    }
    found = {
        "module": f"model.layers.{description['layer']}",
        "llm": _llm(known.get("llm") or identity.get("llm"), config.get("llm", {})),
        "context_length": known.get("context_length", harvest.get("context_length")),
        "text": _present({"format": corpus.get("format"), "name": Path(corpus["path"]).name if corpus.get("path") else None}),
        "mask": _present(mask),
        "results": _results(results, description["sha256"]),
    }
    return _present(found)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value not in (None, {})}


def _llm(identity: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any] | None:
    if identity:
        return {key: value for key, value in identity.items() if key not in ("dtype", "attention")}
    model = config.get("model")
    return {"name": Path(model).name} if model else None


def _results(results: Mapping[str, Any], sha256: str) -> dict[str, Any] | None:
    identity = results.get("identity", {})
    if identity.get("checkpoint", {}).get("sae_sha256") != sha256:
        return None
    parts = {name: results[name] for name in RESULTS if name in results}
    return {**parts, "dtype": identity.get("dtype"), "within_these_documents": identity.get("within_these_documents")}


def _find_manifest(run: Path, config: Mapping[str, Any], fingerprint: str | None) -> dict[str, Any]:
    """The manifest of the store that the run was trained on, where it can still be found; else nothing."""
    named = config.get("harvest", {}).get("store")
    for store in ([Path(named)] if named else []) + [run.parent.parent / "store"]:
        manifest = _read_object(store / MANIFEST_FILE)
        if manifest.get("fingerprint") == fingerprint:
            return manifest
    return {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
