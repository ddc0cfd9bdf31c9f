"""What a request is answered with: objects and lists as they are found, on the daemon's own loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from weightd.daemon.s3 import answers
from weightd.daemon.s3.asked import Asked, list_query
from weightd.daemon.s3.bodies import Bodies, Body
from weightd.daemon.s3.listing import page
from weightd.daemon.s3.objects import Objects
from weightd.daemon.s3.origins import Origins


@dataclass(frozen=True)
class Answer:
    """Status and headers, and what follows them: ``text``, or the body that was asked with, ``nbytes`` long."""

    status: int
    headers: Mapping[str, str]
    text: bytes = b""
    nbytes: int = 0


class Answering:
    """Finds what is asked for. On the daemon's own loop."""

    def __init__(self, objects: Objects, bodies: Bodies, origins: Origins) -> None:
        self._objects = objects
        self._origins = origins
        self.bodies = bodies
        self._started_at = time.time()

    async def answer(self, asked: Asked, body: Body, client: str) -> Answer:
        """Answer ``client`` (its address); an object's bytes are found for ``body``, which is to be ended in any case.

        Raises S3Error, DaemonError.
        """
        if asked.operation in ("GetObject", "HeadObject"):
            return await self._object(asked, body, client)
        text = await self._text(asked)
        headers = {"content-type": "application/xml", "content-length": str(len(text))}
        return Answer(200, headers, text, len(text))

    async def _text(self, asked: Asked) -> bytes:
        if asked.operation == "ListBuckets":
            return answers.buckets_xml(self._objects.buckets(), self._started_at)
        if asked.operation in ("HeadBucket", "GetBucketLocation"):
            await self._objects.check_bucket(asked.bucket)
            return b"" if asked.operation == "HeadBucket" else answers.location_xml()
        query = list_query(asked.parameters)
        found = page([], query) if query.most == 0 else await self._objects.list_page(asked.bucket, query)
        return await asyncio.to_thread(answers.list_xml, asked.bucket, asked.parameters, query, found)

    async def _object(self, asked: Asked, body: Body, client: str) -> Answer:
        found = await self._objects.find(asked.bucket, asked.key)
        stored = found.object
        if not answers.check_conditions(stored, asked.headers):
            return Answer(304, {"etag": answers.etag(stored), "last-modified": answers.http_date(stored.modified)})
        part = answers.range_of(asked.headers.get("range", ""), stored.size)
        wanted = part.nbytes if asked.operation == "GetObject" else 0
        if wanted:
            await self.bodies.open(found, part, body, client)
        headers = answers.object_headers(stored, part, asked.parameters)
        return Answer(206 if part.partial else 200, headers, nbytes=wanted)

    def close(self) -> None:
        """Ask nobody for anything any more."""
        self._origins.close()
