"""Statuses, ranges, conditions and pages, of what was found: no server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from unittest import mock
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weightd.daemon.s3 import answers, names
from weightd.daemon.s3.errors import STATUSES, S3Error
from weightd.daemon.s3.listing import Page, Query, after_of, page, token_of
from weightd.daemon.sources import object_store
from weightd.daemon.sources.base import Object
from weightd.daemon.sources.buckets import one_level

STORED = Object("m/a.safetensors", 1000, "abc123", 1_700_000_000.5)
SAME, OTHER = '"abc123"', '"other"'
BEFORE, AT, AFTER = (answers.http_date(1_700_000_000 + shift) for shift in (-1, 0, 1))


@pytest.mark.parametrize(
    ("header", "first", "nbytes", "partial"),
    [
        ("", 0, 1000, False),
        ("bytes=0-", 0, 1000, True),
        ("bytes=0-0", 0, 1, True),
        ("bytes=999-", 999, 1, True),
        ("bytes=10-19", 10, 10, True),
        ("bytes=990-5000", 990, 10, True),
        ("bytes=-1", 999, 1, True),
        ("bytes=-5000", 0, 1000, True),
        ("bytes=20-10", 0, 1000, False),
        ("bytes=0-1,5-6", 0, 1000, False),
        ("bytes=-", 0, 1000, False),
        ("lines=1-2", 0, 1000, False),
        ("bytes=a-b", 0, 1000, False),
        (f"bytes=0-{'9' * 500}", 0, 1000, True),
    ],
)
def test_one_range_is_that_part_and_anything_else_is_the_whole(
    header: str, first: int, nbytes: int, partial: bool
) -> None:
    assert answers.range_of(header, 1000) == (first, nbytes, partial)


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=1000-2000", "bytes=-0", f"bytes={'9' * 500}-"])
def test_a_range_with_nothing_in_it_is_refused_with_the_size(header: str) -> None:
    with pytest.raises(S3Error) as refused:
        answers.range_of(header, 1000)
    assert (refused.value.code, refused.value.status) == ("InvalidRange", 416)
    assert refused.value.details["ActualObjectSize"] == "1000"


def test_nothing_of_an_empty_object_can_be_asked_for_but_all_of_it() -> None:
    assert answers.range_of("", 0) == (0, 0, False)
    with pytest.raises(S3Error):
        answers.range_of("bytes=0-", 0)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"if-match": SAME}, 200),
        ({"if-match": "*"}, 200),
        ({"if-match": f"{OTHER}, {SAME}"}, 200),
        ({"if-match": OTHER}, 412),
        ({"if-none-match": OTHER}, 200),
        ({"if-none-match": SAME}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-modified-since": BEFORE}, 200),
        ({"if-modified-since": AT}, 304),
        ({"if-modified-since": "no date"}, 200),
        ({"if-unmodified-since": AT}, 200),
        ({"if-unmodified-since": BEFORE}, 412),
        # RFC 9110, 13.2.2: tags decide over dates.
        ({"if-match": SAME, "if-unmodified-since": BEFORE}, 200),
        ({"if-none-match": OTHER, "if-modified-since": AFTER}, 200),
        ({"if-none-match": SAME, "if-modified-since": BEFORE}, 304),
    ],
    ids=str,
)
def test_conditions_are_as_http_has_them(headers: dict[str, str], status: int) -> None:
    try:
        found = 200 if answers.check_conditions(STORED, headers) else 304
    except S3Error as error:
        found = error.status
    assert found == status


def test_a_version_that_could_be_no_tag_has_one_of_its_own() -> None:
    odd = [STORED._replace(version=version) for version in ("", 'a"b', "a b", "12-2023-11-14T22:13:20+00:00", "ü")]
    tags = [answers.etag(stored) for stored in odd]
    assert len(set(tags)) == len(tags)
    assert all(tag[0] == tag[-1] == '"' and tag[1:-1].isascii() and '"' not in tag[1:-1] for tag in tags)


# ---------------------------------------------------------------------- lists

KEYS = st.lists(st.text("ab/é ", min_size=1, max_size=6), max_size=30, unique=True)


def brute(keys: list[str], prefix: str, delimiter: str) -> tuple[list[str], list[str]]:
    """All keys and common prefixes that a list has, without pages."""
    objects, prefixes = [], []
    for key in sorted(keys):
        if key.startswith(prefix):
            rest, separator, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if separator:
                prefixes.append(prefix + rest + separator)
            else:
                objects.append(key)
    return objects, sorted(set(prefixes))


@example(keys=["/", "/a"], prefix="/", delimiter="/", most=1)
@example(keys=["ab", "abab", "ababc"], prefix="ab", delimiter="ab", most=1)
@given(
    keys=KEYS,
    prefix=st.text("ab/", max_size=2),
    delimiter=st.sampled_from(["", "/", "b", "ab"]),
    most=st.integers(1, 5),
)
def test_pages_together_are_the_list(keys: list[str], prefix: str, delimiter: str, most: int) -> None:
    objects, prefixes, after = [], [], ""
    for _ in range(100):
        found = page([Object(key, 1, "v", 0.0) for key in sorted(keys)], Query(prefix, delimiter, after, most))
        assert len(found.objects) + len(found.prefixes) <= most
        objects += [stored.key for stored in found.objects]
        prefixes += found.prefixes
        if not found.truncated:
            break
        after = after_of(token_of(found.last))
    assert (objects, prefixes) == brute(keys, prefix, delimiter)


def test_one_level_of_a_bucket_makes_the_same_list_as_all_of_it() -> None:
    everything = [Object(key, 1, "v", 0.0) for key in ("a", "b/c", "b/d/e", "b2", "c/d")]
    for folder in ("", "b/", "b/d/", "c/", "nothing/"):
        query = Query(folder, "/")
        assert page(one_level(iter(everything), folder), query) == page(everything, query)


def test_what_marks_a_folder_is_no_object_of_its_name_in_any_list() -> None:
    def listed(*paths: str) -> list[dict[str, Any]]:
        at = datetime(2026, 1, 1, tzinfo=UTC)
        return [{"path": path, "size": 0, "e_tag": "e", "last_modified": at} for path in paths]

    store = mock.Mock()
    store.list_with_delimiter.return_value = {"common_prefixes": ["m/ab"], "objects": listed("m/ab", "m/e1")}
    with mock.patch.object(object_store, "_connect_s3", return_value=store):
        bucket = object_store.StoredObjects("s3://models")
    store.list.return_value = [listed("m/ab"), listed("m/ab/x", "m/e1")]  # the store has left a slash out
    assert [found.key for found in bucket.objects("m/", "")] == ["m/ab/x", "m/e1"]
    assert [found.key for found in bucket.level("m/")] == ["m/ab/", "m/e1"]


@pytest.mark.parametrize("token", ["", "!", "a", "ÿ", "/w==", "_w=="])
def test_a_token_that_nobody_gave_is_refused(token: str) -> None:
    if token == "":
        return
    with pytest.raises(S3Error, match="continuation token"):
        after_of(token)


def test_a_list_is_the_xml_that_s3_sends() -> None:
    query = Query("a b/", "/", "", 2)
    found = Page([Object("a b/c+d.é", 5, "tag", 1_700_000_000.9)], ["a b/e/"], True, "a b/e/")
    root = ElementTree.fromstring(
        answers.list_xml("models", {"list-type": "2", "encoding-type": "url", "prefix": "a b/"}, query, found)
    )
    space = "{http://s3.amazonaws.com/doc/2006-03-01/}"
    assert root.tag == f"{space}ListBucketResult"
    assert [root.findtext(space + name) for name in ("Name", "Prefix", "KeyCount", "MaxKeys", "IsTruncated")] == [
        "models", "a%20b/", "2", "2", "true",
    ]  # fmt: skip
    assert root.findtext(f"{space}Contents/{space}Key") == "a%20b/c%2Bd.%C3%A9"
    assert root.findtext(f"{space}Contents/{space}LastModified") == "2023-11-14T22:13:20.000Z"
    assert root.findtext(f"{space}CommonPrefixes/{space}Prefix") == "a%20b/e/"
    assert after_of(root.findtext(f"{space}NextContinuationToken") or "") == "a b/e/"
    first = ElementTree.fromstring(answers.list_xml("models", {}, query, found))
    assert first.findtext(f"{space}NextMarker") == "a b/e/"
    assert first.findtext(f"{space}KeyCount") is None


def test_every_error_has_the_status_of_s3() -> None:
    for code, status in STATUSES.items():
        root = ElementTree.fromstring(answers.error_xml(S3Error(code, "<&>"), "/a&b", "1"))
        assert (root.tag, root.findtext("Code"), root.findtext("Message")) == ("Error", code, "<&>")
        assert 400 <= status < 600


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("bucket", "root"),
    [
        ("models", "s3://models"),
        ("my.models-2", "s3://my.models-2"),
        ("gs--bucket", "gs://bucket"),
        ("az--container", "az://container"),
        ("hf--meta-llama--Llama-3.1-8B", "hf://meta-llama/Llama-3.1-8B"),
    ],
)
def test_a_bucket_is_that_of_its_origin_and_the_other_way_round(bucket: str, root: str) -> None:
    assert names.root_of(bucket) == root
    assert names.bucket_of(f"{root}/folder" if not root.startswith("hf") else root) == bucket


@pytest.mark.parametrize(
    "bucket", ["", "a", "a/b", "..", "-a", "a" * 256, "a b", "weightd", "hf--org", "a\x00b", "bücket"]
)
def test_what_can_be_no_bucket_is_not_there(bucket: str) -> None:
    with pytest.raises(S3Error) as refused:
        names.root_of(bucket)
    assert refused.value.code == "NoSuchBucket"


@pytest.mark.parametrize("key", ["a/../b", "../../etc/passwd", "a//b", "./a", "a\x00b", "a\nb", "é" * 600, "\udc80"])
def test_what_can_be_no_key_is_asked_of_nobody(key: str) -> None:
    with pytest.raises(S3Error):
        names.check_key(key)
    for fine in ("a", "a/b", "a/", "a..b", "a b+c%20é"):
        names.check_key(fine)
