"""Writes the texts in code and in Chinese of docs/quality.md.

    python benchmarks/quality_texts.py code OUT.txt
    apt-get download debian-handbook && dpkg -x debian-handbook_*.deb handbook
    python benchmarks/quality_texts.py chinese OUT.txt handbook

Code is the standard library of the Python that runs this: 3.11.7 gives the committed results' text,
whose sum is in their first lines. Chinese is the Debian Administrator's Handbook (debian-handbook
11.20220922): the paragraphs of its zh-CN pages that are mostly Chinese, each once.
"""

from __future__ import annotations

import html
import re
import sys
import sysconfig
from pathlib import Path

MODULES = """
argparse ast asyncio/base_events bdb calendar codecs collections/__init__
concurrent/futures/process configparser copy csv dataclasses datetime decimal difflib dis
doctest enum fractions ftplib functools gzip heapq http/client imaplib inspect ipaddress
json/decoder logging/__init__ mailbox optparse pathlib pdb pickle platform random shutil
smtplib socket statistics subprocess tarfile tempfile textwrap threading tokenize
traceback turtle typing uuid zipfile
""".split()  # noqa: SIM905


def code() -> str:
    """Modules of the standard library, one behind the other."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = (folder / f"{name}.py" for name in MODULES)
    return "".join(file.read_text(encoding="utf-8") for file in files if file.exists())


def chinese(package: str) -> str:
    """Paragraphs of the unpacked handbook, a line each."""
    pages = sorted((Path(package) / "usr/share/doc/debian-handbook/html/zh-CN").rglob("*.html"))
    text = "\n".join(plain(page.read_text(encoding="utf-8")) for page in pages)
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return "\n".join(dict.fromkeys(line for line in lines if is_chinese(line))) + "\n"


def plain(page: str) -> str:
    """A page without its marks and its listings; what ends a paragraph ends a line."""
    page = re.sub(r"(?s)<(script|style|pre|head)\b.*?</\1>", "", page)
    page = re.sub(r"(?i)</(p|div|h\d|li|td|dt|dd)>", "\n", page)
    return html.unescape(re.sub(r"(?s)<[^>]+>", "", page))


def is_chinese(line: str) -> bool:
    """More than 20 characters and two fifths of a line."""
    return len(re.findall("[\u4e00-\u9fff]", line)) > max(20, 0.4 * len(line))


if __name__ == "__main__":
    kind, out, *given = sys.argv[1:]
    Path(out).write_text({"code": code, "chinese": chinese}[kind](*given), encoding="utf-8")
