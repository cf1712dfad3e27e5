"""Write the audit log from an event loop: records that arrive while the disk is busy go into one write.

`record` returns once its record is on disk; only then may an answer leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.serve.audit_log import AuditLog, Unavailable

Record = Mapping[str, Any]


class Recorder:
    """Group commit on one `AuditLog`; must be used from one event loop."""

    def __init__(self, log: AuditLog) -> None:
        self.log = log
        self._waiting: list[tuple[Record, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="audit")

    async def record(self, record: Record) -> None:
        """Put one record on disk, even if the caller is cancelled meanwhile.

        Raises:
            Unavailable: the record is not on disk.
        """
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((record, done))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await asyncio.shield(done)

    async def ready(self) -> None:
        """After a failed write, test whether the disk takes a record again, before new work starts.

        Raises:
            Unavailable: the disk takes no record.
        """
        if self.log.failed:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._probe)

    def _probe(self) -> None:
        if self.log.failed:  # another request may have tested it first
            self.log.append([])

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            failure: Unavailable | None = None
            try:
                records = [record for record, _ in batch]
                await asyncio.get_running_loop().run_in_executor(self._thread, self.log.append, records)
            except Exception:
                failure = Unavailable("the audit log cannot be written")
            for _, done in batch:
                if failure and not done.cancelled():
                    done.set_exception(failure)
                    done.exception()  # reads it, so that asyncio does not warn about a caller that has gone
                elif not done.cancelled():
                    done.set_result(None)

    async def close(self) -> None:
        """Write the waiting records, then release the file."""
        if self._writer is not None:
            await asyncio.wait([self._writer])
        self._thread.shutdown()
        self.log.close()
