"""What the scheduler is told from outside, beside the core settings."""

from __future__ import annotations

from typing import Literal

from alveary_core.settings import CoreSettings


class SchedulerSettings(CoreSettings):
    """ALVEARY_* variables; see each field."""

    # Kind of targets that name none. Where it is "nodes", this scheduler starts no trainers, and "local" is refused.
    default_kind: Literal["local", "nodes"] = "local"
    # A target of kind "nodes" that is made at the start, where it is missing; empty: none.
    default_target: str = ""
    default_workspace: str = "default"
