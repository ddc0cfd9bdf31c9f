"""How this node gets at S3: endpoint, region, addressing, keys, by the rules of the AWS SDKs and found in one place.

botocore, which the streamer's S3 plugin brings along, reads the environment, profiles and roles. What it finds goes to
listing (obstore) and to reading (the native streamer) alike: each would look for itself otherwise, by its own rules.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from weightd.daemon.addresses import is_local, parse_listen
from weightd.daemon.errors import CredentialsRefused, DaemonError, SourceFailed

ADDRESSING = "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"
_GIVEN_ADDRESSING = os.environ.get(ADDRESSING, "")
"""As this process was started with it: the native streamer is told by the same variable what was found."""
UNSIGNED = ("AWS_NO_SIGN_REQUEST", "AWS_SKIP_SIGNATURE", "RUNAI_STREAMER_S3_UNSIGNED")
"""Variables that each ask for requests without a signature, whatever keys there are."""
DEFAULT_REGION = "us-east-1"
_LOOK_AGAIN = 60.0
"""Seconds after which keys are looked for again where none were found: an instance's role may come late."""
_KEYS_LIVE = timedelta(minutes=5)
"""How long listing uses keys before it asks for them again: botocore renews those that expire well before they do."""
_ORIGINS = {
    "env": "AWS_ACCESS_KEY_ID",
    "shared-credentials-file": "{credentials}, profile {profile}",
    "config-file": "{config}, profile {profile}",
    "assume-role": "a role, {config}, profile {profile}",
    "assume-role-with-web-identity": "a role by web identity (AWS_WEB_IDENTITY_TOKEN_FILE, or profile {profile})",
    "custom-process": "credential_process, {config}, profile {profile}",
    "sso": "single sign-on, {config}, profile {profile}",
    "container-role": "the container's role (AWS_CONTAINER_CREDENTIALS_*)",
    "iam-role": "the instance's role",
}


class Found(NamedTuple):
    """A value, and where it came from, in words for people."""

    value: str
    origin: str


@dataclass(frozen=True)
class S3Access:
    """How S3 is asked. Never holds a secret itself: ``keys`` asks botocore, which renews what expires."""

    endpoint: Found
    """A URL without the bucket and without a slash at its end."""
    region: Found
    addressing: Found
    """``path`` or ``virtual``: whether a bucket is part of the path or of the host's name."""
    signing: Found
    """``signed`` or ``unsigned``."""
    ca_bundle: Found
    """A PEM file of authorities to trust as well; empty for none."""
    credentials: Any = field(default=None, repr=False, compare=False)

    def keys(self) -> Any:
        """``access_key``, ``secret_key`` and ``token`` as they are now; None: unsigned. Raises CredentialsRefused."""
        if self.credentials is None:
            return None
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return self.credentials.get_frozen_credentials()
        except (BotoCoreError, ClientError) as error:
            raise CredentialsRefused(f"AWS credentials, from {self.signing.origin}: {error}") from None

    def is_virtual(self, bucket: str) -> bool:
        """Whether requests name this bucket in the host: not where the host is an address, or the name cannot be."""
        from botocore.utils import check_dns_name

        return self.addressing.value == "virtual" and not _is_address(self.endpoint.value) and check_dns_name(bucket)

    def listing(self, bucket: str) -> dict[str, Any]:
        """What obstore's S3Store takes. Raises SourceFailed where the authorities cannot be read."""
        scheme, host, path, *_ = urlsplit(self.endpoint.value)
        virtual = self.is_virtual(bucket)
        endpoint = f"{scheme}://{bucket}.{host}{path}" if virtual else self.endpoint.value
        options: dict[str, Any] = {
            # Both: of its own accord it would take the second from the environment, which may be told to be ignored.
            "endpoint": endpoint,
            "aws_endpoint_url_s3": endpoint,
            "region": self.region.value,
            "virtual_hosted_style_request": virtual,
            "skip_signature": self.credentials is None,
        }
        if self.credentials is not None:
            options["credential_provider"] = self._provide
        return options

    def authorities(self) -> bytes | None:
        """The content of ``ca_bundle``; None for none. Raises SourceFailed."""
        if not self.ca_bundle.value:
            return None
        try:
            return Path(self.ca_bundle.value).read_bytes()
        except OSError as error:
            raise SourceFailed(f"{self.ca_bundle.value}, from {self.ca_bundle.origin}: {error.strerror}") from None

    def _provide(self) -> Any:
        keys = self.keys()
        return {
            "access_key_id": keys.access_key,
            "secret_access_key": keys.secret_key,
            "token": keys.token,
            "expires_at": datetime.now(UTC) + _KEYS_LIVE,
        }

    def reading(self) -> dict[str, str]:
        """What a native streamer takes, as the keys are now. Raises CredentialsRefused.

        Always an endpoint, and keys even where there are none: what it lacks, it looks for itself. Empty keys are
        what makes it sign nothing.
        """
        keys = self.keys()
        given = {
            "endpoint": self.endpoint.value,
            "region": self.region.value,
            "access_key_id": keys.access_key if keys else "",
            "secret_access_key": keys.secret_key if keys else "",
        }
        if keys and keys.token:
            given["session_token"] = keys.token
        return given


