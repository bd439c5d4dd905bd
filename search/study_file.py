"""Study files: which there are, and loading one."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from search.errors import StudyError
from search.study import Study
from trainer.common.errors import nearest, shown

STUDIES = Path(__file__).resolve().parent.parent / "studies"

DATA_FILES = (".yaml", ".yml", ".json", ".toml")
"""What other programs describe a sweep in."""

MOST_SAID = 1000
"""Characters shown of the message of a study file's exception."""


def available() -> dict[str, Path]:
    """Study files of this project by name."""
    return {p.stem: p for p in sorted(STUDIES.glob("*.py")) if not p.stem.startswith("_")}


def load(name_or_path: str) -> Study:
    """The `STUDY` of a file in `studies/` (hyphen or underscore) or of a path to a study file.

    Raises:
        StudyError: no such study, a file that does not run, or one without a `STUDY`.
    """
    names = available()
    stem = name_or_path.replace("-", "_")
    path = names.get(stem)
    if path is None:
        path = Path(name_or_path)
        if path.suffix.lower() in DATA_FILES:
            raise StudyError(
                f"the study {shown(name_or_path)} is a {path.suffix} file, and a study is Python, so that an editor "
                "and a type checker know its fields and a space can be computed: write STUDY = Study(...) in a "
                f".py file, as {STUDIES / 'rsicap_mini.py'} does"
            )
        if path.suffix != ".py":
            raise StudyError(
                f"there is no study {shown(name_or_path)}{nearest(stem, names)}; "
                f"known studies: {', '.join(names)}; or give the path of a study file"
            )
        try:
            found = path.is_file()
        except OSError as error:  # a name too long
            raise StudyError(f"the study file {shown(name_or_path)} cannot be read: {error.strerror}") from None
        if not found:
            raise StudyError(f"there is no study file {shown(name_or_path)}; known studies: {', '.join(names)}")
    module = _execute(path)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise StudyError(f"{path}: a study file sets STUDY = Study(...), but STUDY is {shown(study)}")
    return study.located()


class _Source(SourceFileLoader):
    """Compiles a study file each time. Compiled code beside it would be a folder in the user's place, and stale for a
    file that was changed within the second to one of the same length."""

    def get_code(self, fullname: str) -> CodeType:
        """See `importlib.abc.InspectLoader`."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _execute(path: Path) -> ModuleType:
    """Run a study file as a module. A study file is Python, and trusted as such."""
    name = f"studies.{path.stem}" if path.parent == STUDIES else f"study_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a study file must not end the program
        line = getattr(error, "lineno", None)
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(path):
                line = trace.tb_lineno
            trace = trace.tb_next
        raise StudyError(f"{path}, line {line}: {type(error).__name__}: {_said(error)}") from error
    return module


def _said(error: BaseException) -> str:
    """The message of a study file's exception, shortened if long."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - whatever an exception's own __str__ raises
        return "(no message)"
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]}..."
