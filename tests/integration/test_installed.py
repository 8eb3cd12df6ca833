"""An installed user: the wheel in an environment of its own, an empty folder, and the examples of README and docs.

The environment takes its dependencies from the one that runs the tests, so that nothing is downloaded; crosslayer
itself comes from the wheel.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import tiny_finetune
from crosslayer import __version__
from crosslayer.recipes import FOLDER
from examples import ROOT, blocks, command_lines

SMALL = "--num_hidden_layers 2 --per_device_train_batch_size 2"

# Examples for a shell -> what is added so that they end in seconds. In this order: later ones need what earlier wrote.
RUN = {
    "crosslayer recipes": "",
    "crosslayer recipes --show crnet_5m_text > mine.yaml": "",
    "crosslayer pretrain --recipe crnet_5m_text --data ./my_texts --max_steps 3000": f"{SMALL} --max_steps 1 "
    "--save_steps 1 --logging_steps 1",
    "crosslayer pretrain --recipe crnet_5m_text --data ./my_texts --resume": f"{SMALL} --max_steps 2",
    "crosslayer prepare --recipe crnet_5m_text --data ./my_texts --output ready --workers 2": "",
    "crosslayer pretrain --recipe crnet_5m_text --data ready": f"{SMALL} --max_steps 1 --output_dir runs/ready",
    "crosslayer export runs/crnet_5m_text --output_dir model": "",
    "crosslayer evaluate runs/crnet_5m_text --data ./other_texts --part all": "",
    "crosslayer generate runs/crnet_5m_text --prompt 'Once upon a time'": "--max_new_tokens 8",
    "crosslayer analyze runs/crnet_5m_text": "--max_tokens 4096 --positions q",
    "crosslayer finetune --model FOLDER_OR_HUB_NAME --task sst2 --method lor2c": "--data sst2 --max_steps 2",
    "crosslayer plan --model llama_7b --gpu-memory 80GB --gpus 8 --sequence 4096": "",
    "crosslayer plan --gpu-memory 24GB --sequence 4096": "",
    "crosslayer compare --recipe crnet_1m_text --data texts.jsonl.gz": f"{SMALL} --max_steps 2 "
    "--tuning_runs 0 --seeds 1 --methods dense,crnet --validation_blocks 4",
    "crosslayer bench memory": "--hidden_size 32 --layers 1,2 --methods crnet",
    "crosslayer bench device --output device.json": "--dtypes float32",
    "crosslayer plan --model llama_1b --device device.json --sequence 4096": "--precision float32 --gpu-memory 80GB",
}
PLACEHOLDERS = {"FOLDER_OR_HUB_NAME": "encoder"}

CHECKOUT = "needs the checkout"
EXTRA = "needs an extra"
HUB = "needs the hub"
OTHERS = "as one that is run, with other options, which tests/unit/test_readme.py parses"
NOT_RUN = {
    "pip install 'crosslayer[quantize]'": EXTRA,
    "crosslayer generate runs/crnet_5m_text --quantize int8 --prompt 'Once upon a time'": EXTRA,
    "crosslayer evaluate runs/crnet_5m_text --quantize int8": EXTRA,
    "pip install 'transformers[serving]'": EXTRA,
    "crosslayer serve runs/crnet_5m_text --port 8000": "does not end",
    "pip install lm-eval": EXTRA,
    "make pretrain": CHECKOUT,
    "make test": CHECKOUT,
    "python benchmarks/memory.py": CHECKOUT,
    "python benchmarks/memory.py --sections speed kept_heap bf16 --redo --threads 1": CHECKOUT,
    "python benchmarks/kills.py --kills 50": CHECKOUT,
    "python benchmarks/resume_memory.py": CHECKOUT,
    "python benchmarks/plan_limits.py": CHECKOUT,
    "python benchmarks/soak.py --hours 1": CHECKOUT,
    "python benchmarks/lor2c_causal.py --texts FILE --gsm8k FILE --instructions FILE --png": CHECKOUT,
    "python benchmarks/lor2c_gradients.py --pretrain TEXTS --task sst2 --data DIR --rows 8000 --epochs 1 "
    "--learning_rate 0.002 --max_length 64 --out benchmarks/results/lor2c_gradients_24.json": CHECKOUT,
    "python benchmarks/lor2c_vision.py": CHECKOUT,
    "python benchmarks/metamathqa.py --peft CHECKOUT -v": CHECKOUT,
    "python benchmarks/gpu.py": CHECKOUT,
    "python benchmarks/gpu.py --expect": CHECKOUT,
    "python benchmarks/seven_billion.py": CHECKOUT,
    "python benchmarks/seven_billion.py --expect": CHECKOUT,
    "crosslayer pretrain --recipe crnet_1b_c4 --dry-run": HUB,
    "torchrun --nproc_per_node 8 -m crosslayer pretrain --recipe crnet_1b_c4": HUB,
    "accelerate launch -m crosslayer pretrain --recipe crnet_1b_c4": HUB,
    "torchrun --standalone --nproc_per_node 8 -m crosslayer pretrain --recipe crnet_1b_c4 --fsdp_size -1": HUB,
    "torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m crosslayer pretrain "
    "--recipe crnet_7b_c4 --fsdp_size 8 --tensor_parallel 2": HUB,
    "accelerate launch --num_processes 8 -m crosslayer pretrain --recipe crnet_1b_c4 --fsdp_size 8": HUB,
    "torchrun --standalone --nproc_per_node 8 -m crosslayer finetune --model meta-llama/Llama-3.1-8B "
    "--task instruction --data answers.jsonl --fsdp_size -1": HUB,
    "torchrun --nproc_per_node 4 -m crosslayer pretrain --recipe crnet_1b_c4 --fsdp_size 4 "
    "--per_device_train_batch_size 8": HUB,
    "torchrun --nproc_per_node 2 -m crosslayer pretrain --recipe crnet_1b_c4 --fsdp_size 2 "
    "--per_device_train_batch_size 16 --resume": HUB,
    "crosslayer pretrain --recipe crnet_5m_text --data ./my_texts --optim muon": OTHERS,
    "crosslayer pretrain --recipe crnet_5m_text --data ./my_texts --optim spectron "
    "--optim_args 'momentum=0.9, nesterov=false'": OTHERS,
    "crosslayer plan --model llama_7b --optimizer muon --gpu-memory 80GB --gpus 8 --sequence 4096": OTHERS,
    "crosslayer compare --recipe crnet_1m_text --data texts.jsonl.gz "
    "--methods dense,dense+muon,crnet,crnet+muon,crnet+spectron,cola,cola+muon,cola+spectron": OTHERS,
    "crosslayer pretrain --recipe crnet_7b_c4 --recompute invert --gradient_release true --max_grad_norm 0 "
    "--gradient_accumulation_steps 1 --optim adamw_bnb_8bit --dtype bfloat16": HUB,
    "crosslayer finetune --model FacebookAI/roberta-base --task sst2 --method lor2c --output_dir runs/sst2": HUB,
    "crosslayer analyze meta-llama/Meta-Llama-3-8B --dtype bfloat16 --device cuda --data hf:allenai/c4:en "
    "--split validation --max_tokens 65536 --block_size 512 --gram_memory 8G": HUB,
    "torchrun --nproc_per_node 2 -m crosslayer finetune --model FacebookAI/roberta-base --task sst2 --rank 8": HUB,
    "crosslayer finetune --recipe finetune/lor2c_crnet_instructions --data FILE": "needs the model of `make pretrain`",
    "crosslayer plan --model llama_7b --method crnet --gpu-memory 80GB --gpus 8 --sequence 4096 "
    "--tokens-per-step 1M": OTHERS,
    "crosslayer plan --gpu-memory 24GB --device rtx-4090 --sequence 4096": OTHERS,
    "crosslayer plan --model llama_7b --gpus 64 --sequence 4096 --tokens-per-step 4M": OTHERS,
    "crosslayer plan --model llama_7b --gpus 64 --tensor-parallel 2 --fsdp 32 --micro-batch 1": OTHERS,
    "crosslayer plan --model llama_13b --gpus 64 --device a100 --network 3GB --no-overlap --all": OTHERS,
    "crosslayer pretrain --recipe crnet_5m_text --data ./my_texts --resume_from 2000 --learning_rate 1e-3": OTHERS,
    "crosslayer export runs/crnet_5m_text --output_dir earlier --step 4000 --dtype bfloat16": OTHERS,
    "crosslayer compare --recipe crnet_1m_text --data texts.jsonl.gz --max_steps 500": OTHERS,
    "crosslayer compare --recipe crnet_1m_text --data texts.jsonl.gz --methods dense,crnet,cola "
    "--sizes 64x6,96x9,128x13 --tokens_per_parameter 20 --tuning_steps 0.2 --tuning_runs 14,9,7 --seeds 2,1,2": OTHERS,
    "crosslayer compare --recipe crnet_2m_text --data FILE --validation_data FILE --tuning_runs 16 --tuning_steps 250 "
    "--validation_blocks 148 --workers 2 --use_cpu": OTHERS,
    "crosslayer bench memory --hidden-size 512 --layers 4,16 --methods dense,crnet_invert": OTHERS,
    "crosslayer bench speed --hidden-size 512 --num-hidden-layers 8 --parts training,memory": OTHERS,
    "crosslayer bench speed --hidden-size 1024 --parts generation --methods dense,cola,crnet": OTHERS,
    "crosslayer analyze MODEL": OTHERS,
    "crosslayer analyze MODEL --data texts.jsonl.gz --max_tokens 100000 --ranks 64,256,1024": OTHERS,
    "crosslayer analyze MODEL --suggest-ranks --rank_budget 1.5M": OTHERS,
    "crosslayer analyze --before BASE --after FINE_TUNED": OTHERS,
    "crosslayer analyze runs/crnet_1m_text --health": OTHERS,
    "crosslayer analyze MODEL --untrained": OTHERS,
}

BERT = "from transformers import BertConfig, BertForSequenceClassification as Bert\n"
# Python -> what stands before it in the reader's own program.
PYTHON = {
    "README.md 1": "",
    "README.md 2": "",
    "README.md 3": "",
    "accounting.md 1": "",
    "crnet.md 1": "",
    "families.md 1": "",
    "finetuning.md 1": "",  # reads what the example of `finetune` on the same page wrote
    "inference.md 2": "",
    "inference.md 3": "",
    "lor2c.md 1": f"{BERT}model = Bert(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2))\n",
    "memory.md 1": "",
    "scale.md 1": "",  # as one process; torchrun is for several
}
PYTHON_NOT_RUN = {
    "inference.md 1": EXTRA,
    "lor2c.md 2": "a line with ... for what is the reader's",
    "lor2c.md 3": "a line with ... for what is the reader's",
    "new-family.md 1": "files of the checkout: tests/integration/test_new_family.py",
    "new-family.md 2": "files of the checkout: tests/integration/test_new_family.py",
    "new-family.md 3": "files of the checkout: tests/integration/test_new_family.py",
}


def test_every_example_is_here():
    """A new example is run, or has a reason not to be."""
    assert RUN.keys() | NOT_RUN.keys() == {*command_lines()}
    assert PYTHON.keys() | PYTHON_NOT_RUN.keys() == blocks("python").keys()
    assert not RUN.keys() & NOT_RUN.keys()
    assert not PYTHON.keys() & PYTHON_NOT_RUN.keys()


class Installed:
    """An environment with the wheel, and a folder to work in."""

    def __init__(self, root: Path) -> None:
        self.environment, self.wheels, self.folder = root / "environment", root / "wheels", root / "empty"
        self.folder.mkdir()
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "COVERAGE_PROCESS_START")
        self.variables = {name: value for name, value in os.environ.items() if name not in hidden}
        self.variables |= {
            "PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "CROSSLAYER_CACHE": str(root / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        source = root / "source"
        shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        self.call([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(self.wheels), str(source)])
        self.call([sys.executable, "-m", "venv", "--without-pip", str(self.environment)])
        (wheel,) = self.wheels.iterdir()
        python = str(self.environment / "bin" / "python")
        self.call([*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)])
        # A folder in a .pth file is searched last, and its own .pth files (an editable crosslayer) are not read.
        own = self.call([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        (Path(own) / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")

    def call(self, command: list[str] | str) -> str:
        """What a command prints, run in the empty folder; fails with its error."""
        done = subprocess.run(
            command, cwd=self.folder, env=self.variables, shell=isinstance(command, str), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_what_the_wheel_holds(installed):
    (wheel,) = installed.wheels.iterdir()
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"crosslayer/recipes/{path.relative_to(FOLDER)}" for path in FOLDER.rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert names >= {*recipes, *modules, "crosslayer/py.typed"}
    others = {name for name in names - recipes - modules if ".dist-info/" not in name}
    assert others == {"crosslayer/py.typed"}


@pytest.fixture(scope="module")
def after_commands(installed):
    """The environment, and the folder after the commands of the pages."""
    for folder, files in (("my_texts", ("argparse", "ast", "inspect", "typing")), ("other_texts", ("textwrap",))):
        (installed.folder / folder).mkdir()
        for name in files:
            shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", installed.folder / folder / f"{name}.py")
    rows = [{"text": path.read_text()} for path in sorted((installed.folder / "my_texts").iterdir())]
    with gzip.open(installed.folder / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    tiny_finetune.write_encoder(installed.folder / "encoder")
    tiny_finetune.write_task(installed.folder / "sst2")
    for example, more in RUN.items():
        command = example
        for name, value in PLACEHOLDERS.items():
            command = command.replace(name, value)
        output, arrow, file = command.partition(" > ")
        installed.call(f"{output} {more}{arrow}{file}")
    return installed


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_commands_of_the_pages(after_commands):
    installed = after_commands
    assert installed.call("crosslayer --version") == f"crosslayer {__version__}\n"
    assert (installed.folder / "mine.yaml").read_text() == (FOLDER / "crnet_5m_text.yaml").read_text()
    made = {path.name for path in (installed.folder / "runs").iterdir()}
    assert made == {"crnet_5m_text", "ready", "analysis", "sst2_lor2c", "compare_crnet_1m_text"}


EXAMPLE = """
import sys
import crosslayer
assert crosslayer.__file__.startswith(sys.prefix), crosslayer.__file__
assert not [path for path in sys.path if {checkout!r} in path], sys.path
for name, code in {examples!r}.items():
    print("#", name)
    exec(compile(code, name, "exec"), {{}})
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.long
def test_python_of_the_pages(after_commands):
    """In one process, which has loaded torch once; each example in a program of its own."""
    examples = {name: before + blocks("python")[name] for name, before in PYTHON.items()}
    program = after_commands.folder / "program.py"
    program.write_text(EXAMPLE.format(checkout=str(ROOT / "src"), examples=examples))
    assert after_commands.call(["python", str(program)]).count("# ") == len(PYTHON)
