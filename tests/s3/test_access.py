"""Who may ask over S3: keys, hosts, settings."""

from __future__ import annotations

import http.client
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.s3.conftest import SHARDS, Endpoint, Start, client, refusal
from tests.servers import Daemon, SeaweedFS, free_ports, until


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


def test_it_listens_on_ipv6_as_well(start_daemon: Start, s3: SeaweedFS, model: Path) -> None:
    s3.upload(model, "s3-ipv6")
    (port,) = free_ports(1, host="::1")
    here = Endpoint(start_daemon, s3.url, s3.env, address=f"[::1]:{port}")
    assert here.get(f"s3-ipv6/{SHARDS[0]}") == (model / SHARDS[0]).read_bytes()
    assert here.s3.list_objects_v2(Bucket="models", Prefix="s3-ipv6/")["KeyCount"] == 5
    with socket.socket(socket.AF_INET6) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("::1", port))
        connection.sendall(f"GET /models/s3-ipv6/{SHARDS[0]} HTTP/1.1\r\nHost: [::1]:{port}\r\n\r\n".encode())
        (lease,) = until(here.daemon.client.leases, "it is sent under a lease")
        assert lease["client"] == f"[::1]:{connection.getsockname()[1]}"
