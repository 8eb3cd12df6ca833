"""Folders made by `crosslayer prepare`: the blocks of `pretrain`, gone on with after a kill, refused where they do not
fit."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from crosslayer.cli import main
from crosslayer.data import DataConfig, load_evaluation_data, parts, prepare_data, prepare_folder
from crosslayer.errors import ConfigError, DataError
from crosslayer.train import build_recipe
from crosslayer.train.run import pretrain
from streams import write_shards
from tiny_run import tiny_content


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_shards(root / "texts", 3, 400)
    return root


@pytest.fixture
def make(root, tmp_path):
    defaults = {"block_size": 32, "tokenizer_vocab_size": 300, "validation_fraction": 0.1, "cache_dir": str(tmp_path)}
    return lambda **fields: DataConfig(**{"data": str(root / "texts"), **defaults, **fields})


@pytest.fixture(scope="module")
def folder(root):
    """A prepared folder, made of several parts by two workers."""
    config = DataConfig(data=str(root / "texts"), block_size=32, tokenizer_vocab_size=300, validation_fraction=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_CHARACTERS", 2000)
        patch.setenv("CROSSLAYER_CACHE", str(root / "cache"))
        prepare_folder(config, root / "ready", workers=2)
    return root / "ready"


def equal(one, other):
    assert one.train[:] == other.train[:]
    assert one.validation[:] == other.validation[:]
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert one.statistics.describe() == other.statistics.describe()


def test_the_blocks_are_those_of_the_text(folder, make, tmp_path):
    shutil.move(shutil.copytree(folder, tmp_path / "copied"), tmp_path / "elsewhere")  # it travels
    equal(prepare_data(make(data=str(tmp_path / "elsewhere"))), prepare_data(make()))
    assert not list(folder.parent.glob("*.partial")), "work left behind"
    assert str(folder.parent) not in (folder / "statistics.json").read_text()


def test_a_run_on_it_is_a_run_on_the_text(folder, root, tmp_path):
    content = tiny_content(tmp_path, max_steps=3, logging_steps=1, save_strategy="no")
    content["data"] |= {"validation_fraction": 0.1}
    losses = []
    for name in ("texts", "ready"):
        content["data"]["data"] = str(root / name)
        report = pretrain(build_recipe(content), tmp_path / f"run on {name}")
        losses.append([line["loss"] for line in report.history if "loss" in line] + [report.after["loss"]])
    assert losses[0] == losses[1]


def test_what_is_there_is_not_tokenised_again(make, tmp_path, monkeypatch, folder):
    monkeypatch.setattr(parts, "PART_CHARACTERS", 2000)
    written, write = [], parts.Parts.tokenize

    def stop_after_one(self, name, documents, tokenizer):
        rows = write(self, name, documents, tokenizer)
        if not written:
            for path in sorted((self.folder / name).glob("*"))[3:]:
                path.unlink()
            (self.folder / name / "00002.safetensors").write_bytes(b"cut off")
            written.append({path.name: path.stat().st_mtime_ns for path in (self.folder / name).glob("*")})
            raise KeyboardInterrupt
        if name == "train":
            written.append({path.name: path.stat().st_mtime_ns for path in (self.folder / name).glob("*")})
        return rows

    monkeypatch.setattr(parts.Parts, "tokenize", stop_after_one)
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare_folder(make(), output)
    assert not output.exists()
    with pytest.raises(DataError, match=r"out\.partial is half-finished: run the same"):
        prepare_data(make(data=str(tmp_path / "out.partial")))
    with pytest.raises(ConfigError, match=r"out\.partial holds the beginning of other data"):
        prepare_folder(make(block_size=16), output)
    prepare_folder(make(), output)
    before, after = written
    assert all(after[f"0000{i}.safetensors"] == before[f"0000{i}.safetensors"] for i in (0, 1))
    assert after["00002.safetensors"] != before["00002.safetensors"]
    assert len(after) > len(before)
    equal(prepare_data(make(data=str(output))), prepare_data(make(data=str(folder))))
    assert prepare_folder(make(), output).cache_hit  # nothing to do
    with pytest.raises(ConfigError, match="was prepared otherwise"):
        prepare_folder(make(block_size=16), output)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 16}, "block_size=16, prepared with 32; give the same"),
        ({"tokenizer_vocab_size": 310}, "tokenizer_vocab_size=310, prepared with 300"),
        ({"tokenizer": "{root}/other"}, "tokenizer='.*other', prepared with None"),
        ({"validation_fraction": 0.2}, "validation_fraction=0.2, prepared with 0.1"),
        ({"max_documents": 7}, "max_documents=7, prepared with None"),
        ({"streaming": True}, "is prepared, and not read as a stream; give streaming: false"),
    ],
)
def test_another_recipe_is_refused(folder, make, tmp_path, fields, message):
    if "tokenizer" in fields:
        from crosslayer.data import train_tokenizer

        train_tokenizer(["some other text"], 280, 32).save_pretrained(tmp_path / "other")
        fields = {"tokenizer": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=message) as caught:
        prepare_data(make(data=str(folder), **fields))
    assert "\n" not in str(caught.value)


def test_its_own_tokenizer_by_any_name(folder, make, tmp_path):
    shutil.copytree(folder / "tokenizer", tmp_path / "mine")
    equal(prepare_data(make(data=str(folder), tokenizer=str(tmp_path / "mine"))), prepare_data(make(data=str(folder))))
    prepare_folder(make(tokenizer=str(tmp_path / "mine")), tmp_path / "out")
    with pytest.raises(ConfigError, match="was prepared otherwise: tokenizer=None, prepared with"):
        prepare_data(make(data=str(tmp_path / "out")))


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def lose_shard(folder):
    next((folder / "train").glob("*.arrow")).unlink()


def flip_a_bit(folder):
    path = next((folder / "train").glob("*.arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lose_statistics(folder):
    (folder / "statistics.json").unlink()


@pytest.mark.parametrize("damage", [lose_manifest, lose_shard, flip_a_bit, lose_statistics])
def test_damage_is_said(folder, make, tmp_path, damage):
    copy = shutil.copytree(folder, tmp_path / "copy")
    prepare_data(make(data=str(copy)))
    damage(copy)
    with pytest.raises(DataError, match=f"{copy} is damaged: .*; copy it again, or prepare it anew"):
        prepare_data(make(data=str(copy)))
    assert copy.exists(), "a folder of the user's was removed"


def test_blocks_are_no_text(folder, make):
    with pytest.raises(DataError, match="holds prepared blocks, not text"):
        load_evaluation_data(make(data=str(folder)), prepare_data(make()).tokenizer)


def test_folders_that_are_not_touched(make, tmp_path):
    for name in ("mine", "late.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    with pytest.raises(ConfigError, match="mine holds other files; give a new folder as --output"):
        prepare_folder(make(), tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"late\.partial holds files that are not of this work"):
        prepare_folder(make(), tmp_path / "late")
    with pytest.raises(ConfigError, match="a stream is read while it trains"):
        prepare_folder(make(streaming=True), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("file")) == ["file", "file"]


def test_the_command(root, tmp_path, monkeypatch, capsys):
    content = tiny_content(tmp_path)
    content["data"] |= {"data": str(root / "texts"), "validation_fraction": 0.1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    arguments = ["prepare", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(sys, "argv", ["crosslayer", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = json.loads(capsys.readouterr().out)
    assert said["train"]["blocks"] == len(prepare_data(build_recipe(content).data).train)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
def test_killed_while_it_tokenises(folder, make, tmp_path, monkeypatch):
    """At moments that differ; in the end the same folder."""
    script = (
        "import sys, time; from pathlib import Path; from crosslayer.data import *; from crosslayer.data import parts\n"
        "parts.PART_CHARACTERS, write = 2000, parts.write_part\n"
        "parts.write_part = lambda *given: (time.sleep(0.05), write(*given))\n"
        "prepare_folder(DataConfig(**eval(sys.argv[1])), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", script, repr(vars(make())), str(tmp_path / "out")]
    monkeypatch.setattr(parts, "PART_CHARACTERS", 2000)
    for kill in range(2):
        before = len(list(tmp_path.glob("out.partial/train/*.safetensors")))
        process = subprocess.Popen(command)
        ended = time.monotonic() + 100
        while len(list(tmp_path.glob("out.partial/train/*.safetensors"))) < before + 3 + kill:
            assert time.monotonic() < ended
            assert process.poll() is None, "it was too fast to be killed"
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not (tmp_path / "out").exists()
    prepare_folder(make(), tmp_path / "out")
    equal(prepare_data(make(data=str(tmp_path / "out"))), prepare_data(make(data=str(folder))))
