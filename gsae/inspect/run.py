"""`gsae inspect`. In: where a store is. Out: tables or JSON on stdout, and a picture in a directory."""

import json
import sys
from pathlib import Path

from gsae.config.location import is_remote
from gsae.errors import StoreError
from gsae.inspect.measure import inspect_store
from gsae.inspect.mixing import Batching
from gsae.inspect.plots import write_plots
from gsae.inspect.show import show
from gsae.store.durable import require_writable
from gsae.store.opening import open_store
from gsae.store.parts import is_in_parts


def run_inspect(location: str, cache: Path, cache_gigabytes: float, output: Path | None, batching: Batching, as_json: bool) -> None:
    """Look at a whole store, say what is in it, and draw it.

    Args:
        location: directory or URL of the store.
        cache: directory of the mirrors of stores at a URL.
        cache_gigabytes: room for the tars of a mirror, in units of 10^9 bytes.
        output: directory of `norms.png` and `norms.svg`, made where it is missing; None: `inspect` in the store, or here where that is at a
            URL.
        batching: how training takes batches from it.
        as_json: whether to write one JSON object instead of tables.

    Raises:
        StoreError: there is no store, or it is not whole or damaged.
        ConfigError: `output` or `cache` cannot be written, or `batching` does not fit the number of lanes.
    """
    store = open_store(location, cache, cache_gigabytes)
    if is_in_parts(store):
        raise StoreError(f"store {store} is in parts; give one of them that is there, e.g. {store / 'part-0000'}")
    inspection = inspect_store(store, batching)
    output = output or (Path() if is_remote(location, "STORE") else store) / "inspect"
    require_writable(output, "--output")
    pictures = write_plots(inspection, output)
    if as_json:
        content = {**inspection.to_json(), "pictures": [str(path) for path in pictures]}
        sys.stdout.write(json.dumps(content, allow_nan=False) + "\n")
        return
    show(inspection)
    for path in pictures:
        sys.stdout.write(f"{path}\n")
