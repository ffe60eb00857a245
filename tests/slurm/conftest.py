"""One cluster for the tests of a file."""

from collections.abc import Iterator

import pytest
import slurm_cluster as slurm

REASON = slurm.why_not()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slurm" in item.path.parts:
            item.add_marker(pytest.mark.slurm)
            if REASON is not None:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[slurm.Cluster]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
