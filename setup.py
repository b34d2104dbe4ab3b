"""Everything declarative is in pyproject.toml. But the wheel carries two folders from outside the package.

The CUDA sources lie in rawkernels/ and the demo model in tutorials/, at the top level where people look for them. A
wheel needs both inside the package, as cupyinfer/rawkernels and cupyinfer/demo_model. (``package-dir`` could say this
too, but then every sub-package would have to be listed by hand, and an editable install would go through an import
hook.) An editable install copies nothing: cupyinfer looks beside the package as well.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FOLDERS = {"rawkernels": "cupyinfer/rawkernels", "tutorials/demo_model/model": "cupyinfer/demo_model"}


class BuildWithFolders(build_py):
    """Copies FOLDERS into the wheel's build folder."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in FOLDERS.items():
            if not (ROOT / source).is_dir():
                raise SystemExit(f"{source}/ is missing: a wheel without it would not work")
            place = Path(self.build_lib) / target
            shutil.rmtree(place, ignore_errors=True)  # a file that was renamed must not stay from the build before
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__", ".*"))


setup(cmdclass={"build_py": BuildWithFolders})
