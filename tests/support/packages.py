"""Packages as the registries hand them out, made in memory."""

from __future__ import annotations

import gzip
import io
import lzma
import tarfile
import zipfile

import zstandard


def make_ar(parts: dict[str, bytes]) -> bytes:
    data = b"!<arch>\n"
    for name, body in parts.items():
        data += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(body):<10}`\n".encode() + body + b"\n" * (len(body) % 2)
        )
    return data


def make_tar(files: dict[str, bytes], prefix: str = "./") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        link = tarfile.TarInfo(prefix + "link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


def make_deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    pack = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}
    data = pack[compression](make_tar(files))
    return make_ar({"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data})


def make_wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return buffer.getvalue()
