"""Harvesting a corpus in parts. In: the config of the whole corpus. Out: the visits that are wanted now, each as a config of its own."""

import shutil
from dataclasses import replace
from pathlib import Path

from gsae.config import Config
from gsae.corpus.documents import part_of
from gsae.corpus.size import PARTS_AT_ONCE
from gsae.errors import StoreError
from gsae.llm.site import resolve_sites
from gsae.store import finish
from gsae.store.durable import require_writable
from gsae.store.manifest import MANIFEST_FILE, load
from gsae.store.parts import read_used, remove_used, rows_of_visit, visit_directory


def config_of_visit(config: Config, visit: int) -> Config:
    """The harvest of one visit: a part of the corpus, into a store of its own."""
    corpus = part_of(config.corpus, visit % config.corpus.parts)
    store = visit_directory(Path(config.store_directory), visit)
    return replace(config, corpus=corpus, harvest=replace(config.harvest, store=str(store)))


def next_visit(config: Config, num_layers: int) -> int | None:
    """The visit to harvest now; None where two wait for training, or training needs no more. What is used up is removed.

    Args:
        config: the config of the whole corpus.
        num_layers: of the LLM.
    """
    store = Path(config.store_directory)
    while True:
        remove_used(store)
        used = read_used(store)
        if used.is_over:
            for left_over in store.glob("part-*"):
                shutil.rmtree(left_over)
            return None
        visits = range(used.visits, used.visits + PARTS_AT_ONCE)
        missing = (visit for visit in visits if not finish.is_finished(visit_directory(store, visit)))
        wanted = next(missing, None)
        if read_used(store) == used:  # otherwise a training has removed one while this looked
            return None if wanted is None or _is_enough(config, num_layers, wanted) else wanted


def _is_enough(config: Config, num_layers: int, visits: int) -> bool:
    """Whether the first so many visits have all the rows that training will take, at every site that is trained."""
    train, store = config.train, Path(config.store_directory)
    harvested, trained = ({site.name for site in resolve_sites(sites, num_layers)} for sites in (config.harvest.sites, train.sites))
    sites = harvested & trained or harvested
    rows = {site: [rows_of_visit(store, visit, site) or 0 for visit in range(visits)] for site in sites}
    return all(sum(each // train.batch_rows for each in found) * train.batch_rows >= train.total_rows for found in rows.values())


def what_comes_next(config: Config) -> str:
    """What to do when there is nothing to harvest."""
    store = Path(config.store_directory)
    if read_used(store).is_over:
        return f"harvest: training on the parts of {store} has ended, nothing to do"
    waiting = [directory.name for directory in sorted(store.glob("part-*"))]
    return f"harvest: {' and '.join(waiting)} of {store} wait for training; run gsae train, then gsae harvest again"


def is_calibrated(store: Path) -> bool:
    """Whether there is the manifest that all parts share."""
    return (store / MANIFEST_FILE).exists()


def share_calibration(config: Config, visit: int) -> None:
    """Make a visit's store mask by the norms that all parts share. One rank calls this, before the visit is harvested.

    Raises:
        StoreError: it was begun with others.
        ConfigError: its directory cannot be written.
    """
    store = Path(config.store_directory)
    directory = visit_directory(store, visit)
    require_writable(directory, "harvest.store")
    shared = {site.name: site.median_norm for site in load(store).sites.values()}
    own = finish.read_calibration(directory)
    if own is None:
        finish.write_calibration(directory, shared)
    elif own != shared:
        raise StoreError(
            f"store {directory} was begun with another calibration than {store}; delete {directory}, then run gsae harvest again"
        )
