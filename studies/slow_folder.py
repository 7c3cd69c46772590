"""A read-only copy of a folder, every read of which takes a while longer. Needs mfusepy, libfuse3 and root.

python -m studies.slow_folder SOURCE MOUNT MILLISECONDS     # until it is unmounted
"""

import os
import sys
import time
from typing import Any

import mfusepy


class SlowFolder(mfusepy.Operations):
    use_ns = True

    def __init__(self, source: str, seconds: float) -> None:
        self.source, self.seconds = source, seconds

    def init_with_config(self, conn: Any, config: Any) -> None:  # noqa: ARG002
        conn.max_background, conn.congestion_threshold = 256, 200

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:  # noqa: ARG002
        status = os.lstat(self.source + path)
        plain = {name: getattr(status, name) for name in ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid")}
        return plain | {name: getattr(status, name + "_ns") for name in ("st_atime", "st_mtime", "st_ctime")}

    def readdir(self, path: str, fh: int) -> list[str]:  # noqa: ARG002
        return [".", "..", *os.listdir(self.source + path)]  # noqa: PTH208

    def open(self, path: str, flags: int) -> int:
        return os.open(self.source + path, flags)

    def release(self, path: str, fh: int) -> int:  # noqa: ARG002
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:  # noqa: ARG002
        time.sleep(self.seconds)
        return os.pread(fh, size, offset)


if __name__ == "__main__":
    operations = SlowFolder(sys.argv[1], float(sys.argv[3]) / 1000)
    mfusepy.FUSE(operations, sys.argv[2], foreground=True, ro=True, nothreads=False, max_threads=128)
