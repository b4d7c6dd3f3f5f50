"""Importing this module makes ``tools/`` importable: benchmarks use the lab's case of each operation, and the task of the demo."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))
