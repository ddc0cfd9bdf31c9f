"""S3 is asked where and how boto3 asks it, by listing and by reading alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from tests.conftest import command
from tests.image.tls import Terminator
from tests.servers import Daemon, SeaweedFS
from tests.sources.s3_asked import Front, front
from weightd.daemon.doctor.s3 import examine_s3
from weightd.daemon.errors import DaemonError
from weightd.daemon.sources import aws

KEYS = {"AWS_ACCESS_KEY_ID": "ENVKEY", "AWS_SECRET_ACCESS_KEY": "secret"}
DEAD = "http://127.0.0.1:9"
UNDER = {"AWS_EC2_METADATA_DISABLED": "true"}
"""What every row has: there is no metadata service here to ask, and looking for it takes seconds."""


@dataclass(frozen=True)
class Row:
    """One way to say how S3 is asked. ``{url}`` is where it is, ``{home}`` a folder with these files in it."""

    name: str
    env: dict[str, str]
    key: str = "ENVKEY"
    region: str = "us-east-1"
    config: str = ""
    credentials: str = ""
    endpoint_origin: str = ""
    in_boto3: bool = True


SHARED = "[default]\naws_access_key_id = FILEKEY\naws_secret_access_key = s\n"
FLEET = "[fleet]\naws_access_key_id = FLEETKEY\naws_secret_access_key = s\n"
SERVICES = "[services mine]\ns3 =\n    endpoint_url = {url}\n"
ROWS = [
    Row("the variable of all services", {**KEYS, "AWS_ENDPOINT_URL": "{url}"}, endpoint_origin="AWS_ENDPOINT_URL"),
    Row("the variable of S3", {**KEYS, "AWS_ENDPOINT_URL_S3": "{url}"}, endpoint_origin="AWS_ENDPOINT_URL_S3"),
    Row("S3's before that of all", {**KEYS, "AWS_ENDPOINT_URL_S3": "{url}", "AWS_ENDPOINT_URL": DEAD}),
    Row("a slash at the end", {**KEYS, "AWS_ENDPOINT_URL": "{url}/"}),
    Row("a variable before a profile", {**KEYS, "AWS_ENDPOINT_URL": "{url}"},
        config=f"[default]\nendpoint_url = {DEAD}\n"),
    Row("a profile's endpoint", {}, "FILEKEY", "eu-north-1",
        "[default]\nendpoint_url = {url}\nregion = eu-north-1\n", SHARED, "profile default"),
    Row("a profile's services", {}, "FILEKEY",
        config=f"[default]\nservices = mine\nendpoint_url = {DEAD}\n{SERVICES}", credentials=SHARED,
        endpoint_origin="services mine"),
    Row("a named profile", {"AWS_PROFILE": "fleet"}, "FLEETKEY", "ap-south-1",
        f"[default]\nendpoint_url = {DEAD}\n[profile fleet]\nregion = ap-south-1\nendpoint_url = {{url}}\n",
        SHARED + FLEET, "profile fleet"),
    Row("keys of a profile in the config file", {"AWS_PROFILE": "fleet"}, "FLEETKEY",
        config="[profile fleet]\nendpoint_url = {url}\naws_access_key_id = FLEETKEY\naws_secret_access_key = s\n"),
    Row("keys of the environment before a profile's", {**KEYS, "AWS_PROFILE": "fleet"},
        config="[profile fleet]\nendpoint_url = {url}\n", credentials=FLEET),
    Row("a session", {**KEYS, "AWS_SESSION_TOKEN": "token", "AWS_ENDPOINT_URL": "{url}"}),
    Row("a process that gives keys", {"AWS_ENDPOINT_URL": "{url}"}, "MADEKEY",
        config=f"[default]\ncredential_process = {sys.executable} {{home}}/give.py\n"),
    Row("the region by its older name", {**KEYS, "AWS_ENDPOINT_URL": "{url}", "AWS_DEFAULT_REGION": "eu-west-1"},
        region="eu-west-1"),
    Row("the region by its newer name", {**KEYS, "AWS_ENDPOINT_URL": "{url}", "AWS_REGION": "eu-west-2",
        "AWS_DEFAULT_REGION": "eu-west-1"}, region="eu-west-2", in_boto3=False),
    Row("no keys", {"AWS_ENDPOINT_URL": "{url}"}, "", ""),
    Row("no signature though there are keys", {**KEYS, "AWS_ENDPOINT_URL": "{url}", "AWS_NO_SIGN_REQUEST": "true"},
        "", ""),
]  # fmt: skip


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Nothing of this machine's own configuration is seen; returns the folder of the row's."""
    for name in os.environ:
        if name.startswith(("AWS_", "RUNAI_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(aws, "_known", None)
    monkeypatch.setattr(aws, "_GIVEN_ADDRESSING", "")
    return tmp_path


def environment(row: Row, url: str, home: Path) -> dict[str, str]:
    """Write the row's files; returns its variables."""
    for name, content in (("config", row.config), ("credentials", row.credentials)):
        (home / name).write_text(content.format(url=url, home=home))
    made = {"Version": 1, "AccessKeyId": "MADEKEY", "SecretAccessKey": "s"}
    (home / "give.py").write_text(f"print({json.dumps(json.dumps(made))})")
    return UNDER | {name: value.format(url=url) for name, value in row.env.items()}


@pytest.fixture(scope="module")
def asked(s3: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    folder = tmp_path_factory.mktemp("asked")
    save_file({"w": numpy.arange(1 << 18, dtype=numpy.float32)}, folder / "model.safetensors")
    s3.upload(folder, "asked")
    with front(s3.url) as server:
        yield server


@pytest.fixture(scope="module")
def boto3() -> Any:
    return pytest.importorskip("boto3")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_way_to_say_where_s3_is_reaches_listing_reading_and_boto3(
    row: Row,
    alone: Path,
    asked: Front,
    boto3: Any,
    monkeypatch: pytest.MonkeyPatch,
    start_daemon: Callable[..., Daemon],
) -> None:
    for name, value in environment(row, asked.url, alone).items():
        monkeypatch.setenv(name, value)
    asked.asked.clear()
    server = start_daemon()
    record = server.stage("s3://models/asked")
    assert record["state"] == "ready", record["error"]
    with server.attach("s3://models/asked") as weights:
        assert weights["w"].sum() == numpy.arange(1 << 18, dtype=numpy.float32).sum()
    read, listed = ([each for each in asked.asked if each.native == native] for native in (True, False))
    assert read
    assert listed
    assert {(each.key, each.region) for each in asked.asked} == {(row.key, row.region)}
    assert {each.token for each in asked.asked} == {row.env.get("AWS_SESSION_TOKEN", "")}
    server.stop()

    asked.asked.clear()
    if row.in_boto3:
        unsigned = {} if row.key else {"config": boto3_unsigned()}
        client = boto3.session.Session().client("s3", **unsigned)
        assert client.list_objects_v2(Bucket="models", Prefix="asked")["KeyCount"] == 1
        assert {(each.key, each.region) for each in asked.asked} == {(row.key, row.region)}

    findings = {finding.what: finding.found for finding in examine_s3()}
    assert findings["endpoint s3://"].startswith(f"{asked.url} (")
    assert row.endpoint_origin in findings["endpoint s3://"]
    assert findings["credentials s3://"].startswith("signed" if row.key else "unsigned")


OWN = {
    "nothing said": {},
    "a region": {"AWS_DEFAULT_REGION": "eu-central-1"},
    "another partition": {"AWS_DEFAULT_REGION": "cn-north-1"},
    "dual stack": {"AWS_DEFAULT_REGION": "eu-central-1", "AWS_USE_DUALSTACK_ENDPOINT": "true"},
    "FIPS": {"AWS_DEFAULT_REGION": "us-gov-west-1", "AWS_USE_FIPS_ENDPOINT": "true"},
    "variables to be ignored": {
        "AWS_DEFAULT_REGION": "eu-central-1", "AWS_ENDPOINT_URL": DEAD, "AWS_ENDPOINT_URL_S3": DEAD,
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
    },
}  # fmt: skip


@pytest.mark.parametrize("env", OWN.values(), ids=OWN)
@pytest.mark.parametrize("config", ["", f"ignore_configured_endpoint_urls = true\nendpoint_url = {DEAD}\n"])
def test_awss_own_endpoints_are_those_of_boto3(
    env: dict[str, str], config: str, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**UNDER, **KEYS, **env}.items():
        monkeypatch.setenv(name, value)
    (alone / "config").write_text("[default]\n" + config)
    found, expected = aws.resolve(), boto3_client()
    # boto3 keeps to the global name of what is in us-east-1.
    assert found.endpoint.value == expected.meta.endpoint_url.replace("//s3.amazonaws", "//s3.us-east-1.amazonaws")
    assert found.region.value == expected.meta.region_name
    assert found.is_virtual("models")
    assert found.listing("models")["endpoint"] == found.endpoint.value.replace("https://", "https://models.")
    assert not found.is_virtual("models.with.dots")
    assert found.listing("models.with.dots")["endpoint"] == found.endpoint.value


@pytest.mark.parametrize("style", ["", "path", "virtual", "auto"])
@pytest.mark.parametrize(
    "endpoint", ["", "https://minio.test:9000", "https://minio.test/store", "http://127.0.0.1:9000"]
)
def test_a_bucket_is_named_where_boto3_names_it(
    style: str, endpoint: str, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**UNDER, **KEYS, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "cn-north-1"}.items():
        monkeypatch.setenv(name, value)
    (alone / "config").write_text(f"[default]\ns3 =\n    addressing_style = {style}\n" if style else "")
    expected = boto3_client().generate_presigned_url("get_object", Params={"Bucket": "models", "Key": "k"})
    listing = aws.resolve().listing("models")
    base = listing["endpoint"] if listing["virtual_hosted_style_request"] else listing["endpoint"] + "/models"
    assert base == expected.partition("?")[0].removesuffix("/k")


@pytest.mark.parametrize(("style", "asks"), [("path", "localhost"), ("virtual", "models.localhost")])
def test_listing_and_reading_name_a_bucket_in_the_same_place(
    style: str, asks: str, alone: Path, asked: Front, start_daemon: Callable[..., Daemon]
) -> None:
    port = asked.url.rpartition(":")[2]
    (alone / "config").write_text(
        f"[default]\ns3 =\n    addressing_style = {style}\nendpoint_url = http://localhost:{port}\n"
    )
    asked.asked.clear()
    server = start_daemon(env={**UNDER, **KEYS, "WEIGHTD_RETRY_DEADLINE": "1"})
    record = server.stage("s3://models/asked")
    # Of names below localhost some resolvers know none; what was asked, if anything was, was asked there.
    assert {each.host.partition(":")[0] for each in asked.asked} <= {asks}
    assert record["state"] == "ready" or (style == "virtual" and not asked.asked), record["error"]


@pytest.mark.parametrize("said", ["variable", "profile"])
def test_an_authority_of_ones_own_is_trusted_by_listing_and_reading(
    said: str, alone: Path, asked: Front, start_daemon: Callable[..., Daemon]
) -> None:
    command("openssl", "apt-get install openssl")
    terminator = Terminator(int(asked.url.rpartition(":")[2]), alone / "tls")
    env = {**UNDER, **KEYS, "AWS_ENDPOINT_URL": terminator.url}
    if said == "variable":
        env["AWS_CA_BUNDLE"] = str(terminator.authority)
    else:
        (alone / "config").write_text(f"[default]\nca_bundle = {terminator.authority}\n")
    try:
        record = start_daemon(env=env).stage("s3://models/asked")
    finally:
        terminator.close()
    assert record["state"] == "ready", record["error"]


def test_authorities_that_are_not_there_are_named(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**UNDER, **KEYS, "AWS_CA_BUNDLE": "/no/such.pem"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DaemonError, match=r"/no/such\.pem, from AWS_CA_BUNDLE"):
        aws.resolve().authorities()
    findings = {finding.what: finding for finding in examine_s3()}
    assert findings["authorities s3://"].level == "error"
    assert findings["credentials s3://"].level == "ok"


WRONG = {
    "a profile that is nowhere": ({"AWS_PROFILE": "nowhere"}, "", "credentials_refused", "nowhere"),
    "services that are nowhere": ({}, "[default]\nservices = gone\n", "credentials_refused", "'gone'"),
    "an endpoint without a scheme": ({"AWS_ENDPOINT_URL_S3": "minio:9000"}, "", "source_failed", "AWS_ENDPOINT_URL_S3"),
    "a profile's endpoint that is none": (
        {},
        "[default]\nendpoint_url = ftp://x\n",
        "source_failed",
        "profile default",
    ),
    "half of a key": ({"AWS_ACCESS_KEY_ID": "K"}, "", "credentials_refused", "AWS_SECRET_ACCESS_KEY"),
    "a file that is none": ({}, "[default\n", "credentials_refused", "config"),
    "a process that fails": ({}, "[default]\ncredential_process = false\n", "credentials_refused", "custom-process"),
}


@pytest.mark.parametrize(("env", "config", "code", "named"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_with_the_configuration_is_named(
    env: dict[str, str], config: str, code: str, named: str, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**UNDER, **env}.items():
        monkeypatch.setenv(name, value)
    (alone / "config").write_text(config)
    with pytest.raises(DaemonError, match=named) as refused:
        aws.resolve().keys()
    assert refused.value.code == code
    (finding,) = [finding for finding in examine_s3() if finding.level == "error"]
    assert named in finding.found
    assert finding.remedy


def test_what_is_found_is_kept_until_a_file_changes(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (alone / "credentials").write_text(SHARED)
    first = aws.resolve()
    assert aws.resolve() is first
    assert first.keys().access_key == "FILEKEY"
    assert "FILEKEY" not in repr(first)
    (alone / "credentials").write_text(SHARED.replace("FILEKEY", "OTHERKEY"))
    assert aws.resolve().keys().access_key == "OTHERKEY"


def test_that_there_are_no_keys_is_not_believed_for_ever(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    first = aws.resolve()
    assert first.signing == ("unsigned", "no credentials were found")
    assert aws.resolve() is first
    monkeypatch.setattr(aws.time, "monotonic", lambda: float("inf"))
    assert aws.resolve() is not first


def test_a_refusal_without_a_signature_says_that_there_was_none(
    alone: Path, s3: SeaweedFS, start_daemon: Callable[..., Daemon]
) -> None:
    with front(s3.url) as asked:
        asked.refuses = lambda each: not each.key
        server = start_daemon(env={**UNDER, "AWS_ENDPOINT_URL": asked.url})
        record = server.stage("s3://models/asked")
    assert record["error"]["code"] == "credentials_refused"
    assert "without a signature (no credentials were found)" in record["error"]["message"]


def test_keys_that_expire_while_a_stage_loads_are_replaced(
    alone: Path, s3: SeaweedFS, asked: Front, start_daemon: Callable[..., Daemon]
) -> None:
    # Each run gives other keys, which expire so soon that botocore asks again whenever it is asked.
    (alone / "give.py").write_text(
        "import datetime, json, pathlib\n"
        f"count = pathlib.Path({str(alone / 'count')!r})\n"
        "number = int(count.read_text()) + 1 if count.exists() else 1\n"
        "count.write_text(str(number))\n"
        "soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=12)\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'KEY{number}', 'SecretAccessKey': 's',"
        " 'Expiration': soon.isoformat()}))\n"
    )
    (alone / "config").write_text(f"[default]\ncredential_process = {sys.executable} {alone / 'give.py'}\n")
    with front(s3.url) as expiring:
        first: list[str] = []

        def refuses(each: Any) -> bool:
            if each.native and not first:
                first.append(each.key)
            return each.native and each.key in first

        expiring.refuses = refuses
        server = start_daemon(env={**UNDER, "AWS_ENDPOINT_URL": expiring.url})
        record = server.stage("s3://models/asked")
    assert record["state"] == "ready", record["error"]
    assert first
    assert {each.key for each in expiring.asked if each.native} > set(first)


def test_a_daemon_that_asks_no_object_store_imports_no_botocore() -> None:
    code = (
        "import sys, weightd.api.server, weightd.daemon.cli, weightd.daemon.sources.object_store;"
        "print([name for name in sys.modules if name.partition('.')[0] in ('botocore', 'boto3')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def boto3_client() -> Any:
    session: Any = pytest.importorskip("boto3").session.Session()
    return session.client("s3")


def boto3_unsigned() -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    return Config(signature_version=UNSIGNED)
