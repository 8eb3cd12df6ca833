"""`crosslayer analyze` of an encoder of 22M parameters takes at most 1.5 times the memory of its plain forward."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

from crosslayer.data import train_tokenizer
from tiny_run import write_texts

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "analyze.py"


@pytest.mark.long
def test_peak_memory(tmp_path):
    """The shape of all-MiniLM-L6-v2 with random weights, the bench's own script, 4,096 tokens instead of 100,000."""
    model = tmp_path / "encoder"
    BertModel(
        BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12)
    ).save_pretrained(model)
    texts = write_texts(tmp_path / "texts", documents=80)
    tokenizer = train_tokenizer((path.read_text() for path in texts.iterdir()), 300, 256)
    tokenizer.save_pretrained(model)
    out = tmp_path / "cost.json"
    arguments = [model, "--data", texts, "--max_tokens", 4096, "--threads", 1, "--out", out]
    subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], check=True, capture_output=True)
    cost = json.loads(out.read_text())
    assert 4000 < cost["tokens"] <= 4096
    assert cost["passes"] == 1
    assert cost["memory_ratio"] <= 1.5
