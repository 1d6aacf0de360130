"""What training runs on: several processes, devices and precisions, its estimate, and too little memory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from training import DEV, SMALL, evaluations, losses, run_sft

from qe_edge.errors import BadArgument, QeEdgeError
from qe_edge.recipe import read_recipe
from qe_edge.records import Expansion, encode_jsonl
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.hardware import Hardware, explain_out_of_memory, hardware
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

pytest.importorskip("trl")
import torch

from qe_edge.train.base_model import load_config
from qe_edge.train.estimate import LOGIT, SURPLUS, estimate

CPU = Hardware("cpu", "float32", 1, "a CPU")
GPU = Hardware("cuda", "bfloat16", 1, "a GPU")


# Processes


def on_two_processes(*command):
    """Run on two CPU processes, as `accelerate launch` starts them; on GPUs it is the same command."""
    accelerate = Path(sys.executable).with_name("accelerate")
    start = [accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    start += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--no_python"]
    return subprocess.run(
        list(map(str, [*start, *command])),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def launch(work, *command):
    settings = ["--batch-size", 1, "--accumulate", 1, "--logging-steps", 1, "--save-steps", 2]
    # In float32, or the losses would agree to three digits only, where the processor has bf16.
    settings += ["--device", "cpu", "--precision", "float32", "--json", "--workdir", work]
    qe_edge = Path(sys.executable).with_name("qe-edge")
    return on_two_processes(qe_edge, "train", *command, *settings)


def test_two_processes_train_like_one_with_twice_the_batches(tiny_qwen3, data, tmp_path):
    from qe_edge.train.dpo import dpo

    expansions = data / "expansions.jsonl"
    settings = {"batch_size": 1, "accumulate": 2, "precision": "float32"}
    alone = run_sft(tiny_qwen3, data, tmp_path / "alone", **settings)
    evaluated = ("--eval-dataset", DEV, "--eval-queries", 4, "--eval-steps", 2)
    student = ("--student", tiny_qwen3, "--rank", 4, "--alpha", 8)
    done = launch(tmp_path / "two", "sft", "-e", expansions, *student, *evaluated)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # one object, from one process
    folder = Path(printed["artifacts"]["adapter"])
    assert losses(folder) == pytest.approx(losses(alone), abs=2e-4)
    assert read_record(folder)["settings"]["processes"] == 2
    assert list(evaluations(folder)) == [0, 2, 4]
    assert done.stderr.count("step 2: nDCG@10") == 1

    pairs = data / "pairs.jsonl"
    config = DpoConfig(epochs=2, logging_steps=1, **settings)
    alone = dpo(pairs, folder, config, workdir=Workdir(tmp_path / "alone"))
    done = launch(tmp_path / "two", "dpo", "--pairs", pairs, "--adapter", folder, "--epochs", 2)
    assert done.returncode == 0, done.stderr
    aligned = Path(json.loads(done.stdout)["artifacts"]["adapter"])
    assert losses(aligned)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(aligned) == pytest.approx(losses(alone), abs=2e-4)

    done = launch(tmp_path / "two", "dpo", "--pairs", pairs, "--adapter", folder, "--precompute")
    assert done.returncode != 0
    assert "leave out --precompute, or train on one" in " ".join(done.stderr.split())


LEAVING = """
from pathlib import Path
from qe_edge.train.hardware import Hardware, leave_group

def threads():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)

with Hardware("cpu", "float32", 2, "a CPU").main_process_first():
    pass
import torch
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
assert threads()
leave_group()
assert not threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have names in Linux's /proc")
def test_leaving_the_group_ends_its_threads():
    """One that is left can abort the process at its end, once in many runs."""
    done = on_two_processes(sys.executable, "-c", LEAVING)
    assert done.returncode == 0, done.stderr


