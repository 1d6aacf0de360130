"""What only shows when the package is installed: light start-up, and that the wheel holds every file."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "mlx", "mlx_lm", "llama_cpp", "trl", "datasets", "bm25s", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "import qe_edge, qe_edge.cli",
        "import qe_edge.train, qe_edge.export, qe_edge.bench, qe_edge.train.sft, qe_edge.bench.harness",
        "from typer.testing import CliRunner as R; from qe_edge.cli import app; R().invoke(app, ['--help'])",
    ],
)
def test_starting_loads_nothing_heavy(code):
    code += f"; import sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_sub_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"qe_edge"} | {
        ".".join(("qe_edge", *init.parent.relative_to(ROOT / top).parts))
        for top in ("qe_edge",)
        for init in (ROOT / top).rglob("__init__.py")
    }
    for top in ("train", "export", "bench"):
        found |= {
            ".".join(("qe_edge", *init.parent.relative_to(ROOT).parts))
            for init in (ROOT / top).rglob("__init__.py")
        }
    assert set(settings["packages"]) == set(settings["package-dir"]) == found


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_runs(tmp_path):
    source = tmp_path / "source"
    listing = ["git", "ls-files", "-coz", "--exclude-standard"]  # -z, or Chinese names are quoted
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = listed.rstrip("\0").split("\0")
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            tmp_path / "site",
            source,
        ],
        check=True,
    )
    site = tmp_path / "site"
    for top in ("qe_edge", "train", "export", "bench"):
        inside = site / "qe_edge" if top == "qe_edge" else site / "qe_edge" / top
        wanted = [name for name in files if name.startswith(f"{top}/")]
        missing = [name for name in wanted if not (inside / Path(name).relative_to(top)).is_file()]
        assert not missing
    assert not (site / "train").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from qe_edge.cli import app; app(['data', 'list'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "demo-en" in done.stdout, done.stderr
