"""A log whose reader stands still."""

import os
import threading
from pathlib import Path

from deploy.output import Output
from tests.deploy.pair import until


def test_nobody_waits_for_a_reader_and_what_is_dropped_is_counted() -> None:
    reading, writing = os.pipe()
    output = Output(writing)
    writer = threading.Thread(target=lambda: [output.write(b"%06d\n" % i + b"x" * 100 + b"\n") for i in range(20_000)])
    writer.start()
    writer.join(60)
    assert not writer.is_alive(), "all lines are taken, though nobody reads"
    output.flush(0.1)
    read = bytearray()

    def read_all() -> None:
        while part := os.read(reading, 65536):
            read.extend(part)

    threading.Thread(target=read_all, daemon=True).start()
    until(lambda: b"lines of the log were dropped" in read)
    output.write(b"the last\n")
    until(lambda: read.endswith(b"the last\n"))
    lines = bytes(read).splitlines()
    kept = [int(line) for line in lines if len(line) == 6]
    assert kept == sorted(kept), "in order"
    dropped = sum(int(line.split()[1]) for line in lines if line.startswith(b"pair: "))
    assert dropped == 20_000 - len(kept) > 0
    os.close(writing)


def test_a_full_disk_is_said_once_and_stops_nobody(tmp_path: Path) -> None:
    said: list[str] = []
    output = Output(os.open("/dev/full", os.O_WRONLY), said.append)
    for _ in range(10):
        output.write(b"a line\n")
    output.flush(30)
    assert said == ["the log is lost: No space left on device"]


def test_a_descriptor_that_does_not_block_loses_nothing() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    output = Output(writing)
    for _ in range(1000):
        output.write(b"x" * 999 + b"\n")
    read = b""
    while len(read) < 1_000_000:
        read += os.read(reading, 65536)
    assert read == (b"x" * 999 + b"\n") * 1000
