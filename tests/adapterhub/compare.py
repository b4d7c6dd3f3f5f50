"""What peftkit computes with the adapters that ``write.py`` left, against the outputs beside them.

python tests/adapterhub/compare.py FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import transformers as hf

from peftkit import import_adapter
from peftkit.compatibility.rounding import same_up_to_rounding


def main() -> None:
    """Compare all of them."""
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/*/outputs.pt"))
    if not folders:
        raise SystemExit(f"{sys.argv[1]} holds nothing that write.py wrote")
    different = [folder for folder in folders if not compare(folder)]
    print(f"{len(folders)} adapters, {len(different)} give another output")
    raise SystemExit(bool(different))


def compare(folder: Path) -> bool:
    """Whether one adapter gives its output here, and the model without it does not."""
    written = torch.load(folder / "outputs.pt")
    kind = json.loads((folder / "base" / "config.json").read_text())["architectures"][0]
    dtype = written["output"].dtype
    base = getattr(hf, kind).from_pretrained(folder / "base", dtype=dtype).eval()
    with torch.no_grad():
        plain = base(**written["inputs"])[0]
        found = import_adapter(base, folder / "adapter").eval()(**written["inputs"])[0]
    error = (found - written["output"]).abs().max() / written["output"].abs().max()
    right = same_up_to_rounding(found, written["output"])
    right = right and not same_up_to_rounding(plain, written["output"])
    print(f"{'same' if right else 'DIFFERENT':9} {error:.1e}  {folder.parent.name} {folder.name}")
    return right


if __name__ == "__main__":
    main()
