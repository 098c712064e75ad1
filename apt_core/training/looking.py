"""Looks how much of the data is there, in a run that begins before all of it is built."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pydantic import ValidationError

from apt_core.data.early import Found, GrowingData
from apt_core.data.growing import GrowingOrder
from apt_core.data.loading import early_source
from apt_core.data.looks import Look
from apt_core.data.store.format import StoreError
from apt_core.errors import CheckpointError
from apt_core.log import get_logger
from apt_core.runs.events import Event
from apt_core.training.context import RunContext

log = get_logger("apt.training")

WAIT_SECONDS = 0.5


class _Waiting:
    """Waits a little at a time for ``what``, which the log says once."""

    def __init__(self, what: str) -> None:
        self._what, self._said = what, False

    def wait(self) -> None:
        """Wait a little."""
        if not self._said:
            log.info("waiting for %s", self._what)
            self._said = True
        time.sleep(WAIT_SECONDS)


class Looking:
    """Looks whenever the windows that the run knows are used up. ``recorded`` are the events of
    the run's folder: what a run has looked up that was killed later is not looked up again, so that
    its steps are taken again as they were."""

    def __init__(self, context: RunContext, recorded: Sequence[Event]) -> None:
        self._run, self._recorded = context, recorded

    @property
    def _order(self) -> GrowingOrder:
        order = self._run.parts.plan.order
        assert isinstance(order, GrowingOrder)
        return order

    @property
    def _growing(self) -> GrowingData:
        growing = self._run.parts.data.growing
        assert growing is not None
        return growing

    def restore(self) -> None:
        """Know what the run knew at its checkpoint. Raises CheckpointError where the store is
        another, StoreError where it is not built that far, nor being built."""
        looks, self._run.progress.looks = self._run.progress.looks, []
        for look in looks:
            self._add(look)
        if looks:
            self._find(looks[-1])

    def look(self, step: int) -> bool:
        """Find windows for ``step``; whether there are any: not where the run is to stop meanwhile.
        Raises StoreError where no more come."""
        while step > self._order.known_steps:
            look = self._from_record(step)
            if look is not None:
                self._find(look)
            else:
                look = self._next(step)
            if look is None:
                return False
            number = len(self._run.progress.looks)
            self._add(look)
            known = "all the data is" if look.whole else f"{look.shards} shards of the data are"
            self._run.events.record(
                "looked",
                f"step {step}: {known} known; windows {look.start:,} to {look.stop - 1:,} follow",
                step=step - 1,
                log=log,
                number=number,
                look=look.model_dump(),
            )
        return True

    def _add(self, look: Look) -> None:
        self._order.add(look)
        self._run.progress.looks.append(look)

    def _from_record(self, step: int) -> Look | None:
        number = len(self._run.progress.looks)
        for event in reversed(self._recorded):
            if event.kind == "looked" and event.data.get("number") == number:
                try:
                    look = Look.model_validate(event.data.get("look"))
                except ValidationError:
                    continue
                if look.step == step:
                    return look
        return None

    def _next(self, step: int) -> Look | None:
        order, tell = self._order, _Waiting("more of the token store")
        while True:
            self._run.stopping.check_limits(step - 1)
            found, more, stops = self._everywhere()
            if stops:
                self._run.stopping.agreed = True
                return None
            if found is not None and found[0]:
                windows, shards, whole, sha256 = found
                look = order.next_look(step, windows, shards, whole=whole, sha256=sha256)
                is_new = whole or look.start > 0 or not order.looks
                # Windows are seen again only where a step is full of others.
                if is_new or (more and look.stop >= order.steps.windows_per_step):
                    return look
            if not more:
                said = self._growing.failure()
                raise StoreError(
                    "the rest of the token store is not being built any more, and the run has "
                    f"trained on all that is there before step {step}"
                    + (f"; the build failed: {said}" if said else "")
                    + "\n--resume begins to build it again, and goes on"
                )
            tell.wait()

    def _everywhere(self) -> tuple[tuple[int, int, bool, str] | None, bool, bool]:
        """What all processes have found, whether more comes, and whether the run is to stop."""
        # In this order: a builder that ends between the two has left the whole store.
        more = self._growing.more_comes()
        found = self._growing.newest()
        facts = None if found is None else (found.windows, found.whole, list(found.hashes))
        everyone = self._run.world.gather((facts, more, self._run.stopping.wanted))
        stops = any(row[2] for row in everyone)
        comes = all(row[1] or (row[0] is not None and row[0][1]) for row in everyone)
        known = [row[0] for row in everyone if row[0] is not None]
        if len(known) < len(everyone):
            return None, comes, stops
        windows, _, hashes = min(known, key=lambda row: len(row[2]))
        if any(row[2][: len(hashes)] != hashes for row in known):
            raise StoreError("the processes of the run have token stores that differ")
        if found is not None:
            self._use(found)
        return (windows, len(hashes), all(row[1] for row in known), hashes[-1]), comes, stops

    def _find(self, look: Look) -> None:
        """Wait until what a look has found is there. Raises CheckpointError for another store."""
        what = "the whole token store" if look.whole else f"{look.shards} shards of the token store"
        tell = _Waiting(f"{what}, which the run has trained on before")
        while True:
            more = self._growing.more_comes()
            found = self._growing.newest()
            if found is not None and (
                found.whole or (found.shards >= look.shards and not look.whole)
            ):
                break
            if not more:
                raise StoreError(
                    f"the run has trained on {look.shards} shards of its token store; fewer are "
                    "there now, and no process builds it"
                )
            self._run.stopping.interrupts.require_none()
            tell.wait()
        same = found.shards >= look.shards and found.hashes[look.shards - 1] == look.sha256
        if not same or (look.whole and found.windows != look.stop):
            raise CheckpointError(
                f"the token store is another than the one that the run has trained on: its first "
                f"{look.shards} shards differ; start a new run"
            )
        self._use(found)

    def _use(self, found: Found) -> None:
        sources = self._run.parts.data.sources
        source = early_source(sources[0].described, found, self._run.config)
        sources[0] = source
        self._run.parts.plan.grow(source.train)
