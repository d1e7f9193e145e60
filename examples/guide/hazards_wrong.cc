// SPDX-License-Identifier: MIT
// What docs/hazards.md warns of. It compiles, without a warning, and is never run.
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <future>
#include <mutex>
#include <set>
#include <stop_token>
#include <string>
#include <string_view>
#include <utility>

#include "foreign_device.h"
#include "roost/aio/aio_context.h"
#include "roost/aio/timer.h"
#include "roost/base/result.h"
#include "roost/coro/completion.h"
#include "roost/coro/task.h"
#include "roost/sync/co_rwlock.h"

namespace wrong {

using roost::Result;
using roost::Task;

void count_later(roost::AioContext& context, int* counter) {
  const auto body = [counter]() -> Task<void> {
    co_await roost::sleep_for(1'000'000);
    ++*counter;  // `counter` is a member of a closure that is gone
  };
  roost::spawn(context, body());
}

Task<void> log(std::string_view line) {
  co_await roost::sleep_for(1'000'000);
  std::printf("%.*s\n", static_cast<int>(line.size()), line.data());  // whose text is gone
}

void log_later(roost::AioContext& context, const std::string& who) {
  roost::spawn(context, log("hello " + who));
}

Task<std::size_t> length(const std::string& text) { co_return text.size(); }

Task<std::size_t> length_of_greeting(std::string who) {
  Task<std::size_t> task = length("hello " + who);  // the temporary goes here
  co_return co_await std::move(task);
}

Task<Result<int>> read_device(foreign::Device* device, std::stop_token stop) {
  std::array<char, 64> buffer;
  roost::Completion<int> done("the device");
  device->read(buffer.data(), buffer.size(), &foreign::fire, done.token().release());
  co_return co_await done.wait(stop);  // stopped: the frame goes, the device writes on
}

Task<int> ask(std::future<int> answer) {
  co_return answer.get();  // blocks the thread, and with it all coroutines of the context
}

Task<void> append(std::mutex* mutex, std::string* log) {
  const std::lock_guard guard(*mutex);
  co_await roost::sleep_for(1'000'000);  // whoever wants the mutex now blocks a thread
  *log += "entry\n";
}

struct Names {
  roost::CoRwlock lock;
  std::set<std::string> all;
};

Task<void> add(Names* names, std::string name) {
  const auto reading = co_await names->lock.read();
  if (names->all.contains(name)) co_return;
  const auto writing = co_await names->lock.write();  // once all readers are gone: it is one
  names->all.insert(std::move(name));
}

Task<std::size_t> count(Names* names) {
  const auto reading = co_await names->lock.read();
  co_return names->all.size();
}

Task<bool> empty(Names* names) {
  const auto reading = co_await names->lock.read();
  co_return co_await count(names) == 0;  // behind a writer that waits for the first read to end
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

Task<void> destroy_twice(bool urgent, std::string text) {
  co_await call([text] { std::printf("%s\n", text.c_str()); });  // the trap itself
  co_await post(Message{text});                                  // so is this
  co_await (urgent ? keep(text) : post(Message{text}));          // the trap itself
  co_await keep(urgent ? "urgent: " + text : text);              // the trap itself
}

}  // namespace wrong
