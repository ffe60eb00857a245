"""What pilots add to a training. In: a bank whose runs name a target L0. Out: how many pilots, their rows and parameters, before it."""

from dataclasses import dataclass

from gsae.config import Config
from gsae.plan.disk import num_parameters
from gsae.train.plan import BankSpec, pilot_lengths, search_name


@dataclass(frozen=True)
class PilotNeeds:
    """The pilots of one site, where no target lies beyond their first lambdas."""

    runs: int
    parameters: int
    """Of those that train together."""
    rows: float
    """Rows of the stream that would take as long, if all runs of the site trained on them."""


def pilot_needs(config: Config, bank: BankSpec) -> PilotNeeds:
    """Count them: all lambdas on the short length, on the longer one two a target."""
    lengths, num_lambdas = pilot_lengths(config.train, bank.total_steps), len(config.train.pilot.lambdas)
    targets: dict[str, set[float]] = {}
    sizes: dict[str, int] = {}
    for run in bank.runs:
        if run.target_l0 is not None:
            targets.setdefault(search_name(run), set()).add(run.target_l0)
            sizes[search_name(run)] = num_parameters(run)
    counts = {name: [num_lambdas, *(2 * len(found) for _ in lengths[1:])] for name, found in targets.items()}
    work = sum(sizes[name] * num * steps for name, nums in counts.items() for num, steps in zip(nums, lengths, strict=True))
    of_bank = sum(map(num_parameters, bank.runs))
    return PilotNeeds(
        runs=sum(map(sum, counts.values())),
        parameters=sum(max(nums) * sizes[name] for name, nums in counts.items()),
        rows=bank.batch_rows * work / of_bank,
    )
