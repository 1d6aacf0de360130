"""The whole pipeline from a recipe file, on a tiny student; and the recipes that ship."""

from pathlib import Path

import msgspec
import pytest
from endpoint import serve

from qe_edge import Expander
from qe_edge.bench.result import read_result
from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError
from qe_edge.overrides import Overrides
from qe_edge.pipeline import run_recipe
from qe_edge.recipe import load_recipe, recipe_file
from qe_edge.records import Expansion, Pair, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import builtin_folder
from qe_edge.student.spec import read_spec
from qe_edge.train.pairs import BEST, PAIRS
from qe_edge.train.teach.teach import EXPANSIONS, Outcome
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

ROOT = Path(__file__).parents[2]
TINY = """
title = "a tiny student"
[pairs]
dataset = "demo-en@train"
expansions = ["{{builtin}}/demo-en/expansions/train.jsonl"]
join = "mass:2"
max_per_query = 1
[sft]
expansions = ["{{builtin}}/demo-en/expansions/train.jsonl"]
student = "{student}"
max_rows = 8
rank = 4
[dpo]
learning_rate = {rate}
[export]
quant = ["Q4_K_M"]
format = ["gguf"]
[bench]
dataset = ["demo-en"]
teacher = ["{{builtin}}/demo-en/expansions/test.jsonl"]
"""


@pytest.mark.parametrize("recipe", ["demo", *(ROOT / "recipes").glob("*.toml")], ids=str)
def test_the_recipes_that_ship_can_be_read(recipe, tmp_path):
    assert load_recipe(recipe, data=tmp_path).title


def test_the_demo_trains_on_train_queries_alone():
    recipe = load_recipe("demo")
    files = (*recipe.sft.expansions, *recipe.pairs.expansions)
    assert all(Path(path).name == "train.jsonl" and Path(path).is_file() for path in files)
    assert recipe.pairs.dataset == "demo-en@train"
    assert recipe.bench.datasets == ("demo-en", "demo-zh")


def test_a_recipe_that_does_not_fit_is_named(tmp_path):
    file = tmp_path / "bad.toml"
    file.write_text('title = "x"\nnonsense = 1\n')
    with pytest.raises(BadInput, match=r"bad\.toml: not a valid recipe: .*nonsense"):
        load_recipe(file)
    file.write_text("title = ")
    with pytest.raises(BadInput, match="not a valid recipe"):
        load_recipe(file)
    with pytest.raises(BadInput, match=r"uses \{data\}; name that folder with --data"):
        load_recipe(next((ROOT / "recipes").glob("*.toml")))
    with pytest.raises(NotFound, match="no recipe nothing"):
        load_recipe("nothing")


def test_dpo_needs_pairs(tmp_path):
    file = tmp_path / "recipe.toml"
    start, rest = TINY.format(student="s", rate=1e-4).split("[pairs]")
    file.write_text(f"{start}[sft]{rest.split('[sft]')[1]}")
    with pytest.raises(BadInput, match=r"DPO needs a \[pairs\] section"):
        load_recipe(file)


def test_expansions_alone_make_no_pairs(tmp_path):
    recipe = ROOT / "recipes" / "smollm2-135m-cpu.toml"
    given = {"pairs": {"expansions": ["own.jsonl"]}, "sft": {"expansions": ["own.jsonl"]}, "bench": {}}
    loaded = load_recipe(recipe, data=tmp_path, given=given)
    assert (loaded.pairs, loaded.sft.expansions) == (None, ("own.jsonl",))
    given["pairs"]["dataset"] = "demo-en@train"
    assert load_recipe(recipe, data=tmp_path, given=given).pairs.dataset == "demo-en@train"
    with pytest.raises(BadInput, match=r"\[bench\] lacks `dataset`; name your data with --dataset"):
        load_recipe("qwen3-0.6b-24gb", given={"pairs": {"expansions": ["own.jsonl"]}})


