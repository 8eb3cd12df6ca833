"""Whatever differs between a run and its resumption, and whatever happened to its checkpoints (hypothesis).

What differs is applied and said, or refused; a checkpoint is whole or passed over; no other errors than ours come out.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import event, given
from hypothesis import strategies as st

from crosslayer.errors import CheckpointError, CrossLayerError
from crosslayer.train import build_recipe
from crosslayer.train.checkpoints import MANIFEST, checkpoint_to_resume, write_manifest
from crosslayer.train.recipe import Recipe, field_types
from crosslayer.train.resume import _UNSAID
from crosslayer.train.run import _check_resumption, build_arguments, pretrain
from property_cases import cases, long_enough
from tiny_run import tiny_content

pytestmark = long_enough


@pytest.fixture(autouse=True)
def no_deprecation_logged():
    """Drawn values may well be deprecated ones."""


# ------------------------------------------------------------------------------------------------- checkpoints

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST)
KINDS = ("remove", "empty", "cut", "flip", "longer", "folder", "garbage")
damages = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from(FILES), st.sampled_from(KINDS), st.integers(0, 10**6)), max_size=4
)


def write_checkpoint(folder, step):
    folder.mkdir()
    for name in FILES[:-2]:
        (folder / name).write_bytes(f"{name} of {step} ".encode() * 20)
    state = {"global_step": step, "max_steps": 99, "epoch": 0.5}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_manifest(folder, processes=1, weights_only=False)


def do_damage(path, kind, where):
    if not path.is_file():
        return
    content = path.read_bytes()
    place = where % max(len(content), 1)
    flipped = (
        content[:place] + bytes(byte ^ (1 << where % 8) for byte in content[place : place + 1]) + content[place + 1 :]
    )
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "remove":
        others = {"empty": b"", "cut": content[:place], "longer": content + b"x", "garbage": b"\x80\x00"}
        path.write_bytes(others.get(kind, flipped))


@cases(150)
@given(damages=damages)
def test_the_newest_whole_checkpoint_is_found(damages):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        steps = (1, 2, 3, 4)
        for step in steps:
            write_checkpoint(root / f"checkpoint-{step}", step)
        files = {step: [root / f"checkpoint-{step}" / file for file in FILES] for step in steps}
        before = {path: path.read_bytes() for paths in files.values() for path in paths}
        for step, file, kind, where in damages:
            do_damage(root / f"checkpoint-{step}" / file, kind, where)
        is_whole = {path: path.is_file() and path.read_bytes() == before[path] for path in before}
        spoiled = {step for step in steps if not all(is_whole[path] for path in files[step][:-1])}
        unhashed = {step for step in steps if not is_whole[files[step][-1]]}
        try:
            found = checkpoint_to_resume(root, 1)
        except CheckpointError:
            found = None
        chosen = 0 if found is None else int(found.name.rpartition("-")[2])
        # Where the hashes themselves are gone or damaged, what is complete may be taken, and need not.
        assert chosen in {0, *steps} - (spoiled - unhashed)
        assert chosen >= max({0, *steps} - spoiled - unhashed)


# ------------------------------------------------------------------------------------------------- what differs

LONG = {"torch_compile", "torch_compile_backend", "torch_compile_mode"}  # minutes each
OUTSIDE = {"push_to_hub", "hub_strategy", "report_to", "full_determinism", "dataloader_num_workers", "use_cpu"}
OUTSIDE |= {"dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_backend", "torch_empty_cache_steps"}
SECTIONS = ("training", "model", "data", "parameter_groups", "monitor")
FIELDS = [
    (section, name)
    for section in SECTIONS
    for name in sorted(field_types(Recipe, section))
    if name not in LONG | OUTSIDE and not name.startswith(("hub_", "push_", "jit_"))
]
settings_of_fields = st.one_of(
    st.booleans(),
    st.integers(-2, 14),
    st.sampled_from([0.0, 0.5, 1e-3, 1.0, 3.7, 1e300, float("nan")]),
    st.sampled_from(["no", "steps", "epoch", "best", "linear", "cosine", "constant", "greedy", "polynomial", "sgd"]),
    st.sampled_from(
        ["adamw_torch", "adafactor", "reduce_lr_on_plateau", "all", "loss", "eval_loss", "invert", "x", ""]
    ),
    st.none(),
    st.just({}),
    st.just([]),
    st.just(["q_proj"]),
)
LIKELY = {
    ("training", "max_steps"): range(7, 15),
    ("training", "learning_rate"): (1e-4, 3e-3, 0.1),
    ("training", "lr_scheduler_type"): ("linear", "cosine", "constant", "polynomial", "warmup_stable_decay"),
    ("training", "warmup_steps"): (0, 0.1, 2, 5),
    ("training", "weight_decay"): (0.0, 0.1),
    ("training", "adam_beta1"): (0.5, 0.9),
    ("training", "max_grad_norm"): (0.0, 0.5),
    ("training", "label_smoothing_factor"): (0.0, 0.1),
    ("training", "neftune_noise_alpha"): (None, 1.0),
    ("training", "bf16"): (True, False, "auto"),
    ("training", "logging_steps"): (1, 2, 4, 0.25),
    ("training", "logging_strategy"): ("no", "steps", "epoch"),
    ("training", "save_steps"): (1, 2, 4, 6, 0.5),
    ("training", "save_strategy"): ("no", "steps", "epoch", "best"),
    ("training", "save_total_limit"): (None, 1, 2, 9),
    ("training", "save_only_model"): (True, False),
    ("training", "eval_steps"): (1, 3, 6, 0.5),
    ("training", "eval_strategy"): ("no", "steps", "epoch"),
    ("training", "load_best_model_at_end"): (True, False),
    ("training", "metric_for_best_model"): ("loss", "eval_perplexity", "bits_per_byte"),
    ("training", "activation_checkpointing"): (True, False),
    ("training", "optim"): ("adamw_torch", "adafactor", "sgd"),
    ("training", "seed"): (3, 4),
    ("parameter_groups", "embedding_lr_factor"): (0.5, 1.0),
    ("parameter_groups", "full_rank_lr_factor"): (0.1, 2.0),
    ("model", "recompute"): ("none", "invert", "auto"),
    ("data", "validation_fraction"): (0.2, 0.3),
}
likely = st.sampled_from(sorted(LIKELY)).flatmap(
    lambda field: st.tuples(st.just(field), st.sampled_from(list(LIKELY[field])))
)
differences = st.lists(likely, min_size=1, max_size=4) | st.lists(
    st.tuples(st.sampled_from(FIELDS), settings_of_fields) | likely, min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def began(root):
    """A run after step 8 of 12, with checkpoints of steps 4 and 8."""
    pretrain(build_recipe(tiny_content(root, save_total_limit=3)), root / "run")
    (root / "run" / "report.json").unlink()
    shutil.rmtree(root / "run" / "checkpoint-12")
    return root / "run"


def changed(began, differences):
    content = yaml.safe_load((began / "recipe.yaml").read_text())
    for (section, name), value in differences:
        content[section][name] = value
    return build_recipe(content)


@cases(250)
@given(differences=differences)
def test_every_difference_is_said_or_refused(root, began, differences):
    try:
        recipe = changed(began, differences)
        arguments = build_arguments(recipe, began)
    except CrossLayerError:
        return
    words = ""
    try:
        words = "; ".join(_check_resumption(recipe, arguments, began))
    except CrossLayerError as error:
        words = str(error)
    now = recipe.to_dict()
    earlier = yaml.safe_load((began / "recipe.yaml").read_text())
    before = build_arguments(build_recipe(earlier), began).to_dict()
    for section in SECTIONS:
        for name in {*now[section], *earlier[section]} - {"cache_dir", *_UNSAID}:
            is_training = section == "training"
            value = arguments.to_dict().get(name) if is_training else now[section].get(name)
            was = before.get(name) if is_training else earlier[section].get(name)
            if value != was and value == value:
                assert "cannot be resumed" in words or f"{name}=" in words, (section, name, value, was)


@cases(20)
@given(differences=differences)
def test_a_resumption_goes_to_its_end_or_leaves_the_run_alone(root, began, differences):
    folder = root / "again"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(began, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    try:
        recipe = changed(began, differences)
        if not -1 < recipe.training["max_steps"] <= 14:
            return  # as good as any other, and too long
        report = pretrain(recipe, folder, resume=True)
    except CrossLayerError as error:
        event(type(error).__name__)
        if type(error).__name__ != "TrainingError":
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        return
    event("went on")
    assert report.steps == recipe.training["max_steps"]
    assert build_recipe(yaml.safe_load((folder / "recipe.yaml").read_text())) == recipe
