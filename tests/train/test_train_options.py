"""Training's settings do what they say, and bad input is refused before anything is trained."""

import json
import math
import re
import shutil
import sys
import tomllib

import msgspec
import pytest
from training import DEV, log_of, losses, run_sft

from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.recipe import load_recipe, read_recipe
from qe_edge.records import Expansion, Pair
from qe_edge.student.prompt import prompt_for
from qe_edge.student.spec import read_spec
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

pytest.importorskip("trl")
from qe_edge.train.base_model import open_trained
from qe_edge.train.dpo import dpo, encode_pairs
from qe_edge.train.merge import merge
from qe_edge.train.sft import encode_rows

# The settings


def cli(monkeypatch, capsys, *arguments):
    from qe_edge.cli import main

    monkeypatch.setattr(sys, "argv", ["qe-edge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr()


def test_flags_override_a_recipe_which_overrides_the_defaults(monkeypatch, capsys):
    flags = ("--recipe", "qwen3-4b-24gb", "--rank", 8, "--mode", "few-shot", "--print-config")
    code, shown = cli(monkeypatch, capsys, "train", "sft", *flags)
    assert code == 0
    config = msgspec.convert(tomllib.loads(shown.out)["sft"], SftConfig)
    recipe = read_recipe("qwen3-4b-24gb")["sft"]
    assert config == msgspec.convert(recipe | {"rank": 8, "mode": ["few-shot"]}, SftConfig)
    assert config.student == "Qwen/Qwen3-4B"


def test_what_print_config_prints_is_a_recipes_section(monkeypatch, capsys, tmp_path):
    losses = ("--loss", "sigmoid", "--loss", "sft")
    _, shown = cli(monkeypatch, capsys, "train", "dpo", *losses, "--print-config")
    (tmp_path / "mine.toml").write_text(shown.out)
    _, again = cli(monkeypatch, capsys, "train", "dpo", "--recipe", tmp_path / "mine.toml", "--print-config")
    assert again.out == shown.out
    assert tomllib.loads(shown.out)["dpo"]["loss"] == ["sigmoid", "sft"]


def test_a_flag_can_turn_off_what_a_recipe_turns_on(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.toml").write_text("[sft]\ncheckpointing = true\npacking = true\n")
    flags = ("--recipe", tmp_path / "mine.toml", "--no-checkpointing", "--print-config")
    _, shown = cli(monkeypatch, capsys, "train", "sft", *flags)
    settings = tomllib.loads(shown.out)["sft"]
    assert (settings["checkpointing"], settings["packing"]) == (False, True)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--device", "tpu"), 2, "'tpu' is not one of"),
        (("--batch-size", "0"), 2, "--batch-size"),
        (("--mode", "ZERO-SHOT,none"), 2, "--mode: unknown none; choose from: zero-shot, few-shot, student"),
        (("--recipe", "nothing"), 4, "neither a file nor one that ships"),
    ],
)
def test_settings_out_of_bounds_are_named(monkeypatch, capsys, flags, code, message):
    done, shown = cli(monkeypatch, capsys, "train", "sft", *flags, "--print-config")
    assert done == code
    assert message in " ".join(shown.err.replace("│", " ").split())


FLAGS = {"teacher_models": "teacher-model", "modes": "mode", "tasks": "task", "loss_weights": "loss-weight"}


def test_every_setting_has_a_flag_with_help(monkeypatch, capsys):
    for verb, kind in (("sft", SftConfig), ("dpo", DpoConfig)):
        monkeypatch.setenv("COLUMNS", "200")
        _, shown = cli(monkeypatch, capsys, "train", verb, "--help-all")
        for name in kind.__struct_fields__:
            flag = FLAGS.get(name, name)
            assert f"--{flag.replace('_', '-')} " in shown.out


def test_a_recipe_of_settings_alone_takes_data_from_flags(tmp_path):
    with pytest.raises(BadInput, match="name your data with --dataset, --expansions and --test"):
        load_recipe("qwen3-0.6b-24gb")
    given = {
        "pairs": {"dataset": DEV, "expansions": ["a"]},
        "sft": {"expansions": ["a"]},
        "bench": {"dataset": ["demo-en"]},
    }
    recipe = load_recipe("qwen3-0.6b-24gb", given=given)
    assert (recipe.pairs.dataset, recipe.sft.expansions, recipe.bench.datasets) == (DEV, ("a",), ("demo-en",))
    assert recipe.sft.student == "Qwen/Qwen3-0.6B"


# What is trained


def test_packed_rows_give_the_same_loss_as_rows_apart(tiny_qwen3, data, tmp_path):
    apart = run_sft(tiny_qwen3, data, tmp_path / "apart", batch_size=8)
    packed = run_sft(tiny_qwen3, data, tmp_path / "packed", batch_size=8, packing=True, max_length=256)
    assert len(losses(apart)) == len(losses(packed)) == 1
    # A row that saw its neighbour would differ in the first digit; the sums of another order, in the sixth.
    assert losses(packed) == pytest.approx(losses(apart), abs=5e-4)
    assert read_record(packed)["rows"] == 8
    assert log_of(packed)[0]["num_tokens"] == log_of(apart)[0]["num_tokens"]


def test_max_steps_end_a_training_whatever_the_epochs(tiny_qwen3, data, tmp_path, capsys):
    few = run_sft(tiny_qwen3, data, tmp_path / "few", batch_size=2, max_steps=3, epochs=10)
    assert len(losses(few)) == 3
    assert "at a rate of 0" not in capsys.readouterr().err
    one = run_sft(tiny_qwen3, data, tmp_path / "one", batch_size=2, max_steps=1)
    told = "warning: sft: its only step warms up, at a rate of 0, so nothing is learnt: take more rows"
    assert told in capsys.readouterr().err
    assert log_of(one)[0]["learning_rate"] == 0


def test_computing_activations_twice_changes_nothing(tiny_qwen3, data, tmp_path):
    once = run_sft(tiny_qwen3, data, tmp_path / "once", epochs=2)
    twice = run_sft(tiny_qwen3, data, tmp_path / "twice", epochs=2, checkpointing=True)
    assert losses(twice) == pytest.approx(losses(once), abs=1e-5)


def test_whole_weights_are_trained_aligned_and_merged(tiny_qwen3, data, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    trained = run_sft(tiny_qwen3, data, tmp_path, tuning="full", epochs=10, learning_rate=1e-3)
    curve = losses(trained)
    assert curve[-1] < 0.8 * curve[0]
    assert not (trained / "adapter_config.json").exists()
    assert open_trained(trained).full
    # It is a model folder by itself.
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (tiny_qwen3, trained))
    vocabularies = [AutoTokenizer.from_pretrained(f).get_vocab() for f in (tiny_qwen3, trained)]
    assert vocabularies[0] == vocabularies[1]
    weights = zip(before.parameters(), after.parameters(), strict=True)
    assert all((a != b).any() for a, b in weights)

    for i, settings in enumerate(({}, {"precompute": True})):
        settings = {"batch_size": 4, "accumulate": 1, "logging_steps": 1, "epochs": 3, **settings}
        # In bfloat16 the reference's log-probabilities, of other batches, would agree to three digits.
        config = DpoConfig(learning_rate=1e-3, precision="float32", **settings)
        aligned = dpo(data / "pairs.jsonl", trained, config, workdir=Workdir(tmp_path / str(i)))
        log = [entry for entry in log_of(aligned) if "loss" in entry]
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    merged = merge(aligned, workdir=Workdir(tmp_path))
    assert AutoConfig.from_pretrained(merged).dtype == AutoConfig.from_pretrained(tiny_qwen3).dtype
    assert read_record(merged)["checks"]["logit_cosine"] > 0.999
    assert read_spec(merged).stage == "dpo"


# Bad input


def test_a_quantized_student_is_refused(tiny_qwen3, data, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(tiny_qwen3, student)
    config = json.loads((student / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (student / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadArgument, match="is quantized; train its unquantized original"):
        run_sft(student, data, tmp_path)


def test_what_a_chat_template_says_of_thinking_decides_the_prompt():
    chatml = "{{ '<|im_start|>' + message.role }}"
    assert prompt_for(chatml).answer_prefix == ""
    hybrid = chatml + "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    assert prompt_for(hybrid).answer_prefix == "<think>\n\n</think>\n\n"
    always = chatml + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    with pytest.raises(BadArgument, match="thinks before every answer"):
        prompt_for(always)


def test_a_tokenizer_without_the_think_token_of_its_template_is_refused(tiny_llama, data, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(tiny_llama, student)
    spec = json.loads((student / "qe_edge.json").read_text())
    spec["prompt"]["answer_prefix"] = "<think>\n\n</think>\n\n"
    (student / "qe_edge.json").write_text(json.dumps(spec))
    with pytest.raises(BadInput, match="no single token '<think>'"):
        run_sft(student, data, tmp_path)


def test_only_what_train_wrote_is_aligned_or_merged(tiny_qwen3, data, tmp_path):
    for verb in (
        lambda: dpo(data / "pairs.jsonl", tiny_qwen3, workdir=Workdir(tmp_path)),
        lambda: merge(tiny_qwen3, workdir=Workdir(tmp_path)),
    ):
        with pytest.raises(BadInput, match="is no folder of `qe-edge train`"):
            verb()


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"run.json": '{"command": "merge"}'}, "no longer an adapter: `qe-edge export` takes it"),
        ({"trainer_state.json": "{}"}, "is a checkpoint: give the training's command again, which ends it"),
    ],
)
def test_what_looks_like_an_adapter_has_its_own_remedy(tiny_qwen3, tmp_path, made, told):
    folder = shutil.copytree(tiny_qwen3, tmp_path / "student")
    for name, content in made.items():
        (folder / name).write_text(content)
    with pytest.raises(BadInput, match=told):
        merge(folder, workdir=Workdir(tmp_path))


def test_what_to_train_on_is_not_guessed(tmp_path):
    work = Workdir(tmp_path)
    with pytest.raises(NotFound, match="name a file with --expansions"):
        work.only_taught()
    with pytest.raises(NotFound, match="`qe-edge pairs`"):
        work.newest_pairs()
    for number, name in enumerate(("a@train", "a@train", "b@train"), 1):
        taught, paired = tmp_path / "teach" / name, tmp_path / "pairs" / f"{number:03d}"
        for folder in (taught, paired):
            folder.mkdir(parents=True, exist_ok=True)
        (taught / "expansions.jsonl").write_text("")
        (paired / "run.json").write_text(json.dumps({"settings": {"dataset": name}}))
        adapter = tmp_path / "sft" / f"{number:03d}"
        adapter.mkdir(parents=True)
        (adapter / "run.json").write_text(json.dumps({"learnt": [name.removesuffix("@train"), "c"]}))
        if number < 3:
            assert work.newest_sft({"a"}) == adapter
            with pytest.raises(BadArgument, match=r"learnt from a \+ c, and the pairs are of z; make pairs"):
                work.newest_sft({"z"})
            assert work.only_taught() == taught / "expansions.jsonl"
            assert work.newest_pairs() == paired
    (tmp_path / "teach" / "a@test").mkdir()  # to compare with, not to train on
    (tmp_path / "teach" / "a@test" / "expansions.jsonl").write_text("")
    sets, teach, pairs, sft = "a@train, b@train", tmp_path / "teach", tmp_path / "pairs", tmp_path / "sft"
    texts = [teach / name / "expansions.jsonl" for name in ("a@train", "b@train")]
    told = f"sets ({sets}); give --expansions {texts[0]} or --expansions {texts[1]}"
    with pytest.raises(BadArgument, match=re.escape(told)):
        work.only_taught()
    # Of each data set the newest.
    told = f"sets ({sets}); give --pairs {pairs / '002/pairs.jsonl'} or --pairs {pairs / '003/pairs.jsonl'}"
    with pytest.raises(BadArgument, match=re.escape(told)):
        work.newest_pairs()
    assert work.newest_pairs(sft / "002") == pairs / "002" and work.newest_pairs(sft / "003") == pairs / "003"
    told = f"sets (a + c, b + c); give --adapter {sft / '002'} or --adapter {sft / '003'}"
    with pytest.raises(BadArgument, match=re.escape(told)):
        work.newest_sft({"a"})


def test_rows_in_a_language_that_the_student_lacks_are_left_out_or_refused(tiny_qwen3):
    both = read_spec(tiny_qwen3)
    english = msgspec.structs.replace(
        both, prompt=msgspec.structs.replace(both.prompt, texts={"en": both.prompt.texts["en"]})
    )
    tokenize = lambda text, special: [len(text)]  # noqa: E731
    rows = [Expansion("d", str(i), "潮汐", "zh", "m", "zero-shot", f"月亮{i}") for i in range(2)]
    pairs = [Pair("d", "1", "潮汐", "zh", "月亮", "面包和", 1, 0, 1, 0, *["m", "zero-shot"] * 2)]
    why = r"student that knows en; dropped 2 \(in a language that the student doesn't know\)"
    with pytest.raises(BadInput, match=why):
        encode_rows(rows, english, tokenize, 512)
    with pytest.raises(BadInput, match="no pair is left to train on, by a student that knows en; dropped 1"):
        encode_pairs(pairs, english, tokenize, 512)
    assert (
        len(encode_rows(rows, both, tokenize, 512)[0]) == 2
        and len(encode_pairs(pairs, both, tokenize, 512)[0]) == 1
    )
    mixed = [*rows, Expansion("d", "3", "tides", "en", "m", "zero-shot", "the moon")]
    kept, dropped = encode_rows(mixed, english, tokenize, 512)
    assert len(kept) == 1 and dropped == {"in a language that the student doesn't know": 2}
