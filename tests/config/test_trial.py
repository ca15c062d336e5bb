import json
import subprocess
import sys

from pipeline.config.trial import TrialConfig, canonical

BASE = {"backbone": "b", "backbone_digest": "0", "task": "t", "manifest_digest": "1", "method": "hificl"}


def test_equal_configurations_have_equal_keys_whatever_the_order():
    one = TrialConfig(**BASE, options={"rank": 8, "num_virtual_tokens": 4})
    two = TrialConfig(**dict(reversed(BASE.items())), options={"num_virtual_tokens": 4, "rank": 8})
    assert one.key == two.key


def test_every_field_is_in_the_key():
    base = TrialConfig(**BASE)
    for name, value in base.model_dump().items():
        other = {bool: not value, int: 7, float: 0.5, str: "x", dict: {"rank": 1}}.get(type(value))
        changed = base.model_copy(update={name: other})
        assert changed.key != base.key, name


def test_the_key_is_the_same_for_every_hash_seed():
    code = (
        "from pipeline.config.trial import TrialConfig;"
        f"print(TrialConfig(**{BASE!r}, options={{'rank': 8, 'a': 1, 'b': [1, 2]}}).key)"
    )
    keys = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True,
                       check=True).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert len(keys) == 1


def test_canonical_json_is_json():
    assert json.loads(canonical({"b": [1, 2.5, None], "a": "ä"})) == {"a": "ä", "b": [1, 2.5, None]}
