// shortlist on an example worked out by hand, from C++ and from C.
#include <adakv/adakv.h>
#include <adakv/c.h>
#include <gtest/gtest.h>

#include "tensors.h"

namespace adakv {
namespace {

using Ints = std::vector<int32_t>;

// One row of four pages of two entries, the last of which has one; q = (1, -2, 0 ...). The products are
// at most 5, -3 and 8 in the first three pages.
struct Example {
  Tensor queries{{1, 1, 1, 8}, std::vector<float>{1, -2, 0, 0, 0, 0, 0, 0}};
  Tensor bounds{{4, 16}, DType::kFloat32};
  Tensor lengths{{1, 1}, Ints{7}}, table{{1, 1, 4}, Ints{3, 0, 2, 1}};
  Tensor listed{{1, 1, 4}, DType::kInt32}, listed_lengths{{1, 1}, DType::kInt32};

  Example() {
    const float largest[4][2] = {{1, 3}, {NAN, NAN}, {0, 9}, {3, 5}};
    const float smallest[4][2] = {{0, 2}, {NAN, NAN}, {-1, -4}, {-9, -1}};
    for (int page = 0; page < 4; ++page) {
      for (int d = 0; d < 2; ++d) {
        bounds.set(page * 16 + d, largest[page][d]);
        bounds.set(page * 16 + 8 + d, smallest[page][d]);
      }
    }
  }

  ShortlistArgs args(double share) const {
    ShortlistArgs args;
    args.queries = queries.view;
    args.bounds = bounds.view;
    args.lengths = lengths.view;
    args.block_table = table.view;
    args.page_size = 2;
    args.share = share;
    args.least = 0;
    args.listed = listed.view;
    args.listed_lengths = listed_lengths.view;
    return args;
  }
};

TEST(Shortlist, TakesThePagesWhoseBoundsAreBest) {
  const Example example;
  run(&shortlist, example.args(0.5));
  EXPECT_EQ(example.listed.ints(), (Ints{2, 1, -1, -1}));
  EXPECT_EQ(example.listed_lengths.ints(), Ints{3});
  run(&shortlist, example.args(0.51));
  EXPECT_EQ(example.listed.ints(), (Ints{3, 2, 1, -1}));
  run(&shortlist, example.args(1));
  EXPECT_EQ(example.listed.ints(), (Ints{3, 0, 2, 1}));
  EXPECT_EQ(example.listed_lengths.ints(), Ints{7});
}

TEST(Shortlist, ListsNoMorePagesThanThereIsRoomFor) {
  const Example example;
  ShortlistArgs args = example.args(1);
  args.listed.shape[2] = 2;
  run(&shortlist, args);
  EXPECT_EQ(example.listed.ints(), (Ints{2, 1, 0, 0}));
}

TEST(Shortlist, IsTheSameInC) {
  const Example example;
  const auto c_tensor = [](const Tensor& x, AdakvDataType dtype, int64_t* shape) {
    for (int i = 0; i < x.view.rank; ++i) shape[i] = x.view.shape[i];
    AdakvTensor tensor = {};
    tensor.data = x.view.data;
    tensor.device = {1, 0};
    tensor.ndim = x.view.rank;
    tensor.dtype = dtype;
    tensor.shape = shape;
    return tensor;
  };
  int64_t shapes[6][4];
  const AdakvDataType floats = {2, 32, 1}, ints = {0, 32, 1};
  const AdakvTensor queries = c_tensor(example.queries, floats, shapes[0]),
                    bounds = c_tensor(example.bounds, floats, shapes[1]),
                    lengths = c_tensor(example.lengths, ints, shapes[2]),
                    table = c_tensor(example.table, ints, shapes[3]),
                    listed = c_tensor(example.listed, ints, shapes[4]),
                    listed_lengths = c_tensor(example.listed_lengths, ints, shapes[5]);
  AdakvShortlistArgs args = adakv_shortlist_defaults();
  EXPECT_EQ(args.share, 0.125);
  args.queries = &queries;
  args.bounds = &bounds;
  args.lengths = &lengths;
  args.block_table = &table;
  args.page_size = 2;
  args.share = 0.5;
  args.least = 0;
  args.listed = &listed;
  args.listed_lengths = &listed_lengths;
  int32_t scratch[64];
  ASSERT_EQ(adakv_shortlist_workspace(&args, &args.workspace_bytes), ADAKV_OK)
      << adakv_last_error();
  ASSERT_LE(args.workspace_bytes, sizeof scratch);
  args.workspace = scratch;
  ASSERT_EQ(adakv_shortlist(&args), ADAKV_OK) << adakv_last_error();
  EXPECT_EQ(example.listed.ints(), (Ints{2, 1, -1, -1}));
}

}  // namespace
}  // namespace adakv
