"""Every option of every verb has a range, and whatever stands after it, nothing but our own errors comes out."""

import inspect
import io
import os
import shutil
import sys
import tempfile
import typing
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from crosslayer.cli import (
    analyze,
    app,
    bench,
    compare,
    evaluate,
    export,
    finetune,
    generate,
    main,
    plan,
    prepare,
    pretrain,
    recipes,
    serve,
)
from crosslayer.cli.ranges import OPTIONS
from crosslayer.train.run import pretrain as run_pretraining
from property_cases import cases, long_enough
from tiny_finetune import write_encoder, write_task
from tiny_run import tiny_content, tiny_recipe, write_texts

pytestmark = long_enough
VERBS = {
    "pretrain": pretrain.pretrain,
    "prepare": prepare.prepare,
    "finetune": finetune.finetune,
    "evaluate": evaluate.evaluate,
    "generate": generate.generate,
    "serve": serve.serve,
    "export": export.export,
    "plan": plan.plan,
    "analyze": analyze.analyze,
    "compare": compare.compare,
    "recipes": recipes.recipes,
    "bench memory": bench.memory,
    "bench speed": bench.speed,
    "bench device": bench.measure_device,
}


def options_of(verb):
    """{name: (type without None, whether an argument)} of a verb's options that take a value."""
    hints = typing.get_type_hints(inspect.unwrap(VERBS[verb]), include_extras=True)
    found = {}
    for name, hint in hints.items():
        if typing.get_origin(hint) is not typing.Annotated:
            continue
        kind, info = typing.get_args(hint)[:2]
        kinds = [each for each in typing.get_args(kind) if each is not type(None)] or [kind]
        if kinds != [bool]:
            found[name] = (kinds[0] if len(kinds) == 1 else str, type(info).__name__ == "ArgumentInfo")
    return found


def test_every_verb_is_here():
    named = [*app.app.registered_commands, *bench.bench.registered_commands]
    functions = {inspect.unwrap(command.callback) for command in named}
    assert functions == {inspect.unwrap(verb) for verb in VERBS.values()}
    assert all(hasattr(command.callback, "__wrapped__") for command in named), "a verb whose options are not checked"


@pytest.mark.parametrize("verb", VERBS)
def test_every_number_has_a_range(verb):
    numbers = {name for name, (kind, _) in options_of(verb).items() if kind in (int, float)}
    assert numbers <= OPTIONS.keys()


def test_the_table_names_options_that_there_are():
    assert {name for verb in VERBS for name in options_of(verb)} >= OPTIONS.keys()


