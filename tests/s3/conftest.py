"""Daemons with an S3 endpoint, and clients of it that know of no daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from safetensors.numpy import save_file

from tests.checkpoint_files import write_index
from tests.fault_proxy import FaultProxy
from tests.servers import Daemon, SeaweedFS, free_ports

Start = Callable[..., Daemon]
MiB = 1 << 20
SHARDS = tuple(f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


class Endpoint:
    """A daemon with an S3 endpoint in front of an object store, and boto3 clients of both."""

    def __init__(
        self, start: Start, origin: str, env: dict[str, str], *arguments: str, address: str | None = None
    ) -> None:
        self.address = address or f"127.0.0.1:{free_ports(1)[0]}"
        self.url = f"http://{self.address}"
        self.daemon = start("--s3-listen", self.address, *arguments, env={**env, "AWS_ENDPOINT_URL": origin})
        self.env = {**env, "AWS_ENDPOINT_URL": self.url}
        self.s3 = client(self.url)

    def get(self, key: str, **asked: Any) -> bytes:
        data: bytes = self.s3.get_object(Bucket="models", Key=key, **asked)["Body"].read()
        return data

    def sent(self, outcome: str) -> float:
        """Bytes that it has sent, by where they came from."""
        line = f'weightd_s3_sent_bytes_total{{outcome="{outcome}"}} '
        return next(float(found[len(line) :]) for found in self.daemon.get("/metrics").splitlines() if line in found)


def client(url: str, access: str = "any", secret: str = "any", **options: Any) -> Any:
    """boto3 at an endpoint, which tries nothing twice."""
    style = options.pop("addressing_style", "path")
    config = Config(
        s3={"addressing_style": style},
        signature_version="s3v4",
        retries={"max_attempts": 1, "mode": "standard"},
        **options,
    )
    return boto3.client(
        "s3", endpoint_url=url, aws_access_key_id=access, aws_secret_access_key=secret, region_name="us-east-1",
        config=config,
    )  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of tensors that are no multiple of anything, and what is beside them."""
    folder = tmp_path_factory.mktemp("model")
    rng = numpy.random.default_rng(15)
    for number, shard in enumerate(SHARDS):
        tensors = {f"w{number}.{i}": rng.standard_normal((611 + i, 1001), numpy.float32) for i in range(5)}
        tensors[f"w{number}.empty"] = numpy.zeros((0, 3), numpy.float32)
        tensors[f"w{number}.scale"] = numpy.float32([number])
        save_file(tensors, folder / shard)
    write_index(folder)
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "tokenizer.json").write_text("{}" * 1000)
    return folder


@pytest.fixture
def origin(s3: SeaweedFS) -> Iterator[FaultProxy]:
    """The object store, behind a proxy that sees every request."""
    with FaultProxy(s3.url) as proxy:
        yield proxy


def weight_bytes(origin: FaultProxy) -> int:
    """Bytes of weights that were asked of an object store, headers left out."""
    return sum(seen.nbytes for seen in list(origin.seen) if seen.nbytes > 128 << 10)


def refusal(of: Any, **asked: Any) -> tuple[str, int]:
    """The code and status that boto3 is refused with."""
    with pytest.raises(ClientError) as refused:
        of(**asked)
    answer = refused.value.response
    return answer["Error"]["Code"], answer["ResponseMetadata"]["HTTPStatusCode"]
