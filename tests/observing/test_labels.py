"""Label values of what comes from outside."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from weightd.daemon.observing.labels import OTHER, Named, label, model_label

SIGNED = "X-Amz-Credential=AKIAEXAMPLE&X-Amz-Signature=5ec2e7"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://bucket/llama", "s3://bucket/llama"),
        (f"s3://bucket/llama?{SIGNED}", "s3://bucket/llama"),
        (f"az://container/llama#{SIGNED}", "az://container/llama"),
        ("s3://AKIAEXAMPLE:5ec2e7@bucket/llama", "s3://bucket/llama"),
        ("gs://5ec2e7@bucket?token=5ec2e7", "gs://bucket"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("file:///models/what? really#1@home", "file:///models/what? really#1@home"),
    ],
)
def test_a_models_label_is_its_uri_without_what_may_be_a_secret(uri: str, shown: str) -> None:
    assert model_label(uri) == shown


def test_long_values_are_cut_and_still_differ() -> None:
    first, second = (model_label("s3://bucket/" + "x" * 1000 + end + "/model-7b") for end in ("a", "b"))
    assert len(first) <= 120
    assert first.startswith("s3://bucket/")
    assert "/model-7b~" in first
    assert first != second


@settings(max_examples=50)
@given(st.text(max_size=300))
def test_any_text_makes_a_value_that_prometheus_reads_back(text: str) -> None:
    registry = CollectorRegistry()
    Gauge("g", "", ["model"], registry=registry).labels(model_label(f"s3://{text}")).set(1)
    (family,) = text_string_to_metric_families(generate_latest(registry).decode())
    (sample,) = family.samples
    assert sample.labels["model"] == model_label(f"s3://{text}")
    assert len(sample.labels["model"]) <= 120


def test_only_so_many_names_have_series_of_their_own_and_keep_them() -> None:
    named = Named(2)
    assert [named(name) for name in ("a", "b", "c", "a", "c", "b")] == ["a", "b", OTHER, "a", OTHER, "b"]


def test_a_lone_surrogate_is_no_reason_for_an_exposition_to_fail() -> None:
    label("\udce4").encode()
