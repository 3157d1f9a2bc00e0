"""Ids as people type them: whole, or their first characters, in either case."""

from __future__ import annotations

import re

from alveary_contracts.ids import is_id
from alveary_core.errors import InvalidArgument
from alveary_runs.projection import RunsProjection

# Fewer characters are more likely a slip than an id.
_BEGINNING = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{3,24}")
# So many candidates are named where there are several.
_NAMED = 5


async def full_id(view: RunsProjection, workspace: str, text: str) -> str:
    """The id of the run whose id is `text` or begins with it; `text` itself where there is none.

    Raises:
        InvalidArgument: several begin with it; names the newest of them.
    """
    beginning = text.strip().upper()
    if is_id(beginning) or not _BEGINNING.fullmatch(beginning):
        return beginning if is_id(beginning) else text
    # "~" comes behind every character of an id.
    sql = "SELECT id, experiment, name FROM runs WHERE workspace=? AND id BETWEEN ? AND ? ORDER BY id DESC LIMIT ?"
    rows = await view.rows(sql, (workspace, beginning, beginning + "~", _NAMED + 1))
    if len(rows) > 1:
        known = ", ".join(f"{r['id']} ({r['experiment']}{', ' + r['name'] if r['name'] else ''})" for r in rows[:_NAMED])
        more = " and others" if len(rows) > _NAMED else ""
        raise InvalidArgument(("run_id", f"{text!r} begins the ids of several runs, {known}{more}: give more characters"))
    return str(rows[0]["id"]) if rows else text
