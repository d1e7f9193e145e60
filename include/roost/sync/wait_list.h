// SPDX-License-Identifier: MIT
// The list that waiters of a lock or queue stand in, oldest first.
//
// Threads: every operation, and every member of a node, under the P::Mutex of whoever owns the
// list. Lifetime: a node stands in at most one list, and does not go while it is in one. Whoever
// unlinks it is the one who wakes its coroutine: that is how a grant and a cancellation agree.
#pragma once

#include <cstdint>

#include "roost/base/platform.h"

namespace roost {

template <Platform P>
struct WaitNode {
  template <class T>
  using Shared = typename P::template Shared<T>;

  Shared<WaitNode*> later{nullptr};
  Shared<WaitNode*> earlier{nullptr};
  Shared<std::uint64_t> linked{0};     // 1: in a list
  Shared<std::uint64_t> cancelled{0};  // 1: a stop was requested
};

/// Node derives from WaitNode<P>.
template <Platform P, class Node>
class WaitList {
 public:
  bool empty() const noexcept { return !head_.get(); }
  Node* front() const noexcept { return static_cast<Node*>(head_.get()); }

  void push_back(Node& node) noexcept { link(node, tail_.get(), nullptr); }
  void push_front(Node& node) noexcept { link(node, nullptr, head_.get()); }

  /// Null if it is empty.
  Node* pop_front() noexcept {
    Node* node = front();
    if (node) remove(*node);
    return node;
  }

  /// REQUIRES: it stands in this list.
  void remove(Node& node) noexcept {
    WaitNode<P>* const before = node.earlier.get();
    WaitNode<P>* const after = node.later.get();
    (before ? before->later : head_).set(after);
    (after ? after->earlier : tail_).set(before);
    node.later.set(nullptr);
    node.earlier.set(nullptr);
    node.linked.set(0);
  }

 private:
  void link(Node& node, WaitNode<P>* before, WaitNode<P>* after) noexcept {
    node.earlier.set(before);
    node.later.set(after);
    node.linked.set(1);
    (before ? before->later : head_).set(&node);
    (after ? after->earlier : tail_).set(&node);
  }

  typename P::template Shared<WaitNode<P>*> head_{nullptr};
  typename P::template Shared<WaitNode<P>*> tail_{nullptr};
};

}  // namespace roost
