"""Programs that take a checkpoint as any transformers model: what they ask of it, and the harness itself where it is
installed (docs/inference.md)."""

import json
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from crosslayer.crnet.cross_layer_linear import CrossLayerLinear
from crosslayer.loading import load_saved
from crosslayer.train.run import pretrain
from device_reads import Reads
from family_cases import FAMILY_CASES
from model_cases import model_of
from tiny_run import tiny_recipe

# vLLM's Transformers backend, in its own words "writing custom models": kwargs reach the attention, which asks
# ALL_ATTENTION_FUNCTIONS; AutoModel knows the decoder; linears may be others' classes; one row holds all sequences.


class ForeignLinear(nn.Module):
    """As vLLM's ReplicatedLinear: no `nn.Linear`, the same parameters."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class SequencesInOneRow:
    """As vLLM's Attention of one layer: keys and values of every sequence, whatever row their tokens come in."""

    lengths: list[int] = []  # of the sequences in the row at hand

    def __init__(self, head_dim):
        self.head_dim, self.cache = head_dim, {}

    def forward(self, *tensors, scaling):
        outputs = []
        for sequence, parts in enumerate(zip(*(x.split(self.lengths) for x in tensors), strict=True)):
            q, *new = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1) for x in parts)
            old = self.cache.get(sequence)
            k, v = new if old is None else (torch.cat(pair, 1) for pair in zip(old, new, strict=True))
            self.cache[sequence] = k, v
            mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
            groups = q.shape[0] // k.shape[0]
            k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            outputs.append(out.transpose(0, 1).flatten(1))
        return torch.cat(outputs)


def attend(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **given):
    assert attention_mask is None
    length = query.shape[-2]
    rows = (x.transpose(1, 2).reshape(length, -1) for x in (query, key, value))
    return attention_instances[module.layer_idx].forward(*rows, scaling=scaling), None


def replace_linears(module):
    for name, child in module.named_children():
        replace_linears(child)
        if isinstance(child, nn.Linear):
            setattr(module, name, ForeignLinear(child))


@pytest.fixture
def backend():
    ALL_ATTENTION_FUNCTIONS.register("backend", attend)
    yield "backend"
    del ALL_ATTENTION_FUNCTIONS._global_mapping["backend"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@torch.no_grad()
def test_a_backend_that_brings_attention_and_linears(name, backend, tmp_path):
    ours = FAMILY_CASES[name].model().eval()
    ours.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config._attn_implementation = backend
    with torch.device("meta"):
        assert type(AutoModel.from_config(config).get_decoder()) is type(ours.base_model)
    model = AutoModel.from_config(config).eval()
    assert model.is_backend_compatible()
    weights = {
        key.removeprefix(f"{ours.base_model_prefix}."): w
        for key, w in load_file(next(tmp_path.glob("*.safetensors"))).items()
    }
    assert not model.load_state_dict(weights, strict=False).missing_keys
    replace_linears(model)
    assert any(isinstance(m, CrossLayerLinear) and isinstance(m.B, ForeignLinear) for m in model.modules())

    instances = {index: SequencesInOneRow(config.attention_shape(index).key_dim) for index in range(len(model.blocks))}
    texts = [torch.randint(3, config.vocab_size, (length,)) for length in (9, 6)]
    expected = [ours.base_model(text[None]).last_hidden_state[0] for text in texts]

    def run(starts, ends):
        SequencesInOneRow.lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        pieces = list(zip(texts, starts, ends, strict=True))
        ids = torch.cat([text[a:b] for text, a, b in pieces])[None]
        positions = torch.cat([torch.arange(a, b) for _, a, b in pieces])[None]
        given = {"position_ids": positions, "attention_instances": instances, "use_cache": False}
        with pytest.MonkeyPatch.context() as patch, Reads(patch) as reads:
            output = model(input_ids=ids, return_dict=False, **given)
        assert not reads.found
        wanted = torch.cat([states[a:b] for states, (_, a, b) in zip(expected, pieces, strict=True)])
        torch.testing.assert_close(output[0][0], wanted, rtol=1e-4, atol=1e-5)

    run((0, 0), (7, 5))  # prompts of both
    run((7, 5), (8, 6))  # one token more of each


def test_trl_packs_documents_that_stay_apart(tmp_path):
    """What SFTTrainer's collator makes of packed texts is what a CR-Net takes for documents, and it trains on them."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["[PAD]", "[BOS]", "[EOS]", *(f"w{n}" for n in range(50))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    texts = [" ".join(f"w{(start + step) % 50}" for step in range(3 + start % 6)) for start in range(24)]
    arguments = trl.SFTConfig(
        str(tmp_path),
        packing=True,
        max_length=16,
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model_of("gqa", recompute="invert"),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    ids, positions = batch["input_ids"], batch["position_ids"]
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    assert len(starts) > 3
    given = {name: value for name, value in batch.items() if name not in ("labels", "input_ids")}
    with torch.no_grad():
        packed = trainer.model.eval()(input_ids=ids, use_cache=False, **given).logits[0]
        alone = [trainer.model(ids[:, a:b]).logits[0] for a, b in pairwise(starts)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert trainer.train().training_loss > 0


TASK = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_lm_evaluation_harness(tmp_path):
    """A task of one's own over a local file; the likelihoods are those of the model."""
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval")
    from lm_eval.tasks import TaskManager

    pretrain(tiny_recipe(tmp_path, max_steps=4, eval_strategy="no"), tmp_path / "run")
    rows = [
        {"question": "the quick brown", "choices": ["fox", "seven wizards"], "answer": 0},
        {"question": "jumps over a", "choices": ["pots", "lazy dog"], "answer": 1},
    ]
    file, tasks = tmp_path / "rows.jsonl", tmp_path / "tasks"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks.mkdir()
    (tasks / "mine.yaml").write_text(TASK.format(rows=file))
    folder = tmp_path / "run" / "model"
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "trust_remote_code": True},
        tasks=["mine"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    (model, _), tokenizer = load_saved(folder), AutoTokenizer.from_pretrained(folder)
    for sample in found["samples"]["mine"]:
        for choice, ((likelihood, _),) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            context = tokenizer(sample["doc"]["question"], add_special_tokens=False).input_ids
            whole = tokenizer(f"{sample['doc']['question']} {choice}", add_special_tokens=False).input_ids
            with torch.no_grad():
                scores = model.eval()(torch.tensor([whole])).logits[0].log_softmax(-1)
            wanted = sum(scores[at - 1, whole[at]].item() for at in range(len(context), len(whole)))
            assert likelihood == pytest.approx(wanted, abs=1e-4)
