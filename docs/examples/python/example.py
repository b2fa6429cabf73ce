#!/usr/bin/env python3
"""Creates a stream, publishes to it and reads it, with nothing but grpcio and the files in proto/.

usage: example.py [HOST:PORT] [STREAM]
"""

import importlib
import pathlib
import struct
import sys
import tempfile
import zlib

import grpc
import grpc_tools
from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[3] / "proto"


def generate():
    """Generates the modules of mainstem.v1 and puts them on the path."""
    out = tempfile.mkdtemp(prefix="mainstem-proto-")
    well_known = str(pathlib.Path(grpc_tools.__file__).parent / "_proto")
    files = [str(p.relative_to(PROTO)) for p in sorted((PROTO / "mainstem" / "v1").glob("*.proto"))]
    arguments = ["protoc", f"-I{PROTO}", f"-I{well_known}", f"--python_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(arguments + files) != 0:
        sys.exit("the protocol files could not be compiled")
    sys.path.insert(0, out)


generate()
types, publish, read, admin = (
    importlib.import_module(f"mainstem.v1.{name}_pb2") for name in ("types", "publish", "read", "admin")
)
publish_rpc, read_rpc, admin_rpc = (
    importlib.import_module(f"mainstem.v1.{name}_pb2_grpc") for name in ("publish", "read", "admin")
)


# ---- the batch format, docs/reference/batch.md (records with a subject and a payload only)


def encode_batch(messages):
    """Encodes (subject, payload) pairs, uncompressed."""
    body = b""
    for subject, payload in messages:
        name = subject.encode()
        content = bytes([0, len(name)]) + name + payload
        body += struct.pack("<II", len(content), zlib.crc32(content)) + content
    head = struct.pack("<2sBBIIII", b"MB", 1, 0, len(messages), len(body), len(body), 0)
    return head + struct.pack("<I", zlib.crc32(head + body)) + body


def decode_batch(batch):
    """The (subject, payload) pairs of an uncompressed batch whose records have neither key, id, time nor headers."""
    magic, version, codec, count, stored, _, _ = struct.unpack("<2sBBIIII", batch[:20])
    (crc,) = struct.unpack("<I", batch[20:24])
    body = batch[24:]
    if (magic, version, codec, stored) != (b"MB", 1, 0, len(body)) or crc != zlib.crc32(batch[:20] + body):
        raise ValueError("not a batch that this program knows")
    messages, at = [], 0
    for _ in range(count):
        length, crc = struct.unpack("<II", body[at : at + 8])
        content = body[at + 8 : at + 8 + length]
        if crc != zlib.crc32(content) or content[0] != 0:
            raise ValueError("a damaged record")
        end = 2 + content[1]
        messages.append((content[2:end].decode(), content[end:]))
        at += 8 + length
    return messages


# ---- four things to do with a stream


def publish_one_by_one(stub, stream, messages):
    """A call for each message; returns their sequences."""
    sequences = []
    for subject, payload in messages:
        message = types.Message(subject=subject, payload=payload)
        answer = stub.Publish(publish.PublishRequest(stream=stream, messages=[message]), timeout=10)
        sequences.append(answer.acks[0].sequence)
    return sequences


def publish_session(stub, stream, batches):
    """Batches over a session, without waiting in between; returns their acks. The stream has one shard."""

    def requests():
        yield publish.PublishSessionRequest(open=publish.PublishOpen(stream=stream))
        opened = next(answers).opened
        for sequence, messages in enumerate(batches, start=1):
            batch = publish.PublishBatch(
                shard=0, map_epoch=opened.map.epoch, producer_sequence=sequence, batch=encode_batch(messages)
            )
            yield publish.PublishSessionRequest(batch=batch)
        # The session stays open until every batch is answered.
        while len(acks) < len(batches):
            answer = next(answers)
            if answer.WhichOneof("frame") == "error":
                raise RuntimeError(f"{answer.error.reason}: {answer.error.message}")
            if answer.WhichOneof("frame") == "ack":
                acks.append(answer.ack)

    acks = []
    answers = stub.PublishSession(requests(), timeout=30)
    # grpc makes the requests in a thread of its own, and that takes the answers; the call's end is theirs.
    if answers.code() != grpc.StatusCode.OK:
        raise RuntimeError(answers.details())
    return acks


def fetch_all(stub, stream):
    """Pages of decoded messages."""
    messages, start = [], read.StartPosition(beginning=read.Beginning())
    while True:
        page = stub.Fetch(read.FetchRequest(stream=stream, start=start, max_messages=100), timeout=10)
        messages += [(m.message.subject, m.message.payload) for m in page.messages]
        if page.caught_up:
            return messages
        start = read.StartPosition(cursor=page.cursor)


def read_session(stub, stream):
    """Batches as they are stored; ends at the tail."""
    open_ = read.ReadOpen(
        stream=stream,
        start=read.StartPosition(beginning=read.Beginning()),
        credit=read.ReadCredit(messages=1_000_000, bytes=64 << 20),
        stop_at_tail=True,
    )
    messages = []
    for answer in stub.ReadSession(iter([read.ReadSessionRequest(open=open_)]), timeout=30):
        if answer.WhichOneof("frame") == "batch":
            messages += decode_batch(answer.batch.batch)
    return messages


def main():
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:7411"
    stream = sys.argv[2] if len(sys.argv) > 2 else "python-example"
    with grpc.insecure_channel(address) as channel:
        streams = admin_rpc.StreamServiceStub(channel)
        publisher = publish_rpc.PublishServiceStub(channel)
        reader = read_rpc.ReadServiceStub(channel)

        spec = types.StreamSpec(name=stream, subjects=[f"{stream}.>"])
        created = streams.CreateStream(admin.CreateStreamRequest(spec=spec), timeout=10)
        print(f"stream {stream} has id {created.stream.stream_id}")
        if created.existed and created.stream.shards[0].tail > 1:
            sys.exit(f"the stream {stream} has messages already: name another")

        singles = [(f"{stream}.single", f"message {n}".encode()) for n in range(10)]
        sequences = publish_one_by_one(publisher, stream, singles)
        assert sequences == list(range(1, 11)), sequences
        print(f"published {len(singles)} messages one by one: sequences {sequences[0]}-{sequences[-1]}")

        batches = [[(f"{stream}.batch.{b}", f"{b}/{n}".encode()) for n in range(100)] for b in range(20)]
        acks = publish_session(publisher, stream, batches)
        assert [(a.first, a.last) for a in acks] == [(11 + 100 * b, 110 + 100 * b) for b in range(20)], acks
        print(f"published {len(batches)} batches over a session: the last ends at sequence {acks[-1].last}")

        expected = singles + [message for batch in batches for message in batch]
        assert fetch_all(reader, stream) == expected
        assert read_session(reader, stream) == expected
        print(f"read {len(expected)} messages back, by page and by batch: all there, in order")

        try:
            wrong = publish.PublishRequest(
                stream=stream,
                messages=[types.Message(subject=f"{stream}.single", payload=b"never stored")],
                expect=publish.Expectation(last_sequence=1),
            )
            publisher.Publish(wrong, timeout=10)
            sys.exit("a condition that does not hold was ignored")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error
            print(f"a condition that does not hold is refused: {error.details()}")


if __name__ == "__main__":
    main()
