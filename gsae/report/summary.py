"""What the report says besides its tables. In: runs. Out: facts about them in words, and the metrics' definitions."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gsae.report.numbers import count, decimals
from gsae.report.runs import Results, Run

FEW_DOCUMENTS = 30
"""Below so many documents an interval over documents speaks for these documents only."""

_TITLES = {
    "l0": "L0",
    "l0_median": "L0 median",
    "l0_p90": "L0 p90",
    "fvu": "FVU",
    "fvu_dropped": "FVU, dropped rows",
    "mse": "MSE",
    "mse_scaled": "MSE, scaled",
    "cosine": "cosine",
    "gamma": "\N{GREEK SMALL LETTER GAMMA}",
    "ce_clean": "CE clean",
    "ce_spliced": "CE spliced",
    "ce_zero": "CE zero",
    "ce_mean": "CE mean",
    "ce_zero_all_rows": "CE zero, all rows",
    "ce_mean_all_rows": "CE mean, all rows",
    "delta_ce": "ΔCE",
    "kl": "KL",
    "loss_recovered": "loss recovered",
    "loss_recovered_mean": "recovered, mean ablation",
    "loss_recovered_all_rows": "recovered, all rows",
    "loss_recovered_mean_all_rows": "recovered, mean, all rows",
    "not_seen_fraction": "not seen",
    "dense_fraction": "dense",
    "max_decoder_cosine_mean": "decoder cosine",
    "kept_rows": "kept rows",
    "intervals": "95 % interval",
}
"""The report's words for the names in results.json."""
_OWN_DEFINITIONS = {
    "λ": "sparsity coefficient, on scaled activations; the same value means different sparsity for each objective, so compare at equal L0",
    "dead": "share of features, at the end of training, that were not on for the stated number of rows over all ranks",
    "pre-activation loss": "weight, in multiples of λ, of the loss that pulls at closed gates of dead features; none where there is a dash",
    "in training": "the last logged value, over training rows: not comparable with an evaluation",
    "stopped": "training gave the run up, for the reason stated; its numbers are shown, its points are not drawn",
}


@dataclass(frozen=True)
class Fact:
    """A term and what holds of it."""

    term: str
    text: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation setting: the LLM, the text, and how much of it; all runs of a pipeline share it."""

    facts: tuple[Fact, ...]
    is_within_documents: bool
    """Whether its documents are too few to speak for others."""
    settings: tuple[Fact, ...]
    """Its whole identity."""


def by_site(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """The runs of each site, sites in layer order."""
    return [(site, list(of_site)) for site, of_site in groupby(runs, key=lambda run: run.site)]


def evaluations(runs: Iterable[Run]) -> list[Evaluation]:
    """The distinct evaluation settings among the runs."""
    found = {}
    for run in runs:
        if run.results is not None:
            evaluation = _evaluation(run.results)
            found[evaluation] = evaluation
    return list(found)


def states(runs: Sequence[Run]) -> str:
    """How many runs there are, and how they ended."""
    wanted: list[tuple[str, Callable[[Run], bool]]] = [
        ("finished", lambda run: run.state == "finished"),
        ("stopped", lambda run: run.state == "stopped"),
        ("unfinished", lambda run: run.state == "unfinished"),
        ("from elsewhere", lambda run: run.state == "from elsewhere"),
        ("not evaluated", lambda run: run.results is None),
    ]
    numbers = ((sum(map(holds, runs)), name) for name, holds in wanted)
    return f"{_plural(len(runs), 'run')} at {_plural(len(by_site(runs)), 'site')}: " + ", ".join(f"{n} {name}" for n, name in numbers if n)


def site_facts(runs: Sequence[Run]) -> list[Fact]:
    """What all runs of a site share: cross-entropies in nats a token, rows, and the checks of the evaluation."""
    cross_entropies = {"CE clean": "ce_clean", "CE zero": "ce_zero", "CE mean": "ce_mean"}
    facts = [Fact(term, _values(run.metric(metric) for run in runs)) for term, metric in cross_entropies.items()]
    evaluated = [run.results for run in runs if run.results]
    kept = {results.counts["kept_rows"] for results in evaluated if "kept_rows" in results.counts}
    facts.append(Fact("kept rows", " / ".join(map(count, sorted(kept)))))
    for term, check in {"identity recovers": "identity_loss_recovered", "zero recovers": "zero_loss_recovered"}.items():
        facts.append(Fact(term, _values(results.checks.get(check) for results in evaluated)))
    return [fact for fact in facts if fact.text]


def definitions(runs: Iterable[Run]) -> list[Fact]:
    """What each number means: in the words of the evaluation that computed it, then in the report's own."""
    given = {name: text for run in runs if run.results for name, text in run.results.definitions.items()}
    # The dead share is training's, and so is shown also without an evaluation: the report defines it itself.
    facts = [Fact(_TITLES.get(name, name), text) for name, text in given.items() if name not in ("dead_fraction", "dead_rows")]
    return facts + [Fact(title, text) for title, text in _OWN_DEFINITIONS.items()]


def title(runs: Sequence[Run]) -> str:
    """The report's title, with the LLM's name where it is known."""
    names = {_model_name(run.results.identity.get("llm")) for run in runs if run.results}
    return "Sparse autoencoders" + (f" on {' and '.join(sorted(names))}" if names else "")


def _evaluation(results: Results) -> Evaluation:
    counts, identity = results.counts, results.identity
    evaluated = [f"{count(counts[name])} {name}" for name in ("tokens", "contexts", "documents") if name in counts]
    facts = (
        Fact("Model", _model_name(identity.get("llm"))),
        Fact("Text", _text_name(identity.get("text"))),
        Fact("Evaluated on", ", ".join(evaluated)),
    )
    few = bool(identity.get("within_these_documents")) or counts.get("documents", FEW_DOCUMENTS) < FEW_DOCUMENTS
    return Evaluation(facts, few, tuple(Fact(term, text) for term, text in _flat(identity)))


def _model_name(model: Any) -> str:
    if not isinstance(model, Mapping) or "name" not in model:
        return "an unnamed LLM"
    revision = f" at {str(model['revision'])[:12]}" if model.get("revision") else ""
    return "a random Llama" if model["name"] == "random" else f"{model['name']}{revision}"


def _text_name(text: Any) -> str:
    if not isinstance(text, Mapping) or not {"format", "files"} <= text.keys():
        return "not recorded"
    files = text["files"]
    rest = f" and {count(files['number'] - 1)} more files" if files["number"] > 1 else ""
    return f"{text['format']}: {files['first']}{rest}"


def _flat(tree: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """The leaves of a tree of plain data, by dotted name."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(tree)


def _values(values: Iterable[float | None]) -> str:
    """The distinct values to three decimals; the runs of a site share one unless they were evaluated apart."""
    return " / ".join(sorted({decimals(3)(value) for value in values if value is not None}))


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
