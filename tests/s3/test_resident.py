"""What is resident, over S3: the bytes and tags of its origin, which may be away, or have others by now."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy
import pytest
from botocore.exceptions import ClientError
from safetensors.numpy import load_file, save_file

from tests.fault_proxy import FaultProxy, Request
from tests.s3.conftest import SHARDS, Endpoint, Start, client, refusal, weight_bytes
from tests.servers import FakeGCS, SeaweedFS, until
from tests.sources.hub import Hub


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
