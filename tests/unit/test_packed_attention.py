"""Documents packed into one row, under every attention and every memory policy: apart, read once, without a mask."""

import copy
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_flash_attention_utils

from crosslayer.crnet.policies import POLICIES
from crosslayer.errors import ConfigError
from crosslayer.train import attention as attention_module
from crosslayer.train import build_recipe
from crosslayer.train.attention import DOCUMENTS, FLASH, attention_of
from crosslayer.train.run import pretrain
from device_reads import Reads
from family_cases import FAMILY_CASES
from model_cases import SHAPE, config_of, model_of, tokens
from tiny_run import tiny_content

LENGTHS = ((5, 1, 11), (9, 2, 3, 1, 1, 1))
"""Of the documents in each row; the ones at the end are padding."""

POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
BOUNDS = [0, 5, 6, 17, 26, 28, 31, 32, 33, 34]


def with_attention(model, name):
    """A copy of the model with another attention, whether transformers finds its package or not."""
    other = copy.deepcopy(model)
    other.config._attn_implementation = name
    return other


def step(model, positions=POSITIONS):
    """(loss, gradients by name) of packed rows."""
    ids = tokens(vocab_size=model.config.vocab_size)
    loss = model.train()(ids, position_ids=positions, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model, other):
    """Loss and every gradient of a step."""
    torch.testing.assert_close(step(other), step(model), rtol=1e-4, atol=1e-5)


class FlashStandIn:
    """What transformers calls of FlashAttention, in sdpa; notes the lengths that it was given."""

    def __init__(self, patch):
        self.lengths: list = []
        process = partial(
            modeling_flash_attention_utils._process_flash_attention_kwargs,
            supports_mapping=dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "window_size"), True)
            | dict.fromkeys(("dropout_p", "deterministic", "softcap", "s_aux", "cache_seqlens"), False),
        )
        functions = (self.whole, self.by_length, None, None, None), (process, process)
        patch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda name: functions)

    def whole(self, q, k, v, softmax_scale, causal):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    def by_length(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **given):
        assert type(max_seqlen_q) is int  # a tensor would be read by every layer
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q is cu_seqlens_k
        self.lengths.append((cu_seqlens_q, max_seqlen_q))
        bounds = cu_seqlens_q.numpy()
        assert max_seqlen_q == max_seqlen_k == (bounds[1:] - bounds[:-1]).max()
        pairs = itertools.pairwise(bounds)
        return torch.cat([self.whole(q[None, a:b], k[None, a:b], v[None, a:b], **given)[0] for a, b in pairs])


@pytest.mark.parametrize("policy", POLICIES)
def test_flash_attention_gets_lengths_once(policy, monkeypatch):
    """transformers alone reads positions in every layer, and lets documents of several rows see each other."""
    flash, model = FlashStandIn(monkeypatch), model_of("gqa", recompute=policy)
    check_equal(model, with_attention(model, "flash_attention_2"))
    assert len(flash.lengths) >= SHAPE["num_hidden_layers"]
    assert all(lengths is flash.lengths[0][0] for lengths, _ in flash.lengths)
    assert flash.lengths[0][0].tolist() == BOUNDS
    assert {longest for _, longest in flash.lengths} == {11}


def test_flash_attention_reads_positions_once(monkeypatch):
    flash = FlashStandIn(monkeypatch)
    model, ids = with_attention(model_of("cola"), "flash_attention_2").train(), tokens()

    def reads(**given):
        flash.lengths.clear()
        with pytest.MonkeyPatch.context() as patch, Reads(patch) as found:
            model(ids, use_cache=False, **given)
        return sum(found.found.values()) - len(flash.lengths)  # the stand-in's own

    assert reads(position_ids=POSITIONS) == 1
    assert reads() == 0
    lengths = torch.tensor(BOUNDS, dtype=torch.int32)
    known = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 11, "max_length_k": 11}
    assert reads(position_ids=POSITIONS, **known) == 0
    assert flash.lengths[0][0] is lengths


@pytest.mark.parametrize("policy", POLICIES)
def test_flex_attention(policy, monkeypatch):
    """torch's own mathematics of flex attention, uncompiled: its check alone forbids a backward on a CPU."""
    from torch.nn.attention import flex_attention
    from transformers import masking_utils

    masks = []

    def create(**given):
        masks.append(flex_attention.create_block_mask(**given | {"_compile": False}))
        return masks[-1]

    monkeypatch.setattr(masking_utils, "create_block_mask", create)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    model = model_of("gqa", recompute=policy)
    torch.compiler.set_stance("force_eager")
    try:
        check_equal(model, with_attention(model, "flex_attention"))
    finally:
        torch.compiler.set_stance("default")
    assert len(masks) == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_one_document_at_a_time(policy):
    model = model_of("gqa", recompute=policy)
    check_equal(model, with_attention(model, DOCUMENTS))


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt2", "deepseek_v3"])
def test_one_document_at_a_time_in_families(name):
    """Sliding windows, positions that are learned, keys wider than values."""
    model = FAMILY_CASES[name].model()
    check_equal(model, with_attention(model, DOCUMENTS))


