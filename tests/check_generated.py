"""Fail when `nbdev_clean` or `nbdev_export` would change a file: notebooks and package must be committed in step.

Works on a copy of the tracked files, so that a check never edits the tree it checks.
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main():
    tool = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as temp:
        copy = Path(temp)/"shipnb"
        copy.mkdir()
        for name in ("settings.ini", "pyproject.toml", "setup.py", "README.md"): shutil.copy(ROOT/name, copy/name)
        for name in ("nbs", "shipnb"): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        for command in ("nbdev_clean", "nbdev_export"): subprocess.run([tool/command], cwd=copy, check=True)
        changed = sorted(str(p.relative_to(copy)) for folder in ("nbs", "shipnb") for p in (copy/folder).rglob("*")
                         if p.is_file() and "__pycache__" not in p.parts and not same(p, ROOT/p.relative_to(copy)))
        for name in ("settings.ini", "pyproject.toml"):
            if not same(copy/name, ROOT/name): changed.append(name)
    if changed: sys.exit(f"nbdev_clean && nbdev_export would change {', '.join(changed)}; run both and commit the result")
    print("notebooks are clean, the package is in step")


def same(a, b): return b.is_file() and a.read_bytes() == b.read_bytes()


if __name__ == "__main__": main()
