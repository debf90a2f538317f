"""Removes what a retention policy does not keep.

Invariants:
    The rules see the repository as it is now: catalog and leases are read again right before the first one is removed.
    A base backup's sentinel goes before its data, a delta's before its parent's: killed anywhere, an expiry leaves no
    backup that is listed and cannot be restored. What it leaves has no sentinel, and the next one removes it.
    WAL goes last, by what the backups that are then in the repository need, those included whose sentinel could not be
    removed.
    What cannot be removed (an object lock) is told, and does not keep the rest from being removed.
    History files, and objects of names that nobody knows, are never removed.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from agent.domain.catalog import Backup
from agent.domain.retention import (
    LEFTOVER_AGE,
    NeededWal,
    RetentionPolicy,
    Verdict,
    decide,
    needed_wal,
)
from agent.domain.wal import WalFileKind, segment_position
from agent.domain.window import window_begin
from agent.errors import RepositoryUnavailable
from agent.expire.removal import KEYS_AT_ONCE, Amount, Removal, Remover
from agent.ports import Clock, ObjectInfo, ObjectStore
from agent.repository.backups import read_catalog
from agent.repository.keys import WAL_FOLDER
from agent.repository.restore_lease import leased
from agent.repository.survey import Survey, survey_repository
from agent.repository.verification_record import read_records
from agent.repository.wal_archive import WalArchive, parse_wal_object
from agent.telemetry.metrics import Metrics

_TRIES = 3

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ExpiryPlan:
    """What an expiry would do.

    verdicts: of every base backup, oldest first. backups, leftovers, wal: how much goes of each. window_before,
    window_after: from when on everything can be restored; None if nothing can.
    """

    policy: RetentionPolicy
    survey: Survey
    verdicts: Sequence[Verdict]
    backups: Amount
    leftovers: Amount
    wal: Amount
    window_before: datetime | None
    window_after: datetime | None

    @property
    def going(self) -> list[Backup]:
        """The base backups that go."""
        return [verdict.backup for verdict in self.verdicts if not verdict.stays]

    @property
    def total(self) -> Amount:
        """All that goes."""
        parts = (self.backups, self.leftovers, self.wal)
        return Amount(sum(part.objects for part in parts), sum(part.stored_bytes for part in parts))


class Expiry:
    """Expires base backups and WAL of one repository."""

    def __init__(self, store: ObjectStore, archive: WalArchive, clock: Clock, metrics: Metrics) -> None:
        self._store = store
        self._archive = archive
        self._clock = clock
        self._metrics = metrics
        self._remover = Remover(store)

    async def plan(self, policy: RetentionPolicy) -> ExpiryPlan:
        """Return what `expire` would do now; nothing is changed.

        Raises:
            ConfigError: This machine's clock and the store's differ.
            RepositoryCorrupt: A base backup cannot be understood; then nothing may go.
            RepositoryError: The repository could not be read.
        """
        survey = await self._survey()
        inventory = survey.inventory
        verdicts = decide(inventory, policy)
        kept = [verdict for verdict in verdicts if verdict.stays]
        backups, leftovers, wal = Amount(), Amount(), Amount()
        for verdict in verdicts:
            if not verdict.stays and (folder := survey.folders.get(verdict.backup.name)):
                backups.add(folder.objects, folder.stored_bytes)
        for name in survey.leftovers:
            leftovers.add(survey.folders[name].objects, survey.folders[name].stored_bytes)
        needed = needed_wal(inventory, kept)
        async for info in self._unneeded_wal(needed, inventory.segment_bytes):
            wal.add(1, info.size)
        before = inventory.holdings(inventory.backups)
        after = replace(
            before,
            backups=[verdict.backup for verdict in kept],
            wal={timeline: needed.left_of(timeline, held) for timeline, held in before.wal.items()},
        )
        return ExpiryPlan(policy, survey, verdicts, backups, leftovers, wal, window_begin(before), window_begin(after))

    async def expire(self, policy: RetentionPolicy) -> tuple[ExpiryPlan, Removal]:
        """Remove what `policy` does not keep; return what was planned, and what was removed.

        Killed or failed, it can be called again.

        Raises:
            ConfigError, RepositoryError: As `plan`; also when the store failed half-way.
        """
        try:
            plan, removal = await self._settled_plan(policy), Removal()
            removal.backups.add(*await self._remove_backups(plan, removal))
            await self._remove_wal(policy, removal)
        except Exception:  # being cancelled, as at the agent's end, is no failure
            self._metrics.expire_failures.inc()
            raise
        self._observe(plan, removal)
        return plan, removal

    async def _survey(self) -> Survey:
        """Look at the repository, and at what is known of damage: tars that are gone, and what reading back found."""
        survey = await survey_repository(self._store, self._archive, self._clock)
        backups = survey.inventory.backups
        records = await read_records(self._store, [backup.name for backup in backups])
        damaged = [
            backup.name
            for backup in backups
            if records[backup.name].known_problems
            or ((folder := survey.folders.get(backup.name)) and folder.tar_bytes < backup.stored_bytes)
        ]
        return replace(survey, inventory=replace(survey.inventory, damaged=damaged))

    async def _settled_plan(self, policy: RetentionPolicy) -> ExpiryPlan:
        """Return a plan that was made of a catalog which has not changed since, and removes nothing that is restored.

        To make it took as long as listing all WAL does.
        """
        for _ in range(_TRIES):
            plan = await self.plan(policy)
            inventory = plan.survey.inventory
            restoring = await leased(self._store, inventory.now)
            is_settled = await read_catalog(self._store, strict=True) == inventory.backups
            if is_settled and not restoring.intersection(backup.name for backup in plan.going):
                return plan
        raise RepositoryUnavailable(
            "base backups come or go while it is decided which to remove", hint="Try again when that has ended."
        )

    async def _remove_backups(self, plan: ExpiryPlan, removal: Removal) -> tuple[int, int]:
        gone = await self._remover.sentinels(plan.going, removal)
        removed = Amount(len(gone), sum(plan.survey.folders[name].sentinel_bytes for name in gone))
        for name in [*gone, *plan.survey.leftovers]:
            limit = plan.survey.inventory.now - LEFTOVER_AGE if name in plan.survey.leftovers else None
            amount = await self._remover.folder(name, removal, older_than=limit)
            removed.add(amount.objects, amount.stored_bytes)
        return removed.objects, removed.stored_bytes

    async def _remove_wal(self, policy: RetentionPolicy, removal: Removal) -> None:
        inventory = (await self._survey()).inventory
        there = [
            replace(verdict, stays=True, wal_after=verdict.wal_after or not verdict.backup.permanent)
            for verdict in decide(inventory, policy)
        ]
        batch: list[ObjectInfo] = []
        async for info in self._unneeded_wal(needed_wal(inventory, there), inventory.segment_bytes):
            batch.append(info)
            if len(batch) == KEYS_AT_ONCE:
                await self._remove_wal_batch(batch, removal)
                batch = []
        await self._remove_wal_batch(batch, removal)

    async def _remove_wal_batch(self, batch: Sequence[ObjectInfo], removal: Removal) -> None:
        amount = await self._remover.objects(batch, removal)
        removal.wal.add(amount.objects, amount.stored_bytes)

    async def _unneeded_wal(self, needed: NeededWal, segment_bytes: int) -> AsyncIterator[ObjectInfo]:
        """Yield what is archived of WAL and not needed, and what follows a segment that is not: partial, backup."""
        async for info in self._store.list(WAL_FOLDER):
            item = parse_wal_object(info)
            if item is None or item.kind is WalFileKind.HISTORY:
                continue
            position = segment_position(item.name[:24], segment_bytes)
            if position is not None and not needed.keeps(*position, info.modified_at):
                yield info

    def _observe(self, plan: ExpiryPlan, removal: Removal) -> None:
        metrics = self._metrics
        for kind, amount in (("backup", removal.backups), ("wal", removal.wal)):
            metrics.expire_objects.labels(kind).inc(amount.objects)
            metrics.expire_bytes.labels(kind).inc(amount.stored_bytes)
        for key, error in removal.failed.items():
            log.error("object could not be removed", key=key, reason=error.one_line())
        if removal.failed:
            metrics.expire_failures.inc()
        else:
            metrics.expire_last_success.set(self._clock.now().timestamp())
        if plan.window_after is not None:
            metrics.expire_window_begin.set(plan.window_after.timestamp())
        log.info(
            "expired", retention=str(plan.policy), backups=len(plan.going), backup_bytes=removal.backups.stored_bytes,
            wal_files=removal.wal.objects, wal_bytes=removal.wal.stored_bytes, failed=len(removal.failed),
            window_begins=plan.window_after, bucket_keeps_versions=removal.keeps_versions,
        )  # fmt: skip
