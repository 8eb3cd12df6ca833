"""Checkpoints carry their own code: they load, run, train on and save again where crosslayer is not installed."""

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import crosslayer.crnet
from crosslayer.crnet import FAMILIES, CRNetForCausalLM, CRNetForSequenceClassification, CRNetModel
from family_cases import FAMILY_CASES
from model_cases import model_of, tokens

SOURCES = Path(crosslayer.crnet.__file__).parent
MODELS = {
    "causal": ("cross_layer", CRNetForCausalLM),
    "base": ("gqa", CRNetModel),
    "classifier": ("cola", CRNetForSequenceClassification),
}

PREAMBLE = """
    import importlib.abc, json, sys
    from pathlib import Path

    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "crosslayer":
                raise ModuleNotFoundError("No module named 'crosslayer'")

    sys.meta_path.insert(0, Blocked())
    try:
        import crosslayer
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("crosslayer is not blocked")

    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers import AutoModelForSequenceClassification as Classifier

    folder = Path(sys.argv[1])
    expected = torch.load(folder / "expected.pt")
    ids = expected["ids"]

    def load(auto, name, **arguments):
        model = auto.from_pretrained(folder / name, trust_remote_code=True, **arguments)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        return model
"""


def run_without_crosslayer(script, folder):
    """In a fresh isolated interpreter, in which importing crosslayer raises."""
    script = textwrap.dedent(PREAMBLE) + textwrap.dedent(script) + '\nassert "crosslayer" not in sys.modules\n'
    done = subprocess.run([sys.executable, "-I", "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


STEMS = [stem for stem, _ in FAMILIES.values()]


def carried_files(stem: str = "crnet") -> set[str]:
    """The modelling file of a family and everything it reaches through relative imports."""
    found, waiting = set(), {f"modeling_{stem}"}
    while waiting:
        name = waiting.pop()
        found.add(name)
        for node in ast.walk(ast.parse((SOURCES / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{name} imports from above its folder"
                assert node.module, f"{name} imports its package"
                waiting |= {node.module} - found
    return {f"{name}.py" for name in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    expected = {"ids": tokens()}
    for name, (case, model_class) in MODELS.items():
        model = model_of(case, model_class, eos_token_id=None)
        model.save_pretrained(folder / name)
        output = model(tokens())
        expected[name] = (output.last_hidden_state if name == "base" else output.logits).detach()
        if name == "causal":
            expected["hidden"] = model.model(tokens()).last_hidden_state.detach()
            expected["generated"] = model.generate(
                tokens(), attention_mask=torch.ones_like(tokens()), do_sample=False, max_new_tokens=8
            )
    expected["families"] = {}
    for name, case in FAMILY_CASES.items():
        model = case.model(eos_token_id=None, recompute="invert")
        model.save_pretrained(folder / name)
        expected["families"][name] = model(tokens()).logits.detach()
    torch.save(expected, folder / "expected.pt")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_folder_carries_its_code(folder, name):
    assert {path.name for path in (folder / name).glob("*.py")} == carried_files()
    for file in carried_files():
        assert (folder / name / file).read_text() == (SOURCES / file).read_text()
    auto_map = json.loads((folder / name / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_crnet.CRNetConfig",
        "AutoModel": "modeling_crnet.CRNetModel",
        "AutoModelForCausalLM": "modeling_crnet.CRNetForCausalLM",
        "AutoModelForSequenceClassification": "modeling_crnet.CRNetForSequenceClassification",
    }


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_folder_of_a_family_carries_its_code(folder, name):
    stem = json.loads((folder / name / "config.json").read_text())["model_type"]
    files = carried_files(stem)
    assert {path.name for path in (folder / name).glob("*.py")} == files
    assert {file for file in files if file.startswith("modeling_")} >= {f"modeling_{stem}.py"}
    auto_map = json.loads((folder / name / "config.json").read_text())["auto_map"]
    for auto, target in auto_map.items():
        file, _, cls = target.partition(".")
        assert f"{file}.py" in files
        assert f"class {cls}(" in (folder / name / f"{file}.py").read_text(), auto


@pytest.mark.parametrize("stem", STEMS)
def test_carried_files_import_only_what_every_user_has(stem):
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "huggingface_hub"}
    for file in carried_files(stem):
        for node in ast.walk(ast.parse((SOURCES / file).read_text())):
            if isinstance(node, ast.Import):
                used = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                used = {node.module.split(".")[0]}
            else:
                continue
            assert used <= allowed, f"{file}:{node.lineno}"


def test_every_file_of_crnet_is_carried():
    """Nothing lies beside the modelling files that every checkpoint would leave behind, and each family has cases."""
    left_behind = {"__init__.py", "families.py", "registration.py"}
    assert {path.name for path in SOURCES.glob("*.py")} - left_behind == set().union(*map(carried_files, STEMS))
    assert {case.cls("Config").model_type for case in FAMILY_CASES.values()} == set(STEMS)


def test_works_where_crosslayer_is_not_installed(folder):
    run_without_crosslayer(
        """
        try:
            AutoModelForCausalLM.from_pretrained(folder / "causal", trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code" in str(error), error
        else:
            raise SystemExit("code from the folder ran without trust_remote_code")
        assert AutoConfig.from_pretrained(folder / "causal", trust_remote_code=True).model_type == "crnet"

        causal = load(AutoModelForCausalLM, "causal")
        assert torch.equal(causal(ids).logits, expected["causal"])
        generated = causal.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
        assert torch.equal(generated, expected["generated"])
        assert torch.equal(load(AutoModel, "base")(ids).last_hidden_state, expected["base"])
        assert torch.equal(load(Classifier, "classifier")(ids).logits, expected["classifier"])

        # AutoModel and a classifier from the language model's checkpoint
        assert torch.equal(load(AutoModel, "causal")(ids).last_hidden_state, expected["hidden"])
        classifier = load(Classifier, "causal", num_labels=3)
        assert torch.equal(classifier.model(ids).last_hidden_state, expected["hidden"])

        # half precision and a training step
        half = load(AutoModelForCausalLM, "causal", dtype=torch.bfloat16)
        assert {p.dtype for name, p in half.named_parameters() if name.endswith("beta")} == {torch.float32}
        causal.train()(ids, labels=ids).loss.backward()
        torch.optim.SGD(causal.parameters(), lr=0.01).step()
        expected["trained"] = causal.eval()(ids).logits.detach()

        # saved from there, loaded there and, by the test, here
        causal.save_pretrained(folder / "again")
        again = load(AutoModelForCausalLM, "again")
        assert torch.equal(again(ids).logits, expected["trained"])
        assert torch.equal(load(AutoModel, "again").norm.weight, causal.model.norm.weight)
        torch.save(expected["trained"], folder / "trained.pt")

        # every family, and a training step under the policy that it was saved with
        for name, logits in expected["families"].items():
            model = load(AutoModelForCausalLM, name)
            torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)
            assert model.config.recompute == "invert"
            model.train()(ids, labels=ids, use_cache=False).loss.backward()
            assert all(p.grad is not None for p in model.parameters()), name
            assert load(Classifier, name, num_labels=3)(ids).logits.shape == (2, 3)
        """,
        folder,
    )
    assert {path.name for path in (folder / "again").glob("*.py")} == carried_files()
    ours = CRNetForCausalLM.from_pretrained(folder / "again")
    assert torch.equal(ours(tokens()).logits, torch.load(folder / "trained.pt"))
    ours.save_pretrained(folder / "third")
    assert {path.name for path in (folder / "third").glob("*.py")} == carried_files()
