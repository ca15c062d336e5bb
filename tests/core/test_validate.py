"""Every door turns pydantic's complaints into the same line."""

from __future__ import annotations

import pytest

from pipeline.config.schema import Train
from pipeline.core.errors import InputError, validate
from pipeline.measure import create_measure
from pipeline.methods import parse


@pytest.mark.parametrize(
    ("door", "line"),
    [
        (lambda: validate(Train, {"epoch": 2}, "f.yaml"), "f.yaml: unknown key 'epoch'. Did you mean 'epochs'? Known"),
        (lambda: validate(Train, {"epochs": "x"}, "f.yaml", way_out="Mend it"),
         "f.yaml: epochs: Input should be a valid integer, unable to parse string as an integer, got 'x'. Mend it"),
        (lambda: validate(Train, {"epochs": 0, "epochs_below_1000": 0}, "f.yaml"),
         "f.yaml: epochs: Input should be greater than or equal to 1, got 0 (and 1 more)"),
        (lambda: validate(Train, [], "f.yaml"), "f.yaml: Input should be a valid dictionary or instance of Train"),
        (lambda: create_measure("latent_distance", {"shots": 2}, "studies.s"),
         "studies.s: unknown setting 'shots'. Did you mean 'num_shots'?"),
        (lambda: parse("mimic+lora", {"lora": {"rnak": 2}}),
         "method 'mimic+lora': unknown option 'lora.rnak'. Did you mean 'rank'?"),
    ],
)  # fmt: skip
def test_the_line_names_place_field_value_and_way_out(door, line):
    with pytest.raises(InputError) as refused:
        door()
    assert str(refused.value).startswith(line)
