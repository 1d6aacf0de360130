"""Training's settings do what they say: packing, whole weights, dev evaluation, processes, memory."""

import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError
from qe_edge.manifest import read_record
from qe_edge.prompt import prompt_for
from qe_edge.recipe import load_recipe, read_recipe
from qe_edge.records import Expansion, Pair, encode_jsonl
from qe_edge.spec import read_spec
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.hardware import Hardware, hardware
from qe_edge.workdir import Workdir

pytest.importorskip("trl")
import torch

from qe_edge.train.dev import DevSet
from qe_edge.train.dpo import dpo
from qe_edge.train.estimate import estimate
from qe_edge.train.merge import merge
from qe_edge.train.sft import sft
from qe_edge.train.student import load_config, load_tokenizer, load_trained, open_trained

CPU = Hardware("cpu", "float32", 1, "a CPU")
GPU = Hardware("cuda", "bfloat16", 1, "a GPU")
QUERIES = ("what causes tides", "how does bread rise", "what is a gene", "why is iron good for blood")
GOOD = ("The moon's gravity.", "Yeast makes gas.", "A stretch of DNA.", "Doctors measure ferritin in adults.")
BAD = ("A short query.", "Long documents.", "The tax rate.", "A laptop or a phone.")
DEV = "demo-en@train"
SMALL = {"rank": 4, "alpha": 8, "batch_size": 4, "accumulate": 1, "logging_steps": 1, "save_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        Expansion("tiny", f"q{i}", query, "en", "teacher", "zero-shot", text)
        for texts in (GOOD, BAD)
        for i, (query, text) in enumerate(zip(QUERIES, texts, strict=True))
    ]
    (folder / "expansions.jsonl").write_bytes(encode_jsonl(rows))
    origin = ("teacher", "zero-shot") * 2
    pairs = [
        Pair("tiny", f"q{i}", query, "en", good, bad, 1.0, 0.0, 1.0, 0.0, *origin)
        for i, (query, good, bad) in enumerate(zip(QUERIES, GOOD, BAD, strict=True))
    ]
    (folder / "pairs.jsonl").write_bytes(encode_jsonl(pairs))
    return folder


def run_sft(student, data, work, **settings):
    config = SftConfig(student=str(student), **{**SMALL, **settings})
    return sft([data / "expansions.jsonl"], config, workdir=Workdir(work))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def evaluations(folder):
    return {entry["step"]: entry["eval_ndcg"] for entry in log_of(folder) if "eval_ndcg" in entry}


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
    assert config == SftConfig(**recipe, rank=8, modes=("few-shot",))
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
        (("--batch-size", "0"), 2, "expected `int` >= 1 - at `batch-size`"),
        (("--mode", "none"), 2, "invalid enum value 'none'"),
        (("--recipe", "nothing"), 4, "neither a file nor one that ships"),
    ],
)
def test_settings_out_of_bounds_are_named(monkeypatch, capsys, flags, code, message):
    done, shown = cli(monkeypatch, capsys, "train", "sft", *flags, "--print-config")
    assert done == code
    assert message in " ".join(shown.err.replace("│", " ").split())


def test_every_setting_has_a_flag_with_help(monkeypatch, capsys):
    for verb, kind in (("sft", SftConfig), ("dpo", DpoConfig)):
        monkeypatch.setenv("COLUMNS", "200")
        _, shown = cli(monkeypatch, capsys, "train", verb, "--help")
        for name in kind.__struct_fields__:
            flag = {"models": "teacher-model", "modes": "mode", "loss_weights": "loss-weight"}.get(name, name)
            assert f"--{flag.replace('_', '-')} " in shown.out


def test_a_recipe_of_settings_alone_takes_data_from_flags(tmp_path):
    with pytest.raises(BadInput, match="name your data with --dataset, --expansions and --test"):
        load_recipe("qwen3-0.6b-24gb")
    given = {
        "pairs": {"dataset": DEV, "expansions": ["a"]},
        "sft": {"expansions": ["a"]},
        "bench": {"datasets": ["demo-en"]},
    }
    recipe = load_recipe("qwen3-0.6b-24gb", given=given)
    assert (recipe.pairs.dataset, recipe.sft.expansions, recipe.bench.datasets) == (DEV, ("a",), ("demo-en",))
    assert recipe.sft.student == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("name", ["0.6b", "1.7b", "4b"])
