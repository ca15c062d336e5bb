"""The DVC stages: params in, one call into pipeline, outputs out.

`python3 -m stages.NAME` works under any Python that has the packages. Under another one, as where `.venv/bin/dvc` is
called and the environment is not activated, the project's own `.venv` takes over.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("deepspeed", "dvc", "mlflow", "pydantic", "ray", "torch", "transformers")


def _find_packages() -> None:
    """Go on under the project's environment where this one lacks packages; say so in one line where there is none."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return
    project = Path(os.environ.get("DVC_ROOT") or ".")  # DVC names it also where it works in a copy
    environment = project.absolute() / ".venv"
    python = environment / "bin" / "python"
    if python.is_file() and Path(sys.prefix).resolve() != environment.resolve() and hasattr(sys, "orig_argv"):
        os.execv(str(python), [str(python), *sys.orig_argv[1:]])  # noqa: S606 - the project's own Python
    print(
        f"error: {sys.executable}: has no {', '.join(missing)}. Activate the environment that has the project's "
        "packages and run dvc again, or make one with `make setup`",
        file=sys.stderr,
    )
    sys.exit(2)


_find_packages()
