"""The model that `mlflow.pyfunc.load_model` gives: MLflow copies this file into every logged adapter and runs it.

It holds no pickle: the adapter's own files lie beside it, and the code that answers is that of `hificl predict`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class AdapterModel(PythonModel):
    """An adapter on its frozen backbone: images and questions in, answers out.

    The backbone's weights are those that the params.yaml of `model_config["project"]` names; without one, that of the
    project whose store the model lies in, or else that of the current folder.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read what the adapter is; weights are loaded at the first answer."""
        from pipeline.evaluate.answerer import Answerer

        adapter = Path(context.artifacts["adapter"])
        given = context.model_config.get("project")
        around = (folder for folder in adapter.resolve().parents if (folder / "params.yaml").is_file())
        project = Path(given) if given else next(around, Path())
        self._answerer = Answerer(adapter, project=project, reads_files=False)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return one answer a row.

        Args:
            context: what MLflow loaded the model from.
            model_input: `image`, its content in base64 (no path: a request must not have files read), and for tasks
                that ask one `question`.
            params: not used.
        """
        rows = model_input.astype(object).where(model_input.notna(), None).to_dict("records")
        return [str(self._answerer.answer(row["image"], row.get("question"))["answer"]) for row in rows]


set_model(AdapterModel())
