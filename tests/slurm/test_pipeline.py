"""slurm/pipeline.sh on two nodes, from another directory, with spaces in every path: what it makes is what is made without Slurm."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from ranks import run_gsae
from trained_runs import assert_equal
from trees import tree

ROOT = Path(__file__).parents[2]
STAGES = ("harvest", "train", "evaluate", "report")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with spaces in its name, with the checkout under another such name, and the smoke config."""
    folder = tmp_path_factory.mktemp("some place") / "of its own"
    folder.mkdir()
    (folder / "a checkout").symlink_to(ROOT)
    settings = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
    settings["corpus"] |= {"path": f"{ROOT}/gsae/train/*.py"}
    settings["train"]["total_rows"] = 40_960
    (folder / "smoke config.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def submitted(cluster, place) -> dict[str, str]:
    """The jobs of the pipeline, all of them ended."""
    (place / "elsewhere").mkdir()
    words = ["nodes=2", "cpus_per_rank=1", "../smoke config.yaml", "--output", "../runs of slurm", "--train.groups", "2"]
    shown = cluster.run("bash", "../a checkout/slurm/pipeline.sh", *words, cwd=place / "elsewhere")
    jobs = dict(line.split()[:2] for line in shown.splitlines())
    assert [*jobs] == [*STAGES, "logs"]
    for stage in STAGES:
        assert cluster.wait(jobs[stage]) == "COMPLETED", cluster.output(jobs[stage])
    return jobs


@pytest.fixture(scope="module")
def by_hand(place) -> Path:
    """What one process makes of the same config."""
    for stage in ("harvest", "train", "evaluate"):
        run_gsae(1, [stage, place / "smoke config.yaml", "--output", place / "runs"])
    return place / "runs"


def test_a_pipeline_on_two_nodes_makes_what_one_process_makes(cluster, submitted, by_hand, place):
    output = place / "runs of slurm"
    assert tree(output / "store") == tree(by_hand / "store")
    assert_equal(output, by_hand)
    results = sorted(path.relative_to(by_hand) for path in by_hand.rglob("results.json"))
    assert len(results) == 8
    assert [(output / path).read_bytes() == (by_hand / path).read_bytes() for path in results] == [True] * 8
    assert (output / "report.html").exists()
    assert sorted(path.name for path in output.iterdir() if path.is_file()) == ["report.html", "report.md", "results.csv"]


def test_each_job_has_both_nodes_and_waits_for_the_one_before(cluster, submitted):
    shown = {stage: cluster.show(submitted[stage]) for stage in STAGES}
    assert [shown[stage]["NodeList"] for stage in STAGES[:3]] == ["n[1-2]"] * 3
    ends = [shown[stage]["EndTime"] for stage in STAGES]
    assert ends == sorted(ends)
    assert [shown[stage]["Restarts"] for stage in STAGES] == ["0"] * 4


def test_the_first_rank_speaks_in_the_jobs_output_and_the_others_in_files(cluster, submitted, place):
    said = cluster.output(submitted["train"])
    log = place / "runs of slurm" / "logs" / f"train-{submitted['train']}" / "rank-0001.log"
    sites = {"resid.0", "resid.1"}
    in_output, in_file = ({site for site in sites if f"{site} gated" in text} for text in (said, log.read_text()))
    assert in_output | in_file == sites, "each group speaks for its site"
    assert in_output.isdisjoint(in_file)
    assert "training: no site is left" in said
    assert "\x1b" not in said
    assert Path(cluster.show(submitted["train"])["StdOut"]).parent == (place / "runs of slurm" / "logs").resolve()


def test_an_array_of_four_lambdas_shares_one_store(cluster, submitted, place):
    sweep = [
        f"""--train.sweeps '[{{objective: gated, expansions: [4], lambdas: {{"*": [{lambda_}]}}}}]'""" for lambda_ in (0.05, 0.1, 0.2, 0.4)
    ]
    (place / "four lambdas.txt").write_text("# one a line\n" + "\n".join(sweep))
    output, store = place / "an array", place / "runs of slurm" / "store"
    before = tree(store)
    words = ["cpus_per_rank=1", f"array={place}/four lambdas.txt", place / "smoke config.yaml"]
    words += ["--output", output, "--harvest.store", store]
    shown = cluster.run("bash", ROOT / "slurm" / "pipeline.sh", *words)
    jobs = dict(line.split()[:2] for line in shown.splitlines())
    assert cluster.wait(jobs["report"]) == "COMPLETED", [cluster.output(f"{jobs['train']}_{member}") for member in range(4)]
    found = sorted(path.relative_to(output).parts[0] for path in output.rglob("results.json"))
    assert found == sorted("0123" * 2), "two sites each"
    lambdas = {json.loads(path.read_text())["lambda"] for path in output.rglob("run.json")}
    assert lambdas == {0.05, 0.1, 0.2, 0.4}
    assert tree(store) == before
    assert "8 runs at 2 sites" in (output / "report.md").read_text()


def test_a_second_job_on_the_same_runs_is_refused(cluster, submitted, place):
    store = place / "runs of slurm" / "store"
    words = [ROOT / "slurm" / "train.sbatch", place / "smoke config.yaml", "--output", place / "twice", "--harvest.store", store]
    words += ["--train.total_rows", "4_096_000"]
    first, second = (cluster.run("sbatch", "--parsable", f"--output={place}/job-%j.out", *words).strip() for _ in range(2))
    until = time.monotonic() + 120
    while "FAILED" not in (states := [cluster.state(first), cluster.state(second)]):
        assert time.monotonic() < until, cluster.output(first) + cluster.output(second)
        time.sleep(0.3)
    refused, other = (first, second) if states[0] == "FAILED" else (second, first)
    assert cluster.show(refused)["ExitCode"] == "2:0"
    said = [line for line in cluster.output(refused).splitlines() if line.startswith("gsae: ")]
    assert len(said) == 1, cluster.output(refused)
    assert f"where job {other} on n" in said[0]
    assert f"wait for it, or scancel {other}, or give output another directory" in said[0]
    assert cluster.state(other) == "RUNNING"
    cluster.run("scancel", other)
    assert cluster.wait(other) == "CANCELLED"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no config given; usage: bash slurm/pipeline.sh"),
        (["nodse=2", "CONFIG"], "there is no setting nodse (the command line); slurm/env.sh lists them"),
        (["nodes=two", "CONFIG"], "nodes is 'two' (the command line); give a number from 1 on"),
        (["evaluate.nodes=0", "CONFIG"], "evaluate.nodes is '0' (the command line); give a number from 1 on"),
        (["venv=/nowhere", "CONFIG"], "/nowhere/bin/python is not there on"),
        (["array=/nowhere", "CONFIG"], "array is /nowhere, which cannot be read"),
        (["no-config.yaml"], "config no-config.yaml: No such file or directory"),
        (["CONFIG", "--train.grops", "2"], "unknown setting train.grops in the command line; did you mean train.groups?"),
        (["array=LINES", "CONFIG", "--corpus.parts", "2"], "array does not go with corpus.parts"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(cluster, place, words, message):
    (place / "lines").write_text("--train.seed 1\n")
    words = [word.replace("CONFIG", str(place / "smoke config.yaml")).replace("LINES", str(place / "lines")) for word in words]
    before = cluster.run("squeue", "-h", "-o", "%i")
    tried = subprocess.run(
        ["bash", ROOT / "slurm" / "pipeline.sh", *words],
        capture_output=True,
        text=True,
        check=False,
        env=cluster.environment | {"GSAE_SLURM": ""},
        cwd=place,
    )
    assert tried.returncode == 2, tried
    assert tried.stdout == ""
    assert tried.stderr.count("\n") == 1, tried.stderr
    assert tried.stderr.startswith("gsae: ")
    assert message in tried.stderr
    assert cluster.run("squeue", "-h", "-o", "%i") == before