def test_documents_are_no_matter_to_generation():
    model = model_of("cross_layer")
    other, ids = with_attention(model, DOCUMENTS), tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    given = {"max_new_tokens": 4, "do_sample": False, "attention_mask": mask}
    assert torch.equal(other.generate(ids, **given), model.generate(ids, **given))
    torch.testing.assert_close(other(ids).logits, model(ids).logits)
    cached = [m(ids, position_ids=POSITIONS, use_cache=True).logits for m in (other, model)]
    torch.testing.assert_close(*cached)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation gave."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize("policy", ["none", "reversible"])
@pytest.mark.parametrize("name", ["sdpa", DOCUMENTS, "flash_attention_2"])
def test_no_mask_of_a_whole_row(name, policy, monkeypatch):
    FlashStandIn(monkeypatch)
    length = 600
    model = with_attention(model_of("gqa", recompute=policy, num_hidden_layers=2), name).train()
    ids, positions = tokens(1, length), (torch.arange(length) % 40)[None]
    with Largest() as largest:
        model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
    assert (largest.numbers >= length**2) == (name == "sdpa")


def chosen(device="cpu", bf16=True, block_size=2048, asked=None, **fields):
    recipe = SimpleNamespace(
        model={} if asked is None else {"attn_implementation": asked}, data=SimpleNamespace(block_size=block_size)
    )
    arguments = SimpleNamespace(device=torch.device(device), bf16=bf16, fp16=False)
    return attention_of(recipe, config_of("cross_layer", **fields), arguments)[0]


@pytest.fixture
def installed(monkeypatch):
    """Sets which packages are there: triton, and names of FlashAttention."""

    def install(*names):
        monkeypatch.setattr(attention_module, "find_spec", lambda name: name if name in names else None)
        for name in FLASH:
            monkeypatch.setitem(FLASH, name, lambda name=name, **kernels: name in names)

    return install


def test_what_is_installed_decides(installed):
    installed("triton", "flash_attention_2", "flash_attention_3")
    assert chosen("cuda") == chosen("cuda", block_size=256) == "flash_attention_3"
    assert chosen("cuda", bf16=False) == "flex_attention"
    assert chosen("cuda", bf16=False, block_size=256) == "sdpa"
    assert chosen("cuda", attention_dropout=0.1) == "flash_attention_2"
    assert chosen("cuda", asked="sdpa") == "sdpa"
    installed("triton")
    assert chosen("cuda") == "flex_attention"
    installed()
    assert chosen("cuda") == "sdpa"
    assert chosen("cpu") == DOCUMENTS
    assert chosen("cpu", block_size=512) == "sdpa"
    assert chosen("cpu", asked="eager") == "eager"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"asked": "flex_attention"}, "no backward on a CPU"),
        ({"asked": "flash_attention_2"}, "runs on CUDA, and this is cpu"),
        ({"asked": "flash_attention_2", "device": "cuda", "bf16": False}, "bf16 or fp16 alone"),
        ({"asked": "flash_attention_2", "device": "cuda"}, "is not installed"),
        ({"asked": "flex_attention", "device": "cuda"}, "needs triton"),
        ({"asked": "flex_attention", "device": "cuda", "attention_dropout": 0.1}, "takes no attention_dropout=0.1"),
    ],
)
def test_what_cannot_train_is_refused(given, message, installed):
    installed()
    with pytest.raises(ConfigError, match=message) as error:
        chosen(**given)
    assert "\n" not in str(error.value)


def recipe_with(root, attention, **training):
    content = tiny_content(root, max_steps=4, eval_strategy="no", **training)
    return build_recipe(content | {"model": content["model"] | {"attn_implementation": attention}})


def test_a_recipe_says_which(tmp_path):
    with pytest.raises(ConfigError, match=r"model.attn_implementation='flash' must be one of auto, sdpa"):
        recipe_with(tmp_path, "flash")
    plans = []
    reports = [
        pretrain(recipe_with(tmp_path, name), tmp_path / name, show_plan=plans.append) for name in ("sdpa", DOCUMENTS)
    ]
    assert [plan.attention.partition(":")[0] for plan in plans] == ["sdpa", DOCUMENTS]
    assert [report.model.config._attn_implementation for report in reports] == ["sdpa", DOCUMENTS]
    assert reports[0].after["loss"] == pytest.approx(reports[1].after["loss"], abs=1e-5)


def test_a_resumed_run_may_take_another(tmp_path, caplog):
    pretrain(recipe_with(tmp_path, "auto"), tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    caplog.set_level("INFO")
    report = pretrain(recipe_with(tmp_path, "eager"), tmp_path / "run", resume=True)
    assert report.model.config._attn_implementation == "eager"
    assert "attn_implementation='eager' (was 'auto')" in caplog.text
