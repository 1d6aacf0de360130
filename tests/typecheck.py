"""Run mypy over the package as it is installed.

train/, export/ and bench/ stand at the top level but are imported as qe_edge.train and so on; mypy
can't see through setuptools' editable finder (python/mypy#13392), so it is shown a tree of links.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "qe_edge"
        package.mkdir()
        for path in (ROOT / "qe_edge").iterdir():
            (package / path.name).symlink_to(path)
        for top in ("train", "export", "bench"):
            (package / top).symlink_to(ROOT / top)
        command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "-p", "qe_edge"]
        command += ["--cache-dir", ROOT / ".mypy_cache"]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
