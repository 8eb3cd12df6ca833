"""`crosslayer export`: the same model from a run's result and its checkpoints, in every dtype, or one clear line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_finetune
from crosslayer.errors import CheckpointError, ConfigError, DataError
from crosslayer.train import build_finetune_recipe, build_recipe
from crosslayer.train.checkpoints import write_manifest
from crosslayer.train.export import export
from crosslayer.train.finetune import finetune, load_base
from crosslayer.train.parallel import Parallel, check_same_data
from crosslayer.train.resume import check_form
from crosslayer.train.run import build_model_config, pretrain
from crosslayer.train.sharded import FOLDER, ShardWriter
from tiny_finetune import write_decoder, write_instructions
from tiny_run import tiny_content, tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    content = tiny_content(root, max_steps=4, save_steps=2, save_total_limit=5, eval_strategy="no")
    content["model"]["tie_word_embeddings"] = True
    pretrain(build_recipe(content), root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def sharded(run):
    """A run whose newest checkpoint is in shards, as several processes write it; it has no result yet."""
    folder = run.parent / "sharded"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "model")
    checkpoint = folder / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "crosslayer_manifest.json").unlink()
    writer = ShardWriter()
    writer.start(checkpoint, model, optimizer, lambda: write_manifest(checkpoint, processes=4, weights_only=False))
    writer.wait()
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)


def equal(one, other):
    states = [model.state_dict() for model in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[1][k], v) for k, v in states[0].items())


@pytest.mark.parametrize("name", ["run", "sharded"])
def test_the_same_weights(name, run, request, tmp_path):
    written = export(request.getfixturevalue(name), tmp_path / "out")
    (model, tokenizer), (expected, _) = load(tmp_path / "out"), load(run / "model")
    assert equal(model, expected)
    assert tokenizer("the fox")["input_ids"]
    assert written["parameters"] == expected.num_parameters()
    assert written["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing beside it


def test_a_checkpoint_by_its_step_is_an_earlier_one(run, tmp_path):
    export(run, tmp_path / "out", step=2)
    earlier, _ = load(tmp_path / "out")
    assert equal(earlier, load(run / "checkpoint-2")[0])
    assert not equal(earlier, load(run / "model")[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_and_tied_heads(sharded, run, dtype, tmp_path):
    export(sharded, tmp_path / "out", dtype=dtype)
    model, _ = load(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in stored.items():
        assert weight.dtype == (torch.float32 if name.endswith("beta") else getattr(torch, dtype)), name
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    expected = AutoModelForCausalLM.from_pretrained(run / "model", dtype=dtype)
    assert equal(model, expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == dtype
    assert "distributed_config" not in config


def test_shards_that_were_not_finished_or_are_damaged_are_not_read(sharded, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(sharded, folder)
    part = next((folder / "checkpoint-4" / FOLDER).glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"checkpoint-4 cannot be exported: .*is not what was written"):
        export(folder, tmp_path / "out", step=4)
    written = export(folder, tmp_path / "older")  # the newest one that is whole
    assert written["from"].endswith("checkpoint-2")
    (folder / "checkpoint-4" / "crosslayer_manifest.json").unlink()
    assert export(folder, tmp_path / "other")["from"].endswith("checkpoint-2")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give the folder of a run"):
        export(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no checkpoint of step 3; it has 2, 4"):
        export(run, tmp_path / "out", step=3)
    with pytest.raises(ConfigError, match="holds something already; give a new --output_dir"):
        export(run, run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no model and no whole checkpoint yet"):
        export(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(run, tmp_path / "file" / "out")


def test_a_whole_checkpoint_is_no_start_for_a_shared_model(run):
    check_form(None, Parallel(fsdp_size=2))
    check_form(run / "checkpoint-2", Parallel())
    with pytest.raises(ConfigError, match="each hold the whole model; go on with tensor_parallel=1 and fsdp_size=1"):
        check_form(run / "checkpoint-2", Parallel(fsdp_size=2))


REFUSED = [
    ({"fsdp_size": 2}, "fsdp_size=2 want a multiple of 2 processes, and there is 1; start them with torchrun"),
    ({"tensor_parallel": 2}, "tensor_parallel=2 and fsdp_size=1 want a multiple of 2 processes, and there is 1"),
    ({"fsdp_size": 0}, "parallel.fsdp_size=0 must be a whole number of at least 1, or -1 for the rest"),
    ({"tensor_parallel": -1}, "parallel.tensor_parallel=-1 must be a whole number of at least 1"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused_before_anything_is_written(tmp_path, fields, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(build_recipe({**tiny_content(tmp_path), "parallel": fields}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_model_that_cannot_be_split_is_refused_by_its_shape(tmp_path):
    config = build_model_config(tiny_recipe(tmp_path))
    Parallel(tensor_parallel=2).check(config, 2)
    with pytest.raises(ConfigError, match="num_attention_heads=2 cannot be split over 4 ranks"):
        Parallel(tensor_parallel=4).check(config, 4)
    with pytest.raises(ConfigError, match="want a multiple of 4 processes, and there are 6"):
        Parallel(tensor_parallel=2, fsdp_size=2).check(config, 6)


def test_one_way_to_shard(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"training.fsdp='full_shard' must be null \(the section `parallel`"):
        tiny_recipe(tmp_path, fsdp="full_shard")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="asks for FSDP"):
        pretrain(tiny_recipe(tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    ("parallel", "is_frozen", "message"),
    [
        ({"fsdp_size": 2}, False, "fsdp_size=2 shards a model that is frozen whole"),
        ({"tensor_parallel": 2}, True, "tensor_parallel=2 would hand adapters a part"),
        ({"fsdp_size": 3}, True, "want a multiple of 3 processes, and there are 4"),
    ],
)
def test_frozen_models(parallel, is_frozen, message):
    assert Parallel().check_frozen(4, is_frozen=False) is None
    assert Parallel(fsdp_size=2).check_frozen(4, is_frozen=True).dp_replicate_size == 2
    with pytest.raises(ConfigError, match=message):
        Parallel(**parallel).check_frozen(4, is_frozen=is_frozen)


def test_a_cr_net_in_parts_keeps_the_structure_of_its_adapter(tmp_path, monkeypatch):
    data = tmp_path / "data"
    for part in ("train", "validation"):
        write_instructions(data / f"{part}.jsonl", 4)
    content = tiny_finetune.tiny_content(
        tmp_path, write_decoder(tmp_path / "decoder"), data, method="imlor2c", task="instruction"
    )
    content["parallel"] = {"fsdp_size": 2}
    monkeypatch.setattr(Parallel, "check_frozen", lambda *args, **kwargs: object())
    load = load_base
    monkeypatch.setattr("crosslayer.train.finetune.load_base", lambda *args: load(*args[:3]))
    with pytest.raises(ConfigError, match="method='imlor2c' is not known for a CR-Net; give lor2c, sharelor2c or lora"):
        finetune(build_finetune_recipe(content), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_processes_that_have_read_other_data_do_not_train(monkeypatch):
    facts = {"train": {"tokens": 412}}
    check_same_data(facts, 1)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: own * 3)
    check_same_data(facts, 3)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, *own, {"train": {"tokens": 391}}])
    with pytest.raises(DataError, match="process 2 has read other data than process 0: files changed"):
        check_same_data(facts, 3)