def test_several_gpus_without_a_launcher_are_refused(monkeypatch):
    """Transformers would split each batch over them by itself, in one process."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "two GPUs")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with pytest.raises(BadArgument, match="2 GPUs: start one process on each with `accelerate launch"):
        hardware(SftConfig())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert hardware(SftConfig()) == Hardware("cuda", "bfloat16", 2, "two GPUs")


# What it needs


@pytest.mark.parametrize("name", ["0.6b", "1.7b", "4b"])
@pytest.mark.parametrize("size", [24, 80])
def test_the_recipes_fit_their_gpu_by_the_estimate_and_train_alike(name, size):
    from qe_edge.bench.synthetic import shape

    recipe = read_recipe(f"qwen3-{name}-{size}gb")
    of_sft, of_dpo = msgspec.convert(recipe["sft"], SftConfig), msgspec.convert(recipe["dpo"], DpoConfig)
    for config, rows in ((of_sft, 32), (of_dpo, 16)):
        needs = estimate(
            shape(f"qwen3-{name}"),
            config,
            GPU,
            rank=of_sft.rank,
            longest=config.max_length,
            answer=128,
        )
        assert 0.2 * size < needs.memory_gb < 0.8 * size
        assert config.batch_size * config.accumulate == rows


@pytest.mark.parametrize(("precision", "rank"), [("float32", 8), ("bfloat16", 8), ("bfloat16", 0)])
def test_the_estimate_counts_what_autograd_really_keeps(tiny_qwen3, precision, rank):
    """The estimate's activations, by a formula, against a real pass through four layers."""
    import peft
    from transformers import AutoModelForCausalLM

    from qe_edge.train.lora import lora_config

    shape = load_config(str(tiny_qwen3))
    shape.num_hidden_layers, shape.layer_types = 4, ["full_attention"] * 4
    on = CPU._replace(precision=precision)
    needs = estimate(shape, SftConfig(batch_size=4), on, rank=rank, longest=100, answer=40)
    model = AutoModelForCausalLM.from_config(shape, dtype=on.weights(full=not rank))
    if rank:
        model = peft.get_peft_model(model, lora_config(rank, rank))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids, mask = torch.zeros((4, 100), dtype=torch.long), torch.ones((4, 100), dtype=torch.long)
    mask[0, -1] = 0  # as in a real batch, some row is padded
    backbone = (model.get_base_model() if rank else model).model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), on.autocast():
        output = backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    real = sum(storage.nbytes() for storage in kept.values())
    logits = LOGIT * 4 * 40 * shape.vocab_size
    assert needs.activations / SURPLUS["cpu"] - logits == pytest.approx(real, rel=0.15)
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert needs.weights > 4 * parameters  # and what the process holds
    assert needs.training == 12 * trained
    assert output.last_hidden_state.shape == (4, 100, 256)


HUNGRY = """
import resource, sys
import msgspec, torch
from qe_edge.errors import QeEdgeError
from qe_edge.train.config import SftConfig
from qe_edge.train import sft as module
from qe_edge.work.folder import Workdir
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


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="something else"), explain_out_of_memory(SftConfig(), CPU, False):
        raise RuntimeError("something else")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")):
        with pytest.raises(QeEdgeError, match="Try --checkpointing; or a smaller --max-length"):  # noqa: SIM117
            with explain_out_of_memory(SftConfig(batch_size=1), CPU, False):
                raise error
    with (
        pytest.raises(QeEdgeError, match="--precompute, which"),
        explain_out_of_memory(DpoConfig(), CPU, True),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


# What is there


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


@pytest.mark.parametrize(("given", "spin"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_of_a_training_soon_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], spin: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    # PyTorch is loaded before it is found that there is nothing to train on.
    command = [sys.executable, "-m", "qe_edge", "train", "sft", "--expansions", "nothing.jsonl"]
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "nothing.jsonl: no such file" in done.stderr
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("PyTorch was built without OpenMP")
    assert f"GOMP_SPINCOUNT = '{spin}'" in done.stderr


def test_it_computes_in_as_many_threads_as_find_a_core_free(
    tiny_qwen3: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from qe_edge.train import loop

    before, used = torch.get_num_threads(), []

    class Free:
        def __init__(self, most: int):
            self.most = most

        def __call__(self) -> int:
            used.append(torch.get_num_threads())
            return 1

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(loop, "FreeCores", Free)
    run_sft(tiny_qwen3, data, tmp_path, batch_size=1, accumulate=2)
    assert len(used) >= 8 and set(used[1:]) == {1}  # once before each batch
    assert torch.get_num_threads() == loop.usable_cores()
    used.clear()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    run_sft(tiny_qwen3, data, tmp_path / "fixed", batch_size=1, accumulate=2)
    assert used == []
    torch.set_num_threads(before)
