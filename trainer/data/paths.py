"""Where the image is that a caption file names.

Links are the owner's own and are followed, wherever they lead: hub caches, DVC, git-annex and `ln -s` keep data so.
The caption file comes from elsewhere, so its names may not climb out with `..` or begin at the root; what is found
must be a regular file (`images.content_of`).

A name in another Unicode form is the same name: macOS writes `é` as two code points into archives (NFD), caption files
have it as one (NFC). A name in another case is not: whoever reads the data elsewhere would have to guess too.
"""

from __future__ import annotations

import os
import threading
import unicodedata
from pathlib import Path, PurePosixPath

from trainer.common.errors import DataError, shown

OTHER_CASE = "its name is spelt with other upper and lower case letters on disk"
AMBIGUOUS = "its name is there in several Unicode forms on disk"
"""What the messages of `Names.on_disk` have in common, for counting them."""


def relative(name: str) -> PurePosixPath:
    """A caption file's name of an image, below the images folder.

    Raises:
        DataError: it names no file, or leads out of the folder; the message is to follow the place in the file.
    """
    pure = PurePosixPath(name.replace("\\", "/"))
    if not pure.name:
        raise DataError(f"it must name a file, but is {shown(name)}")
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"the file name {shown(name)} leads out of the images folder")
    return pure


class Names:
    """The files of an images folder, by the names that caption files give them. For several threads."""

    def __init__(self, images: Path) -> None:
        self.images = images
        self._lock = threading.Lock()
        self._listed: dict[Path, _Folder] = {}

    def on_disk(self, image: Path) -> Path:
        """The file that this name means, the name itself if there is none.

        Folders are listed only for names that do not exist, each once.

        Raises:
            DataError: the file is there under a name that differs in case, or under several that differ in their
                Unicode form alone, or it is a link to nothing.
            OSError: a folder may not be read, or a link leads in a circle.
        """
        try:
            image.stat()
            return image
        except FileNotFoundError:
            if image.is_symlink():
                raise DataError(
                    f"the image is a link to {shown(str(image.readlink()))}, which does not exist; if it was not "
                    "fetched yet: git annex get, dvc pull, or download it again"
                ) from None
        found, cases = self.images, 0
        for part in image.relative_to(self.images).parts:
            step = found / part
            if not os.path.lexists(step):
                folder = self._folder(found)
                same = folder.by_form.get(_form(part), [])
                if len(same) > 1:
                    raise DataError(f"the image is missing; {AMBIGUOUS}: {', '.join(map(ascii, same))}")
                if not same:
                    same = folder.by_letters.get(_form(part).casefold(), [])
                    cases += 1
                if not same:
                    return image
                step = found / same[0]
            found = step
        if cases:
            name = str(found.relative_to(self.images))
            raise DataError(f"the image is missing; {OTHER_CASE}: {shown(name)}")
        return self.on_disk(found) if found != image else image

    def _folder(self, path: Path) -> _Folder:
        with self._lock:
            if path not in self._listed:
                self._listed[path] = _Folder(path)
            return self._listed[path]


class _Folder:
    """The names in a folder, by what they have in common with others."""

    def __init__(self, path: Path) -> None:
        self.by_form: dict[str, list[str]] = {}
        self.by_letters: dict[str, list[str]] = {}
        try:
            names = sorted(entry.name for entry in path.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            names = []
        for name in names:
            self.by_form.setdefault(_form(name), []).append(name)
            self.by_letters.setdefault(_form(name).casefold(), []).append(name)


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)
