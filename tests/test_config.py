from pathlib import Path

import pytest
import yaml

from pipeline.config import load
from pipeline.errors import InputError
from tests.conftest import ROOT


def test_the_shipped_params_are_valid_for_every_profile(tmp_path):
    text = (ROOT / "params.yaml").read_text()
    for profile in yaml.safe_load(text)["profiles"]:
        path = tmp_path / f"{profile}.yaml"
        path.write_text(text.replace("run: *mini", f"run: *{profile}"))
        assert load(path).profile == profile


def test_the_profile_lies_over_the_sections():
    params = load(ROOT / "params.yaml")
    assert params.run.train["micro_batch_size"] == params.train.micro_batch_size == 8
    assert params.train.weight_decay == 0.05  # untouched by the profile


def test_a_value_set_on_the_command_line_wins_over_the_profile():
    assert load(ROOT / "params.yaml", overrides=["train.micro_batch_size=3"]).train.micro_batch_size == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("train", {"learning_rat": 0.1}), ["unknown key 'train.learning_rat'", "learning_rate"]),
        (("sweep", {"scheduler": "ahsa"}), ["sweep.scheduler", "'asha'", "ahsa"]),
        (("train", {"epochs": 0}), ["train.epochs", "greater than or equal to 1", "0"]),
        (("studdies", {}), ["unknown key 'studdies'", "studies"]),
        (("evaluate", {"generation": {"num_beam": 3}}), ["num_beam", "num_beams"]),
    ],
)
def test_a_mistake_is_named_with_the_way_out(tmp_path, change, words):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    key, value = change
    raw[key] = {**raw.get(key, {}), **value}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_in_the_profile_is_found(tmp_path):
    path = tmp_path / "params.yaml"
    text = (
        (ROOT / "params.yaml").read_text().replace("micro_batch_size: 8, accumulation", "micro_batch: 8, accumulation")
    )
    path.write_text(text)
    with pytest.raises(InputError, match=r"unknown key 'micro_batch'.*micro_batch_size"):
        load(path)


@pytest.mark.parametrize("text", ["run: [", "- a", "\x00"])
def test_no_yaml_is_said_so(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="params.yaml"):
        load(path)


def test_a_missing_file_is_said_so():
    with pytest.raises(InputError, match="no such file"):
        load(Path("nowhere/params.yaml"))
