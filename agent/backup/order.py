"""What kind of base backup is asked for."""

from dataclasses import dataclass

from agent.domain.backup_schedule import Why
from agent.domain.delta_parent import BackupKind


@dataclass(frozen=True, slots=True)
class BackupOrder:
    """Why a base backup is wanted, and of what kind. permanent: expiry never removes it."""

    why: Why = Why.REQUEST
    kind: BackupKind = BackupKind.AUTO
    permanent: bool = False
