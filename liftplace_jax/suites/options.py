"""What a suite is asked to do, and what it answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

Result = dict[str, Any]
"""{"title": heading, "columns": those of the table, "rows": dicts by column, "notes": lines}, and,
where a suite has them,

"formats": {column: format of its numbers, such as ".1f"} (default: as they are);
"name": stem of the files (default: the suite's name);
"tables": {name: {"title", "columns", "rows", "formats"}}, further tables;
"figures": {file name: matplotlib figure}; the name's suffix is the format.
"""


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `liftplace_jax.benchmark`; a suite reads those that concern it.

    Attributes:
      quick: a small part, to see that the suite works.
      repeats: timed calls of each case, at least 3.
      out: folder of the results, which `benchmark.py` writes.
      workdir: where a suite that trains keeps its runs.
      config: the experiment that is measured.
      ratios: shares of channels removed; empty: the suite's own.
      batch_size: in place of the config's.
      workdirs: finished work directories, for the quality of their students.
    """

    quick: bool = False
    repeats: int = 9
    out: Path = Path("benchmarks")
    workdir: Path | None = None
    config: ConfigDict | None = None
    ratios: tuple[float, ...] = ()
    batch_size: int | None = None
    workdirs: tuple[Path, ...] = ()

    def need(self, suite: str, *fields: str) -> ConfigDict:
        """The config, which has the fields that a suite varies.

        Raises:
          ValueError: it has not; names the first.
        """
        assert self.config is not None, f"suite {suite} takes --config"
        for field in fields:
            room, name = field.rsplit(".", 1)
            if name not in self.config[room]:
                raise ValueError(
                    f"suite {suite} varies config.{field}, and the config of a "
                    f"{self.config.model.model!r} has no such field: give one that has"
                )
        return self.config
