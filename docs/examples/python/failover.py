#!/usr/bin/env python3
"""Publishes to a cluster one message after the other, whatever happens to its nodes, and checks that none is lost.

usage: failover.py HOST:PORT[,HOST:PORT...] STREAM SECONDS

The stream must be there and empty. What a program needs to ride through the end of a node is little: a message id, so
that a call can be repeated when its outcome is not known; the addresses of the other nodes, which any node tells; and
the leader's, which answers tell, to save a hop. Meanwhile kill nodes, as long as a majority is left.
"""

import sys
import time
import uuid

import grpc

from example import admin, admin_rpc, publish, publish_rpc, read, read_rpc, types

# gRPC tries a connection that broke again after pauses of up to two minutes, unless it is told otherwise.
OPTIONS = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 500)]
# What did not happen, or may have happened and is known by its id: try again, elsewhere.
AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
CALL_SECONDS = 5
PATIENCE_SECONDS = 60


class Cluster:
    """The nodes of a cluster: one is used until it fails, then the next."""

    def __init__(self, addresses):
        self.addresses = list(addresses)
        self.current = self.addresses[0]
        self.channels = {}

    def channel(self):
        if self.current not in self.channels:
            self.channels[self.current] = grpc.insecure_channel(self.current, options=OPTIONS)
        return self.channels[self.current]

    def call(self, call):
        """Makes a call that may be repeated, until it succeeds."""
        begun, pause = time.monotonic(), 0.01
        while True:
            try:
                answer = call(self.channel())
                return answer
            except grpc.RpcError as error:
                if error.code() not in AGAIN or time.monotonic() - begun > PATIENCE_SECONDS:
                    raise
            at = self.addresses.index(self.current) if self.current in self.addresses else -1
            self.current = self.addresses[(at + 1) % len(self.addresses)]
            time.sleep(pause)
            pause = min(pause * 2, 0.2)

    def learn(self):
        """Takes the addresses of all nodes, after those that were given."""
        info = self.call(lambda c: admin_rpc.ServerServiceStub(c).GetServerInfo(admin.GetServerInfoRequest(), timeout=2))
        told = [node.client_address for node in info.nodes if node.client_address]
        self.addresses += [address for address in told if address not in self.addresses]

    def follow(self, leader):
        """Goes to the leader's node next time."""
        if leader.address in self.addresses:
            self.current = leader.address


def main():
    cluster, stream, seconds = Cluster(sys.argv[1].split(",")), sys.argv[2], float(sys.argv[3])
    cluster.learn()
    print(f"publishing to {stream}; nodes: {', '.join(cluster.addresses)}", flush=True)
    count, slowest, run = 0, 0.0, uuid.uuid4().hex
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        message = types.Message(subject=stream, payload=str(count).encode(), message_id=f"{run}-{count}")
        request = publish.PublishRequest(stream=stream, messages=[message])
        begun = time.monotonic()
        answer = cluster.call(lambda c: publish_rpc.PublishServiceStub(c).Publish(request, timeout=CALL_SECONDS))
        slowest = max(slowest, time.monotonic() - begun)
        if answer.HasField("leader"):
            cluster.follow(answer.leader)
        count += 1
    print(f"published {count} messages without an error; the slowest took {slowest:.2f} s", flush=True)

    found, start = [], read.StartPosition(beginning=read.Beginning())
    while True:
        request = read.FetchRequest(stream=stream, start=start, max_messages=1000)
        page = cluster.call(lambda c: read_rpc.ReadServiceStub(c).Fetch(request, timeout=CALL_SECONDS))
        found += [int(m.message.payload) for m in page.messages]
        if page.caught_up:
            break
        start = read.StartPosition(cursor=page.cursor)
    assert found == list(range(count)), "what was acknowledged is not what is there"
    print(f"read {len(found)} messages back: each once, in order", flush=True)


if __name__ == "__main__":
    main()
