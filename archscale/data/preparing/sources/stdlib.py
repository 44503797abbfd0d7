"""The standard library of the running Python."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from archscale.data.preparing.sources.base import SourceBase
from archscale.data.preparing.sources.opening import reading
from archscale.data.preparing.sources.units import UNIT_BYTES, Part, Unit, group
from archscale.data.preparing.trouble import Trouble
from archscale.errors import DataError


class PythonStdlibSource(SourceBase):
    """The standard library of the running Python, each `.py` file one document: a corpus that is
    always there."""

    kind: Literal["python_stdlib"]
    include_tests: bool = False

    def files(self) -> list[tuple[str, Path]]:
        root = Path(sysconfig.get_path("stdlib"))
        skipped = {"site-packages", "dist-packages", "__pycache__"}
        if not self.include_tests:
            skipped |= {"test", "tests", "idle_test"}
        names = sorted(path.relative_to(root) for path in root.rglob("*.py"))
        # _sysconfigdata is generated when Python is built, and differs from machine to machine.
        names = [
            n
            for n in names
            if not skipped.intersection(n.parts) and not n.name.startswith("_sysconfigdata")
        ]
        if not names:
            raise DataError(
                "this Python has no source files", str(root), "use another kind of source"
            )
        return [(name.as_posix(), root / name) for name in names]

    def units(self, limit: int = UNIT_BYTES) -> list[Unit]:
        parts = [Part(str(path), size=path.stat().st_size) for _, path in self.files()]
        return group(parts, limit)

    def read_part(self, part: Part, trouble: Trouble) -> Iterator[str]:
        try:
            with reading(part.path):
                text = Path(part.path).read_bytes().decode()
        except UnicodeDecodeError:
            # A handful of its test files are wrong on purpose.
            return
        yield text
