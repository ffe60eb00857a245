"""`gsae inspect`. In: a store. Out: tables or JSON on stdout, and a picture in a directory."""

import json
import sys
from pathlib import Path

from gsae.errors import StoreError
from gsae.inspect.measure import inspect_store
from gsae.inspect.mixing import Batching
from gsae.inspect.plots import write_plots
from gsae.inspect.show import show
from gsae.store.durable import require_writable
from gsae.store.parts import is_in_parts


def run_inspect(store: Path, output: Path, batching: Batching, as_json: bool) -> None:
    """Look at a whole store, say what is in it, and draw it.

    Args:
        store: directory of the store.
        output: directory of `norms.png` and `norms.svg`; made where it is missing.
        batching: how training takes batches from it.
        as_json: whether to write one JSON object instead of tables.

    Raises:
        StoreError: there is no store, or it is not whole or damaged.
        ConfigError: `output` cannot be written, or `batching` does not fit the number of lanes.
    """
    if is_in_parts(store):
        raise StoreError(f"store {store} is in parts; give one of them that is there, e.g. {store / 'part-0000'}")
    inspection = inspect_store(store, batching)
    require_writable(output, "--output")
    pictures = write_plots(inspection, output)
    if as_json:
        content = {**inspection.to_json(), "pictures": [str(path) for path in pictures]}
        sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")
        return
    show(inspection)
    for path in pictures:
        sys.stdout.write(f"{path}\n")
