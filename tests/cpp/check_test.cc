#include "ops/check.h"

#include <gtest/gtest.h>

namespace adakv {
namespace {

std::string message_of(void (*body)(Checker&)) {
  Checker check("score");
  try {
    body(check);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

float data[4096];
const TensorView queries(data, {2, 8, 4, 16}, DType::kFloat32);

TEST(Checker, BindsNamesAndComparesThem) {
  EXPECT_EQ(message_of([](Checker& check) {
              check.floats("queries", queries, "B Hq W D");
              check.floats("keys", TensorView(data, {2, 2, 9, 16}, DType::kFloat32), "B Hkv T D");
              EXPECT_EQ(check.size("Hkv"), 2);
              EXPECT_EQ(check.size("D"), 16);
              EXPECT_EQ(check.size("X"), -1);
            }),
            "");
  EXPECT_EQ(message_of([](Checker& check) {
              check.floats("queries", queries, "B Hq W D");
              check.floats("keys", TensorView(data, {2, 2, 9, 24}, DType::kFloat32), "B Hkv T D");
            }),
            "score: keys must be [B = 2, Hkv, T, D = 16], got [2, 2, 9, 24]");
  EXPECT_EQ(message_of([](Checker& check) { check.floats("queries", queries, "B Hq W"); }),
            "score: queries must be [B, Hq, W], got [2, 8, 4, 16]");
  EXPECT_EQ(message_of([](Checker& check) { check.floats("pages", queries, "B 2 P D"); }),
            "score: pages must be [B, 2, P, D], got [2, 8, 4, 16]");
}

TEST(Checker, ComparesTypesAndDevices) {
  EXPECT_EQ(message_of([](Checker& check) { check.floats("queries", TensorView(), "B"); }),
            "score: queries is missing");
  EXPECT_EQ(message_of([](Checker& check) {
              check.floats("queries", queries, "B Hq W D");
              check.floats("keys", TensorView(data, {2}, DType::kFloat16), "B");
            }),
            "score: keys must be float32 like queries, got float16");
  EXPECT_EQ(message_of([](Checker& check) {
              check.floats("queries", queries, "B Hq W D");
              check.tensor("lens", TensorView(data, {2}, DType::kInt32, {DeviceType::kCuda, 1}),
                           "B", DType::kInt32);
            }),
            "score: lens must be on cpu like queries, got cuda:1");
  EXPECT_EQ(message_of([](Checker& check) { check.tensor("lens", queries, "B", DType::kInt32); }),
            "score: lens must be int32, got float32");
}

TEST(Checker, WantsAContiguousLastDimension) {
  EXPECT_EQ(message_of([](Checker& check) {
              TensorView view(data, {2, 8}, DType::kFloat32);
              view.stride[1] = 2;
              check.floats("w_o", view, "E D");
            }),
            "score: w_o must be contiguous in its last dimension, got a stride of 2");
}

}  // namespace
}  // namespace adakv
