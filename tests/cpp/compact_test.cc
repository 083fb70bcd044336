// compact: which page and slot every kept entry lands in, and what it refuses.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "layer.h"
#include "tensors.h"

namespace adakv {
namespace {

using Ints = std::vector<int32_t>;

constexpr int kLength = 20, kDim = 8, kPageSize = 8;

// Two sequences of two rows that keep 9, 0 | 3, 8 entries. Sequence 0 needs 2 + 0 pages and 2 fresh
// ones, sequence 1 needs 1 + 1 and 2.
struct Case {
  std::mt19937 random{0};
  Tensor keys{{2, 2, kLength, kDim}, DType::kFloat32, random};
  Tensor values{{2, 2, kLength, kDim}, DType::kFloat32, random};
  Tensor positions{{20},
                   Ints{0, 2, 4, 6, 8, 10, 12, 14, 19, 1, 5, 7, 12, 13, 14, 15, 16, 17, 18, 19}};
  Tensor indptr{{5}, Ints{0, 9, 9, 12, 20}};
  Tensor page_ids{{8}, Ints{5, 3, 9, 8, 0, 1, 7, 2}};
  Tensor page_indptr{{3}, Ints{0, 4, 8}};
  Layer layer{2, 2, kDim, kPageSize, 10, 4, 3};
  CompactArgs args;

  Case() {
    args.keys = keys.view;
    args.values = values.view;
    args.positions = positions.view;
    args.indptr = indptr.view;
    args.page_ids = page_ids.view;
    args.page_indptr = page_indptr.view;
    args.layer = layer.view();
  }
};

TEST(Compact, DealsPagesToRowsInOrder) {
  Case c;
  run(&compact, c.args);
  EXPECT_EQ(c.layer.block_table.ints(), (Ints{5, 3, -1, -1, -1, -1, -1, -1,  //
                                              0, -1, -1, -1, 1, -1, -1, -1}));
  EXPECT_EQ(c.layer.fresh_pages.ints(), (Ints{9, -1, -1, 8, -1, -1, 7, -1, -1, 2, -1, -1}));
  EXPECT_EQ(c.layer.lengths.ints(), (Ints{9, 0, 3, 8}));
  EXPECT_EQ(c.layer.seen.ints(), (Ints{kLength, kLength}));
  for (int r = 0; r < 4; ++r) {
    const Ints indptr = c.indptr.ints(), positions = c.positions.ints();
    const std::vector<Entry> held = c.layer.entries(r / 2, r % 2);
    ASSERT_EQ(static_cast<int>(held.size()), indptr[r + 1] - indptr[r]);
    for (size_t i = 0; i < held.size(); ++i) {
      const int position = positions[indptr[r] + i];
      EXPECT_EQ(held[i].position, position);
      for (int d = 0; d < kDim; ++d) {
        EXPECT_EQ(held[i].key[d], c.keys.get((r * kLength + position) * kDim + d));
        EXPECT_EQ(held[i].value[d], c.values.get((r * kLength + position) * kDim + d));
      }
    }
  }
}

TEST(Compact, TakesSeenFromTheTrueLengths) {
  Case c;
  const Tensor seq_lens({2}, Ints{20, 19});
  c.args.seq_lens = seq_lens.view;
  run(&compact, c.args);
  EXPECT_EQ(c.layer.seen.ints(), (Ints{20, 19}));
}

// Each wrong input is named, and the layer is as it was.
TEST(Compact, ChangesNothingIfSomethingIsWrong) {
  const auto complaint_after = [](void (*change)(Case&)) {
    Case c;
    change(c);
    const Ints table = c.layer.block_table.ints(), lengths = c.layer.lengths.ints();
    const std::string text = complaint([&] { run(&compact, c.args); });
    EXPECT_EQ(c.layer.block_table.ints(), table);
    EXPECT_EQ(c.layer.lengths.ints(), lengths);
    return text;
  };
  EXPECT_EQ(complaint_after([](Case& c) { c.positions.view.ptr<int32_t>()[3] = kLength; }),
            "compact: positions must lie in 0 .. 19, got 20");
  EXPECT_EQ(complaint_after([](Case& c) { c.page_ids.view.ptr<int32_t>()[7] = 10; }),
            "compact: page_ids must lie in 0 .. 9, got 10");
  EXPECT_EQ(complaint_after([](Case& c) { c.page_indptr.view.ptr<int32_t>()[1] = 3; }),
            "compact: sequence 0 needs 4 pages, got 3");
  EXPECT_EQ(complaint_after([](Case& c) { c.page_indptr.view.ptr<int32_t>()[2] = 9; }),
            "compact: page_indptr must lie in 0 .. 8 and ascend");
  for (const int32_t wrong : {-1, 21, std::numeric_limits<int32_t>::min()}) {
    Case c;
    c.indptr.view.ptr<int32_t>()[2] = wrong;
    EXPECT_EQ(complaint([&] { run(&compact, c.args); }),
              "compact: indptr must ascend from 0 to at most 20");
  }
}

}  // namespace
}  // namespace adakv
