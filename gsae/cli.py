"""The command line. In: `gsae STAGE CONFIG [--section.field value ...]`. Out: the stage run, and an exit code.

Nothing heavy is imported before the arguments are understood, so `--help` answers at once. Exit codes: 0 done or stopped
on request, 2 the user's mistake (one line on stderr), 1 a bug (a traceback), 130 interrupted.
"""

import argparse
import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

from gsae import __version__
from gsae.config import Config, HarvestConfig, TrainConfig
from gsae.console import complain, divert
from gsae.errors import ConfigError, GsaeError
from gsae.settings import config_parser, read_config

USERS_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system says when a disk is full or a file may not be touched."""
SPEAKING_SECONDS = 5
STAGES = {
    "harvest": "run the LLM over the training text and store its activations",
    "train": "train the SAEs of a store's sites",
    "evaluate": "held-out text through the LLM with each SAE spliced in",
    "features": "where features are strongest on held-out text, and the tokens that their directions promote",
    "compare": "the differences of two evaluated runs, with paired 95 % intervals, and how many directions they share",
    "report": "one page, table and plots of finished runs",
    "status": "how far each stage of a config is",
    "plan": "text, disk, memory and hours that a config will need, and what will not fit, before anything runs",
    "verify": "check a store or a run directory byte for byte; --repair takes out of a store what is broken",
    "inspect": "norms, dropped tokens, lanes and mixing of a store, and a picture of its norms",
    "export": "write an SAE for use by others: our published form, SAELens, dictionary_learning",
    "import": "take over an SAE of SAELens or dictionary_learning",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        divert(int(os.environ.get("RANK", "0")))
        sys.exit(_dispatch(words))
    except GsaeError as error:
        _complain(str(error), error.spoken_by)
        sys.exit(2)
    except OSError as error:
        if error.errno not in USERS_ERRORS:
            raise
        _complain(
            f"{error.filename or 'writing'}: {error.strerror}; free some space or mend the permissions, then run the same again", None
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(message: str, spoken_by: int | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if spoken_by in (None, rank):
        complain(message)
    else:
        # The launcher ends all ranks when the first one exits: that must be the one that speaks.
        time.sleep(SPEAKING_SECONDS)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        sys.stdout.write(f"gsae {__version__}\n")
        return 0
    stage, rest = words[0], words[1:]
    if stage not in STAGES:
        raise ConfigError(f"there is no command {stage!r}; choose from {', '.join(STAGES)}")
    if stage == "report":
        return _report(rest)
    if stage == "evaluate":
        return _evaluate(rest)
    if stage == "features":
        return _features(rest)
    if stage == "compare":
        return _compare(rest)
    if stage == "status":
        return _status(rest)
    if stage == "plan":
        return _plan(rest)
    if stage == "verify":
        return _verify(rest)
    if stage == "inspect":
        return _inspect(rest)
    if stage == "export":
        return _export(rest)
    if stage == "import":
        return _import(rest)
    return _stage_of_config(stage, rest)


def _overview() -> str:
    lines = [f"  {name:<10} {purpose}" for name, purpose in STAGES.items()]
    return (
        "usage: gsae COMMAND ...\n\nGated sparse autoencoders on the activations of Llama models.\n\n"
        + "\n".join(lines)
        + "\n\ngsae COMMAND --help shows what each takes. On many ranks: accelerate launch -m gsae COMMAND ...\n"
    )


def _evaluate(words: list[str]) -> int:
    parser = _Parser(
        prog="gsae evaluate", add_help=False, allow_abbrev=False, usage="gsae evaluate CONFIG [options] [--section.field value ...]"
    )
    what = "an SAE from elsewhere to evaluate beside the runs, more than once for several: a directory of SAELens or dictionary_learning, "
    what += "or what gsae.load_sae reads; it becomes a run below the config's output"
    parser.add_argument("--sae", action="append", default=[], metavar="PATH", help=what)
    parser.add_argument("--site", metavar="SITE", help="where they belong, such as resid.15; default: what their own files say")
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(f"{parser.format_help()}\n{config_parser('evaluate').format_help()}")
        return 0
    try:
        given, rest = parser.parse_known_args(words)
    except ConfigError as error:
        error.spoken_by = 0
        raise

    def add_guests(config: Config) -> None:
        from gsae.exchange.guest import add_guests as add

        add(config, given.sae, given.site)

    return _stage_of_config("evaluate", rest, add_guests if given.sae else None)


def _stage_of_config(stage: str, words: list[str], before: Callable[[Config], None] | None = None) -> int:
    """Run a stage on all ranks; `before` on the first one."""
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(config_parser(stage).format_help())
        return 0
    try:
        config = read_config(stage, words)
        if stage == "harvest" and config.harvest.is_remote:
            raise ConfigError(
                f"harvest.store is {config.harvest.store}, and a harvest writes to a directory; give one, "
                "and copy it there when it is whole (docs/remote.md)"
            )
    except ConfigError as error:
        error.spoken_by = 0  # all ranks read the same words
        raise
    # DDP warns that its search for unused parameters found none; gsae/world says why it is on. Torch reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from gsae import world

    run: Callable[..., None] = getattr(import_module(f"gsae.{stage}.run"), f"run_{stage}")
    groups = config.train.groups if stage == "train" else 1
    feature_ranks = config.train.feature_ranks if stage != "harvest" else 1
    with world.start(config.device, groups, feature_ranks=feature_ranks) as ranks:
        if before is not None:
            ranks.everyone.on_first(lambda: before(config))
        if stage == "train" and config.train.evaluate_every_fraction is not None:
            from gsae.evaluate.probe import Probe

            run(config, ranks, lambda: Probe(config, ranks))
        else:
            run(config, ranks)
    return 0


def _status(words: list[str]) -> int:
    parser = _Parser(
        prog="gsae status", add_help=False, allow_abbrev=False, usage="gsae status CONFIG [options] [--section.field value ...]"
    )
    parser.add_argument("--stage", choices=("harvest", "train", "evaluate"), help="this stage alone")
    brief = "for scripts: its state (ended, stopped, waiting, unfinished), a word that changes with its progress, when it was stopped"
    parser.add_argument("--brief", action="store_true", help=brief)
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(f"{parser.format_help()}\n{config_parser('status').format_help()}")
        return 0
    given, rest = parser.parse_known_args(words)
    config = read_config("status", rest)
    from gsae.status import STATUS

    for stage in (given.stage,) if given.stage else STATUS:
        found = STATUS[stage](config)
        line = f"{found.state} {found.mark} {found.stopped_at}".rstrip() if given.brief else f"{stage:<9}{found.state:<11}{found.text}"
        sys.stdout.write(f"{line}\n")
    return 0


def _plan(words: list[str]) -> int:
    parser = _Parser(prog="gsae plan", add_help=False, allow_abbrev=False, usage="gsae plan CONFIG [options] [--section.field value ...]")
    ranks = "ranks of the job; default: as many as a launcher started, or 1"
    parser.add_argument("--ranks", type=_positive(int), default=int(os.environ.get("WORLD_SIZE", "1")), metavar="N", help=ranks)
    rates = parser.add_mutually_exclusive_group()
    tokens = "tokens a second of the harvest, over all ranks, for its hours"
    rates.add_argument("--tokens-per-second", type=_positive(float), metavar="X", help=tokens)
    rates.add_argument("--measure", action="store_true", help="load the LLM and measure that for some seconds, on one rank of this machine")
    rows = "rows a second of the runs of a site, as gsae train shows them, for the hours of training"
    parser.add_argument("--rows-per-second", type=_positive(float), metavar="X", help=rows)
    link = "10^9 bytes a second that a rank sends to another of its group; adds communication to the hours of training"
    parser.add_argument("--link-gigabytes-per-second", type=_positive(float), metavar="X", help=link)
    disk = "10^9 bytes a second that the store's disk gives to all ranks together; with --rows-per-second it decides who reads"
    parser.add_argument("--disk-gigabytes-per-second", type=_positive(float), metavar="X", help=disk)
    memory = "GiB that each rank has where it computes; default: what is free on this machine"
    parser.add_argument("--memory-gibibytes", type=_positive(float), metavar="X", help=memory)
    parser.add_argument("--slurm", action="store_true", help="suggest Slurm jobs too, as lines to type")
    node = "GPUs of a node, for --slurm; with device: cpu, ranks of a node; default: %(default)s"
    parser.add_argument("--gpus-per-node", type=_positive(int), default=8, metavar="N", help=node)
    parser.add_argument("--json", action="store_true", help="write one JSON object, for machines")
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(f"{parser.format_help()}\n{config_parser('plan').format_help()}")
        return 0
    given, rest = parser.parse_known_args(words)
    config = read_config("plan", rest)
    if int(os.environ.get("RANK", "0")):
        return 0  # the first rank speaks for all
    from gsae.plan.budget import Assumptions
    from gsae.plan.run import Submission, run_plan

    link_rate, disk_rate = (
        None if gigabytes is None else 1e9 * gigabytes for gigabytes in (given.link_gigabytes_per_second, given.disk_gigabytes_per_second)
    )
    memory_bytes = None if given.memory_gibibytes is None else round(given.memory_gibibytes * 2**30)
    speeds = given.tokens_per_second, given.rows_per_second, link_rate, disk_rate
    assumptions = Assumptions(given.ranks, *speeds, memory_bytes, measure=given.measure)
    run_plan(config, assumptions, as_json=given.json, submission=Submission(rest, given.gpus_per_node) if given.slurm else None)
    return 0


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """What argparse makes of a word: a number above 0."""

    def parse(word: str) -> float:
        value = kind(word)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _report(words: list[str]) -> int:
    usage = "usage: gsae report RUNS... [--output DIRECTORY]\n       gsae report CONFIG [--section.field value ...]\n"
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{usage}\nRUNS are run directories, or directories that hold some; CONFIG is the config that made them.\n")
        return 0 if words else 2
    output: Path | None = None
    if words[0].endswith((".yaml", ".yml")):
        words = [read_config("report", words).output]
    elif "--output" in words[:-1]:
        at = words.index("--output")
        output = Path(words[at + 1])
        words = words[:at] + words[at + 2 :]
    unknown = [word for word in words if word.startswith("-")]
    if unknown or not words:
        raise ConfigError(f"gsae report cannot use {' '.join(unknown) or 'no runs'}; {' '.join(usage.split())}")
    from gsae.report.run import run_report

    page = run_report([Path(word) for word in words], output)
    sys.stdout.write(f"{page}\n")
    return 0


def _features(words: list[str]) -> int:
    parser = _Parser(
        prog="gsae features", add_help=False, allow_abbrev=False, usage="gsae features CONFIG [options] [--section.field value ...]"
    )
    whose = "a run's name or directory, more than once for several; default: all"
    parser.add_argument("--run", action="append", default=[], metavar="RUN", help=whose)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--features", type=_numbers, default=(), metavar="N,N,...", help="these features of each run")
    which.add_argument("--random", type=_positive(int), default=10, metavar="N", help="so many random ones; default: %(default)s")
    top = "contexts of each feature, and tokens its direction promotes; default: %(default)s"
    parser.add_argument("--top", type=_positive(int), default=10, metavar="N", help=top)
    window = "tokens on either side of a peak; default: %(default)s"
    parser.add_argument("--window", type=_positive(int), default=12, metavar="N", help=window)
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(f"{parser.format_help()}\n{config_parser('features').format_help()}")
        return 0
    try:
        given, rest = parser.parse_known_args(words)
        config = read_config("features", rest)
    except ConfigError as error:
        error.spoken_by = 0
        raise
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from gsae import world
    from gsae.evaluate.features import Wanted, run_features

    wanted = Wanted(given.features, given.random, given.top, given.window, tuple(given.run))
    with world.start(config.device, 1, feature_ranks=config.train.feature_ranks) as ranks:
        run_features(config, ranks, wanted)
    return 0


def _numbers(word: str) -> tuple[int, ...]:
    """What argparse makes of `1,5,9`."""
    return tuple(int(part) for part in word.split(","))


_numbers.__name__ = "list of numbers"


def _compare(words: list[str]) -> int:
    parser = _Parser(
        prog="gsae compare",
        allow_abbrev=False,
        description="Differences are the second run's minus the first's, on the same tokens; both were evaluated by gsae evaluate.",
    )
    parser.add_argument("first", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("second", type=Path, metavar="RUN", help="run directory, of the same site")
    parser.add_argument("--json", action="store_true", help="write one JSON object, for machines")
    given = _parse(parser, words)
    if given is None:
        return 0
    from gsae.evaluate.compare import run_compare

    run_compare(given.first, given.second, as_json=given.json)
    return 0


def _verify(words: list[str]) -> int:
    parser = _Parser(prog="gsae verify", allow_abbrev=False, description="Everything is read again; nothing is changed without --repair.")
    parser.add_argument("path", metavar="PATH", help="an activation store or its URL, a run directory, or a directory that holds some")
    _add_cache(parser)
    repair = "remove what is broken in stores, so that gsae harvest rebuilds just that; nothing else may be writing to them"
    parser.add_argument("--repair", action="store_true", help=repair)
    given = _parse(parser, words)
    if given is None:
        return 0
    from gsae.verify import run_verify

    report = run_verify(given.path, given.cache, given.cache_gigabytes, given.repair)
    for line in (*report.problems, *report.removed):
        sys.stdout.write(f"{line}\n")
    count = len(report.problems)
    advice = ""
    if report.num_repaired:
        advice = f", {report.num_repaired} of them repaired; run gsae harvest with the same config to rebuild what is missing"
    sys.stdout.write(f"{given.path}: {report.checked}; {count or 'no'} problem{'' if count == 1 else 's'}{advice}\n")
    return 2 if count > report.num_repaired else 0


def _inspect(words: list[str]) -> int:
    parser = _Parser(
        prog="gsae inspect",
        allow_abbrev=False,
        description="What the rows of a whole store are like, which are not in it, and how well training mixes them.",
    )
    parser.add_argument("store", metavar="STORE", help="directory or URL of an activation store")
    _add_cache(parser)
    parser.add_argument("--json", action="store_true", help="write one JSON object, for machines")
    pictures = "directory for norms.png and norms.svg; default: inspect in the store, or here where that is at a URL"
    parser.add_argument("--output", type=Path, metavar="DIR", help=pictures)
    whose = "of the training whose mixing is shown; default:"
    batch = f"train.batch_rows {whose} {TrainConfig.batch_rows}, or the multiple of the store's lanes below it"
    parser.add_argument("--batch-rows", type=_positive(int), metavar="N", help=batch)
    window = f"train.window_rows {whose} %(default)s"
    parser.add_argument("--window-rows", type=_positive(int), default=TrainConfig.window_rows, metavar="N", help=window)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed, metavar="N", help=f"train.seed {whose} %(default)s")
    given = _parse(parser, words)
    if given is None:
        return 0
    from gsae.inspect.mixing import Batching
    from gsae.inspect.run import run_inspect

    batching = Batching(given.batch_rows, given.window_rows, given.seed)
    run_inspect(given.store, given.cache, given.cache_gigabytes, given.output, batching, as_json=given.json)
    return 0


def _add_cache(parser: argparse.ArgumentParser) -> None:
    """What a store at a URL takes besides it."""
    default = HarvestConfig()
    where = "harvest.cache, where the files of a store at a URL are kept; default: %(default)s"
    parser.add_argument("--cache", type=Path, default=default.cache_directory, metavar="DIR", help=where)
    room = "harvest.cache_gigabytes, the disk that its shards may take there; default: %(default)s"
    parser.add_argument("--cache-gigabytes", type=_positive(float), default=default.cache_gigabytes, metavar="X", help=room)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; {self.format_usage()}")


def _export(words: list[str]) -> int:
    parser = _Parser(
        prog="gsae export", allow_abbrev=False, description="The scale is folded in; a model card is written beside the weights."
    )
    parser.add_argument("run", metavar="RUN", help="a run, a checkpoint, a directory made by gsae, or OWNER/NAME[@REVISION] on the hub")
    targets = ("gsae", "saelens", "dictionary_learning", "jumprelu")
    parser.add_argument("--to", required=True, choices=targets, help="the format; jumprelu is SAELens' architecture of that name")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory to make; default: exports/FORMAT in the run")
    parser.add_argument("--push", metavar="OWNER/NAME", help="put it into this repository of the Hugging Face hub, made if need be")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    given = _parse(parser, words)
    if given is None:
        return 0
    from gsae.exchange.export import run_export

    exported = run_export(given.run, given.to, output=given.output, push=given.push, private=given.private)
    sys.stdout.write(f"{exported.directory}\n" + (f"{exported.page}\n" if exported.page else ""))
    return 0


def _import(words: list[str]) -> int:
    parser = _Parser(prog="gsae import", allow_abbrev=False, description="Only what can be represented exactly is taken over.")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="directory as SAELens or dictionary_learning saved it")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="directory to make, which gsae.load_sae reads")
    libraries = ("saelens", "dictionary_learning")
    parser.add_argument("--from", dest="library", choices=libraries, help="whose directory it is; default: told by its files")
    given = _parse(parser, words)
    if given is None:
        return 0
    from gsae.exchange.importing import run_import

    sys.stdout.write(f"{run_import(given.source, given.output, given.library)}\n")
    return 0


def _parse(parser: _Parser, words: list[str]) -> argparse.Namespace | None:
    """The arguments; None when help was asked for and given."""
    if any(word in ("-h", "--help") for word in words):
        sys.stdout.write(parser.format_help())
        return None
    return parser.parse_args(words)
