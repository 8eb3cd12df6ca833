"""What is used of other packages without being documented by them: there, and as it is needed; nothing beside it."""

import ast
import atexit
import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import crosslayer
from crosslayer import private

ROOT = Path(crosslayer.__file__).parent


# Functions


def test_attention_is_counted_on_a_cpu():
    """`bench` and the accounting's witnesses would count attention as nothing."""
    forward, backward = private.fused_attention_on_cpu()
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    known = {forward: lambda *shapes, **more: 7}
    with torch.utils.flop_counter.FlopCounterMode(display=False, custom_mapping=known) as counter:
        result = nn.functional.scaled_dot_product_attention(query, query, query)
    assert counter.get_total_flops() == 7
    assert result.grad_fn.name().lower().startswith("scaleddotproductflashattentionforcpu")
    assert backward.default._schema.arguments[0].name == "grad_out"
    assert private.attention_operations((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)) == 2 * 2 * 2 * 3 * 3 * 4


def test_grouped_products_are_counted():
    """Experts' operations would be missing."""
    assert private.grouped_product().default._schema.arguments[0].name == "self"


def test_addresses_of_storages():
    """`measure_peak_memory` would take two empty storages for one."""
    one, other = torch.empty(0).untyped_storage(), torch.empty(0).untyped_storage()
    assert private.storage_address(one) == private.storage_address(one) != private.storage_address(other)


def test_models_by_configuration():
    """`bench` would measure every dtype and attention as the default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=1, vocab_size=9)
    model = private.model_from_config(LlamaForCausalLM, config, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_a_prepared_model_can_be_prepared_anew():
    """Under several processes every one would train alone after an evaluation."""
    from accelerate import Accelerator

    assert "_is_accelerate_prepared" in inspect.getsource(Accelerator)
    model = nn.Linear(1, 1)
    private.prepare_anew(Accelerator(cpu=True).prepare_model(model))
    assert not hasattr(model, "_is_accelerate_prepared")
    private.prepare_anew(model)  # nothing to forget


def test_last_rates_of_schedules():
    """Logs of a resumed run would show the rates of the run before it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    private.set_last_rates(schedule, [0.5])
    assert schedule.get_last_lr() == [0.5]


def test_the_server_looks_among_transformers_names():
    """`crosslayer serve` would find no model of ours, or would not need this any more."""
    import transformers
    from transformers.cli.serving.model_manager import ModelManager

    assert "getattr(transformers, config.architectures[0])" in inspect.getsource(ModelManager._load_model)
    model = type("ModelOfATest", (), {})
    said = private.run_transformers_serve("folder", ["--port", "none"], [model])
    assert said == "Invalid value for '--port': 'none' is not a valid integer."
    assert transformers.ModelOfATest is model
    del transformers.ModelOfATest


def test_fingerprints_of_datasets():
    """Other content would be found in the cache of this one."""
    from datasets import Dataset

    one, same, other = (Dataset.from_dict({"text": [text]}) for text in "aab")
    assert private.dataset_fingerprint(one) == private.dataset_fingerprint(same) != private.dataset_fingerprint(other)


