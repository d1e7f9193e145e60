// SPDX-License-Identifier: MIT
#include "roost/nbd/protocol.h"

#include <gtest/gtest.h>

#include <cerrno>

namespace roost::nbd {
namespace {

TEST(NbdErrors, HaveTheProtocolsValues) {
  EXPECT_EQ(to_nbd_error(0), 0u);
  EXPECT_EQ(to_nbd_error(EPERM), 1u);
  EXPECT_EQ(to_nbd_error(EIO), 5u);
  EXPECT_EQ(to_nbd_error(ENOMEM), 12u);
  EXPECT_EQ(to_nbd_error(EINVAL), 22u);
  EXPECT_EQ(to_nbd_error(ENOSPC), 28u);
  EXPECT_EQ(to_nbd_error(EOVERFLOW), 75u);
  EXPECT_EQ(to_nbd_error(ENOTSUP), 95u);
  EXPECT_EQ(to_nbd_error(ESHUTDOWN), 108u);
}

TEST(NbdErrors, TranslateWhatTheProtocolHasNoWordFor) {
  EXPECT_EQ(to_nbd_error(EROFS), 1u);
  EXPECT_EQ(to_nbd_error(EDQUOT), 28u);
  EXPECT_EQ(to_nbd_error(EFBIG), 28u);
  EXPECT_EQ(to_nbd_error(ENOENT), 5u);
  EXPECT_EQ(to_nbd_error(ECANCELED), 5u);
  EXPECT_EQ(to_nbd_error(-EINVAL), 5u);
  EXPECT_EQ(to_nbd_error(123456), 5u);
}

}  // namespace
}  // namespace roost::nbd