@pytest.mark.parametrize("size", [24, 80])
def test_the_recipes_fit_their_gpu_by_the_estimate_and_train_alike(name, size):
    from qe_edge.synthetic import shape

    recipe = read_recipe(f"qwen3-{name}-{size}gb")
    of_sft, of_dpo = msgspec.convert(recipe["sft"], SftConfig), msgspec.convert(recipe["dpo"], DpoConfig)
    for config, rows in ((of_sft, 32), (of_dpo, 16)):
        needs = estimate(
            shape(f"qwen3-{name}"), config, GPU, rank=of_sft.rank, longest=config.max_length, tokens=1
        )
        assert 0.2 * size < needs.memory_gb < 0.8 * size
        assert config.batch_size * config.accumulate == rows


# What is trained


def test_packed_rows_give_the_same_loss_as_rows_apart(tiny_qwen3, data, tmp_path):
    apart = run_sft(tiny_qwen3, data, tmp_path / "apart", batch_size=8)
    packed = run_sft(tiny_qwen3, data, tmp_path / "packed", batch_size=8, packing=True, max_length=256)
    assert len(losses(apart)) == len(losses(packed)) == 1
    # A row that saw its neighbour would differ in the first digit.
    assert losses(packed) == pytest.approx(losses(apart), abs=1e-5)
    assert read_record(packed)["rows"] == 8
    assert log_of(packed)[0]["num_tokens"] == log_of(apart)[0]["num_tokens"]


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
        config = DpoConfig(learning_rate=1e-3, **settings)
        aligned = dpo(data / "pairs.jsonl", trained, config, workdir=Workdir(tmp_path / str(i)))
        log = [entry for entry in log_of(aligned) if "loss" in entry]
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    merged = merge(aligned, workdir=Workdir(tmp_path))
    assert AutoConfig.from_pretrained(merged).dtype == AutoConfig.from_pretrained(tiny_qwen3).dtype
    assert read_record(merged)["checks"]["logit_cosine"] > 0.999
    assert read_spec(merged).stage == "dpo"


# Evaluation by retrieval


@pytest.fixture(scope="module")
def evaluated(tiny_qwen3, data, tmp_path_factory):
    work = tmp_path_factory.mktemp("evaluated")
    return run_sft(tiny_qwen3, data, work, **EVALUATED)


EVALUATED = {
    "epochs": 3,
    "learning_rate": 5e-3,
    "eval_dataset": DEV,
    "eval_steps": 2,
    "eval_queries": 12,
    "eval_join": "mass:5",
}


def test_the_best_checkpoint_by_retrieval_is_kept(evaluated, tiny_qwen3, data, tmp_path):
    found = evaluations(evaluated)
    assert list(found) == [0, 2, 4, 6]
    kept = read_record(evaluated)["kept"]
    assert kept["ndcg"] == max(found.values())
    assert kept["step"] == max(step for step, ndcg in found.items() if ndcg == kept["ndcg"])
    # The weights in the folder are those: they give the same figure again.
    trained = open_trained(evaluated)
    dev = DevSet(
        DEV,
        trained.spec,
        load_tokenizer(trained.base),
        CPU,
        join=_join("mass:5"),
        count=12,
        seed=0,
        workdir=Workdir(tmp_path),
    )
    assert dev.ndcg(load_trained(trained, dtype=torch.float32)) == pytest.approx(kept["ndcg"], abs=1e-9)
    assert not (evaluated / "best").exists() and not (evaluated / "best.json").exists()


def _join(text):
    from qe_edge.join import Join

    return Join.parse(text)


def test_evaluation_is_what_the_expander_and_the_bench_would_give(tiny_qwen3, tmp_path):
    """The same expansions one by one, and the same nDCG@10 through the bench's own functions."""
    from qe_edge import Expander
    from qe_edge.bench.quality import retrieve, values_of
    from qe_edge.measures import mean

    spec, tokenizer = read_spec(tiny_qwen3), load_tokenizer(str(tiny_qwen3))
    dev = DevSet(DEV, spec, tokenizer, CPU, join=_join("mass:5"), count=6, seed=1, workdir=Workdir(tmp_path))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    texts = dev._expand(model)
    with Expander.load(tiny_qwen3, engine="transformers") as expander:
        singly = {query_id: expander.expand(query).text for query_id, query in dev.queries.items()}
    same = [query_id for query_id in texts if " ".join(texts[query_id].split()) == singly[query_id]]
    assert len(same) >= 5  # a random model has near ties, which padding may tip
    data = dev.data
    run = retrieve(data, dev.index, texts, _join("mass:5"), depth=10)
    values = values_of(data, run)
    assert dev.ndcg(model) == pytest.approx(mean({query_id: values[query_id] for query_id in dev.queries}))


