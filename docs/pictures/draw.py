"""Draw the committed pictures anew: ``python docs/pictures/draw.py``. tests/test_front_page.py holds the files against what this makes."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from chart import chart
from strip import strip

__all__ = ["PICTURES"]

HERE = Path(__file__).parent

#: File name -> what draws it.
PICTURES = {"speed-and-memory.svg": chart, "trips-through-memory.svg": strip}


def main() -> int:
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8")
        print(f"wrote {HERE / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