@pytest.fixture(scope="module", autouse=True)
def quickly_measured():
    """Devices, over next to nothing."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny = {"GRIDS": dict.fromkeys(("rows", "inner", "outer"), (16,)), "SEQUENCES": (8,), "POOL": 2**16}
        for name, value in (tiny | {"PASS_ELEMENTS": 2**10}).items():
            monkeypatch.setattr(f"crosslayer.bench.device.{name}", {"cpu": value})
        yield


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        run_pretraining(tiny_recipe(root, max_steps=2, save_strategy="no", eval_strategy="no"), root / "run")
        write_encoder(root / "encoder")
        write_task(root / "sst2", 8, 4)
        write_texts(root / "few", 2)
        content = tiny_content(root, max_steps=1, save_strategy="no", eval_strategy="no")
        (root / "recipe.yaml").write_text(yaml.safe_dump(content))
        yield root


def arguments_of(verb, root):
    """A command that works, on small things, and that writes nothing or under root/out alone."""
    tiny = ["--hidden_size=16", "--num_attention_heads=2", "--vocab_size=32", "--methods=crnet", "--batch_size=1"]
    tiny += ["--sequence=8"]
    out = f"--output_dir={root / 'out'}"
    return {
        "pretrain": [f"--recipe={root / 'recipe.yaml'}", out, "--dry-run"],
        "prepare": [f"--recipe={root / 'recipe.yaml'}", f"--output={root / 'out'}"],
        "finetune": [f"--model={root / 'encoder'}", "--task=sst2", f"--data={root / 'sst2'}", "--use_cpu", "--dry-run"],
        "evaluate": [str(root / "run"), f"--data={root / 'few'}"],
        "generate": [str(root / "run"), "--max_new_tokens=2", "--prompt=the"],
        "serve": [str(root / "run"), "--port=none"],  # refused: else it would not end
        "plan": ["--model=llama_60m"],
        "recipes": [],
        "export": [str(root / "run"), out],
        "analyze": [str(root / "run"), f"--data={root / 'few'}", "--max_tokens=200", out],
        "compare": [
            *(f"--recipe={root / 'recipe.yaml'}", "--methods=crnet", "--seeds=1", "--tuning_runs=0", out),
            "--workers=1",
        ],
        "bench memory": [*tiny, "--layers=1,2"],
        "bench speed": [*tiny, "--num_hidden_layers=1", "--turns=1", "--warm_up=0", "--prompt=4", "--new_tokens=2"],
        "bench device": ["--device=cpu"],
    }[verb]


def ends_well(verb, given_options, root, monkeypatch):
    """Runs a verb in an empty folder. Its exit code; fails for anything that is not ours to say."""
    monkeypatch.setattr(sys, "argv", ["crosslayer", *verb.split(), *arguments_of(verb, root), *given_options])
    monkeypatch.setenv("CROSSLAYER_CACHE", str(root / "cache"))
    shutil.rmtree(root / "out", ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as empty:
        monkeypatch.chdir(empty)
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            main()
        code = stopped.value.code or 0
        said = err.getvalue()
        assert code in (0, 2), said
        if code:
            errors = [line for line in said.splitlines() if line.startswith("crosslayer: error: ")]
            assert len(errors) == 1, said
            assert "Traceback" not in said
            assert not (root / "out").exists(), "something was written"
            assert not os.listdir(empty), "something was written"
        monkeypatch.chdir(root)
    return code


WRONG = {int: ["-1", "1.5", "nan", "x", str(2**70)], float: ["-1", "nan", "inf", "x"], str: [""]}
HARMLESS = {("generate", "prompt"), ("pretrain", "prompt")}  # any text is a prompt


@pytest.mark.parametrize("verb", VERBS)
def test_wrong_values_of_every_option(verb, root, monkeypatch):
    for name, (kind, is_argument) in options_of(verb).items():
        if is_argument or (verb, name) in HARMLESS:
            continue
        for value in WRONG.get(kind, ["x"]):  # else one of a few words
            assert ends_well(verb, [f"--{name}={value}"], root, monkeypatch) == 2, (name, value)


numbers = st.integers(-3, 4).map(str) | st.sampled_from(
    ["1e-3", "0.5", "1e3", "1e400", "-inf", "nan", str(2**31), str(2**64), "1_0", "007", "", "²", "0x10", "-0", "+1"]
)
texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00/"), max_size=12).filter(
    lambda text: not text.startswith(("hf:", "."))
) | st.sampled_from(
    ["cpu", "cuda:9", "meta", "1,2", "4,2,2", "q,k", "crnet", "7b", "-5", "null", "[1]", "*", "~", "80GB"]
)


HOW_OFTEN = {"turns", "warm_up", "new_tokens"}  # as many as are asked for are done
NOT_DRAWN = {"output_dir", "workers", "tokens_per_parameter"}  # a budget is worked off, however large
few = numbers.filter(lambda text: len(text) < 6)


def draw_options(verb, data):
    names = data.draw(st.lists(st.sampled_from(sorted(options_of(verb))), min_size=1, max_size=2, unique=True))
    options = []
    for name in names:
        kind, is_argument = options_of(verb)[name]
        if not is_argument and name not in NOT_DRAWN:
            drawn = texts if kind not in (int, float) else few if name in HOW_OFTEN else numbers
            options.append(f"--{name}={data.draw(drawn)}")
    return options


@pytest.mark.parametrize("verb", VERBS)
@cases(40)
@given(data=st.data())
def test_any_value_after_any_option(verb, root, data):
    with pytest.MonkeyPatch.context() as monkeypatch:
        ends_well(verb, draw_options(verb, data), root, monkeypatch)