def test_expansions_of_a_recipes_data_are_those_that_teach_collected(tmp_path):
    work = Workdir(tmp_path)
    taught = work.teach_folder("demo-en@train")
    content = {"pairs": {"dataset": "demo-en@train"}, "sft": {}, "bench": {"dataset": ["demo-en"]}}
    with pytest.raises(NotFound, match="run `qe-edge teach`"):
        Overrides().sections(content, work)
    taught.mkdir(parents=True)
    (taught / EXPANSIONS).write_text("")
    given = Overrides().sections(content, work)
    assert given["pairs"]["expansions"] == given["sft"]["expansions"] == (str(taught / EXPANSIONS),)
    content["pairs"]["expansions"] = ["mine.jsonl"]
    assert "expansions" not in Overrides().sections(content, work)["pairs"]


OWN = """
title = "a tiny student of its own texts"
join = "mass:1"
[samples]
dataset = ["demo-en@train", "demo-zh@train"]
n = 2
[sft]
student = "{student}"
budget_tokens = 8
max_rows = 8
rank = 4
[export]
quant = ["Q4_K_M"]
format = ["gguf"]
[bench]
dataset = ["demo-en"]
"""


def test_a_recipe_of_the_students_own_texts_names_no_others(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN.format(student="builtin:smollm2-135m") + '[pairs]\nexpansions = ["x.jsonl"]\n')
    with pytest.raises(BadInput, match=r"\[samples\] has datasets and makes expansions"):
        load_recipe(file)
    file.write_text(OWN.format(student="builtin:smollm2-135m"))
    given = {"samples": {"dataset": ["cisi@train"]}, "pairs": {}, "sft": {"student": "other"}}
    assert load_recipe(file, given=given).samples.datasets == ("cisi@train",)
    given = {"pairs": {"dataset": "demo-en@train", "expansions": ["x"]}, "bench": {"dataset": ["demo-en"]}}
    with pytest.raises(BadInput, match=r"\[sft\] needs expansions; name your data"):
        load_recipe("qwen3-0.6b-24gb", given=given)


def samples(data, config, *, out):
    """As `teach` would write them, but what a random tiny student writes is in no language."""
    assert (config.modes, config.n, config.max_tokens) == (("student",), 2, 8)
    file = builtin_folder(data.name) / "expansions" / "train.jsonl"
    rows = [msgspec.structs.replace(row, mode="student") for row in read_jsonl(file, Expansion)]
    out.mkdir(parents=True)
    (out / EXPANSIONS).write_bytes(encode_jsonl(rows))
    return Outcome(candidates=1, done=1)


