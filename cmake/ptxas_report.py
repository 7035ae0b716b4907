"""What ptxas says of the CUDA kernels: registers, spills and shared memory of each.

As a compiler launcher: ptxas_report.py NVCC ARGUMENTS... runs the command, keeps ptxas' lines in
OBJECT.ptxas and passes on everything else. After the build: ptxas_report.py --table FOLDER FILE
collects them in one table, most registers first.
"""

import pathlib
import re
import subprocess
import sys


def launch(command):
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines(keepends=True)
    resources = [l for l in lines if re.match(r"ptxas info|\s+\d+ bytes stack frame", l)]
    sys.stderr.write("".join(l for l in lines if l not in resources))
    if done.returncode == 0 and "-o" in command:
        output = command[command.index("-o") + 1]
        pathlib.Path(output + ".ptxas").write_text("".join(resources))
    return done.returncode


def kernels(text):
    """(architecture, mangled name, registers, bytes spilled, bytes of static shared memory)."""
    name = arch = None
    spilled = 0
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, arch, spilled = m[1], m[2], 0
        elif m := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(m[1])
        elif name and (m := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            yield arch, name, int(m[1]), spilled, int(shared[1]) if shared else 0
            name = None


def readable(names):
    text = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True).stdout
    for name in text.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|sarissa::kernels::|^void ", "", name)
        # The parameters begin at the first parenthesis outside <>; inside are casts of enumerators.
        depth = 0
        for end, c in enumerate(name):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                name = name[:end]
                break
        yield name


def table(folder, file):
    rows = []
    for report in sorted(pathlib.Path(folder).rglob("*.ptxas")):
        rows += kernels(report.read_text())
    rows = [(a, n, *rest) for (a, _, *rest), n in zip(rows, readable([r[1] for r in rows]))]
    rows.sort(key=lambda row: (row[0], -row[2], row[1]))
    with open(file, "w") as out:
        out.write("arch    registers  spilled  static shared  kernel\n")
        for arch, name, registers, spilled, shared in rows:
            out.write(f"{arch:7} {registers:9} {spilled:6} B {shared:12} B  {name}\n")
    spills = sum(row[3] > 0 for row in rows)
    print(f"{len(rows)} CUDA kernels, {spills} of them spill registers: {file}")


if __name__ == "__main__":
    if sys.argv[1] == "--table":
        table(sys.argv[2], sys.argv[3])
    else:
        sys.exit(launch(sys.argv[1:]))
