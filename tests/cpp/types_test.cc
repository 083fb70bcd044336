#include "adakv/types.h"

#include <gtest/gtest.h>

#include <limits>

#include "adakv/error.h"

namespace adakv {
namespace {

TEST(TensorView, IsContiguousByDefault) {
  float data[24];
  const TensorView view(data, {2, 3, 4}, DType::kFloat32);
  EXPECT_EQ(view.size(), 24);
  EXPECT_EQ(view.stride[0], 12);
  EXPECT_EQ(view.stride[1], 4);
  EXPECT_EQ(view.stride[2], 1);
  EXPECT_EQ(view.shape_string(), "[2, 3, 4]");
  EXPECT_TRUE(static_cast<bool>(view));
  EXPECT_FALSE(static_cast<bool>(TensorView()));
}

TEST(TensorView, NarrowAndSelectPointIntoTheSameData) {
  float data[24];
  const TensorView view(data, {2, 3, 4}, DType::kFloat32);
  const TensorView part = view.narrow(1, 1, 2);
  EXPECT_EQ(part.ptr<float>(), data + 4);
  EXPECT_EQ(part.shape[1], 2);
  EXPECT_EQ(part.stride[0], 12);
  const TensorView row = view.select(1);
  EXPECT_EQ(row.ptr<float>(), data + 12);
  EXPECT_EQ(row.shape_string(), "[3, 4]");
  EXPECT_THROW(view.narrow(1, 2, 2), InvalidArgument);
  EXPECT_THROW(view.select(2), InvalidArgument);
}

// Verbs refuse such sizes; nothing overflows on the way there.
TEST(TensorView, MayHaveSizesThatCannotBeCounted) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  const TensorView view(nullptr, {kMost, kMost, kMost}, DType::kFloat32);
  EXPECT_EQ(view.stride[2], 1);
  EXPECT_EQ(view.stride[1], kMost);
  view.size();
}

TEST(TensorView, EmptyIsNotMissing) {
  const TensorView view(nullptr, {0, 4}, DType::kInt32);
  EXPECT_TRUE(static_cast<bool>(view));
  EXPECT_EQ(view.size(), 0);
}

}  // namespace
}  // namespace adakv
