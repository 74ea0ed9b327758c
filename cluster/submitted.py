"""A submitted run on the cluster: ``cluster.sent`` sends this file, the recipe and variables.

They are a package, ``rectify_submitted``, that Ray puts on the path of the driver and of every worker
of the job, and of nobody else. Workers may lack the platform (rewards have environments of their own):
what they call needs Python alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

PACKAGE = "rectify_submitted"
RECIPE = "recipe.yaml"
VARIABLES = "variables.json"


def take_variables() -> None:
    """Set the forwarded variables in this process. Ray calls it first in every worker of the job."""
    file = Path(__file__).with_name(VARIABLES)
    if file.is_file():
        os.environ.update(json.loads(file.read_text(encoding="utf-8")))


def main() -> None:
    """The entry point of the job; arguments are those of ``rectify run``."""
    take_variables()
    from cluster.cli import app

    app(["run", str(Path(__file__).with_name(RECIPE)), *sys.argv[1:]])


if __name__ == "__main__":
    main()