class _Known(NamedTuple):
    """What was resolved, of which configuration, and until when it holds (monotonic seconds)."""

    configuration: object
    access: S3Access
    until: float


_lock = Lock()
_known: _Known | None = None


def resolve() -> S3Access:
    """How S3 is asked, as environment and files say now. Raises CredentialsRefused, SourceFailed.

    May take seconds where only an instance's role is left to ask for; what was found is used until a variable or a
    file changes.
    """
    global _known
    configuration = _configuration(os.environ)
    with _lock:
        known = _known
        if known is None or known.configuration != configuration or time.monotonic() > known.until:
            access = _resolve(os.environ)
            found_none = access.credentials is None and access.signing.origin not in UNSIGNED
            until = time.monotonic() + _LOOK_AGAIN if found_none else float("inf")
            known = _known = _Known(configuration, access, until)
        return known.access


def _configuration(environ: Mapping[str, str]) -> object:
    variables = tuple(sorted(item for item in environ.items() if item[0].startswith("AWS_") or item[0] in UNSIGNED))
    return variables, environ.get("HOME"), tuple(_stamp(path) for path in _files(environ))


def _files(environ: Mapping[str, str]) -> tuple[str, str]:
    """Paths of the config and of the credentials file."""
    config = environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    credentials = environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    return os.path.expanduser(config), os.path.expanduser(credentials)


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _resolve(environ: Mapping[str, str]) -> S3Access:
    import botocore.session
    from botocore.exceptions import BotoCoreError, ClientError

    session = botocore.session.Session()
    try:
        profile: Mapping[str, Any] = session.get_scoped_config()
        origin = f"{_files(environ)[0]}, profile {session.profile or 'default'}"
        region = _region(environ, profile, origin)
        endpoint, custom = _endpoint(session, environ, profile, origin, region.value)
        credentials, signing = _credentials(session, environ)
        return S3Access(
            endpoint, region, _addressing(session, origin, custom), signing,
            _first(environ, profile, origin, ("AWS_CA_BUNDLE",), "ca_bundle") or Found("", "default"), credentials,
        )  # fmt: skip
    except (BotoCoreError, ClientError) as error:
        raise CredentialsRefused(f"AWS configuration: {error}: weightd doctor shows what is in use") from None


def _first(
    environ: Mapping[str, str], profile: Mapping[str, Any], origin: str, variables: tuple[str, ...], key: str
) -> Found | None:
    """The first of the variables that is set, else what the profile has."""
    for variable in variables:
        if environ.get(variable):
            return Found(environ[variable], variable)
    return Found(str(profile[key]), origin) if profile.get(key) else None


def _region(environ: Mapping[str, str], profile: Mapping[str, Any], origin: str) -> Found:
    # boto3 knows the second only; the AWS CLI and the other SDKs know both, in this order.
    found = _first(environ, profile, origin, ("AWS_REGION", "AWS_DEFAULT_REGION"), "region")
    return found or Found(DEFAULT_REGION, "default")


