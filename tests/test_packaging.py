"""What only shows when the package is installed: light start-up, and that the wheel holds every file."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("train", "export", "bench")
HEAVY = ("torch", "transformers", "mlx", "mlx_lm", "llama_cpp", "trl", "datasets", "bm25s", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "import qe_edge, qe_edge.cli",
        "import qe_edge.train, qe_edge.export, qe_edge.bench, qe_edge.train.sft, qe_edge.bench.bench",
        "from typer.testing import CliRunner as R; from qe_edge.cli import app; R().invoke(app, ['--help'])",
        "import qe_edge; qe_edge.ExpandedQuery('tides', 'moon', qe_edge.Join.parse('mass:1')).to_fts5()",
    ],
)
def test_starting_loads_nothing_heavy(code):
    code += f"; import sys; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_every_public_name_is_there_and_no_other():
    import qe_edge

    assert [name for name in qe_edge.__all__ if getattr(qe_edge, name) is None] == []
    assert set(qe_edge.__all__) == set(qe_edge._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'expander_of'"):
        _ = qe_edge.expander_of


def test_every_sub_package_is_listed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {f"qe_edge.{top}": top for top in TOPS}
    inside = (init for top in TOPS for init in (ROOT / top).rglob("__init__.py"))
    names = {".".join(("qe_edge", *init.parent.relative_to(ROOT).parts)) for init in inside}
    for init in (ROOT / "qe_edge").rglob("__init__.py"):
        parts = init.parent.relative_to(ROOT).parts
        if parts[1:2] not in [(top,) for top in TOPS]:  # by a link
            names.add(".".join(parts))
    assert set(settings["packages"]) == names


@pytest.mark.parametrize("top", TOPS)
def test_editors_and_type_checkers_find_the_top_level_folders_by_a_link(top):
    link = ROOT / "qe_edge" / top
    if link.is_file():
        pytest.skip("git made no links here, as on Windows: pip goes by package-dir")
    assert link.is_symlink()
    assert link.resolve() == (ROOT / top).resolve()


def test_every_module_imports():
    """mypy takes a module of ours that was moved away for another one that ships no types."""
    code = """
import importlib, pkgutil, qe_edge
for found in pkgutil.walk_packages(qe_edge.__path__, "qe_edge."):
    importlib.import_module(found.name)
    print(found.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "qe_edge.bench.programs.gate_thresholds" in done.stdout.splitlines()


def test_layers_are_kept_and_there_are_no_circles():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_runs(tmp_path):
    source = tmp_path / "source"
    listing = ["git", "ls-files", "-coz", "--exclude-standard"]  # -z, or Chinese names are quoted
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.rstrip("\0").split("\0") if not (ROOT / name).is_symlink()]
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
