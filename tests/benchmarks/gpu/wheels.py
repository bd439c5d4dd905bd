"""Wheels for a machine with a GPU that reaches no registry: `make gpu-wheels`.

Such a machine has Python 3.12, torch for CUDA, Transformers and PEFT, and what those need (`THERE`); what the check
needs besides is downloaded here, in the versions of constraints.txt, and travels in `FOLDER`, which git ignores.
`tests.benchmarks.gpu` installs it there into a temporary folder. MLflow is its `mlflow-skinny`: the client and the
stores, without the pages (a third of the size).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / ".gpu-wheels"
PYTHON = "3.12"
GLIBC = (39, 36, 35, 34, 31, 28, 27, 24, 17)
MOST = 64 * 2**20
"""Bytes of all of them."""

WANTED = (
    *("optuna", "alembic", "colorlog", "mako"),
    *("sqlalchemy", "greenlet"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection"),
    *("optuna-dashboard", "bottle"),
    *("mlflow-skinny", "mlflow-tracing", "sqlparse", "python-dotenv", "cachetools"),
    *("databricks-sdk", "google-auth", "pyasn1", "pyasn1-modules", "cryptography", "cffi", "pycparser"),
    *("fastapi", "starlette", "uvicorn", "gitpython", "gitdb", "smmap", "importlib-metadata"),
    *("opentelemetry-api", "opentelemetry-proto", "opentelemetry-sdk", "opentelemetry-semantic-conventions"),
)
THERE = frozenset(
    [
        "accelerate",
        "annotated-doc",
        "anyio",
        "certifi",
        "charset-normalizer",
        "click",
        "cloudpickle",
        "filelock",
        "fsspec",
        "h11",
        "huggingface-hub",
        "idna",
        "jinja2",
        "markdown-it-py",
        "markupsafe",
        "matplotlib",
        "mdurl",
        "numpy",
        "packaging",
        "pandas",
        "peft",
        "pillow",
        "protobuf",
        "psutil",
        "pyarrow",
        "pygments",
        "python-dateutil",
        "pyyaml",
        "regex",
        "requests",
        "rich",
        "safetensors",
        "scikit-learn",
        "scipy",
        "sentencepiece",
        "shellingham",
        "six",
        "sniffio",
        "tokenizers",
        "torch",
        "tqdm",
        "transformers",
        "typer",
        "typing-extensions",
        "urllib3",
        "werkzeug",
        "zipp",
    ]
)
"""What the machine has, as far as the wheels need it."""


def download(folder: Path = FOLDER) -> None:
    """Fill the folder anew.

    Raises:
        SystemExit: pip found no wheel, they are too large, or one needs what is neither here nor there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--constraint", str(ROOT / "constraints.txt")]
    for version in GLIBC:
        command += ["--platform", f"manylinux_2_{version}_x86_64"]
    done = subprocess.run(
        [*command, "--platform", "manylinux2014_x86_64", "--dest", str(folder), *WANTED], check=False
    )
    if done.returncode:
        raise SystemExit("pip did not find all wheels; see above")
    size = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    problems = list(missing(folder))
    if size > MOST:
        problems.append(f"the wheels take {size / 2**20:.1f} MiB, and {MOST >> 20} travel")
    if problems:
        raise SystemExit("\n".join(problems))
    print(f"{len(list(folder.glob('*.whl')))} wheels in {folder}: {size / 2**20:.1f} MiB")


def missing(folder: Path) -> Iterator[str]:
    """A line for each requirement of a wheel that is neither in the folder nor on the machine."""
    from packaging.requirements import Requirement

    needs = {plain(wheel.name.partition("-")[0]): list(requirements(wheel)) for wheel in folder.glob("*.whl")}
    environment = {"python_version": PYTHON, "extra": "", "platform_system": "Linux", "sys_platform": "linux"}
    environment |= {"platform_machine": "x86_64", "implementation_name": "cpython"}
    for name, lines in sorted(needs.items()):
        for line in lines:
            asked = Requirement(line)
            if asked.marker is not None and not asked.marker.evaluate(environment):
                continue
            if plain(asked.name) not in needs.keys() | THERE:
                yield f"{name} needs {asked}, which is neither in the folder nor on the machine"


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires, as its metadata have it."""
    with zipfile.ZipFile(wheel) as parts:
        name = next(part for part in parts.namelist() if part.endswith(".dist-info/METADATA"))
        return Parser().parsestr(parts.read(name).decode()).get_all("Requires-Dist") or []


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    download()
