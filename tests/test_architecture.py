"""The rooms and the arrows between them, as DESIGN draws them: read from the source's own imports."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gsae"
FOUNDATIONS = {"errors", "config", "settings", "console", "world", "heartbeat"}
ROOMS = {"corpus", "llm", "sae"}
STAGES = {"harvest", "train", "evaluate", "report"}
MAY_IMPORT = {
    **dict.fromkeys(FOUNDATIONS, FOUNDATIONS),
    **dict.fromkeys(ROOMS, FOUNDATIONS | ROOMS),
    "store": FOUNDATIONS | ROOMS | {"store"},
    **{stage: FOUNDATIONS | ROOMS | {"store", stage} for stage in STAGES},
    "plan": FOUNDATIONS | ROOMS | {"store", "train", "plan"},
    "status": FOUNDATIONS | ROOMS | {"store", "train", "evaluate"},
    "verify": FOUNDATIONS | {"store"},
    "inspect": FOUNDATIONS | {"store", "inspect"},
    "exchange": FOUNDATIONS | {"sae", "store", "exchange"},
    "cli": FOUNDATIONS | STAGES | {"plan", "status", "verify", "inspect", "exchange"},
    "__main__": {"cli"},
    "__init__": {"exchange"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of the modules and members that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    rooms = {name.split(".")[1] for name in imported(path) if name.startswith("gsae.")} - {"__version__"}
    assert rooms <= MAY_IMPORT[room(path)], f"{room(path)} imports {rooms - MAY_IMPORT[room(path)]}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_world_knows_of_processes_and_only_site_hooks(path):
    distributed = [name for name in imported(path) if name.startswith(("torch.distributed", "accelerate", "deepspeed"))]
    assert not distributed or room(path) == "world"
    assert "register_forward" not in path.read_text() or path.name == "site.py"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_from_disk(path):
    text = path.read_text().replace("safetensors.torch.load(", "")
    assert text.count("torch.load(") == (path.name == "importing.py")
    assert text.count("torch.load(") == text.count("weights_only=True")
    assert "pickle" not in {name.split(".")[0] for name in imported(path)}