def test_a_student_learns_from_its_own_best_texts(tiny_qwen3, tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl")
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr("qe_edge.pipeline.teach", samples)
    file = tmp_path / "own.toml"
    file.write_text(OWN.format(student=tiny_qwen3.as_posix()))
    work = Workdir(tmp_path / "work")
    out = run_recipe(load_recipe(file), workdir=work)

    rows = [
        row for path in work.root.glob("samples/*/expansions.jsonl") for row in read_jsonl(path, Expansion)
    ]
    assert {(row.dataset, row.mode) for row in rows} == {("demo-en", "student"), ("demo-zh", "student")}
    of_en, of_zh = (list(read_jsonl(out[f"pairs demo-{lang}@train"] / PAIRS, Pair)) for lang in ("en", "zh"))
    assert list(read_jsonl(work.root / "samples" / PAIRS, Pair)) == of_en + of_zh
    inputs = read_record(out["sft"])["inputs"]
    assert [Path(entry["path"]).name for entry in inputs.values()] == [BEST, BEST]
    (data,) = read_result(out["bench"]).datasets
    names = [system.name for system in data.systems if system.kind == "model"]
    assert [name for name in names if not name.endswith(" + gate")] == [
        "untrained",
        "SFT Q4_K_M",
        "SFT+DPO Q4_K_M",
    ]
    capsys.readouterr()
    assert run_recipe(load_recipe(file), workdir=work) == out
    assert "started" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('quant = ["Q4_K_M"]', 'quant = ["Q4"]'), r"^\[export\] of the recipe: unknown kind Q4"),
        (('format = ["gguf"]', 'format = ["onnx"]'), r"^\[export\] of the recipe: unknown format onnx"),
        (('join = "mass:2"', 'join = "lots"'), "can't read the join"),
        (
            ('dataset = ["demo-en"]', 'dataset = ["demo-fr"]'),
            r"^\[bench\] of the recipe: no data set 'demo-fr'",
        ),
        (("expansions/test.jsonl", "expansions/nothing.jsonl"), r"^\[bench\] of the recipe: .*no such file"),
        (("[bench]\n", '[bench]\nrefine = true\nreader = ["no.gguf"]\n'), "no.gguf: no such file"),
        (("[bench]\n", '[bench]\nrun = ["no.trec"]\n'), "no.trec: no such file"),
        (("rank = 4", 'eval_dataset = "demo-fr"'), r"^\[sft\] of the recipe: no data set 'demo-fr'"),
        (("rank = 4", 'eval_join = "lots"'), "can't read the join"),
        (("max_per_query = 1", 'reward = "nDCG@@"'), r"^\[pairs\] .*nDCG@@"),
        (("[bench]\n", '[bench]\nmeasure = ["nDCG@@"]\n'), r"^\[bench\] .*nDCG@@"),
        (("[bench]\n", '[bench]\njoin = ["lots"]\n'), "can't read the join"),
        (("[bench]\n", '[bench]\ntune_on = "demo-en"\n'), "tune on others than those that are measured"),
        (("[bench]\n", '[bench]\nmodel = ["no.gguf"]\n'), "no model 'no.gguf'"),
        (('student = "', 'student = "/nowhere'), r"^\[sft\] of the recipe: no model"),
    ],
)
def test_mistakes_in_a_recipe_are_found_before_the_first_stage(tiny_qwen3, tmp_path, change, message):
    file = tmp_path / "tiny.toml"
    file.write_text(TINY.format(student=tiny_qwen3.as_posix(), rate="1e-4").replace(*change))
    with pytest.raises(QeEdgeError, match=message):
        run_recipe(load_recipe(file), workdir=Workdir(tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_a_recipe_runs_to_a_benchmarked_student_and_skips_what_is_done(tiny_qwen3, tmp_path, capsys):
    pytest.importorskip("trl")
    pytest.importorskip("llama_cpp")
    file = tmp_path / "tiny.toml"
    file.write_text(TINY.format(student=tiny_qwen3.as_posix(), rate="1e-4"))
    work = Workdir(tmp_path / "work")
    out = run_recipe(load_recipe(file), workdir=work)

    (data,) = read_result(out["bench"]).datasets
    # What tiny models write is held back by the gate now and then, which makes another row.
    assert [s.name for s in data.systems if not s.name.endswith(" + gate")] == [
        "BM25",
        "BM25 + RM3",
        "untrained",
        "SFT Q4_K_M",
        "SFT+DPO Q4_K_M",
        "qe-edge/demo-teacher zero-shot",
        "qe-edge/demo-teacher few-shot",
    ]
    assert read_spec(out["merge dpo"]).stage == "dpo"
    with Expander.load(out["export dpo"] / "student-Q4_K_M.gguf") as expander:
        assert str(expander.spec.join) == "mass:2"
        assert expander.spec.stage == "dpo"

    capsys.readouterr()
    assert run_recipe(load_recipe(file), workdir=work) == out
    assert capsys.readouterr().err.count("done before") == 8

    file.write_text(TINY.format(student=tiny_qwen3.as_posix(), rate="2e-4"))
    again = run_recipe(load_recipe(file), workdir=work)
    changed = {stage for stage in out if again[stage] != out[stage]}
    assert changed == {"dpo", "merge dpo", "export dpo", "bench"}

    start, rest = file.read_text().split("[pairs]")
    parts = rest.split("[sft]")[1].replace("[dpo]\nlearning_rate = 2e-4\n", "")
    file.write_text(f'{start}join = "mass:2"\n[sft]{parts}')
    alone = run_recipe(load_recipe(file), workdir=work)
    assert list(alone) == ["sft", "merge sft", "export sft", "bench"]
    assert all(alone[stage] == out[stage] for stage in list(alone)[:3])
    (data,) = read_result(alone["bench"]).datasets
    models = [system.name for system in data.systems if system.kind == "model"]
    assert [name for name in models if not name.endswith(" + gate")] == ["untrained", "SFT Q4_K_M"]


NOTES = """
title = "tiny notes"
[notes]
words = 20
[queries]
[teach]
mode = ["zero-shot"]
n = 2
[pairs]
min_gap = 0.01
[sft]
student = "{student}"
max_rows = 8
rank = 4
[dpo]
[export]
quant = ["Q4_K_M"]
format = ["gguf"]
[bench]
dataset = []
"""
PLANTS = {
    "tomato": "red, and grown under glass",
    "leek": "long, and earthed up in autumn",
    "bean": "climbing on poles",
    "maize": "tall, and pollinated by wind",
    "onion": "dried in the sun",
    "melon": "sweet, and watered at noon",
}


def for_query(body) -> bool:
    message = body["messages"][-1]["content"]
    return "Write one short question" in message or "three to six words" in message


def gardener(body) -> str:
    """Writes a query of a note, or expansions of one: only the second sample adds what the note says."""
    message = body["messages"][-1]["content"]
    plant = next(plant for plant in PLANTS if plant in message)
    if for_query(body):
        return f"what to know of a {plant} in the garden"
    return f"It is {PLANTS[plant]}." if body["seed"] else "It is what all gardens have: soil, sheds, fences."


def test_from_a_folder_of_notes_to_a_student_in_one_command(tiny_qwen3, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    pytest.importorskip("llama_cpp")
    from qe_edge.cli import app

    notes, file = tmp_path / "notes", tmp_path / "notes.toml"
    notes.mkdir()
    for plant, known in PLANTS.items():
        (notes / f"{plant}.md").write_text(
            f"# The {plant}\nA {plant} is what everybody has in the garden, "
            f"to know it is to love it, and it is {known}.\n"
        )
        (notes / f"shed {plant}.md").write_text(
            f"The garden of a {plant} grower has soil, sheds and fences, "
            "and what to know of a garden has he too.\n"
        )
    file.write_text(NOTES.format(student=tiny_qwen3.as_posix()))
    with serve(text=gardener) as endpoint:
        argv = ["run", str(file), "--dataset", str(notes), "--endpoint", endpoint.url, "--model", "big"]
        argv += ["--passages", "11"]  # of 12
        app([*argv, "--json"], standalone_mode=False)
        asked = len(endpoint.requests)
        assert sum(for_query(request) for request in endpoint.requests) == 11
        capsys.readouterr()
        app(argv, standalone_mode=False)  # nothing is asked or trained again
        assert len(endpoint.requests) == asked
    out, err = capsys.readouterr()
    assert "started" not in err and "synthetic, as their judgments are" in err
    assert "notes-synthetic@test on " in out
    work = Workdir()
    (result,) = (read_result(path.parent) for path in work.root.glob("bench/*/result.json"))
    assert result.datasets[0].info.name == "notes-synthetic@test"
    assert {"BM25", "SFT+DPO Q4_K_M", "big zero-shot"} <= {s.name for s in result.datasets[0].systems}


def test_a_recipe_is_shown_as_it_is_written(capsys):
    from qe_edge.cli import app

    app(["run", "own-notes", "--show"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert printed == recipe_file("own-notes").read_text() and "passages = 500" in printed
    with pytest.raises(BadArgument, match="takes no notes and asks no model: leave --passages out"):
        app(["run", "demo", "--passages", "5"], standalone_mode=False)


def test_what_a_recipe_of_notes_lacks_is_said(tmp_path):
    with pytest.raises(BadInput, match="name your notes with --dataset, who writes for them with --model"):
        load_recipe("own-notes")
    with pytest.raises(BadInput, match=r"not complete: \[queries\] lacks `model`; name who writes"):
        load_recipe("own-notes", given={"notes": {"folder": "notes"}})
    given = {"notes": {"folder": str(tmp_path / "none")}, "queries": {"model": "m"}, "teach": {"model": "m"}}
    with pytest.raises(NotFound, match="no such folder of notes"):
        run_recipe(load_recipe("own-notes", given=given), workdir=Workdir(tmp_path / "work"))
    file = tmp_path / "half.toml"
    file.write_text(NOTES.format(student="s").replace("[queries]\n", ""))
    with pytest.raises(BadInput, match=r"\[notes\], \[queries\] and \[teach\] go together"):
        load_recipe(file, given={"notes": {"folder": "x"}, "teach": {"model": "m"}})