def test_evaluation_does_not_change_what_is_trained(evaluated, tiny_qwen3, data, tmp_path):
    plain = run_sft(tiny_qwen3, data, tmp_path, **{**EVALUATED, "eval_dataset": ""})
    assert losses(plain) == losses(evaluated)
    assert len(losses(plain)) == 6


def test_a_dev_set_in_another_language_is_refused(tiny_llama, data, tmp_path):
    import shutil

    student = tmp_path / "student"
    shutil.copytree(tiny_llama, student)
    spec = json.loads((student / "qe_edge.json").read_text())
    del spec["prompt"]["texts"]["zh"]
    (student / "qe_edge.json").write_text(json.dumps(spec))
    with pytest.raises(BadArgument, match="its queries are in zh, the student speaks en"):
        run_sft(student, data, tmp_path, eval_dataset="demo-zh@train")


KILLED = """
import os, signal, sys
from pathlib import Path
import qe_edge.train.loop as loop
from qe_edge.train.config import SftConfig
from qe_edge.train.sft import sft
from qe_edge.workdir import Workdir
import msgspec
original = loop._callback_class()
class AfterFive(original):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        super().on_step_end(args, state, control, **kw)
loop._callback_class = lambda: AfterFive
sft([sys.argv[2]], msgspec.json.decode(sys.argv[1], type=SftConfig), workdir=Workdir(sys.argv[3]))
"""


def test_a_killed_evaluated_run_goes_on_to_the_same_end(evaluated, tiny_qwen3, data, tmp_path):
    config = SftConfig(student=str(tiny_qwen3), **{**SMALL, **EVALUATED})
    command = [sys.executable, "-c", KILLED, msgspec.json.encode(config).decode()]
    killed = subprocess.run([*command, data / "expansions.jsonl", tmp_path], capture_output=True, check=False)
    assert killed.returncode < 0, killed.stderr
    partial = tmp_path / "sft" / "001.partial"
    assert (partial / "checkpoint-4").is_dir()
    assert (partial / "log.jsonl").read_text().count("eval_ndcg") == 3
    resumed = sft([data / "expansions.jsonl"], config, workdir=Workdir(tmp_path))
    assert losses(resumed) == pytest.approx(losses(evaluated), abs=1e-5)
    assert evaluations(resumed) == pytest.approx(evaluations(evaluated))
    assert read_record(resumed)["kept"] == pytest.approx(read_record(evaluated)["kept"])


def test_log_picture_and_tensorboard_are_in_the_folder(tiny_qwen3, data, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("vl_convert")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_sft(tiny_qwen3, data, tmp_path, epochs=2, tensorboard=True)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(folder))


# Processes


