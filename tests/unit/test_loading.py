"""Where the name of a model leads: its folder, the folder of a run, or the hub."""

import pytest

from crosslayer.errors import CheckpointError, first_line, nearest, nearest_hint
from crosslayer.loading import CONFIG, MODEL_FOLDER, find_model, has_model


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / MODEL_FOLDER).mkdir(parents=True)
    (folder / MODEL_FOLDER / CONFIG).write_text("{}")
    return folder


def test_a_run_leads_to_its_model(run):
    assert has_model(run)
    assert not has_model(run / MODEL_FOLDER)
    assert find_model(str(run)) == find_model(str(run / MODEL_FOLDER)) == str(run / MODEL_FOLDER)


def test_names_for_the_hub(run):
    assert find_model("some/model") == "some/model"
    with pytest.raises(CheckpointError, match="checkpoint 'model' does not exist; give the folder that a run wrote"):
        find_model("model", what="checkpoint", on_hub=False)


def test_paths_that_lead_nowhere(run, tmp_path):
    with pytest.raises(CheckpointError, match=rf"model '.*rum' does not exist; did you mean {run}\?"):
        find_model(str(tmp_path / "rum"))
    with pytest.raises(CheckpointError, match="does not exist; give a folder or a name on the hub"):
        find_model("./nowhere/at/all")


def test_folders_of_no_model(run, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert find_model(str(tmp_path)) == str(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a model: it has no config\.json"):
        find_model(str(tmp_path), holds=(CONFIG,))


def test_the_nearest():
    assert nearest("crnit", ["dense", "crnet"]) == "crnet"
    assert nearest("galore", ["dense", "crnet"]) is None
    assert nearest_hint("crnit", {"crnet": 1}) == "; the nearest is crnet"
    assert nearest_hint("galore", ()) == ""


def test_first_lines():
    assert first_line(ValueError("\n  what went wrong  \nand more")) == "what went wrong"
    assert first_line(ValueError()) == "ValueError"