def _endpoint(
    session: Any, environ: Mapping[str, str], profile: Mapping[str, Any], origin: str, region: str
) -> tuple[Found, bool]:
    """The endpoint, and whether it is one that somebody has set. Raises SourceFailed."""
    found = None
    if not session.get_config_variable("ignore_configured_endpoint_urls"):
        found = _first(environ, {}, origin, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "")
        found = found or _service_endpoint(session, profile, origin)
        found = found or _first({}, profile, origin, (), "endpoint_url")
    if found is None:
        return _own_endpoint(session, region), False
    scheme, host, *_ = urlsplit(found.value)
    if scheme not in ("http", "https") or not host:
        raise SourceFailed(f"the S3 endpoint {found.value!r}, from {found.origin}, is no http:// or https:// URL")
    return Found(found.value.rstrip("/"), found.origin), True


def _service_endpoint(session: Any, profile: Mapping[str, Any], origin: str) -> Found | None:
    """Of the section ``[services NAME]`` that the profile names."""
    from botocore.exceptions import InvalidConfigError

    if not (name := profile.get("services")):
        return None
    section = session.full_config.get("services", {}).get(name)
    if not section:
        raise InvalidConfigError(error_msg=f"{origin} names the services section {name!r}, which does not exist")
    of_s3 = section.get("s3")
    url = of_s3.get("endpoint_url") if isinstance(of_s3, Mapping) else None
    return Found(url, f"{origin}, services {name}") if url else None


def _own_endpoint(session: Any, region: str) -> Found:
    """That of AWS itself, in its partition."""
    of_s3 = session.get_config_variable("s3") or {}
    dual = of_s3.get("use_dualstack_endpoint") or session.get_config_variable("use_dualstack_endpoint")
    kinds: dict[str, bool] = {"use_dualstack_endpoint": bool(dual)}
    kinds["use_fips_endpoint"] = bool(session.get_config_variable("use_fips_endpoint"))
    found = session.get_component("endpoint_resolver").construct_endpoint("s3", region, **kinds)
    return Found(f"https://{found['hostname']}", f"AWS's own of {region}")


def _addressing(session: Any, origin: str, custom: bool) -> Found:
    """As botocore: what was asked for, else by path at an endpoint that somebody has set, else by host."""
    if _GIVEN_ADDRESSING:
        return Found("path" if _GIVEN_ADDRESSING.lower() in ("0", "false") else "virtual", ADDRESSING)
    style = (session.get_config_variable("s3") or {}).get("addressing_style")
    if style in ("path", "virtual"):
        return Found(style, origin)
    return Found("path" if custom else "virtual", "default")


def _credentials(session: Any, environ: Mapping[str, str]) -> tuple[Any, Found]:
    for variable in UNSIGNED:
        if environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return None, Found("unsigned", variable)
    credentials = session.get_credentials()
    if credentials is None:
        return None, Found("unsigned", "no credentials were found")
    config, shared = _files(environ)
    words = _ORIGINS.get(credentials.method, credentials.method)
    return credentials, Found(
        "signed", words.format(config=config, credentials=shared, profile=session.profile or "default")
    )


def _is_address(endpoint: str) -> bool:
    try:
        ipaddress.ip_address(urlsplit(endpoint).hostname or "")
    except ValueError:
        return False
    return True


def check_not_itself(listen: str) -> None:
    """Raise ValueError where this node's own S3 endpoint, at HOST:PORT, is what it would ask for what it lacks."""
    try:
        found = resolve().endpoint
    except DaemonError:
        return  # whoever asks for something of S3 is told
    url = urlsplit(found.value)
    port = url.port or (443 if url.scheme == "https" else 80)
    if port != parse_listen(listen)[1]:
        return
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)}
    except OSError:
        return
    if any(is_local(address) for address in addresses):
        raise ValueError(
            f"the S3 endpoint that this daemon reads, {found.value} (from {found.origin}), is the one that it serves "
            f"(WEIGHTD_S3_LISTEN={listen}): it would ask itself: give the daemon the store's own, and engines this one"
        )
