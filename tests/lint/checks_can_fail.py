#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Gives each check a small source tree that is in order, and then trees that are not.

  checks_can_fail.py SCRIPTS COMPILER"""

import os
import subprocess
import sys
import tempfile

SCRIPTS, COMPILER = sys.argv[1:3]
HEADER = "#pragma once\n"

GOOD = {
    "include/roost/base/a.h": HEADER + "inline int a() { return 1; }\n",
    "include/roost/aio/b.h": HEADER + '#include "roost/base/a.h"\ninline int b() { return a(); }\n',
    "include/roost/roost.h": HEADER + '#include "roost/aio/b.h"\n',
    "src/aio/b.cc": '#include "roost/aio/b.h"\n#include "b_private.h"\n#include "aio/b_private.h"\n',
    "src/aio/b_private.h": HEADER,
    "src/aio/test_loop.h": HEADER,
    "src/aio/b_test.cc": '#include "test_loop.h"\n',
    "src/block/c_stress_test.cc": '#include "aio/test_loop.h"\n',
    "src/aio/fine.cc": """
Task<void> fine(Lock& lock, int x, Map& map) {
  co_await suspend([&x](Coroutine&) noexcept { x = 1; });
  co_await suspend_waiting("lock", [&x](Coroutine&) noexcept { x = 1; });
  auto named = [text = std::string("s")] { return text.size(); };
  co_await run(named);
  co_await run([] { return 1; });
  co_await map[x].wait();
  co_await run(x), later([x] { return x; });
  // co_await run([x] { return x; });
  co_await run([&x] { return x; });  // trivial captures
  int a = x ? co_await run(x) : co_await later(x);
  int b = co_await run(x) ? f(x) : g(x);
  co_await sleep(x ? 1 : 20);
  co_await wait(x ? map->first : lock, x);
  co_await run([] { return 1 ? f(2) : g(3); });
  co_await run(x ? f(x) : g(x));  // trivial branches
}
""",
}

GOOD |= {
    "README.md": "[the guide](docs/GUIDE.md#part), [elsewhere](https://example.org/)\n",
    "docs/GUIDE.md": "[a.cc](../examples/guide/a.cc):\n\n```cpp\nint a() {\n...\n}\n```\n",
    "docs/hazards.md": "```sh\nmake\n```\n",
    "docs/known-failures.md": "| it fails | `Suite.DoesNot`, `model.inbox` |\n",
    "src/base/base_test.cc": "TEST_F(Suite, DoesNot) {}\n",
    "examples/guide/a.cc": "int a() {\n  // one\n  return 1;\n}\n",
}


def guide(block, link="a.cc"):
    return {"docs/GUIDE.md": f"[{link}](../examples/guide/{link}):\n\n```cpp\n{block}\n```\n"}


CO_AWAIT = "Task<void> f(std::string s) {{\n  {}\n}}\n"

# What is put on top of the good tree, which check must complain, and of what.
BAD = [
    ("check-layers", {"include/roost/base/a.h": HEADER + '#include "roost/aio/b.h"\n'},
     "aio stands right of base"),
    ("check-layers", {"src/base/a.cc": "#include <roost/aio/b.h>\n"}, "aio stands right of base"),
    ("check-layers", {"src/block/c.cc": '#include "aio/b_private.h"\n'}, "private header of aio"),
    ("check-layers", {"src/block/c.cc": '#include "../aio/b_private.h"\n'},
     "private header of aio"),
    ("check-layers", {"include/roost/aio/c.h": HEADER + '#include "aio/b_private.h"\n'},
     "a public header includes a private one"),
    ("check-layers", {"src/aio/b.cc": '#include "test_loop.h"\n'}, "a header for tests"),
    ("check-layers", {"src/base/a_test.cc": '#include "aio/test_loop.h"\n'},
     "aio stands right of base"),
    ("check-layers", {"src/aio/c.cc": '#include "roost/roost.h"\n'}, "for those outside"),
    ("check-layers", {"include/roost/roost.h": HEADER + '#include "roost/nbd/c.h"\n',
                      "include/roost/nbd/c.h": HEADER}, "nbd stands right of sync"),
    ("check-layers", {"src/misc/c.cc": ""}, "misc is not a layer"),
    ("check-layers", {"src/aio/c.cc": '#include "roost/aio/gone.h"\n'}, "does not exist"),
    ("check-headers", {"include/roost/base/c.h": HEADER + "inline std::string c() { return {}; }\n"},
     "include/roost/base/c.h does not compile alone"),
    ("check-headers", {"include/roost/base/c.h": "inline int c() { return 1; }\n"},
     "include/roost/base/c.h does not compile alone"),
    ("check-headers", {"include/roost/aio/b.h": "int b();\n"},
     "include/roost/aio/b.h has no #pragma once"),
    ("check-guide", guide("int a() {\n  // two"), "docs/GUIDE.md:3: not in examples/guide/a.cc"),
    ("check-guide", guide("int a() {\n  return 1;"), "docs/GUIDE.md:3: not in"),
    ("check-guide", guide("  return 1;\n...\nint a() {"), "docs/GUIDE.md:3: not in"),
    ("check-guide", guide("...\nint a() {"), "an empty piece"),
    ("check-guide", {"docs/GUIDE.md": "```cpp\nint a() {\n```\n"}, "quotes nothing"),
    ("check-guide", guide("int a() {", "b.cc"), "../examples/guide/b.cc, which is not there"),
    ("check-guide", {"examples/guide/b.cc": "int b;\n"}, "b.cc: is quoted nowhere"),
    ("check-guide", {"README.md": "[gone](docs/gone.md)\n"}, "README.md:1: links to docs/gone.md"),
    ("check-guide", {"docs/known-failures.md": "`Suite.Other`\n"}, "no test Suite.Other"),
    ("check-format", {"src/base/a.cc": "int   a( ) ;\n"}, "a.cc:1"),
] + [
    ("check-co-await", {"src/base/a.cc": CO_AWAIT.format(line)}, "src/base/a.cc:2")
    for line in (
        "co_await run([s] { return s; });",
        "co_await run([&] { return s; });",
        "int n = co_await run(1, [s = std::move(s)](int) mutable { return s; });",
        "co_return co_await [s]() -> Task<void> { co_return; }();",
        "co_await run(suspend, [s] { return s; });",
        "co_await when(true ? [s] { return 1; } : nullptr);",
        "co_await (s.empty() ? f(s) : g(s));",
        "const int n = co_await (s.empty() ? f(s) : g(s));",
        "co_await run(s.empty() ? std::string() : s);",
        "co_await run(s.empty() ? s : \"none\");",
        "co_await run(1, s.empty() ? 1 : s[0] ? f(2) : 3);",
        "co_return co_await (s.empty() ? std::move(s).f : g{s});",
    )
]


def run_check(name, files):
    with tempfile.TemporaryDirectory(prefix="roost-lint.") as root:
        for top in ("include", "src", "examples", "bench", "tests", "fuzz"):
            os.makedirs(f"{root}/{top}")
        with open(f"{root}/.clang-format", "w", encoding="utf-8") as file:
            file.write("BasedOnStyle: Google\nColumnLimit: 100\nSortIncludes: Never\n")
        for path, text in files.items():
            os.makedirs(os.path.dirname(f"{root}/{path}"), exist_ok=True)
            with open(f"{root}/{path}", "w", encoding="utf-8") as file:
                file.write(text)
        command = [os.path.join(SCRIPTS, name), root]
        if name == "check-headers":
            command.append(COMPILER)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return done.returncode, done.stdout


def main():
    problems = []
    good_for_format = {path: text.lstrip("\n") for path, text in GOOD.items()}
    for name in sorted({check for check, _, _ in BAD}):
        code, out = run_check(name, good_for_format)
        if code not in (0, 77):
            problems.append(f"{name} complains of a tree that is in order:\n{out}")
    for name, files, wanted in BAD:
        code, out = run_check(name, {**good_for_format, **files})
        if code == 77:
            print(f"{name}: {out.strip()}")
        elif code == 0 or wanted not in out:
            problems.append(f"{name} does not say {wanted!r} of {files}:\n{out}")
    print("\n".join(problems) or f"{len(BAD)} faults were all found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
