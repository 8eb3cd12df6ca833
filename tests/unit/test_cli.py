"""The command line: what it prints, its exit codes, and one clear line for every wrong input."""

import json
import shutil
import subprocess
import sys
import types

import pytest
import typer
import yaml

from crosslayer.cli import app, main
from crosslayer.train.run import pretrain
from crosslayer.train.trainer import PretrainTrainer
from tiny_run import tiny_content, tiny_recipe, write_texts


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def checkpoint(root):
    """A finished run."""
    pretrain(tiny_recipe(root, max_steps=4), root / "run")
    return root / "run"


@pytest.fixture
def run(monkeypatch, capsys):
    """run("evaluate", ...) -> (exit code, standard output, standard error), in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["crosslayer", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return types.SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)

    return call


def write_recipe(root, **training):
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_content(root, **training)))
    return path


def refused(result, *parts, code=2):
    """Wrong input: the exit code, nothing on standard output, one line that says what is wrong."""
    assert result.code == code, result.err
    assert result.out == ""
    lines = result.err.strip().splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("crosslayer: error: ")
    for part in parts:
        assert part in lines[0]


def test_help_is_quick_and_names_the_verbs():
    code = "import sys; sys.argv = ['crosslayer', '--help']; from crosslayer.cli import main\ntry: main()\n"
    code += "finally: print(sorted(set(sys.modules) & {'torch', 'transformers', 'datasets'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for verb in ("pretrain", "finetune", "evaluate", "generate", "plan", "analyze", "bench", "compare"):
        assert verb in done.stdout
    assert done.stdout.strip().endswith("[]")  # nothing heavy was imported


@pytest.mark.parametrize(
    "verb",
    [
        *("pretrain", "finetune", "evaluate", "generate", "plan", "analyze", "compare"),
        *("bench memory", "bench speed", "bench device"),
    ],
)
def test_help_of_a_verb(run, verb):
    result = run(*verb.split(), "--help")
    assert result.code == 0
    assert "--json" in result.out


def test_installed_command_and_module_say_the_same():
    for command in ([sys.executable, "-m", "crosslayer"], [shutil.which("crosslayer", path=sys.prefix + "/bin")]):
        done = subprocess.run([*command, "generate", "nowhere"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.strip() == (
            "crosslayer: error: checkpoint 'nowhere' does not exist; give the folder that a run wrote"
        )


def test_pretrain_shows_plan_table_sample_and_paths(run, root):
    folder = root / "shown"
    result = run("pretrain", "--recipe", write_recipe(root), "--output_dir", folder, "--max_steps", "4")
    assert result.code == 0, result.err
    for part in ("device", "parameters", "dense model", "validation perplexity", "bits per byte", "tokens/s", "peak"):
        assert part in result.out
    assert "Sample:" in result.out
    assert str(folder / "model") in result.out
    assert str(folder / "loss.png") in result.out


def test_progress_bar_shows_loss_and_speed(run, root):
    arguments = ("--max_steps", "6", "--disable_tqdm", "false", "--overwrite")
    result = run("pretrain", "--recipe", write_recipe(root), "--output_dir", root / "bar", *arguments)
    assert result.code == 0, result.err
    assert "loss=" in result.err
    assert "tokens/s=" in result.err
    assert "6/6" in result.err


def test_json_is_all_of_standard_output(run, root, caplog):
    folder = root / "as-json"
    result = run("pretrain", "--recipe", write_recipe(root), "--output_dir", folder, "--max_steps", "4", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["steps"] == 4
    assert "step 4/4: loss" in caplog.text  # the log goes to standard error
    assert "validation loss" in caplog.text


def test_dry_run_as_json(run, root):
    result = run(
        "pretrain", "--recipe", write_recipe(root), "--output_dir", root / "dry", "--dry-run", "--json", "--rank=4"
    )
    assert result.code == 0, result.err
    plan = json.loads(result.out)
    assert plan["steps"] == 12
    assert plan["parameters"]["low_rank"] == 2 * 4 * (8 * 32 + 3 * (32 + 48))
    assert not (root / "dry").exists()


def test_evaluate(run, checkpoint, root):
    result = run("evaluate", checkpoint, "--data", root / "texts", "--json")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert content["documents"] == 60
    assert content["perplexity"] > 1
    assert content["published_perplexity"] < content["perplexity"]
    assert (content["part"], content["block_size"]) == ("all", 32)
    shown = run("evaluate", checkpoint, "--data", root / "texts", "--published")
    assert f"{content['perplexity']:.3f}" in shown.out
    assert "published way" in shown.out


def test_evaluate_finds_the_validation_part_again(run, checkpoint, root):
    arguments = ("--data", root / "texts", "--part", "validation", "--validation-fraction", 0.2, "--json")
    content = json.loads(run("evaluate", checkpoint, *arguments).out)
    report = json.loads((checkpoint / "report.json").read_text())
    assert content["loss"] == pytest.approx(report["after"]["loss"], rel=1e-5)
    assert content["tokens"] == report["after"]["tokens"]


def test_generate_streams_and_repeats(run, checkpoint):
    arguments = ("generate", checkpoint, "--prompt", "the quick", "--max-new-tokens", 8)
    streamed = run(*arguments, "--seed", 1)
    assert streamed.code == 0, streamed.err
    first, again = (json.loads(run(*arguments, "--seed", 1, "--json").out)["text"] for _ in range(2))
    assert first == again
    assert first.startswith("the quick")
    assert streamed.out.strip() == first.strip()


def test_generate_without_a_prompt(run, checkpoint):
    result = run("generate", checkpoint, "--max-new-tokens", 3, "--temperature", 0)
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--hiden_size", "8"), ("hiden_size", "hidden_size")),
        (("--rank", "1000"), ("rank=1000", "layers.1.q (32 x 32)")),
        (("--rank", "0"), ("rank=0",)),
        (("--num_attention_heads", "3"), ("32", "3")),
        (("--data", "no/such/file.txt"), ("no/such/file.txt",)),
        (("--block_size", "100000"), ("100000",)),
        (("--max_steps", "soon"), ("max_steps='soon'",)),
        (("stray",), ("'stray' is not an option",)),
        (("--resume",), ("no run to resume",)),
        (("--resume", "--overwrite"), ("exclude each other",)),
        (("--tokenizer", "./no-tokenizer"), ("no-tokenizer",)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_pretrain_refuses(run, root, arguments, parts):
    folder = root / "refused"
    refused(run("pretrain", "--recipe", write_recipe(root), "--output_dir", folder, *arguments), *parts)
    assert not folder.exists()


def test_pretrain_refuses_a_missing_recipe(run):
    refused(run("pretrain", "--recipe", "nothing.yaml"), "'nothing.yaml' does not exist")
    refused(run("pretrain"), "Missing option", "--recipe")


def test_pretrain_refuses_bad_data(run, root):
    recipe = write_recipe(root)
    bad = root / "bad"
    bad.mkdir()
    (bad / "latin.txt").write_bytes("déjà vu".encode("latin-1") * 100)
    (bad / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (bad / "column.jsonl").write_text('{"body": "fine"}\n')
    (bad / "empty.txt").write_text("")
    (root / "nothing").mkdir()
    for source, parts in (
        (bad / "latin.txt", ("latin.txt", "UTF-8")),
        (bad / "broken.jsonl", ("broken.jsonl", "2")),
        (bad / "column.jsonl", ("column.jsonl", "text", "body")),
        (bad / "empty.txt", ("empty.txt",)),
        (root / "nothing", ("nothing",)),
    ):
        folder = root / "refused-data"
        refused(run("pretrain", "--recipe", recipe, "--output_dir", folder, "--data", source), *parts)
        assert not folder.exists()


def test_skip_bad_skips_and_counts(run, root):
    texts = write_texts(root / "mixed")
    (texts / "latin.txt").write_bytes("déjà vu".encode("latin-1") * 100)
    result = run("pretrain", "--recipe", write_recipe(root), "--data", texts, "--skip_bad", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["data"]["skipped"] == 1


def test_a_run_in_the_way(run, root, checkpoint):
    refused(run("pretrain", "--recipe", write_recipe(root), "--output_dir", checkpoint), "already holds a run")


def test_a_failure_while_running_is_exit_code_1(run, root, monkeypatch):
    original = PretrainTrainer.compute_loss
    monkeypatch.setattr(
        PretrainTrainer, "compute_loss", lambda self, *args, **kwargs: original(self, *args, **kwargs) * float("nan")
    )
    result = run("pretrain", "--recipe", write_recipe(root), "--output_dir", root / "nan")
    assert result.code == 1
    assert "crosslayer: error: the loss is not finite at step 1" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_checkpoints_that_are_none(run, root, checkpoint, verb):
    refused(run(verb, root / "rum"), "does not exist", "did you mean")
    refused(run(verb, root / "texts"), "not a checkpoint")
    broken = root / f"broken-{verb}"
    shutil.copytree(checkpoint / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(run(verb, broken), "cannot be loaded")
    (broken / "config.json").write_text("{")
    refused(run(verb, broken), "cannot be loaded")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--temperature", "-1"), "temperature=-1.0"),
        (("--top-p", "0"), "top_p=0.0"),
        (("--max-new-tokens", "0"), "max_new_tokens=0"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--top-q", "1"), "--top-q"),
    ],
)
def test_generate_refuses(run, checkpoint, arguments, part):
    refused(run("generate", checkpoint, *arguments), part)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--part", "half"), "half"),
        (("--batch-size", "0"), "batch_size=0"),
        (("--block-size", "1"), "block_size=1"),
        (("--data", "missing.txt"), "missing.txt"),
    ],
)
def test_evaluate_refuses(run, checkpoint, arguments, part):
    refused(run("evaluate", checkpoint, *arguments), part)


def test_an_unknown_verb(run):
    refused(run("pretrian"), "pretrian")


def test_words_of_options_are_joined_either_way():
    command = typer.main.get_command(app.app)
    commands = [*command.commands.values(), *command.commands["bench"].commands.values()]
    options = [set(option.opts) for each in commands for option in each.params if option.param_type_name == "option"]
    several = [names for names in options if any("_" in name or "-" in name[2:] for name in names)]
    assert len(several) > 30
    for names in several:
        assert names == {f"--{name[2:].replace(a, b)}" for name in names for a, b in (("_", "-"), ("-", "_"))}
