// SPDX-License-Identifier: MIT
// Static tracepoints (USDT), by which bpftrace, perf and SystemTap look into a running program.
// docs/tracing.md lists them all.
//
//   ROOST_PROBE(co_wake, home, &co);
//
// Each costs one nop, and nothing in a build without systemtap's sys/sdt.h. The arguments, numbers
// and pointers, should be at hand: they are computed whether anybody looks or not.
//
// Threads: any. For source files only: what a public header inlines is compiled by users, who need
// not have sys/sdt.h.
#pragma once

#ifdef ROOST_USDT
#define SDT_USE_VARIADIC 1
#include <sys/sdt.h>
#define ROOST_PROBE(name, ...) STAP_PROBEV(roost, name, __VA_ARGS__)
#else
#define ROOST_PROBE(name, ...) static_cast<void>(0)
#endif
