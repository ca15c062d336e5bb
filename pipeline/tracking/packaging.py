"""What makes an adapter's files a model that MLflow loads, serves and registers: signature, example, code."""

from __future__ import annotations

import base64
import functools
import io
import logging
from pathlib import Path

import mlflow.pyfunc
import pandas as pd
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from PIL import Image

from pipeline.tasks import tasks
from pipeline.tracking.provenance import versions

CODE = Path(__file__).with_name("served.py")
_NEEDED = ("torch", "transformers", "mlflow")
_EXAMPLE_SIDE = 32  # pixels

for _name in ("mlflow.pyfunc", "mlflow.models.model"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def write_flavor(out: Path, *, model_id: str, task: str, about: dict[str, str]) -> None:
    """Write what has to lie beside an adapter's own files for `mlflow.pyfunc.load_model`.

    Args:
        out: a folder that does not exist yet.
        model_id: of the logged model that holds the adapter's files at its top.
        task: whose prompt is used; it decides whether there is a question.
        about: kept as the model's metadata.
    """
    asks = tasks.get(task).template.asks
    columns: list[ColSpec | TensorSpec] = [ColSpec(DataType.string, "image")]
    if asks:
        columns.append(ColSpec(DataType.string, "question"))
    known = versions()
    model = Model(model_id=model_id)
    mlflow.pyfunc.save_model(
        out, python_model=str(CODE), input_example=_example(asks), model_config={"project": ""},
        signature=ModelSignature(inputs=Schema(columns), outputs=Schema([ColSpec(DataType.string)])),
        # given, so that MLflow does not load the model to find out; the project itself comes from its checkout
        pip_requirements=[f"{name}=={known[name]}" for name in _NEEDED if known[name]],
        metadata=about, mlflow_model=model,
    )  # fmt: skip
    # the adapter's files are in the logged model since its trial ended: named here, not kept twice
    model.flavors["python_function"]["artifacts"] = {"adapter": {"path": ".", "uri": "."}}
    model.flavors["python_function"]["model_code_path"] = CODE.name  # where it lay on this machine is nobody's business
    model.save(out / "MLmodel")


@functools.cache
def _example(asks: bool) -> pd.DataFrame:
    buffer = io.BytesIO()
    Image.new("RGB", (_EXAMPLE_SIDE, _EXAMPLE_SIDE), (200, 40, 40)).save(buffer, format="PNG")
    row = {"image": base64.b64encode(buffer.getvalue()).decode()}
    return pd.DataFrame([{**row, **({"question": "What color is this?"} if asks else {})}])
