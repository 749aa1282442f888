"""A gateway in Python: attaches to a node, says who is connected, prints what it is told to hand over, and acknowledges it.

    pip install grpcio grpcio-tools
    python3 -m grpc_tools.protoc -Iproto --python_out=. --grpc_python_out=. proto/mpim/{common,presence,gateway}.proto
    PYTHONPATH=. python3 examples/gateway.py gw-1:7000 42 43 --node 127.0.0.1:6000 --node 127.0.0.1:6002

It keeps its epoch when a stream ends and goes on with it on the next node, so its users stay online meanwhile. Only if the
node says that its life is over (CODE_FENCED) does it begin a new one and bind everybody again.
"""
import argparse
import itertools
import queue
import random
import threading
import time

import grpc
from mpim import common_pb2 as codes, gateway_pb2 as gw, gateway_pb2_grpc as calls, presence_pb2 as presence


def attach(node, addr, epoch, users, since):
    """Serves one stream to its end. Returns the epoch to go on with; 0: begin a new life."""
    frames = queue.Queue()
    with grpc.insecure_channel(node) as channel:
        hello = gw.RegisterGatewayReq(gateway_addr=addr, gateway_epoch=epoch)
        frames.put(gw.GatewayFrame(seq=1, hello=hello))
        answers = calls.GatewayServiceStub(channel).Attach(iter(frames.get, None))
        welcome = next(answers).welcome
        if welcome.result.code != codes.OK:
            print(f"refused: {welcome.result.msg}")
            return 0
        print(f"attached to {node} as {addr} with epoch {welcome.gateway_epoch}")
        stopped = threading.Event()
        beats = threading.Thread(target=beat, args=(frames, welcome.heartbeat_interval_ms / 1000, len(users), stopped))
        beats.start()
        try:
            if welcome.gateway_epoch != epoch:
                for seq, user in zip(itertools.count(2), users):
                    ago = int((time.monotonic() - since) * 1000)
                    bind = presence.BindRouteReq(user_id=user, conn_id=f"{addr}-{user}", connected_ms_ago=ago)
                    frames.put(gw.GatewayFrame(seq=seq, bind=bind))
            for frame in answers:
                take(frame, frames)
                if frame.heartbeat.result.code == codes.CODE_FENCED:
                    return 0
        except grpc.RpcError as error:
            print(f"the stream has ended: {error.details()}")
        finally:
            stopped.set()
            frames.put(None)
            beats.join()
        return welcome.gateway_epoch


def take(frame, frames):
    """Does what a node says."""
    kind = frame.WhichOneof("body")
    if kind == "delivery":
        delivery = frame.delivery
        print(f"user {delivery.user_id}: {delivery.message or delivery.payload}")
        if delivery.wants_ack:
            ack = gw.DeliveryAck(delivery_id=delivery.delivery_id, user_id=delivery.user_id, device_id="")
            frames.put(gw.GatewayFrame(ack=ack))
    elif kind == "kick":
        print(f"close the connection of user {frame.kick.user_id} ({frame.kick.route_key})")
    elif kind == "bound" and frame.bound.result.code != codes.OK:
        print(f"not bound: {frame.bound.result.msg}")


def beat(frames, every, connections, stopped):
    while not stopped.wait(every):
        frames.put(gw.GatewayFrame(seq=2**32, heartbeat=gw.HeartbeatReq(connections=connections)))


def main():
    args = argparse.ArgumentParser(description="A gateway: attaches, binds USERs, prints and acknowledges")
    args.add_argument("addr", help="where this gateway is found; its name")
    args.add_argument("users", metavar="USER", type=int, nargs="+")
    args.add_argument("--node", action="append", help="host:port of a node; may be given for each node")
    args = args.parse_args()
    epoch, since = 0, time.monotonic()
    for node in itertools.cycle(args.node or ["127.0.0.1:6000"]):
        try:
            epoch = attach(node, args.addr, epoch, args.users, since)
        except grpc.RpcError as error:
            print(f"{node}: {error.details()}")
        time.sleep(random.uniform(0.1, 0.5))


if __name__ == "__main__":
    main()
