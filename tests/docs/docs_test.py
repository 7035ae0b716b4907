"""Runs the commands that README.md and docs/*.md show, and checks that their relative links exist.

Commands are the lines of ```sh blocks that start with build/sarissa or "./run help"; a block tagged
```sh no-test is skipped. They run in order, one folder for all pages, in a copy of the project's
files with the built program at build/sarissa.

    python tests/docs/docs_test.py build/sarissa
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = None
# README first: it trains the model that the other pages use.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"),
                                     key=lambda page: (page.stem != "quickstart", page.stem))]


def commands(page):
    """(line number, command) of every tested command; a backslash continues a line."""
    found, block, pending = [], None, ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            block = None if block is not None else line[3:].strip()
        elif block == "sh":
            pending += line.removesuffix("\\")
            if not line.endswith("\\"):
                if pending.startswith(("build/sarissa", "./run help")):
                    found.append((number, pending))
                pending = ""
    return found


def links(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            yield target.split("#")[0]


class DocsTest(unittest.TestCase):
    def test_commands_run(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for name in ("configs", "examples", "docs"):
                shutil.copytree(ROOT / name, folder / name)
            for name in ("run", "README.md"):
                shutil.copy(ROOT / name, folder / name)
            (folder / "build").mkdir()
            (folder / "build" / "sarissa").symlink_to(PROGRAM)
            count = 0
            for page in PAGES:
                for number, command in commands(page):
                    count += 1
                    with self.subTest(f"{page.name}:{number}"):
                        done = subprocess.run(["bash", "-c", command], cwd=folder,
                                              capture_output=True, text=True, errors="replace")
                        self.assertEqual(done.returncode, 0, f"{command}\n{done.stderr[-2000:]}")
            self.assertGreater(count, 10, "the pages show no commands")

    def test_links_exist(self):
        for page in PAGES:
            for target in links(page):
                self.assertTrue((page.parent / target).exists(), f"{page.name}: {target}")


if __name__ == "__main__":
    PROGRAM = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main(verbosity=2)
