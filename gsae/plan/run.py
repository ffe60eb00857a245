"""`gsae plan`: the budget of a config before anything runs. In: a config, what is assumed. Out: the budget on stdout, with warnings."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from gsae.config import Config
from gsae.plan import limits, show, slurm
from gsae.plan.budget import Assumptions, budget


@dataclass(frozen=True)
class Submission:
    """What the lines to submit are made of."""

    words: Sequence[str]
    """CONFIG and its overrides."""
    gpus_per_node: int


def run_plan(config: Config, assumptions: Assumptions, *, as_json: bool = False, submission: Submission | None = None) -> None:
    """Print the budget, and what will not fit.

    Args:
        config: the config.
        assumptions: ranks and rates.
        as_json: whether to print one JSON object instead of lines.
        submission: to suggest Slurm jobs too.

    Raises:
        ConfigError, CorpusError, ModelError: as the stages would.
    """
    found = budget(config, assumptions)
    warnings = limits.warnings(config, found)
    jobs = [] if submission is None else slurm.suggest(config, found, assumptions.ranks, submission.gpus_per_node)
    if as_json:
        text = show.as_json(found, warnings, [asdict(job) for job in jobs])
    else:
        text = "\n".join(show.lines(found, warnings, slurm.lines(jobs, submission.words) if submission is not None else ()))
    sys.stdout.write(f"{text}\n")
