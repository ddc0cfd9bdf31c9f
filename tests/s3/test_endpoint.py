"""The S3 endpoint and boto3: what is resident, what comes through, what is refused, and what goes wrong."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError, IncompleteReadError, ResponseStreamingError
from safetensors.numpy import load_file, save_file

from tests.checkpoint_files import INDEX
from tests.fakecuda import FakeCuda
from tests.fault_proxy import FaultProxy, Request
from tests.node.adopting import Gate, serving
from tests.s3.conftest import SHARDS, Endpoint, MiB, Start, client, weight_bytes
from tests.servers import Daemon, FakeGCS, SeaweedFS, free_ports, until
from tests.sources.hub import Hub


def refusal(of: Any, **asked: Any) -> tuple[str, int]:
    """The code and status that boto3 is refused with."""
    with pytest.raises(ClientError) as refused:
        of(**asked)
    answer = refused.value.response
    return answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]


# ---------------------------------------------------------------------- what is resident


def test_files_and_ranges_of_what_is_resident_are_those_of_the_origin_which_is_read_once(
    start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, "s3-resident")
    here = Endpoint(start_daemon, origin.url, s3.env)
    assert here.daemon.stage(uri)["state"] == "ready"
    before = weight_bytes(origin)
    there, draw = client(s3.url), random.Random(15)
    for file in sorted(path.name for path in model.iterdir()):
        asked = {"Bucket": "models", "Key": f"s3-resident/{file}"}
        truth = (model / file).read_bytes()
        mine, other = here.s3.get_object(**asked), there.get_object(**asked)
        assert mine["Body"].read() == truth
        for name in ("ETag", "LastModified", "ContentLength"):
            assert mine[name] == other[name], (file, name)
        head = here.s3.head_object(**asked)
        assert (head["ETag"], head["ContentLength"]) == (other["ETag"], len(truth))
        for _ in range(40):
            first = draw.randrange(len(truth))
            last = min(len(truth) - 1, first + int(10 ** draw.uniform(0, 7)))
            part = here.s3.get_object(**asked, Range=f"bytes={first}-{last}")
            assert part["Body"].read() == truth[first : last + 1]
            assert part["ContentRange"] == f"bytes {first}-{last}/{len(truth)}"
    assert weight_bytes(origin) == before
    assert here.sent("passed") == here.sent("waited") == 0
    until(lambda: not here.daemon.client.leases(), "no lease is left")


def test_a_stage_that_holds_slices_gives_what_it_has_whole_and_passes_the_rest_on(
    start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, "s3-sliced")
    here = Endpoint(start_daemon, origin.url, s3.env)
    halves = {"*.[024]": 1, "*": "replicate"}
    record = here.daemon.stage(
        uri, parallel={"tp_size": 7, "tp_rank": 3, "map": {**halves, "*.[024]": 1}}, device="cpu"
    )
    assert record["state"] == "ready", record["error"]
    for shard in SHARDS:
        assert here.get(f"s3-sliced/{shard}") == (model / shard).read_bytes()
    sliced = sum(
        tensor.nbytes
        for shard in SHARDS
        for name, tensor in load_file(model / shard).items()
        if name.endswith(("0", "2", "4")) and "." in name
    )
    assert here.sent("passed") == sliced
    assert len(here.daemon.client.stages()) == 1, "what is here in part is not staged once more"


def test_every_stage_is_a_folder_of_a_bucket_of_its_own_wherever_it_came_from(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    here = Endpoint(start_daemon, s3.url, s3.env)
    stage = here.daemon.stage(model)["id"]
    listed = here.s3.list_objects_v2(Bucket="weightd", Prefix=f"{stage}/")["Contents"]
    assert [item["Key"] for item in listed] == sorted(f"{stage}/{path.name}" for path in model.iterdir())
    for item in listed:
        truth = (model / item["Key"].partition("/")[2]).read_bytes()
        found = here.s3.get_object(Bucket="weightd", Key=item["Key"])
        assert found["Body"].read() == truth
        assert (item["Size"], item["ETag"]) == (len(truth), found["ETag"])
    assert {bucket["Name"] for bucket in here.s3.list_buckets()["Buckets"]} == {"weightd"}
    assert refusal(here.s3.get_object, Bucket="weightd", Key="st-nothing/config.json")[0] == "NoSuchKey"
    assert refusal(here.s3.get_object, Bucket="weightd", Key=f"{stage}/nothing")[0] == "NoSuchKey"
    here.daemon.client.remove(stage)
    for of in (here.s3.get_object, here.s3.head_object):
        assert refusal(of, Bucket="weightd", Key=f"{stage}/{SHARDS[0]}")[1] == 404, "it is ready no more"


@pytest.mark.parametrize("way", ["refuses", "says nothing"])
def test_what_is_resident_is_served_and_listed_where_the_origin_is_away(
    way: str, start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, "s3-away")
    over = threading.Event()
    here = Endpoint(start_daemon, origin.url, s3.env)
    here.daemon.stage(uri)
    asked = {"Bucket": "models", "Key": f"s3-away/{SHARDS[0]}"}
    tag = client(s3.url).head_object(**asked)["ETag"]
    origin.fault = lambda _: "403" if way == "refuses" else over.wait(300) and None  # type: ignore[func-returns-value]
    found = here.s3.get_object(**asked)
    assert (found["Body"].read(), found["ETag"]) == ((model / SHARDS[0]).read_bytes(), tag)
    assert here.get("s3-away/config.json") == (model / "config.json").read_bytes()
    listed = here.s3.list_objects_v2(Bucket="models", Prefix="s3-away/")["Contents"]
    assert [item["Key"] for item in listed] == sorted(f"s3-away/{path.name}" for path in model.iterdir())
    for shard in SHARDS:
        assert here.get(f"s3-away/{shard}") == (model / shard).read_bytes()
    over.set()
    if way == "says nothing":
        return
    code, status = refusal(here.s3.get_object, Bucket="models", Key="s3-elsewhere/model.safetensors")
    assert (code, status) == ("AccessDenied", 403)


def test_an_origin_that_hangs_keeps_nobody_from_what_is_resident(
    start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    uri = s3.upload(model, "s3-hangs")
    here = Endpoint(start_daemon, origin.url, s3.env)
    here.daemon.stage(uri)
    answers = threading.Event()

    def hang(_: Request) -> None:
        answers.wait(120)

    origin.fault = hang
    try:
        impatient = client(here.url, read_timeout=20)
        for name in (SHARDS[0], "config.json"):
            found = impatient.get_object(Bucket="models", Key=f"s3-hangs/{name}")
            assert found["Body"].read() == (model / name).read_bytes()
    finally:
        answers.set()


def test_of_two_versions_that_are_resident_the_one_that_was_seen_last_is_served_where_the_origin_is_away(
    start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, tmp_path: Path
) -> None:
    here = Endpoint(start_daemon, origin.url, s3.env)
    path = tmp_path / "model.safetensors"
    for version in (1, 2):
        save_file({"w": numpy.full(300_000, version, numpy.float32)}, path)
        uri = s3.upload(tmp_path, "s3-two-versions")
        assert here.daemon.stage(uri)["state"] == "ready"
    assert len(here.daemon.client.stages()) == 2
    origin.fault = lambda _: "403"
    assert here.get("s3-two-versions/model.safetensors") == path.read_bytes()
    (listed,) = here.s3.list_objects_v2(Bucket="models", Prefix="s3-two-versions/")["Contents"]
    assert listed["ETag"] == here.s3.head_object(Bucket="models", Key=listed["Key"])["ETag"]


def test_what_was_replaced_at_the_origin_is_another_object_and_its_old_tag_fits_no_more(
    start_daemon: Start, s3: SeaweedFS, model: Path, tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros(300_000, numpy.float32)}, tmp_path / "model.safetensors")
    uri = s3.upload(tmp_path, "s3-replaced")
    here = Endpoint(start_daemon, s3.url, s3.env)
    here.daemon.stage(uri)
    asked = {"Bucket": "models", "Key": "s3-replaced/model.safetensors"}
    old = here.s3.get_object(**asked)["ETag"]
    assert here.s3.get_object(**asked, IfMatch=old)["ContentLength"] > 1_200_000
    save_file({"w": numpy.ones(300_000, numpy.float32)}, tmp_path / "model.safetensors")
    s3.upload(tmp_path, "s3-replaced")
    until(lambda: here.s3.head_object(**asked)["ETag"] != old, "it is noticed")
    assert refusal(here.s3.get_object, **asked, IfMatch=old) == ("PreconditionFailed", 412)
    assert here.s3.get_object(**asked)["Body"].read() == (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ClientError) as unmodified:
        here.s3.get_object(**asked, IfNoneMatch=here.s3.head_object(**asked)["ETag"])
    assert unmodified.value.response["ResponseMetadata"]["HTTPStatusCode"] == 304


# ---------------------------------------------------------------------- what is not


def test_the_first_get_stages_and_whoever_comes_after_reads_nothing_at_the_origin(
    start_daemon: Start, s3: SeaweedFS, origin: FaultProxy, model: Path
) -> None:
    s3.upload(model, "s3-cold")
    here = Endpoint(start_daemon, origin.url, s3.env, "--extent", "1MiB")
    keys = [f"s3-cold/{shard}" for shard in SHARDS]
    assert here.get(f"s3-cold/{INDEX}") == (model / INDEX).read_bytes()
    assert here.daemon.client.stages() == [], "who reads what is beside weights may want no weights"
    with ThreadPoolExecutor(8) as pool:
        ranges = [(key, first) for key in keys for first in range(0, 12 * MiB, MiB)]
        truth = {key: (model / key.partition("/")[2]).read_bytes() for key in keys}
        found = list(pool.map(lambda at: here.get(at[0], Range=f"bytes={at[1]}-{at[1] + MiB - 1}"), ranges))
    assert found == [truth[key][first : first + MiB] for key, first in ranges]
    (stage,) = here.daemon.client.stages()
    assert (stage["model"], stage["device"]) == ("s3://models/s3-cold", "cpu")
    until(lambda: here.daemon.client.show(stage["id"])["state"] == "ready", "it is staged")
    tensors = sum(tensor.nbytes for shard in SHARDS for tensor in load_file(model / shard).values())
    assert here.daemon.client.show(stage["id"])["bytes_done"] == tensors
    assert here.sent("passed") == (model / INDEX).stat().st_size
    before = weight_bytes(origin)
    for key in keys:
        assert here.get(key) == truth[key]
    assert weight_bytes(origin) == before


def test_what_is_replaced_while_it_loads_is_never_sent_under_the_tag_of_what_was_there(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": numpy.zeros(4 * MiB, numpy.uint8), "x": numpy.zeros(4 * MiB, numpy.uint8)}, path)
    old = path.read_bytes()
    s3.upload(tmp_path, "s3-replaced-amid")
    save_file({"w": numpy.ones(4 * MiB, numpy.uint8), "x": numpy.ones(4 * MiB, numpy.uint8)}, path)
    replaced = threading.Event()

    def amid(request: Request) -> None:
        """Another file takes its place just before the first of its weights are read."""
        if request.nbytes > 300_000 and not replaced.is_set():
            s3.upload(tmp_path, "s3-replaced-amid")
            replaced.set()

    with FaultProxy(s3.url, amid) as proxy:
        here = Endpoint(start_daemon, proxy.url, s3.env)
        asked = {"Bucket": "models", "Key": "s3-replaced-amid/model.safetensors"}
        tag = here.s3.head_object(**asked)["ETag"]
        with contextlib.suppress(ClientError, IncompleteReadError, ResponseStreamingError):  # refused, or cut short
            found = here.s3.get_object(**asked, Range=f"bytes={4 * MiB}-{5 * MiB - 1}")
            assert (found["Body"].read() == old[4 * MiB : 5 * MiB]) == (found["ETag"] == tag)
            assert found["ETag"] != tag, "bytes that the origin has no more came from there"
        assert replaced.is_set()


def test_a_range_is_answered_as_soon_as_its_bytes_are_verified(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    s3.upload(model, "s3-early")
    opened = threading.Event()

    def only_the_beginning(request: Request) -> None:
        """Weights of the first two MiB of the first shard come, all others once that is opened."""
        if request.nbytes > 300_000 and not (request.path.endswith(SHARDS[0]) and (request.first or 0) < 2 * MiB):
            opened.wait(120)

    with FaultProxy(s3.url, only_the_beginning) as slow:
        here = Endpoint(start_daemon, slow.url, s3.env, "--extent", "1MiB")
        try:
            early = here.get(f"s3-early/{SHARDS[0]}", Range="bytes=0-999999")
            assert early == (model / SHARDS[0]).read_bytes()[:1_000_000]
            (stage,) = here.daemon.client.stages()
            assert stage["state"] == "loading"
            late = threading.Thread(target=lambda: found.append(here.get(f"s3-early/{SHARDS[1]}")))
            found: list[bytes] = []
            late.start()
            until(lambda: here.daemon.client.leases(), "it is waited for under a lease")
            (lease,) = here.daemon.client.leases()
            assert lease["client"].startswith("127.0.0.1:")
            assert lease["pid"] is None
        finally:
            opened.set()
        late.join(60)
        assert found == [(model / SHARDS[1]).read_bytes()]
        assert here.sent("waited") > 0


def test_what_may_not_be_kept_is_passed_on_and_what_may_not_be_passed_on_is_refused(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-passed")
    passing = Endpoint(start_daemon, s3.url, s3.env, "--s3-absent", "pass")
    truth = (model / SHARDS[0]).read_bytes()
    assert passing.get(f"s3-passed/{SHARDS[0]}") == truth
    assert passing.get(f"s3-passed/{SHARDS[0]}", Range="bytes=1000-1000999") == truth[1000:1_001_000]
    assert passing.daemon.client.stages() == []
    assert passing.sent("passed") == len(truth) + 1_000_000
    refusing = Endpoint(start_daemon, s3.url, s3.env, "--s3-absent", "refuse")
    asked = {"Bucket": "models", "Key": f"s3-passed/{SHARDS[0]}"}
    assert refusal(refusing.s3.get_object, **asked) == ("AccessDenied", 403)
    assert refusing.s3.head_object(**asked)["ContentLength"] == len(truth)
    assert refusing.get("s3-passed/config.json") == (model / "config.json").read_bytes()
    refusing.daemon.stage("s3://models/s3-passed")
    assert refusing.get(f"s3-passed/{SHARDS[0]}") == truth


def test_what_does_not_fit_is_passed_on(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    s3.upload(model, "s3-too-large")
    here = Endpoint(start_daemon, s3.url, s3.env, "--capacity", "cpu=1MiB")
    assert here.get(f"s3-too-large/{SHARDS[0]}") == (model / SHARDS[0]).read_bytes()
    assert here.sent("resident") == here.sent("waited") == 0
    assert "is passed on, it cannot be staged" in here.daemon.log.read_text()


def test_files_that_are_not_the_checkpoint_are_staged_by_their_own_names(
    start_daemon: Start, s3: SeaweedFS, model: Path, tmp_path: Path
) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({name: numpy.full(200_000, ord(name[0]), numpy.float32)}, tmp_path / name)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02" * 1000)
    s3.upload(tmp_path, "s3-several")
    here = Endpoint(start_daemon, s3.url, s3.env)
    for path in tmp_path.iterdir():
        assert here.get(f"s3-several/{path.name}") == path.read_bytes()
    ready = [stage for stage in here.daemon.client.stages() if stage["state"] != "failed"]
    assert len(ready) == 2


def test_only_what_may_be_staged_is_there(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    for prefix in ("s3-allowed", "s3-allowed-not", "s3-forbidden"):
        s3.upload(model, prefix)
    here = Endpoint(start_daemon, s3.url, s3.env, "--allow", "s3://models/s3-allowed")
    assert here.get("s3-allowed/config.json") == (model / "config.json").read_bytes()
    for prefix in ("s3-allowed-not", "s3-forbidden"):
        for name in ("config.json", SHARDS[0]):
            asked = {"Bucket": "models", "Key": f"{prefix}/{name}"}
            assert refusal(here.s3.get_object, **asked) == ("AccessDenied", 403)
        assert refusal(here.s3.list_objects_v2, Bucket="models", Prefix=f"{prefix}/") == ("AccessDenied", 403)
    assert refusal(here.s3.list_objects_v2, Bucket="others") == ("AccessDenied", 403)
    for delimiter in ({}, {"Delimiter": "/"}):
        found = here.s3.list_objects_v2(Bucket="models", **delimiter)
        keys = [item["Key"] for item in found.get("Contents", [])]
        keys += [item["Prefix"] for item in found.get("CommonPrefixes", [])]
        assert keys
        assert all(key.startswith("s3-allowed/") for key in keys)


# ---------------------------------------------------------------------- lists


def test_five_thousand_keys_come_in_pages_with_whatever_names(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    odd = ["a b", "a+b", "a%20b", "é/ü", "日本/語", "a&b<c>", "a'\"b", "z=?#;"]
    store = s3.store()
    keys = sorted(
        [f"s3-many/{name}" for name in odd] + [f"s3-many/{i % 7}/{i:05}.json" for i in range(5000 - len(odd))]
    )
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.put(key, key.encode()), keys))
    here, there = Endpoint(start_daemon, s3.url, s3.env), client(s3.url)
    for version in ("list_objects_v2", "list_objects"):
        pages = list(here.s3.get_paginator(version).paginate(Bucket="models", Prefix="s3-many/"))
        assert [item["Key"] for page in pages for item in page["Contents"]] == keys
        assert [len(page["Contents"]) for page in pages] == [1000] * 5
    some = here.s3.get_paginator("list_objects_v2").paginate(
        Bucket="models", Prefix="s3-many/", Delimiter="/", PaginationConfig={"PageSize": 3}
    )
    prefixes = [item["Prefix"] for page in some for item in page.get("CommonPrefixes", [])]
    assert prefixes == [*(f"s3-many/{i}/" for i in range(7)), "s3-many/é/", "s3-many/日本/"]
    after = here.s3.list_objects_v2(Bucket="models", Prefix="s3-many/3", StartAfter=keys[2500], MaxKeys=7)["Contents"]
    assert [item["Key"] for item in after] == [key for key in keys if key > keys[2500] and "many/3" in key][:7]
    for name in odd:
        asked = {"Bucket": "models", "Key": f"s3-many/{name}"}
        found = here.s3.get_object(**asked)
        assert (found["Body"].read(), found["ETag"]) == (asked["Key"].encode(), there.head_object(**asked)["ETag"])
    empty = here.s3.list_objects_v2(Bucket="models", Prefix="s3-nothing/")
    assert (empty["KeyCount"], empty["IsTruncated"]) == (0, False)
    assert here.s3.list_objects_v2(Bucket="models", MaxKeys=0)["KeyCount"] == 0
    assert here.s3.head_bucket(Bucket="models")["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert here.s3.get_bucket_location(Bucket="models")["LocationConstraint"] is None
    assert refusal(here.s3.list_objects_v2, Bucket="no-such-bucket") == ("NoSuchBucket", 404)
    assert refusal(here.s3.head_bucket, Bucket="no-such-bucket") == ("404", 404)


@pytest.mark.parametrize("value", [" text/plain", "text/plain ", " "])
def test_a_header_that_is_asked_for_with_spaces_around_it_comes_without(
    value: str, start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-spaces")
    here = Endpoint(start_daemon, s3.url, s3.env)
    found = here.s3.get_object(Bucket="models", Key="s3-spaces/config.json", ResponseContentType=value)
    assert found["ContentType"] == (value.strip() or "binary/octet-stream")


def test_a_key_that_ends_with_a_slash_is_not_the_object_without_it(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-slash")
    here = Endpoint(start_daemon, s3.url, s3.env)
    for name in ("config.json/", f"{SHARDS[0]}/"):
        asked = {"Bucket": "models", "Key": f"s3-slash/{name}"}
        assert refusal(here.s3.head_object, **asked) == ("404", 404)
        assert refusal(here.s3.get_object, **asked) == ("NoSuchKey", 404)


@pytest.mark.parametrize("prefix", ["a//b/", "a//", "/a/", "a/../b/", "a/./", "a\n/", "../"])
def test_below_a_prefix_that_no_key_can_have_is_nothing(prefix: str, start_daemon: Start, s3: SeaweedFS) -> None:
    s3.store().put("s3-odd-prefix/x", b"x")
    here = Endpoint(start_daemon, s3.url, s3.env)
    for asked in ({}, {"Delimiter": "/"}):
        assert here.s3.list_objects_v2(Bucket="models", Prefix=f"s3-odd-prefix/{prefix}", **asked)["KeyCount"] == 0
    after = here.s3.list_objects_v2(Bucket="models", Prefix="s3-odd-prefix/", StartAfter=f"s3-odd-prefix/{prefix}")
    assert [item["Key"] for item in after["Contents"]] == ["s3-odd-prefix/x"]


# ---------------------------------------------------------------------- who may ask


def test_keys_are_asked_for_where_they_are_set_in_headers_and_in_urls(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-signed")
    keys = {"WEIGHTD_S3_ACCESS_KEY": "engine", "WEIGHTD_S3_SECRET_KEY": "its secret/+="}
    here = Endpoint(start_daemon, s3.url, {**s3.env, **keys})
    truth = (model / SHARDS[0]).read_bytes()
    asked = {"Bucket": "models", "Key": f"s3-signed/{SHARDS[0]}"}
    odd = {"Bucket": "models", "Key": "s3-signed/a b+c%20é(~).json"}
    s3.store().put(odd["Key"], b"{}")
    right = client(here.url, "engine", "its secret/+=")
    assert right.get_object(**asked, Range="bytes=5-104")["Body"].read() == truth[5:105]
    assert right.get_object(**odd)["Body"].read() == b"{}"
    assert right.list_objects_v2(Bucket="models", Prefix="s3-signed/a b+", Delimiter="/")["KeyCount"] == 1
    url = right.generate_presigned_url(
        "get_object", {**odd, "ResponseContentType": "application/json; charset=utf-8"}, ExpiresIn=60
    )
    answer = httpx.get(url)
    assert (answer.content, answer.headers["content-type"]) == (b"{}", "application/json; charset=utf-8")
    assert refusal(client(here.url, "engine", "guessed").get_object, **asked) == ("SignatureDoesNotMatch", 403)
    assert refusal(client(here.url, "other", "its secret/+=").get_object, **asked) == ("InvalidAccessKeyId", 403)
    for wrong in (url.replace("%20", "%2B", 1), url[:-1] + ("0" if url[-1] != "0" else "1"), url + "&x=y", here.url):
        assert httpx.get(wrong).status_code == 403
    other = url.partition("X-Amz-Signature=")[0] + "X-Amz-Signature=%C3%A9"
    assert "<Code>SignatureDoesNotMatch</Code>" in httpx.get(other).text
    s3.store().put("s3-signed/a#b", b"what was not signed for")
    signed = AWSRequest("GET", f"{here.url}/models/s3-signed/a", headers={"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})
    S3SigV4Auth(Credentials("engine", "its secret/+="), "s3", "us-east-1").add_auth(signed)
    connection = http.client.HTTPConnection(here.address)
    connection.request("GET", "/models/s3-signed/a#b", headers=dict(signed.headers))
    assert connection.getresponse().status == 400, "a signature for what is in front of '#' is none for all of it"
    late = right.generate_presigned_url("get_object", asked, ExpiresIn=1)
    until(lambda: httpx.get(late).status_code == 403, "its time is over")
    assert "Request has expired" in httpx.get(late).text
    forged = right.meta.events
    forged.register("before-send.s3.GetObject", _two_hours_late)
    assert refusal(right.get_object, **asked)[0] in ("RequestTimeTooSkewed", "AuthorizationHeaderMalformed")
    # A name of the network, which keys make safe.
    assert httpx.get(url, headers={"Host": "weightd.example"}).status_code == 403, "another host was signed"


def _two_hours_late(request: Any, **_: Any) -> None:
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() - 7200))
    del request.headers["X-Amz-Date"]
    request.headers["X-Amz-Date"] = stamp


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("--s3-listen", "0.0.0.0:7480"), "open to the network: set WEIGHTD_S3_ACCESS_KEY"),
        (("--s3-listen", "127.0.0.1:7480", "--s3-access-key", "a"), "WEIGHTD_S3_SECRET_KEY is missing"),
        (("--s3-listen", "127.0.0.1:7400", "--listen", "127.0.0.1:7400"), "are both"),
    ],
    ids=["beyond loopback", "half a pair", "a port twice"],
)
def test_settings_that_would_open_it_to_strangers_are_refused(
    settings: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError) as refused, Daemon(tmp_path / "d", *settings):
        pass
    assert words in " ".join(str(refused.value).split())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_daemon_that_would_ask_itself_does_not_start(host: str, tmp_path: Path, s3: SeaweedFS) -> None:
    (port,) = free_ports(1)
    env = {**s3.env, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    with pytest.raises(RuntimeError) as refused, Daemon(tmp_path / "d", "--s3-listen", f"127.0.0.1:{port}", env=env):
        pass
    assert "it would ask itself" in str(refused.value)


def test_a_bucket_may_stand_in_the_hosts_name_and_strangers_names_are_refused(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-virtual")
    here = Endpoint(start_daemon, s3.url, s3.env)
    port = here.address.rpartition(":")[2]
    virtual = {"Host": f"models.localhost:{port}"}
    answer = httpx.get(f"{here.url}/s3-virtual/config.json", headers=virtual)
    assert (answer.status_code, answer.content) == (200, (model / "config.json").read_bytes())
    listed = httpx.get(f"{here.url}/?list-type=2&prefix=s3-virtual/", headers=virtual)
    assert listed.text.count("<Key>") == 5
    rebound = httpx.get(f"{here.url}/models/s3-virtual/config.json", headers={"Host": f"attacker.example:{port}"})
    assert (rebound.status_code, "<Code>AccessDenied</Code>" in rebound.text) == (403, True)


# ---------------------------------------------------------------------- what goes wrong


@contextlib.contextmanager
def asking(here: Endpoint, path: str, *headers: str, buffer: int = 4096) -> Iterator[socket.socket]:
    """A connection on which something was asked for, whose answer nobody reads."""
    host, port = here.address.split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect((host, int(port)))
        lines = [f"GET {path} HTTP/1.1", f"Host: {here.address}", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode())
        yield connection


def test_who_hangs_up_holds_no_lease_whether_bytes_were_coming_or_waited_for(
    start_daemon: Start, s3: SeaweedFS, model: Path
) -> None:
    s3.upload(model, "s3-hang-up")
    gate = Gate(0)
    with FaultProxy(s3.url, gate) as slow:
        here = Endpoint(start_daemon, slow.url, s3.env)
        leases = here.daemon.client.leases
        with asking(here, f"/models/s3-hang-up/{SHARDS[1]}"):
            until(leases, "it waits under a lease", 60)
        until(lambda: not leases(), "the lease of who waited is gone", 30)
        gate.opened.set()
        (stage,) = here.daemon.client.stages()
        until(lambda: here.daemon.client.show(stage["id"])["state"] == "ready", "it is ready")
        with asking(here, f"/models/s3-hang-up/{SHARDS[1]}") as connection:
            until(leases, "it is sent under a lease", 60)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            with pytest.raises(Exception, match="S3 at 127"):
                here.daemon.client.remove(stage["id"])
        until(lambda: not leases(), "the lease of who was sent to is gone", 30)
        here.daemon.client.remove(stage["id"])


def test_a_stage_that_is_taken_by_force_ends_what_is_sent_of_it_short(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file({"w": numpy.arange(8_000_000, dtype=numpy.float32)}, tmp_path / "model.safetensors")
    truth = (tmp_path / "model.safetensors").read_bytes()
    here = Endpoint(start_daemon, s3.url, s3.env, "--revoke-grace", "0")
    stage = here.daemon.stage(tmp_path)["id"]
    with asking(here, f"/weightd/{stage}/model.safetensors") as connection:
        until(here.daemon.client.leases, "it is sent under a lease", 60)
        here.daemon.client.remove(stage, force=True)
        until(lambda: here.daemon.client.show(stage)["state"] == "evicted", "it has gone", 60)
        until(lambda: here.daemon.used_bytes == 0, "its memory is free")
        found = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 20):
                found += data
        head, _, body = found.partition(b"\r\n\r\n")
        assert f"content-length: {len(truth)}".encode() in head
        assert len(body) < len(truth), "all of it was sent"
        assert truth.startswith(body), "other bytes were sent"
    until(lambda: not here.daemon.client.leases(), "the lease is gone")


def test_five_hundred_ranges_at_once_are_all_right_and_slow_readers_cost_no_memory(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file(
        {"w": numpy.random.default_rng(1).integers(0, 256, 64 * MiB, numpy.uint8)}, tmp_path / "model.safetensors"
    )
    truth = (tmp_path / "model.safetensors").read_bytes()
    here = Endpoint(start_daemon, s3.url, s3.env)
    stage = here.daemon.stage(tmp_path)["id"]
    path = f"/weightd/{stage}/model.safetensors"
    before = _private_bytes(here.daemon.pid)
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(asking(here, path)) for _ in range(400)]
        until(lambda: len(here.daemon.client.leases()) == 400, "all are being sent", 120)
        with ThreadPoolExecutor(32) as pool, httpx.Client(base_url=here.url, timeout=120) as web:
            starts = [random.Random(i).randrange(60 * MiB) for i in range(500)]

            def right(start: int) -> bool:
                answer = web.get(path, headers={"Range": f"bytes={start}-{start + MiB}"})
                return answer.status_code == 206 and answer.content == truth[start : start + MiB + 1]

            assert all(pool.map(right, starts))
        assert _private_bytes(here.daemon.pid) - before < 128 * MiB, "what nobody takes is kept somewhere"
        assert here.daemon.get("/livez")
        for connection in slow:
            assert connection.recv(10) == b"HTTP/1.1 2"
    until(lambda: not here.daemon.client.leases(), "all have gone", 60)


@pytest.mark.parametrize("handle", ["fd", "cuda_ipc"])
def test_what_lies_on_a_gpu_is_sent_to_many_slow_readers_who_hold_none_of_its_pinned_memory(
    handle: str, start_daemon: Start, s3: SeaweedFS, fake_library: Path, tmp_path: Path
) -> None:
    save_file({"w": numpy.random.default_rng(3).integers(0, 256, 24 * MiB, numpy.uint8)}, tmp_path / "m.safetensors")
    truth = (tmp_path / "m.safetensors").read_bytes()
    fake = FakeCuda(fake_library, tmp_path / "fakecuda", memory=256 * MiB)
    here = Endpoint(start_daemon, s3.url, {**s3.env, **fake.env, "WEIGHTD_CUDA_RESERVE": "32MiB"})
    record = here.daemon.stage(tmp_path / "m.safetensors", device="cuda:0", handle=handle)
    assert record["state"] == "ready", record["error"]
    path = f"/weightd/{record['id']}/m.safetensors"
    before = _private_bytes(here.daemon.pid)
    with contextlib.ExitStack() as stack:
        for connection in [stack.enter_context(asking(here, path)) for _ in range(40)]:
            while len(connection.recv(1000, socket.MSG_PEEK)) < 1000:
                pass
        assert httpx.get(f"{here.url}{path}", headers={"Range": "bytes=1000-9000000"}).content == truth[1000:9_000_001]
        if handle == "fd":
            assert len(here.daemon.client.leases()) == 40
            assert _private_bytes(here.daemon.pid) - before < 240 * MiB, "each holds a buffer"
    assert httpx.get(f"{here.url}{path}").content == truth
    until(lambda: not here.daemon.client.leases(), "all have gone", 60)


def test_slow_readers_of_what_is_passed_on_cost_less_memory_the_more_they_are(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    (tmp_path / "model.bin").write_bytes(os.urandom(40 * MiB))
    s3.upload(tmp_path, "s3-slow-passed")
    here = Endpoint(start_daemon, s3.url, s3.env)
    before = _private_bytes(here.daemon.pid)
    with contextlib.ExitStack() as stack:
        path = "/models/s3-slow-passed/model.bin"
        for connection in [stack.enter_context(asking(here, path)) for _ in range(64)]:
            found = b""
            while len(found) < 2000:
                found += connection.recv(1000)
            assert found.startswith(b"HTTP/1.1 200")
        assert _private_bytes(here.daemon.pid) - before < 640 * MiB
    assert here.get("s3-slow-passed/model.bin") == (tmp_path / "model.bin").read_bytes()
    assert "Traceback" not in here.daemon.log.read_text()


def _private_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def test_a_client_that_tries_again_notices_no_restart(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    here = Endpoint(start_daemon, s3.url, s3.env)
    stage = here.daemon.stage(model)["id"]
    over, found = threading.Event(), []
    truth = (model / SHARDS[0]).read_bytes()

    def read() -> None:
        again = client(here.url, connect_timeout=60, read_timeout=60)
        while not over.is_set():
            for attempt in range(20):
                try:
                    found.append(again.get_object(Bucket="weightd", Key=f"{stage}/{SHARDS[0]}")["Body"].read() == truth)
                    break
                except Exception as error:
                    if attempt == 19:
                        found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(2):
            pid, count = here.daemon.status["daemon_pid"], len(found)
            until(lambda count=count: len(found) > count + 2, "it is read")  # type: ignore[misc]
            os.kill(pid, signal.SIGKILL)
            serving(here.daemon, pid)
        count = len(found)
        until(lambda: len(found) > count + 2, "it is read again")
    finally:
        over.set()
        reader.join()
    assert set(found) == {True}


def test_an_origin_that_fails_amid_what_is_passed_on_ends_it_short(
    start_daemon: Start, s3: SeaweedFS, tmp_path: Path
) -> None:
    save_file({"w": numpy.zeros(30 * MiB, numpy.uint8)}, tmp_path / "model.safetensors")
    s3.upload(tmp_path, "s3-fails")

    def later(request: Request) -> Any:
        return "403" if request.first and request.first > 8 * MiB else None

    with FaultProxy(s3.url, later) as failing:
        here = Endpoint(start_daemon, failing.url, s3.env, "--s3-absent", "pass")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{here.url}/models/s3-fails/model.safetensors", timeout=60)
    assert "ends short" in here.daemon.log.read_text()


HOSTILE = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /weightd/..%2f..%2fetc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://elsewhere/models/x HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
    b"GET ftp://localhost/models/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/x?" + b"a=b&" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&max-keys=-1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&max-keys=" + b"9" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&continuation-token=%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&prefix=%ff%0a%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=2&delimiter=%f0%9f%92%a9 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?list-type=3 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/?uploads HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/x HTTP/1.1\r\nHost: " + b"a" * 60000 + b"\r\n\r\n",
    b"GET /models/x HTTP/1.1\r\nHost: localhost\r\nRange: bytes=" + b"1" * 9000 + b"-\r\n\r\n",
    b"GET /" + b"a" * 200_000,
    b"PUT /models/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000,
    b"PUT /models/x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
    b"PUT /models/x HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\n",
    b"POST /models/?delete HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n<Delete>",
    b"DELETE /models/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"BREW /models/x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /models/x HTTP/9.9\r\n\r\n",
    b"GET /models/#x HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"GET /models/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nabcde",
    b"GET /models/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: AWS4-HMAC-SHA256 \xff\r\n\r\n",
]


def test_whatever_comes_to_its_port_is_refused_in_the_words_of_s3_and_the_daemon_lives(
    start_daemon: Start, s3: SeaweedFS
) -> None:
    here = Endpoint(start_daemon, s3.url, s3.env)
    draw = random.Random(15)
    noise = [bytes(draw.choices(base, k=draw.randrange(1, len(base) + 1))) for base in HOSTILE[:10] for _ in range(5)]
    for sent in [*HOSTILE, *noise]:
        host, port = here.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection, contextlib.suppress(OSError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while data := connection.recv(1 << 16):
                answer += data
            if answer:
                status = int(answer.split(b" ")[1])
                assert 400 <= status < 600 or sent.startswith(b"GET / ") or b"list-type=2" in sent, (
                    sent[:80],
                    answer[:200],
                )
                assert status != 500, (sent[:80], answer[:300])
            assert b"root:" not in answer
    assert here.daemon.status["restarts"] == 0
    assert "Traceback" not in here.daemon.log.read_text()
    assert here.s3.list_buckets()["Buckets"]


# ---------------------------------------------------------------------- other origins


def test_buckets_of_google_and_repositories_of_the_hub_have_names_of_their_own(
    start_daemon: Start, s3: SeaweedFS, gcs: FakeGCS, model: Path, tmp_path: Path
) -> None:
    gcs.upload(model, "s3-elsewhere")
    with Hub(model) as hub:
        of_hub = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        here = Endpoint(start_daemon, s3.url, {**s3.env, **gcs.env, **of_hub})
        for bucket, prefix in (("gs--models", "s3-elsewhere/"), ("hf--org--name", "")):
            listed = here.s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]
            assert [item["Key"] for item in listed] == sorted(f"{prefix}{path.name}" for path in model.iterdir())
            for item in listed:
                found = here.s3.get_object(Bucket=bucket, Key=item["Key"])
                assert found["Body"].read() == (model / item["Key"].removeprefix(prefix)).read_bytes()
                assert found["ETag"] == item["ETag"]
        assert {stage["model"] for stage in here.daemon.client.stages()} == {
            "gs://models/s3-elsewhere",
            "hf://org/name",
        }
        assert {bucket["Name"] for bucket in here.s3.list_buckets()["Buckets"]} == {
            "weightd", "gs--models", "hf--org--name",
        }  # fmt: skip
