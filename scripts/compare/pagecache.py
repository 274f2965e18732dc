"""What benches bring about before a load: files in the page cache or out of it, and memory that is there."""

import ctypes
import mmap
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

READ_THREADS, READ_BYTES, READ_MOST = 16, 8 << 20, 4 << 30


def read(paths, flags):
    """Reads files with many threads, at most READ_MOST bytes of them with O_DIRECT. GB/s."""
    chunks, most = [], READ_MOST if flags else float("inf")
    for path in paths:
        file = os.open(path, os.O_RDONLY | flags)
        whole = os.fstat(file).st_size // READ_BYTES * READ_BYTES
        chunks += [(file, offset) for offset in range(0, whole, READ_BYTES)]
    chunks = chunks[: int(min(len(chunks), most // READ_BYTES))]
    local = threading.local()

    def one(chunk):
        # A mapping, for O_DIRECT wants its memory aligned.
        if not hasattr(local, "buffer"):
            local.buffer = mmap.mmap(-1, READ_BYTES)
        return os.preadv(chunk[0], [local.buffer], chunk[1])

    start = time.monotonic()
    with ThreadPoolExecutor(max_workers=READ_THREADS) as pool:
        total = sum(pool.map(one, chunks))
    seconds = time.monotonic() - start
    for file in {file for file, _ in chunks}:
        os.close(file)
    return total / seconds / 1e9


def fetch(paths):
    """Reads whole files, so that the page cache has all of them."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(READ_BYTES)
            while file.readinto(buffer):
                pass


def drop(paths):
    """Drops files, which have been synced, from the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(paths):
    """Which part of the files' pages is in the page cache."""
    pages = present = 0
    for path in paths:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            address = LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
            held = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            LIBC.mincore(address, size, held)
            LIBC.munmap(address, size)
            pages += len(held)
            # Only the lowest bit means something.
            present += sum(bytes(held).translate(LOWEST_BIT))
    return present / pages


class Reserve:
    """Memory that is given back right before a load and taken again right after it, in huge pages where there are some.
    A machine below this one may take away what is free for a while, most of all in large pieces, and whoever came next
    would pay for that; what is free only while somebody loads stays."""

    def __init__(self):
        self.address, self.size = None, 0

    def take(self, size):
        if self.size != size:
            self.give_back()
        if self.address is not None:
            return
        address = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        if address == FAILED:
            return
        self.address, self.size = address, size
        LIBC.madvise(address, size, mmap.MADV_HUGEPAGE)
        pieces = [(at, min(PIECE_BYTES, size - at)) for at in range(0, size, PIECE_BYTES)]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda piece: LIBC.memset(address + piece[0], 1, piece[1]), pieces))

    def give_back(self):
        if self.address is not None:
            LIBC.munmap(self.address, self.size)
            self.address = None


PIECE_BYTES = 64 << 20
LOWEST_BIT = bytes(value & 1 for value in range(256))
LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
FAILED = ctypes.c_void_p(-1).value
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
