"""Which objects clients of S3 find: as their origin has them, or had them last where that does not answer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from weightd.daemon.errors import CheckpointNotFound, DaemonError, UnknownStage
from weightd.daemon.node.service import Node
from weightd.daemon.s3 import names
from weightd.daemon.s3.errors import S3Error
from weightd.daemon.s3.holders import Holder, folder, held, holders, is_of_a_revision
from weightd.daemon.s3.listing import Page, Query, page
from weightd.daemon.s3.origins import Origins
from weightd.daemon.sources.base import ANSWERS, Object
from weightd.daemon.sources.buckets import open_bucket
from weightd.daemon.sources.uris import Allow

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """An object, and what holds its bytes, or will; None: nothing but its origin."""

    uri: str
    object: Object
    holder: Holder | None = None


class Objects:
    """The objects of all buckets. On the event loop only."""

    def __init__(self, node: Node, origins: Origins, allow: Allow) -> None:
        self._node = node
        self._origins = origins
        self._allow = allow

    def buckets(self) -> list[str]:
        """Buckets of what is here."""
        found = {names.bucket_of(stage.uri) for stage in self._node.stages() if stage.listing is not None}
        return sorted({names.STAGES, *(bucket for bucket in found if bucket)})

    async def check_bucket(self, bucket: str) -> None:
        """Raises S3Error, DaemonError where there is no such bucket, or not for this daemon to see."""
        if bucket != names.STAGES and bucket not in self.buckets():
            await self.list_page(bucket, Query(most=1, delimiter="/"))

    async def list_page(self, bucket: str, query: Query) -> Page:
        """One page of a bucket's list. Where the origin does not answer: of what is resident.

        Raises S3Error, and what asking the origin raises.
        """
        if bucket == names.STAGES:
            return page(self._of_stages(), query)
        root = names.root_of(bucket)
        if not self._allow.leads_to(f"{root}/{query.prefix}"):
            self._allow.check(f"{root}/{query.prefix}")

        def may_be_seen(stored: Object) -> bool:
            uri = f"{root}/{stored.key}"
            return self._allow.leads_to(uri) if uri.endswith("/") else self._allow.permits(uri)

        def listed() -> Page:
            there = open_bucket(root, self._allow)
            if query.delimiter == "/":
                objects: Iterator[Object] = iter(there.level(query.prefix[: query.prefix.rfind("/") + 1]))
            else:
                objects = there.objects(query.prefix, query.after)
            return page(filter(may_be_seen, objects), query)

        here = sorted(filter(may_be_seen, self._resident_below(root)))
        try:
            return await self._origins.list(root, listed, is_here=bool(here))
        except ANSWERS as error:
            if not isinstance(error, CheckpointNotFound):
                raise
            if error.details.get("missing") == "bucket":
                raise S3Error("NoSuchBucket", "The specified bucket does not exist", {"BucketName": bucket}) from None
            return Page()
        except DaemonError as error:
            if not here:
                raise
            log.warning("%s: listing what is resident, its origin cannot be asked: %s", root, error)
            return page(iter(here), query)

    def _of_stages(self) -> list[Object]:
        return sorted(
            Object(f"{stage.id}/{file.name}", file.size, file.version, stage.created_at)
            for stage in self._node.stages()
            if stage.state == "ready" and stage.listing is not None
            for _, file, _ in held(stage)
        )

    def _resident_below(self, root: str) -> Iterable[Object]:
        """What ``find`` finds where the origin does not answer."""
        found: dict[str, Object] = {}
        for stage in sorted(self._node.stages(), key=lambda stage: stage.listed_at):
            if stage.state != "ready" or stage.listing is None or not folder(stage).startswith(f"{root}/"):
                continue
            for holder in held(stage):
                uri = folder(stage) + holder.file.name
                if self._is_what_was_seen_last(uri, holder):
                    key = uri[len(root) + 1 :]
                    found[key] = self._as_seen_last(uri, key, holder)
        return found.values()

    async def find(self, bucket: str, key: str) -> Found:
        """An object as its origin has it now, or had it last where that does not answer.

        Raises S3Error, and what asking the origin raises.
        """
        names.check_key(key)
        if bucket == names.STAGES:
            return self._of_stage(key)
        root = names.root_of(bucket)
        uri = f"{root}/{key}"
        self._allow.check(uri)
        try:
            stored = await self._origins.head(root, key, is_here=bool(self._holders(uri)))
        except ANSWERS:
            raise
        except DaemonError as error:
            holder = self._seen_last(uri)
            if holder is None:
                raise
            log.warning("%s: serving what is here, its origin cannot be asked: %s", uri, error)
            return Found(uri, self._as_seen_last(uri, key, holder), holder)
        return Found(uri, stored, self.holder(uri, stored))

    def holder(self, uri: str, stored: Object) -> Holder | None:
        """What holds that version of an object, or will; the best there is."""
        return next((holder for holder in self._holders(uri) if holder.file.version == stored.version), None)

    def _of_stage(self, key: str) -> Found:
        stage_id, _, name = key.partition("/")
        stage = self._node.get(stage_id)
        if stage.state != "ready":
            raise UnknownStage(f"stage {stage_id} is {stage.state}")
        for holder in held(stage):
            if holder.file.name == name:
                stored = Object(key, holder.file.size, holder.file.version, stage.created_at)
                return Found(folder(stage) + name, stored, holder)
        raise S3Error("NoSuchKey", "The specified key does not exist.", {"Key": key})

    def _holders(self, uri: str) -> list[Holder]:
        return holders(self._node.stages(), uri)

    def _seen_last(self, uri: str) -> Holder | None:
        """What holds what the origin had at a URI last; the best there is."""
        found = [holder for holder in self._holders(uri) if self._is_what_was_seen_last(uri, holder)]
        if self._origins.known(uri) is None:
            found.sort(key=lambda holder: holder.stage.listed_at, reverse=True)
        return found[0] if found else None

    def _is_what_was_seen_last(self, uri: str, holder: Holder) -> bool:
        """Whether it may be; where nothing is known, of all that may be the one that was listed last is."""
        known = self._origins.known(uri)
        return known.version == holder.file.version if known is not None else not is_of_a_revision(holder.stage)

    def _as_seen_last(self, uri: str, key: str, holder: Holder) -> Object:
        known = self._origins.known(uri)
        return Object(key, holder.file.size, holder.file.version, known.modified if known else holder.stage.created_at)
