"""Lists and names over S3: pages, prefixes, and keys of all kinds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.s3.conftest import SHARDS, Endpoint, Start, client, refusal
from tests.servers import SeaweedFS


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
