"""Requirements of distributions of this repository on others' packages: `python3 deploy/deps.py FOLDER[EXTRA] ...`.

So that the image layer of what others wrote is made, and cached, before what changes with every commit is copied.
"""

import re
import sys
import tomllib

found = set()
for argument in sys.argv[1:]:
    folder, _, extra = argument.partition("[")
    with open(f"{folder}/pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = project.get("optional-dependencies", {})
    found |= {*project.get("dependencies", []), *extras.get(extra.rstrip("]"), [])}
print("\n".join(sorted(r for r in found if not re.match(r"alveary\b", r))))
