// append: new entries behind the last ones, over page borders, right-aligned.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "layer.h"
#include "tensors.h"

namespace adakv {
namespace {

using Ints = std::vector<int32_t>;

constexpr int kDim = 8, kPageSize = 8;

// Rows of 7 and 8 entries in a sequence that saw 30 tokens; the first page is nearly full, the
// second full. A second sequence holds nothing.
struct Case {
  Layer layer{2, 2, kDim, kPageSize, 12, 3, 2};
  std::mt19937 random{0};

  Case() {
    const Ints table = {4, -1, -1, 2, -1, -1, -1, -1, -1, -1, -1, -1},
               fresh = {11, 1, 0, 3, 5, 6, 7, 8}, lengths = {7, 8, 0, 0};
    std::copy(table.begin(), table.end(), layer.block_table.view.ptr<int32_t>());
    std::copy(fresh.begin(), fresh.end(), layer.fresh_pages.view.ptr<int32_t>());
    std::copy(lengths.begin(), lengths.end(), layer.lengths.view.ptr<int32_t>());
    layer.seen.view.ptr<int32_t>()[0] = 30;
  }

  Tensor entries(int count) { return Tensor({2, 2, count, kDim}, DType::kFloat32, random); }

  AppendArgs args(const Tensor& keys, const Tensor& values) const {
    AppendArgs args;
    args.keys = keys.view;
    args.values = values.view;
    args.layer = layer.view();
    return args;
  }
};

TEST(Append, TakesFreshPagesWhereRowsOutgrowTheirs) {
  Case c;
  const Tensor keys = c.entries(10), values = c.entries(10), num_new({2}, Ints{10, 3});
  AppendArgs args = c.args(keys, values);
  args.num_new = num_new.view;
  append(args);
  EXPECT_EQ(c.layer.block_table.ints(), (Ints{4, 11, 1, 2, 0, 3, 5, -1, -1, 7, -1, -1}));
  EXPECT_EQ(c.layer.lengths.ints(), (Ints{17, 18, 3, 3}));
  EXPECT_EQ(c.layer.seen.ints(), (Ints{40, 3}));
  const Ints before = {7, 8, 0, 0};
  for (int r = 0; r < 4; ++r) {
    const int count = num_new.ints()[r / 2];
    const std::vector<Entry> held = c.layer.entries(r / 2, r % 2);
    for (int i = 0; i < count; ++i) {
      const Entry& entry = held[before[r] + i];
      EXPECT_EQ(entry.position, (r < 2 ? 30 : 0) + i);
      for (int d = 0; d < kDim; ++d) {
        EXPECT_EQ(entry.key[d], keys.get((r * 10 + 10 - count + i) * kDim + d));
        EXPECT_EQ(entry.value[d], values.get((r * 10 + 10 - count + i) * kDim + d));
      }
    }
  }
}

TEST(Append, ChangesNothingWithoutRoom) {
  Case c;
  c.layer.fresh_pages.view.ptr<int32_t>()[1] = -1;
  const Tensor keys = c.entries(10), values = c.entries(10);
  EXPECT_EQ(complaint([&] { append(c.args(keys, values)); }),
            "append: sequence 0 has no fresh page: call grow() before");
  const Tensor many_keys = c.entries(16), many_values = c.entries(16), num_new({2}, Ints{16, 17});
  AppendArgs args = c.args(many_keys, many_values);
  args.num_new = num_new.view;
  EXPECT_EQ(complaint([&] { append(args); }),
            "append: num_new must lie in 0 .. 16, got 17 for sequence 1");
  const Tensor too_many = c.entries(17);
  EXPECT_EQ(complaint([&] { append(c.args(too_many, too_many)); }),
            "append: at most F * P = 16 tokens can be appended in one piece, got S = 17");
  EXPECT_EQ(c.layer.lengths.ints(), (Ints{7, 8, 0, 0}));
  EXPECT_EQ(c.layer.seen.ints(), (Ints{30, 0}));
}

}  // namespace
}  // namespace adakv
