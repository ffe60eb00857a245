"""launch/pipeline.sh with a corpus in parts: harvest and train take turns until training ends."""

import shutil
import subprocess

from in_parts import begin, part_stores
from test_pipeline import ROOT, pipeline


def test_the_script_takes_turns_until_training_ends(tmp_path):
    shown = pipeline(begin(tmp_path)).stdout
    assert shown.count("run gsae train, then gsae harvest again") == 3  # visits 0 and 1, 2 and 3, 4
    assert (tmp_path / "runs/report.html").exists()
    assert not (tmp_path / "runs/waiting.json").exists()
    assert part_stores(tmp_path) == []


def test_it_does_not_turn_for_ever_when_training_gets_no_further(tmp_path):
    """The script beside a python that only notes its stages, whose training always waits for the same part."""
    output, log, python = tmp_path / "runs", tmp_path / "log", tmp_path / ".venv/bin/python"
    (tmp_path / "launch").mkdir()
    python.parent.mkdir(parents=True)
    output.mkdir()
    shutil.copy(ROOT / "launch/pipeline.sh", tmp_path / "launch")
    python.write_text(
        f"""#!/usr/bin/env bash
if [ "$1" = -c ]; then echo {output}; exit; fi
echo "$3" >>{log}
if [ "$3" = train ]; then echo part-0002 >{output}/waiting.json; fi
if [ "$3" = evaluate ]; then exit 2; fi
"""
    )
    python.chmod(0o755)
    done = subprocess.run(["bash", str(tmp_path / "launch/pipeline.sh"), "config.yaml"], timeout=30, check=False)
    assert done.returncode == 2
    assert log.read_text().split() == ["harvest", "train", "harvest", "train", "evaluate"]