def test_two_processes_train_like_one_with_twice_the_batches(tiny_qwen3, data, tmp_path):
    """By `accelerate launch`, on two CPU processes; on GPUs it is the same command."""
    alone = run_sft(tiny_qwen3, data, tmp_path / "alone", batch_size=1, accumulate=2)
    accelerate = Path(sys.executable).with_name("accelerate")
    launch = [accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--no_python"]
    command = [Path(sys.executable).with_name("qe-edge"), "train", "sft", "-e", data / "expansions.jsonl"]
    command += ["--student", tiny_qwen3, "--rank", 4, "--alpha", 8, "--batch-size", 1, "--accumulate", 1]
    command += ["--logging-steps", 1, "--save-steps", 2, "--device", "cpu", "--json"]
    command += ["--eval-dataset", DEV, "--eval-queries", 4, "--eval-steps", 2, "--workdir", tmp_path / "two"]
    done = subprocess.run(
        list(map(str, launch + command)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # one object, from one process
    folder = Path(printed["artifacts"]["adapter"])
    assert losses(folder) == pytest.approx(losses(alone), abs=2e-4)
    assert read_record(folder)["settings"]["processes"] == 2
    assert list(evaluations(folder)) == [0, 2, 4]
    assert done.stderr.count("step 2: nDCG@10") == 1


# What it needs


def test_the_estimate_counts_what_autograd_really_keeps(tiny_qwen3):
    """The estimate's activations, from the meta device, against a real forward pass of all layers."""
    from transformers import AutoModelForCausalLM

    shape = load_config(str(tiny_qwen3))
    shape.num_hidden_layers, shape.layer_types = 4, ["full_attention"] * 4
    config = SftConfig(batch_size=4, rank=8)
    needs = estimate(shape, config, CPU, rank=8, longest=100, tokens=1000)
    import peft

    from qe_edge.train.lora import lora_config

    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    model = peft.get_peft_model(model, lora_config(8, 8))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids, mask = torch.zeros((4, 100), dtype=torch.long), torch.ones((4, 100), dtype=torch.long)
    mask[0, -1] = 0  # as in a real batch, some row is padded
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(storage.nbytes() for storage in kept.values())
    tile = 8 * 4 * 400 * shape.vocab_size
    assert needs.activations - tile == pytest.approx(real, rel=0.05)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert needs.weights > 4 * parameters  # and what the process holds
    assert needs.training == 12 * trained
    assert needs.flops == 4 * parameters * 1000
    assert output.last_hidden_state.shape == (4, 100, 256)


HUNGRY = """
import resource, sys
import msgspec, torch
from qe_edge.errors import QeEdgeError
from qe_edge.train.config import SftConfig
from qe_edge.train import sft as module
from qe_edge.workdir import Workdir
original = module.check_batch
def limited(*args):  # all is loaded: what follows gets 200 MB more
    original(*args)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20,) * 2)
module.check_batch = limited
try:
    module.sft([sys.argv[2]], msgspec.json.decode(sys.argv[1], type=SftConfig), workdir=Workdir(sys.argv[3]))
except QeEdgeError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by RLIMIT_AS")
def test_out_of_memory_says_what_to_change(tiny_qwen3, tmp_path):
    rows = [
        Expansion("tiny", f"q{i}", f"query {i}", "en", "t", "zero-shot", f"word {i} " * 300)
        for i in range(32)
    ]
    (tmp_path / "long.jsonl").write_bytes(encode_jsonl(rows))
    config = SftConfig(
        student=str(tiny_qwen3), **{**SMALL, "batch_size": 32, "accumulate": 2, "max_length": 2048}
    )
    command = [sys.executable, "-c", HUNGRY, msgspec.json.encode(config).decode()]
    done = subprocess.run(
        [*command, tmp_path / "long.jsonl", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 6, done.stderr
    assert "out of memory on" in done.stdout
    assert "--batch-size 16 --accumulate 4, which trains the same; or --checkpointing" in done.stdout


# Bad input


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_devices_and_precisions_that_are_not_there_are_refused(monkeypatch):
    with pytest.raises(BadArgument, match=r"device cuda was asked for, but .*--device cpu"):
        hardware(SftConfig(device="cuda"))
    with pytest.raises(BadArgument, match="float16 training needs CUDA"):
        hardware(SftConfig(precision="float16"))
    monkeypatch.setattr("qe_edge.train.hardware._cpu_has_bf16", lambda: False)
    with pytest.raises(BadArgument, match="doesn't compute in bfloat16; use --precision float32"):
        hardware(SftConfig(precision="bfloat16"))
    assert hardware(SftConfig()).precision == "float32"
    monkeypatch.setattr("qe_edge.train.hardware._cpu_has_bf16", lambda: True)
    assert hardware(SftConfig()).precision == "bfloat16"
    assert hardware(SftConfig(precision="float32")).precision == "float32"


def test_a_quantized_student_is_refused(tiny_qwen3, data, tmp_path):
    import shutil

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
    import shutil

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
        with pytest.raises(BadInput, match="train first"):
            verb()


def test_sft_takes_what_teach_collected_last_or_says_what_to_do(tmp_path):
    work = Workdir(tmp_path)
    with pytest.raises(NotFound, match="name a file with --expansions"):
        work.newest_taught()
    for i, name in enumerate(("b", "a")):
        (tmp_path / "teach" / name).mkdir(parents=True)
        file = tmp_path / "teach" / name / "expansions.jsonl"
        file.write_text("")
        os.utime(file, (i, i))
    assert work.newest_taught().parent.name == "a"


def test_other_errors_keep_their_traceback():
    from qe_edge.train.hardware import explain_out_of_memory

    with pytest.raises(RuntimeError, match="something else"), explain_out_of_memory(SftConfig(), CPU):
        raise RuntimeError("something else")
    with pytest.raises(QeEdgeError, match="a smaller --max-length"), explain_out_of_memory(SftConfig(), CPU):
        raise torch.OutOfMemoryError("CUDA out of memory")
