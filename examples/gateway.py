"""A gateway in Python: attaches to a node, says who is connected, prints what it is told to hand over, and acknowledges it.

    python3 -m venv venv && . venv/bin/activate
    pip install grpcio grpcio-tools
    python3 -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. proto/mpim/common.proto proto/mpim/presence.proto proto/mpim/gateway.proto
    PYTHONPATH=. python3 examples/gateway.py gw-1:7000 42 43 --node 127.0.0.1:6000

--token-file, --ca, --cert and --key say who it is, and which nodes it believes; files are read again for each stream.

With several --node it goes on with its epoch on the next one when a stream ends, so its users stay online meanwhile. Only if
a node says that its life is over (CODE_FENCED) does it begin a new one and bind everybody again. Ctrl-C ends it.
"""
import argparse
import functools
import itertools
import queue
import random
import threading
import time

import grpc
from mpim import common_pb2 as codes, gateway_pb2 as gw, gateway_pb2_grpc as calls, presence_pb2 as presence

print = functools.partial(print, flush=True)
# A node that says nothing, not even to a ping, is left for another one.
PINGS = [("grpc.keepalive_time_ms", 5000), ("grpc.keepalive_timeout_ms", 3000), ("grpc.http2.max_pings_without_data", 0)]
BEAT = 2**63  # as the seq of heartbeats; binds have that of their user


class Credentials:
    """What is shown to nodes, and what they have to show."""

    def __init__(self, args):
        self.token_file, self.files = args.token_file, (args.ca, args.key, args.cert)

    def channel(self, node):
        if not self.files[0]:
            return grpc.insecure_channel(node, PINGS)
        read = [open(file, "rb").read() if file else None for file in self.files]
        return grpc.secure_channel(node, grpc.ssl_channel_credentials(*read), PINGS)

    def metadata(self):
        return [("authorization", f"Bearer {open(self.token_file).read().strip()}")] if self.token_file else []


