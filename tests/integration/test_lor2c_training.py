"""LoR2C in training loops that are not ours: two gloo processes under DDP, and TRL's SFTTrainer."""

import os
import socket

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from crosslayer import LoR2CConfig, LoR2CStructureCallback
from crosslayer.lor2c import AdaptedBlocks
from lor2c_cases import base_model
from processes import spawn

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]

WORLD = 2


def train(folder, rows_per_device):
    """(structure, history, weights in use) after three epochs with one fuse and one injection."""
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(3, 53, (6,), generator=generator), "labels": row % 2} for row in range(16)]
    model = base_model("roberta")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    model = get_peft_model(model, LoR2CConfig(r=4, lor2c_dropout=0.0, task_type="SEQ_CLS", injectable=True))
    callback = LoR2CStructureCallback(max_fuses=1, max_injections=1, interval=1)
    arguments = TrainingArguments(
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=rows_per_device,
        train_sampling_strategy="sequential",
        average_tokens_across_devices=False,  # else the mean over rows is multiplied by the number of processes
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    blocks = AdaptedBlocks(model)
    weights = [parameter.detach().clone() for parameter in blocks.parameters()]
    return blocks.structure, [(entry["step"], entry["action"], entry["blocks"]) for entry in callback.history], weights


def worker(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.save(train(f"{folder}/run", 4 // WORLD), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_agree_and_equal_one_process(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(worker, (str(tmp_path), port), nprocs=WORLD)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    structure, history, weights = train(str(tmp_path / "alone"), 4)
    assert [action for _, action, _ in history] == ["fuse", "inject"]
    for their_structure, their_history, their_weights in results:
        assert their_structure == structure
        assert their_history == history
        for mine, theirs, first in zip(weights, their_weights, results[0][2], strict=True):
            assert torch.equal(theirs, first)
            torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-5)


def test_sft_trainer_of_trl(tmp_path):
    """`peft_config=LoR2CConfig(...)` is all it takes: the loss falls, the adapter reloads, structure changes work."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[BOS]", "[EOS]", *(f"w{index}" for index in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2} w{n + 3}"} for n in range(20)]
    arguments = trl.SFTConfig(
        str(tmp_path),
        num_train_epochs=8,
        per_device_train_batch_size=10,
        learning_rate=5e-2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    callback = LoR2CStructureCallback(max_fuses=1, max_injections=1, interval=2)
    trainer = trl.SFTTrainer(
        base_model("llama"),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoR2CConfig(r=4, task_type="CAUSAL_LM", injectable=True),
        callbacks=[callback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert [entry["action"] for entry in callback.history] == ["fuse", "inject"]
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base_model("llama"), tmp_path / "adapter").eval()
    ids = torch.randint(3, 53, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=0)
