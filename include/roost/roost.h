// SPDX-License-Identifier: MIT
// The library in one include: contexts and I/O threads, coroutines, file and socket I/O,
// offloading, and the locks, queues, groups and deadlines of coroutines.
//
//   #include "roost/roost.h"
//
// Those who count compile time include what they use. Left out, since few need them: the simulation
// (roost/aio/simulation.h), the census (roost/aio/census_report.h), moving objects between contexts
// (roost/aio/context_binding.h), and the layers nbd, block and export.
//
// Threads, lifetime: as each header says.
#pragma once

// IWYU pragma: begin_exports
#include "roost/aio/aio_context.h"
#include "roost/aio/bottom_half.h"
#include "roost/aio/event_notifier.h"
#include "roost/aio/io.h"
#include "roost/aio/iothread.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"
#include "roost/aio/unique_fd.h"
#include "roost/base/check.h"
#include "roost/base/clock.h"
#include "roost/base/result.h"
#include "roost/coro/completion.h"
#include "roost/coro/coroutine.h"
#include "roost/coro/gate.h"
#include "roost/coro/task.h"
#include "roost/sync/co_event.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_queue.h"
#include "roost/sync/co_rwlock.h"
#include "roost/sync/co_semaphore.h"
#include "roost/sync/stop_scope.h"
#include "roost/sync/task_group.h"
#include "roost/sync/thread_mutex.h"
#include "roost/sync/when.h"
// IWYU pragma: end_exports
