// SPDX-License-Identifier: MIT
// Links whatever is installed.
#include "roost/block/block_driver.h"
#include "roost/io/socket_address.h"

int main() {
  return roost::parse_size("4K").value_or(0) == 4096 &&
                 roost::SocketAddress::parse("tcp:127.0.0.1:0").has_value()
             ? 0
             : 1;
}
