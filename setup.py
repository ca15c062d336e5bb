"""What pyproject.toml cannot say: a wheel holds `pipeline` as `hificl` (docs/decisions/0012-packages.md)."""

import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from pipeline import CHECKOUT, LIBRARY, as_library  # builders do not look beside this file

DATA = [f"**/*.{ending}" for ending in ("yaml", "txt", "json", "html", "j2", "css", "js", "md")]


class BuildLibrary(build_py):
    """Copies modules as they stand in the library; an editable installation has none to copy."""

    def run(self) -> None:
        """Build from nothing: what an earlier build left would go into the wheel, under the names of then."""
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        """Write one module into the build folder."""
        out = self.get_module_outfile(self.build_lib, package.split("."), module)
        self.mkpath(str(Path(out).parent))
        Path(out).write_text(as_library(Path(module_file).read_text(encoding="utf-8")), encoding="utf-8")
        return out, True


here = find_packages(include=[CHECKOUT, f"{CHECKOUT}.*"])
packages = [name.replace(CHECKOUT, LIBRARY, 1) for name in here]
if "editable_wheel" in sys.argv:  # a checkout has its own names beside it
    packages += [*here, *find_packages(include=["stages*", "benchmarks*"])]
setup(
    packages=packages,
    package_dir={LIBRARY: CHECKOUT},
    package_data={LIBRARY: DATA},
    include_package_data=False,  # of what is named above alone
    cmdclass={"build_py": BuildLibrary},
)
