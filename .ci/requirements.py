"""Prints what mnet_kernels and the named extras of it need, to be installed before the build.

--only: what the extras need, without mnet_kernels' own needs.
"""

import re
import sys
from pathlib import Path

text = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
wanted = re.search(r"^dependencies = \[(.*?)\]$", text, re.S | re.M)
extras = sys.argv[1:]
lists = [wanted.group(1)] if wanted and "--only" not in extras else []
for extra in extras:
    if extra == "--only":
        continue
    found = re.search(rf"^{extra} = \[(.*?)\]$", text, re.S | re.M)
    if found is None:
        sys.exit(f"requirements.py: pyproject.toml has no extra {extra}")
    lists.append(found.group(1))
for requirement in re.findall(r'"([^"]+)"', "\n".join(lists)):
    if not requirement.startswith("mnet_kernels["):
        print(requirement)
