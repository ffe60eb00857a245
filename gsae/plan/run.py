"""`gsae plan`: the budget of a config before anything runs. In: a config, what is assumed. Out: the budget on stdout, with warnings."""

import sys

from gsae.config import Config
from gsae.plan import limits, show
from gsae.plan.budget import Assumptions, budget


def run_plan(config: Config, assumptions: Assumptions, *, as_json: bool = False) -> None:
    """Print the budget, and what will not fit.

    Args:
        config: the config.
        assumptions: ranks and rates.
        as_json: whether to print one JSON object instead of lines.

    Raises:
        ConfigError, CorpusError, ModelError: as the stages would.
    """
    found = budget(config, assumptions)
    warnings = limits.warnings(config, found)
    text = show.as_json(found, warnings) if as_json else "\n".join(show.lines(found, warnings))
    sys.stdout.write(f"{text}\n")
