"""Auto classes know the models and PEFT knows LoR2C, in whatever order things are imported; our own import is light."""

import subprocess
import sys

import pytest

TINY = "num_hidden_layers=2, hidden_size=32, num_attention_heads=2, vocab_size=50, intermediate_size=40"
AUTO = f"A.from_config(C.for_model('crnet', {TINY}))"
KNOWS_LOR2C = "'LOR2C' in peft.PEFT_TYPE_TO_CONFIG_MAPPING"


def outcome(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("imports", "asked", "expected"),
    [
        ("import crosslayer; from transformers import AutoModel as A, AutoConfig as C", AUTO, "CRNetModel"),
        ("from transformers import AutoModel as A, AutoConfig as C, Trainer; import crosslayer", AUTO, "CRNetModel"),
        ("import sys; sys.argv = ['crosslayer']; import crosslayer; from transformers import AutoConfig as C",
         "C.for_model('crnet_gpt2')", "CRNetGPT2Config"),
        ("import crosslayer; import peft", KNOWS_LOR2C, "bool"),
        ("import peft; import crosslayer", KNOWS_LOR2C, "bool"),
        ("from crosslayer import LoR2CConfig; import peft", KNOWS_LOR2C, "bool"),
    ],
)  # fmt: skip
def test_whatever_is_imported_first(imports, asked, expected):
    assert outcome(f"{imports}\nfound = {asked}\nassert found\nprint(type(found).__name__)") == expected


@pytest.mark.parametrize(
    ("module", "name", "auto"),
    [
        ("crosslayer.crnet.modeling_crnet", "CRNetForCausalLM", "AutoModelForCausalLM"),
        ("crosslayer.crnet.configuration_crnet", "CRNetConfig", "AutoConfig"),
    ],
)
def test_whatever_is_used_can_carry_its_code(module, name, auto):
    assert outcome(f"from {module} import {name}\nprint({name}._auto_class)") == auto


def test_importing_is_light():
    heavy = "{'torch', 'transformers', 'peft', 'numpy', 'datasets'}"
    assert outcome(f"import sys, crosslayer, crosslayer.cli.app\nprint({heavy} & set(sys.modules))") == "set()"


def test_what_is_due_waits_for_the_outermost_import(tmp_path, monkeypatch):
    """In the middle of an import modules are half there; and a failure is that of the import, and comes again."""
    monkeypatch.syspath_prepend(tmp_path)
    watched = tmp_path / "watched"
    watched.mkdir()
    (watched / "__init__.py").write_text("import watched.inner\nSEEN = []\n")
    (watched / "inner.py").write_text("")
    (tmp_path / "actor.py").write_text("import watched\ndef act(): watched.SEEN.append(1)\ndef fail(): 1 / 0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom crosslayer import on_import\n"
    code += "on_import.WATCHED += ('watched',)\non_import.after(('watched.inner',), 'actor:act')\n"
    code += "import watched\nprint(watched.SEEN)\n"
    code += "try: on_import.after(('watched',), 'actor:fail')\nexcept ZeroDivisionError: print('failed')"
    assert outcome(code) == "[1]\nfailed"