def test_excluded_modules():
    """PEFT would take an excluded block for one that was not found."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    found = check_target_module_exists(LoraConfig(target_modules=["a"], exclude_modules=["a"]), "a")
    assert isinstance(found, private.excluded_module())


def test_metrics_of_instructions():
    """`finetune` on instructions would say accuracies and entropies of single batches."""
    trl = pytest.importorskip("trl")
    assert "self._metrics = " in inspect.getsource(trl.SFTTrainer)


def test_replicas():
    """An adapter under DataParallel would ask for a state that replicas do not have."""
    assert "_is_replica" in inspect.getsource(nn.Module._replicate_for_data_parallel)
    assert private.is_replica(nn.Linear(1, 1)._replicate_for_data_parallel())
    assert not private.is_replica(nn.Linear(1, 1))


def test_exit_functions(monkeypatch):
    """An interrupted run would leave its temporary files."""
    done = []
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: done.append(True))
    private.run_exit_functions()
    assert done == [True]
    monkeypatch.undo()
    assert callable(atexit._run_exitfuncs)


def test_cpus_that_share_models():
    """`tensor_parallel` on CPU processes, and with it every test of it, would be refused by accelerate."""
    from accelerate import ParallelismConfig

    private.let_cpus_share_models()
    check = ParallelismConfig._validate_accelerator
    private.let_cpus_share_models()
    assert ParallelismConfig._validate_accelerator is check  # once
    others = SimpleNamespace(distributed_type="NO", num_processes=2, is_fsdp2=False, multi_device=False)
    cpus = SimpleNamespace(**{**vars(others), "distributed_type": "MULTI_CPU"})
    ParallelismConfig(tp_size=2)._validate_accelerator(cpus)
    with pytest.raises(ValueError, match="ParallelismConfig is only compatible"):
        ParallelismConfig(tp_size=2)._validate_accelerator(others)


def test_strided_shards():
    """Checkpoints of FSDP2 over tensor parallelism would hold rows in another order."""
    tensors = {"a": {"b": torch.ones(2)}, "c": 1}
    assert private.without_strided_shards(tensors) == tensors  # what is no DTensor stays; others: test_parallel_runs.py
    assert private.without_strided_shards(tensors, like=tensors) == tensors


# Tables


def place(where):
    module, _, name = where.partition(":")
    if not name:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:  # a namespace within a C module
            parent, _, child = module.rpartition(".")
            return getattr(importlib.import_module(parent), child)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("where", "name"),
    [(where, name) for table in (private.OVERRIDDEN, private.OF_CRNET) for where in table for name in table[where]],
)
def test_what_the_tables_name_is_there(where, name):
    """An override that nothing calls is silent: checkpoints without hashes, adapters that PEFT treats as LoRA."""
    found = place(where)
    assert hasattr(found, name) or name in inspect.getsource(found), f"{where} has no {name} any more"


def overrides():
    from crosslayer.crnet.model import CrossLayerPreTrainedModel
    from crosslayer.lor2c import LoR2CLayer, LoR2CModel
    from crosslayer.train.task_trainer import TaskTrainer
    from crosslayer.train.trainer import SafeTrainer

    ours = {
        "transformers:Trainer": (SafeTrainer, TaskTrainer),
        "transformers:PreTrainedModel": (CrossLayerPreTrainedModel,),
        "peft.tuners.tuners_utils:BaseTuner": (LoR2CModel,),
        "peft.tuners.tuners_utils:BaseTunerLayer": (LoR2CLayer,),
    }
    for where, names in private.OVERRIDDEN.items():
        for cls in ours.get(where, ()):
            own = [name for name in names if name in vars(cls)]
            yield from (pytest.param(place(where), cls, name, id=f"{cls.__name__}.{name}") for name in own)


@pytest.mark.parametrize(("theirs", "ours", "name"), list(overrides()))
def test_overrides_take_what_they_are_given(theirs, ours, name):
    """A parameter more on their side would be a TypeError in the middle of a run."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = inspect.signature(getattr(theirs, name)).parameters
    taken = inspect.signature(getattr(ours, name)).parameters
    if any(parameter.kind in kinds for parameter in taken.values()):
        return
    assert len(taken) >= len([p for p in given.values() if p.kind not in kinds])


# Nothing beside it


def private_names(tree):
    """(line, name) of every use of a name with a leading underscore, on something else or from another module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, alias.name) for alias in node.names)


def own_names(trees):
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node.name
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.attr if isinstance(node, ast.Attribute) else node.id


def strangers(trees):
    own = set(own_names(trees.values()))
    listed = {name for table in (private.OVERRIDDEN, private.OF_CRNET) for names in table.values() for name in names}
    allowed = own | listed | {"_exit"}  # os._exit is documented
    for path, tree in trees.items():
        if path.name == "private.py":
            continue
        for line, name in private_names(tree):
            if name.startswith("_") and not name.startswith("__") and name not in allowed | {"_C", "_autograd"}:
                yield f"{path.name}:{line} uses {name}"


def test_no_other_file_uses_anything_private():
    trees = {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
    assert not list(strangers(trees)), "put it into private.py, with a test of what breaks without it"


def test_the_scan_can_fail():
    trees = {Path("new.py"): ast.parse("model._secret()\nfrom peft import _Hidden\nself._mine = 1\nself._mine\n")}
    assert sorted(strangers(trees)) == ["new.py:1 uses _secret", "new.py:2 uses _Hidden"]
