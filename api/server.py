"""The daemon process: sockets, node, lease server and HTTP server put together, run until a signal ends them."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal

from weightd.api.app import create_app
from weightd.api.gate import rules
from weightd.api.peering import Peering, open_fleet
from weightd.api.probes import Port, health_routes, metrics_routes
from weightd.api.uvicorn_server import Server
from weightd.daemon import lasting
from weightd.daemon.addresses import parse_listen
from weightd.daemon.checkpoints.cache import Cache
from weightd.daemon.devices.cpu import held_bytes
from weightd.daemon.devices.discovery import open_devices
from weightd.daemon.devices.quarantine import Quarantine
from weightd.daemon.errors import InvalidRequest
from weightd.daemon.keeper import supervisor
from weightd.daemon.keeper.deposits import Deposits
from weightd.daemon.keeper.supervisor import LISTEN, LOCK
from weightd.daemon.lending.credentials import AllowedPeers
from weightd.daemon.lending.entrance import Entrance
from weightd.daemon.lending.lease_socket import LeaseServer
from weightd.daemon.lending.listeners import Listeners
from weightd.daemon.lending.token import forget_token, own_token
from weightd.daemon.node.gauges import KeeperGauges, NodeGauges
from weightd.daemon.node.preload import Preload, read
from weightd.daemon.node.preloading import Preloading
from weightd.daemon.node.service import Node
from weightd.daemon.observing import logs
from weightd.daemon.observing.metrics import Metrics
from weightd.daemon.peers.moving.movers import Movers, unavailable
from weightd.daemon.peers.pulling.for_stages import Pulling
from weightd.daemon.redaction import redacted
from weightd.daemon.s3.answering import Answering
from weightd.daemon.s3.asked import Access
from weightd.daemon.s3.bodies import Bodies
from weightd.daemon.s3.endpoint import Endpoint
from weightd.daemon.s3.maps import Maps
from weightd.daemon.s3.objects import Objects
from weightd.daemon.s3.origins import Origins
from weightd.daemon.s3.signatures import Keys
from weightd.daemon.settings import Settings
from weightd.daemon.sources import aws
from weightd.daemon.sources.uris import Allow
from weightd.daemon.stages.residency import Residency
from weightd.ipc import CudaError, cuda
from weightd.ipc.runtime_dir import API_SOCKET, LEASE_SOCKET

log = logging.getLogger(__name__)

_CONNECTIONS = 2048
"""To the API at the same time, over TCP and over the Unix socket each."""
_STOP_DEADLINE = 10.0
"""Seconds that a clean stop may take; stalled native reads are left to the kernel after it."""


def serve(settings: Settings) -> int:
    """Run the daemon. Returns the exit code. Raises OSError and ValueError before it listens."""
    logs.configure(settings.log_level, settings.log_format)
    _raise_file_limit()
    deposits = Deposits.inherited()
    held = deposits.collect()
    quarantine = Quarantine(deposits, held)
    capacity = {name: int(size) for name, size in settings.capacity.items()}
    devices = open_devices(capacity, settings.cuda_limits, settings.host_fill, held=held_bytes(held.values()))
    lasting.before_the_end(lambda reason: deposits.dying(redacted(reason)))
    # From here on: GPUs that err as they are looked for are not used, and no reason to end.
    cuda.on_sticky(lambda error: _crash(quarantine, error))
    for device in devices.values():
        device.quarantined = quarantine.reason(device.uuid)
    allow = Allow(settings.allow)
    if settings.s3_listen:
        aws.check_not_itself(settings.s3_listen)
    # Without a keeper, which has locked it, the directory is this process's own to lock.
    lock = held.pop(LOCK, None) or supervisor.lock(str(settings.runtime_dir))
    sockets = {name: held.pop(name) for name in list(held) if name.startswith(LISTEN)}
    listeners = Listeners(settings.runtime_dir, deposits, sockets)
    try:
        over_http = [listeners.unix(API_SOCKET)]
        if settings.listen:
            over_http.append(listeners.tcp(settings.listen))
        peer_listener = listeners.tcp(settings.peer_listen) if settings.peer_listen and not unavailable() else None
        probed = {
            name: (routes, listeners.tcp(address))
            for name, routes, address in (
                ("health", health_routes, settings.health_listen),
                ("metrics", metrics_routes, settings.metrics_listen),
            )
            if address
        }
        s3_listener = listeners.tcp(settings.s3_listen) if settings.s3_listen else None
        lease_listener = listeners.unix(LEASE_SOCKET)
        own = own_token(settings.runtime_dir) if settings.listen and settings.token is None else None
    except OSError:
        listeners.close()
        raise
    listeners.drop_others()
    if own is None:
        forget_token(settings.runtime_dir)
    peers = AllowedPeers(frozenset(settings.peer_uids), frozenset(settings.peer_gids))

    async def run() -> bool:
        loop = asyncio.get_running_loop()
        metrics = Metrics()
        residency = Residency(
            devices,
            deposits,
            metrics,
            lease_grace=settings.lease_grace,
            max_leases_per_user=settings.max_leases_per_user,
            peer_grace=settings.peer_grace,
        )
        cache = Cache(settings.cache_dir, int(settings.cache_bytes))
        fleet, directory = open_fleet(settings, metrics)
        movers = Movers()
        node = Node(
            devices,
            residency=residency,
            deposits=deposits,
            allow=allow,
            cache=cache,
            fill_limits=settings.fill_limits,
            limits=settings.node_limits,
            metrics=metrics,
            fleet=fleet,
            directory=directory,
            peers=Pulling(fleet, movers) if fleet else None,
        )
        metrics.watch(NodeGauges(node, metrics.wall_seconds))
        metrics.watch(KeeperGauges(settings.runtime_dir if deposits.kept else None))
        node.adopt(held, quarantine)
        node.preload = _preload(settings.preload)
        expiry = lasting.lasting(residency.expire(), "evicting what nobody has used for long")
        entrance = Entrance(metrics)
        leases = LeaseServer(node, lease_listener, peers, settings.max_leases, entrance)
        app = create_app(
            node,
            peers=peers,
            token=settings.token.get_secret_value() if settings.token else None,
            own_token=own,
            folder=settings.runtime_dir,
            listen_host=parse_listen(settings.listen)[0] if settings.listen else "",
        )
        server = Server(
            app,
            entrance,
            "api",
            rules(metrics, _CONNECTIONS, admitted=peers, refusals=node.refusals),
            timeout_graceful_shutdown=2,
            on_end=app.state.feed.close,
        )
        stop = _Stop(server, node, deposits, settings.on_stop)
        tidying = asyncio.create_task(node.tidy_cache())
        peering = None
        if fleet is not None and directory is not None:
            peering = Peering(node, settings, directory, fleet, movers, peer_listener, entrance)
            await peering.start()
        ports = [Port(node, entrance, name, routes(node), listener) for name, (routes, listener) in probed.items()]
        for port in ports:
            port.start()
        s3 = None
        if s3_listener is not None:
            s3 = open_endpoint(settings, node, allow)
            s3.open(entrance, s3_listener)
        preloading = Preloading(node)
        preloading.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.signalled)
        if deposits.kept:
            loop.add_reader(deposits.fileno(), stop.said)
        if deposits.stop_ordered:
            stop.ordered()
        log.info("weightd listens on %s%s", settings.runtime_dir, f" and {settings.listen}" if settings.listen else "")
        metrics.serving()
        deposits.up()
        await server.serve(sockets=over_http)
        for port in ports:
            await port.close()
        if peering is not None:
            await peering.close()
        if not stop.drops:
            log.info("making room for the next daemon")
            node.hand_over()
            quarantine.lift()
            logging.shutdown()
            os._exit(0)  # whatever threads still write, the keeper holds
        expiry.cancel()
        tidying.cancel()
        if s3 is not None:
            s3.close()
        await leases.close()
        listeners.close()
        await preloading.close()
        try:
            await asyncio.wait_for(node.close(), _STOP_DEADLINE)
        except TimeoutError:
            log.warning("native reads have not ended within %.0f s: leaving them to the kernel", _STOP_DEADLINE)
            return False
        return True

    clean = asyncio.run(run())
    os.close(lock)
    log.info("weightd has stopped")
    if not clean:
        logging.shutdown()
        os._exit(0)  # threads inside native code would keep the interpreter waiting
    return 0


def open_endpoint(settings: Settings, node: Node, allow: Allow) -> Endpoint:
    """The S3 endpoint, as the settings have it."""
    secret = settings.s3_secret_key
    keys = Keys(settings.s3_access_key, secret.get_secret_value()) if secret else None
    origins = Origins(allow)
    objects = Objects(node, origins, allow)
    maps = Maps(node.cache, origins, allow)
    bodies = Bodies(node, objects, origins, maps, absent=settings.s3_absent, device=settings.s3_device)
    host = parse_listen(settings.s3_listen)[0]
    access = Access(
        keys, tuple(dict.fromkeys(("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host.lower())))
    )
    return Endpoint(
        Answering(objects, bodies, origins), access, node.metrics, threads=min(4, max(2, (os.cpu_count() or 1) // 2))
    )


class _Stop:
    """What ends the daemon: the keeper's order, or a signal.

    A signal to a daemon that has a keeper makes room for the next one, which adopts everything; without a keeper it is
    an order as well.
    """

    def __init__(self, server: Server, node: Node, deposits: Deposits, on_stop: str) -> None:
        self._server = server
        self._node = node
        self._deposits = deposits
        self._on_stop = on_stop
        self.drops = False
        """Whether the weights go with it."""

    def signalled(self) -> None:
        if self._deposits.kept:
            self._server.end()
        else:
            self.ordered()

    def said(self) -> None:
        if not self._deposits.listen():
            asyncio.get_running_loop().remove_reader(self._deposits.fileno())
        if self._deposits.stop_ordered:
            self.ordered()

    def ordered(self) -> None:
        holders = self._node.residency.leases.holders()
        if holders and self._on_stop == "refuse":
            log.warning("not stopping while weights are leased, by %s (WEIGHTD_ON_STOP=refuse)", ", ".join(holders))
            self._deposits.refuse_stop()
            return
        self.drops = True
        self._deposits.agree_to_stop()
        self._server.end()


def _preload(setting: str) -> Preload:
    """What is to be staged; a daemon that cannot read it adopts what there is, and is not ready."""
    try:
        return Preload(read(setting))
    except InvalidRequest as error:
        log.error("%s", error)
        return Preload([], str(error))


def _crash(quarantine: Quarantine, error: CudaError) -> None:
    """End at once: nothing that this process does with that GPU can work any more, and the next one adopts it all."""
    quarantine.failed(error.uuid, redacted(str(error)))
    lasting.end(f"the GPU has failed, and with it this process: {error}")


def _raise_file_limit() -> None:
    """As many descriptors as the system lets us have: one a shard that is read, one a segment, one a lease."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
