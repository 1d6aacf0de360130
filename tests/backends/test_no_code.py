"""No code of a checkpoint is ever run, whoever says yes on stdin."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVIL = """
from pathlib import Path
Path("ran").touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class EvilConfig(PretrainedConfig): model_type = "evil"
class EvilModel(PreTrainedModel): config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture(scope="module", params=["model", "tokenizer"])
def evil(request: pytest.FixtureRequest, tiny_qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose model, or whose tokenizer alone, is code of its own."""
    folder = Path(shutil.copytree(tiny_qwen3, tmp_path_factory.mktemp("evil") / request.param))
    (folder / "evil.py").write_text(EVIL)
    mapped = {
        "model": ("config.json", {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}),
        "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": [None, "evil.EvilTokenizer"]}),
    }
    name, auto_map = mapped[request.param]
    content = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
    if request.param == "model":
        content |= {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
    else:
        content |= {"tokenizer_class": "EvilTokenizer"}
        (folder / "tokenizer.json").unlink()
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        ["expand", "tides", "-m", "EVIL"],
        ["export", "EVIL", "--format", "gguf"],
        ["train", "sft", "-e", "DATA", "--student", "EVIL"],
        ["bench", "-d", "demo-en", "-m", "EVIL"],
        ["teach", "-d", "demo-en", "-m", "EVIL", "--mode", "zero-shot"],
        ["verify", "EVIL", "--source", "EVIL"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_command_refuses_it(evil, tmp_path, command):
    from qe_edge.retrieval.datasets import builtin_folder

    data = builtin_folder("demo-en") / "expansions" / "train.jsonl"
    names = {"EVIL": str(evil), "DATA": str(data)}
    done = subprocess.run(
        [sys.executable, "-m", "qe_edge", *(names.get(part, part) for part in command)],
        input=b"y\n" * 9,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert done.returncode in (4, 5, 6), done.stderr
    assert b"Traceback" not in done.stderr
    assert b"error: " in done.stderr
    assert not list(tmp_path.rglob("ran")) and not list(evil.rglob("ran"))
    if command[0] == "expand" and evil.name == "model":
        assert b"code of its own" in done.stderr


def test_mlx_refuses_it(tiny_qwen3, tmp_path):
    pytest.importorskip("mlx_lm")
    from qe_edge import Expander
    from qe_edge.errors import BadInput
    from qe_edge.export.mlx import convert_mlx
    from qe_edge.student.spec import read_spec

    folder = convert_mlx(tiny_qwen3, tmp_path / "mlx", bits=4, spec=read_spec(tiny_qwen3))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    config = json.loads((folder / "config.json").read_text()) | {"model_file": "evil.py"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=r"custom module \('evil\.py'\)"):
        Expander.load(folder)
    assert not list(tmp_path.rglob("ran"))


def test_every_call_says_no():
    """Wherever a checkpoint is loaded, its code is kept out."""
    for folder in ("qe_edge", "train", "export", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            text = file.read_text()
            for found in re.finditer(r"\.from_pretrained\(([^()]|\([^()]*\))*\)", text):
                # peft's classes load weights of known kinds alone.
                peft = re.search(r"peft\.\w+$", text[: found.start()])
                assert peft or "trust_remote_code=False" in found[0], (file, found[0])
            for found in re.finditer(r"mlx_lm\.load\b[^\n]*\n?[^\n]*", text):
                assert "NO_CODE" in found[0], (file, found[0])
            assert "trust_remote_code=True" not in text
