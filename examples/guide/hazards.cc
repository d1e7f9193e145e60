// SPDX-License-Identifier: MIT
// The right ways of docs/hazards.md; the wrong ones are in hazards_wrong.cc.
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <future>
#include <set>
#include <stop_token>
#include <string>
#include <utility>

#include "foreign_device.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/thread_pool.h"
#include "roost/aio/timer.h"
#include "roost/base/result.h"
#include "roost/coro/completion.h"
#include "roost/coro/task.h"
#include "roost/sync/co_mutex.h"
#include "roost/sync/co_rwlock.h"

namespace {

using roost::Result;
using roost::Task;

void count_later(roost::AioContext& context, int* counter) {
  const auto body = [](int* to) -> Task<void> {
    co_await roost::sleep_for(1'000'000);
    ++*to;  // a parameter lives in the frame
  };
  roost::spawn(context, body(counter));
}

Task<void> log(std::string line) {
  co_await roost::sleep_for(1'000'000);
  std::printf("%s\n", line.c_str());
}

void log_later(roost::AioContext& context, const std::string& who) {
  roost::spawn(context, log("hello " + who));
}

Task<std::size_t> length(const std::string& text) { co_return text.size(); }

Task<std::size_t> length_of_greeting(std::string who) {
  const std::string greeting = "hello " + who;
  co_return co_await length(greeting);  // in the frame of who awaits
}

Task<Result<int>> read_device(foreign::Device* device, std::stop_token stop) {
  std::array<char, 64> buffer;
  roost::Completion<int> done("the device");
  device->read(buffer.data(), buffer.size(), &foreign::fire, done.token().release());
  Result<int> bytes = co_await done.wait(stop);
  if (!bytes && bytes.error().code() == ECANCELED) {
    device->hurry();
    bytes = co_await done.wait();  // the buffer is the device's until it has answered
  }
  co_return bytes;
}

Task<int> ask(roost::ThreadPool* pool, std::future<int> answer) {
  auto get = [&answer] { return answer.get(); };
  co_return co_await pool->run(get);  // blocks a thread that is there for it
}

Task<void> append(roost::CoMutex* mutex, std::string* log) {
  const auto guard = co_await mutex->lock();
  co_await roost::sleep_for(1'000'000);  // others wait, and their threads go on
  *log += "entry\n";
}

struct Names {
  roost::CoRwlock lock;
  std::set<std::string> all;
};

Task<void> add(Names* names, std::string name) {
  auto guard = co_await names->lock.read();
  if (names->all.contains(name)) co_return;
  if (!co_await guard.upgrade()) {  // another reader does: it goes on once this one lets go
    guard.unlock();
    guard = co_await names->lock.write();
  }
  names->all.insert(std::move(name));
}

// For who holds the lock.
std::size_t count(const Names& names, const roost::CoRwlock::Guard&) { return names.all.size(); }

Task<bool> empty(Names* names) {
  const auto reading = co_await names->lock.read();
  co_return count(*names, reading) == 0;
}

Task<void> keep(std::string text) {
  std::printf("%s\n", text.c_str());
  co_return;
}

struct Message {
  std::string text;
};
Task<void> post(Message message) { co_await keep(std::move(message.text)); }

template <class Function>
Task<void> call(Function function) {
  function();
  co_return;
}

Task<void> destroy_once(bool urgent, std::string text) {
  const auto print = [text] { std::printf("%s\n", text.c_str()); };
  co_await call(print);
  Message message{text};
  co_await post(std::move(message));
  urgent ? co_await keep(text) : co_await keep("none");
  const std::string line = urgent ? "urgent: " + text : text;
  co_await keep(line);
}

Task<void> run_all(roost::ThreadPool* pool, foreign::Device* device, bool* done) {
  roost::AioContext& here = *roost::AioContext::current();
  int counter = 0;
  count_later(here, &counter);
  while (counter == 0) co_await roost::sleep_for(1'000'000);

  log_later(here, "world");
  co_await roost::move_to(here);  // it begins, and is to sleep for less than this one
  co_await roost::sleep_for(2'000'000);
  std::printf("length %zu\n", co_await length_of_greeting("world"));

  std::stop_source source;
  source.request_stop();
  const Result<int> bytes = co_await read_device(device, source.get_token());
  std::printf("the device filled %d bytes\n", bytes.value());

  std::promise<int> promise;
  promise.set_value(42);
  std::printf("the answer is %d\n", co_await ask(pool, promise.get_future()));

  roost::CoMutex mutex;
  std::string entries;
  co_await append(&mutex, &entries);
  std::printf("%s", entries.c_str());

  Names names;
  co_await add(&names, "roost");
  const bool none = co_await empty(&names);
  std::printf("%s\n", none ? "no names" : "some names");
  co_await destroy_once(true, "text");
  *done = true;
}

}  // namespace

int main() {
  roost::ThreadPool pool(1);
  foreign::Device device;
  const auto context = roost::AioContext::create({.name = "main"});
  const roost::ContextScope scope(*context);
  bool done = false;
  roost::spawn(*context, run_all(&pool, &device, &done), "hazards");
  context->poll_until(done);
}

// Output:
// hello world
// length 11
// the device filled 64 bytes
// the answer is 42
// entry
// some names
// text
// text
// text
// urgent: text