class Gateway:
    def __init__(self, addr, users, credentials):
        self.addr, self.users, self.since = addr, dict.fromkeys(users), time.monotonic()
        self.epoch, self.bound, self.credentials = 0, set(), credentials

    def attach(self, node):
        """Serves one stream to its end."""
        frames, stopped = queue.Queue(), threading.Event()
        with self.credentials.channel(node) as channel:
            stub, metadata = calls.GatewayServiceStub(channel), self.credentials.metadata()
            answers = stub.Attach(iter(frames.get, None), metadata=metadata)
            try:
                hello = gw.RegisterGatewayReq(gateway_addr=self.addr, gateway_epoch=self.epoch)
                frames.put(gw.GatewayFrame(seq=1, hello=hello))
                first = next(answers)
                if first.WhichOneof("body") != "welcome" or self.is_over(first.welcome.result):
                    return  # a node that stops says so at once
                welcome = first.welcome
                self.epoch = welcome.gateway_epoch
                print(f"attached to {node} as {self.addr} with epoch {self.epoch}")
                every = welcome.heartbeat_interval_ms / 1000
                threading.Thread(target=self.beat, args=(frames, every, stopped), daemon=True).start()
                for user in self.users.keys() - self.bound:
                    frames.put(self.bind(user))
                for frame in answers:
                    if not self.take(frame, frames):
                        return
            finally:
                stopped.set()
                frames.put(None)

    def bind(self, user):
        ago = int((time.monotonic() - self.since) * 1000)  # whoever has moved on meanwhile is not taken back
        bind = presence.BindRouteReq(user_id=user, conn_id=f"{self.addr}-{user}", connected_ms_ago=ago)
        return gw.GatewayFrame(seq=user, bind=bind)

    def beat(self, frames, every, stopped):
        while not stopped.wait(every):
            frames.put(gw.GatewayFrame(seq=BEAT, heartbeat=gw.HeartbeatReq(connections=len(self.users))))

    def take(self, frame, frames):
        """Does what a node says. False: attach again."""
        kind = frame.WhichOneof("body")
        if kind == "delivery":
            delivery = frame.delivery
            print(f"user {delivery.user_id}: {delivery.message or delivery.payload}")
            if delivery.wants_ack:
                ack = gw.DeliveryAck(delivery_id=delivery.delivery_id, user_id=delivery.user_id, device_id="")
                frames.put(gw.GatewayFrame(ack=ack))
        elif kind == "kick":
            self.kick(frame.kick, frames)
        elif kind == "bound":
            return self.take_bound(frame.seq, frame.bound, frames)
        elif kind == "heartbeat":
            return not self.is_over(frame.heartbeat.result)
        return kind != "drain" or frame.drain.reason == codes.REASON_DRAIN

    def take_bound(self, user, bound, frames):
        if bound.result.code == codes.OK:
            self.bound.add(user)
            print(f"user {user} is bound")
        elif bound.result.code == codes.CODE_UNAVAILABLE:
            threading.Timer(bound.retry_after_ms / 1000 + random.random(), frames.put, [self.bind(user)]).start()
        elif not self.is_over(bound.result):
            self.close(user, bound.result.msg)
        return self.epoch != 0

    def kick(self, kick, frames):
        user, why = kick.user_id, codes.Reason.Name(kick.reason)
        if kick.reason in (codes.REASON_DRAIN, codes.REASON_MIGRATE):
            # The route stays until the client is bound elsewhere: then this connection is kicked with REASON_REPLACED.
            to = " or ".join(kick.reconnect_to) or "anywhere"
            print(f"send user {user} to {to} after {kick.reconnect_after_ms} ms, close in {kick.close_after_ms} ms: {why}")
            if kick.close_after_ms > 0:
                return  # this one does not watch the clock: it is asked again, to close at once
            frames.put(gw.GatewayFrame(unbind=presence.UnbindRouteReq(user_id=user, route_key=kick.route_key)))
        self.close(user, why)

    def close(self, user, why):
        self.users.pop(user, None)
        self.bound.discard(user)
        print(f"close the connection of user {user}: {why}")

    def is_over(self, result):
        """Whether this life is over: the next attach begins a new one, in which everybody is bound again."""
        if result.code == codes.CODE_SUPERSEDED:
            raise SystemExit(f"another process is {self.addr}")
        if result.code != codes.CODE_FENCED:
            return False
        print(f"this life is over: {result.msg}")
        self.epoch, self.bound = 0, set()
        return True

    def deregister(self, nodes):
        for node in nodes:
            with self.credentials.channel(node) as channel:
                request = gw.DeregisterGatewayReq(gateway_addr=self.addr, gateway_epoch=self.epoch)
                stub, metadata = calls.GatewayServiceStub(channel), self.credentials.metadata()
                try:
                    return stub.DeregisterGateway(request, timeout=3, metadata=metadata)
                except grpc.RpcError as error:
                    print(f"{node}: {error.details()}")


def main():
    args = argparse.ArgumentParser(description="A gateway: attaches, binds USERs, prints and acknowledges")
    args.add_argument("addr", help="where this gateway is found; its name")
    args.add_argument("users", metavar="USER", type=int, nargs="+")
    args.add_argument("--node", action="append", help="host:port of a node; may be given for each node")
    args.add_argument("--token-file", help="the token to send")
    args.add_argument("--ca", help="CAs of the nodes' certificates: speak TLS")
    args.add_argument("--cert", help="the certificate to show, with --key")
    args.add_argument("--key")
    args = args.parse_args()
    gateway, nodes = Gateway(args.addr, args.users, Credentials(args)), args.node or ["127.0.0.1:6000"]
    try:
        for node in itertools.cycle(nodes):
            try:
                gateway.attach(node)
            except grpc.RpcError as error:
                print(f"{node}: {error.details()}")
            time.sleep(random.uniform(0.1, 0.5))  # not everybody at the same instant
    except KeyboardInterrupt:
        gateway.deregister(nodes)


if __name__ == "__main__":
    main()
