"""What goes into PEFT's comparison of methods: sizes, one step, saving and loading, and the launcher."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark_scripts import BENCHMARKS
from crosslayer import LoR2CConfig
from crosslayer.accounting import lor2c_parameters

EXPERIMENTS = BENCHMARKS / "metamathqa" / "experiments" / "lor2c"
LLAMA_3B = LlamaConfig(
    vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
    num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
RUN = """
import json, os, sys
from peft import PeftConfig
config = PeftConfig.from_pretrained(sys.argv[-1])
seen = {"argv": sys.argv, "type": type(config).__name__, "r": config.r, "path": os.environ["PYTHONPATH"]}
open("seen.json", "a").write(json.dumps(seen) + "\\n")
sys.exit(3 if "--fail" in sys.argv else 0)
"""


@pytest.fixture
def metamathqa(script):
    return script("metamathqa")


@pytest.mark.parametrize(("rank", "expected"), [(32, 28 * 2 * 3072 * 32), (53, 28 * 2 * 3072 * 53)])
def test_sizes(metamathqa, rank, expected):
    config = PeftConfig.from_pretrained(EXPERIMENTS / metamathqa.name_of(rank))
    assert type(config) is LoR2CConfig
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_3B)
    trained = get_peft_model(model, config).get_nb_trainable_parameters()[0]
    assert trained == expected == lor2c_parameters(3072, 28, rank)
    assert f"{expected:,}" in metamathqa.__doc__
    assert config.lor2c_alpha / config.r == 2


@pytest.mark.parametrize("rank", [32, 53])
def test_one_step_saved_and_loaded(metamathqa, rank, tmp_path):
    def tiny():
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**shape, head_dim=16, vocab_size=53, num_hidden_layers=28, tie_word_embeddings=True)
        return LlamaForCausalLM(config).to(torch.bfloat16)

    model = get_peft_model(tiny(), PeftConfig.from_pretrained(EXPERIMENTS / metamathqa.name_of(rank)))
    settings = json.loads((EXPERIMENTS / metamathqa.name_of(rank) / "training_params.json").read_text())
    optimizer = torch.optim.AdamW(model.parameters(), **settings["optimizer_kwargs"])
    ids = torch.randint(0, 53, (2, 9), generator=torch.Generator().manual_seed(0))
    base = model.eval()(ids).logits
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    trained = model.eval()(ids).logits
    assert not torch.equal(trained, base)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert torch.equal(again(ids).logits, trained)
    with again.disable_adapter():
        assert torch.equal(again(ids).logits, base)


class TestLauncher:
    @pytest.fixture
    def checkout(self, tmp_path):
        suite = tmp_path / "peft" / "method_comparison" / "MetaMathQA"
        suite.mkdir(parents=True)
        (suite / "run.py").write_text(RUN)
        return tmp_path / "peft"

    def launch(self, *arguments):
        command = [sys.executable, BENCHMARKS / "metamathqa.py", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_runs_each_with_lor2c_known_to_peft(self, checkout):
        done = self.launch("--peft", checkout, "-v", "--clean")
        assert done.returncode == 0, done.stderr
        suite = checkout / "method_comparison" / "MetaMathQA"
        seen = [json.loads(line) for line in (suite / "seen.json").read_text().splitlines()]
        assert [run["argv"] for run in seen] == [
            ["run.py", "-v", "--clean", f"experiments/lor2c/llama-3.2-3B-rank{rank}"] for rank in (32, 53)
        ]
        assert [(run["type"], run["r"]) for run in seen] == [("LoR2CConfig", 32), ("LoR2CConfig", 53)]
        assert seen[0]["path"].startswith(str(checkout.resolve() / "src"))

    def test_says_what_failed_and_overwrites_nothing(self, checkout):
        failed = self.launch("--peft", checkout, "--ranks", "53", "--fail")
        assert failed.returncode == 1
        assert failed.stderr.endswith("run.py failed for llama-3.2-3B-rank53\n")
        suite = checkout / "method_comparison" / "MetaMathQA"
        assert len((suite / "seen.json").read_text().splitlines()) == 1
        theirs = suite / "experiments" / "lor2c" / "llama-3.2-3B-rank53" / "training_params.json"
        theirs.write_text("{}")
        refused = self.launch("--peft", checkout)
        assert refused.returncode == 1
        assert "training_params.json differs" in refused.stderr
        assert theirs.read_text() == "{}"
        assert len((suite / "seen.json").read_text().splitlines()) == 1

    def test_wants_a_checkout(self, tmp_path):
        refused = self.launch("--peft", tmp_path)
        assert refused.returncode == 2
        assert "has no method_comparison/MetaMathQA/run.py" in refused.stderr
