"""Write kitchen questions without some names and dishes, so that those are new to what learns here.

python -m jobs.reproduce.seen_prompts FILE
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.reproduce.methods import UNSEEN_DISHES, UNSEEN_NAMES
from pilotfish import world

_NUM, _SEED = 4000, 21  # those of proxy.yaml, of which some are left out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module docstring."""
    [path] = sys.argv[1:] if argv is None else argv
    kept = [
        {"prompt": one.messages}
        for one in world.scenes(_NUM, _SEED)
        if one.dish not in UNSEEN_DISHES and one.name not in UNSEEN_NAMES
    ]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
