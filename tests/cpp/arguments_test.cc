// The front door: every verb names what is wrong with its arguments, and reads nothing through
// them.
#include <adakv/adakv.h>
#include <gtest/gtest.h>

#include "layer.h"
#include "tensors.h"

namespace adakv {
namespace {

// Arguments of every verb that are right: B = 2, Hkv = 2, G = 2, T = 12, W = 3, D = 8.
struct Right {
  Tensor queries{{2, 4, 3, 8}, DType::kFloat32}, keys{{2, 2, 12, 8}, DType::kFloat32};
  Tensor scores{{2, 2, 12}, DType::kFloat32}, norms{{2, 2, 12}, DType::kFloat32};
  Tensor w_o{{5, 32}, DType::kFloat32}, budgets{{2, 2}, DType::kInt32};
  Tensor positions{{48}, DType::kInt32}, indptr{{5}, DType::kInt32};
  Tensor page_ids{{12}, DType::kInt32}, page_indptr{{3}, DType::kInt32};
  Layer layer{2, 2, 8, 8, 30, 4, 1};
  Tensor out{{2, 4, 3, 8}, DType::kFloat32}, entries{{2, 2, 3, 8}, DType::kFloat32};
  Tensor schedules{{1, schedule_size(4, 2)}, DType::kInt32};
  Tensor bounds{{30, 16}, DType::kFloat32}, listed{{2, 2, 4}, DType::kInt32};

  ScoreArgs score() const {
    ScoreArgs args;
    args.queries = queries.view;
    args.keys = keys.view;
    args.scores = scores.view;
    return args;
  }
  ValueNormArgs value_norm() const {
    ValueNormArgs args;
    args.values = keys.view;
    args.w_o = w_o.view;
    args.norms = norms.view;
    return args;
  }
  AllocateArgs allocate() const {
    AllocateArgs args;
    args.scores = scores.view;
    args.budgets = budgets.view;
    return args;
  }
  SelectArgs select() const {
    SelectArgs args;
    args.scores = scores.view;
    args.budgets = budgets.view;
    args.positions = positions.view;
    args.indptr = indptr.view;
    return args;
  }
  CompactArgs compact() const {
    CompactArgs args;
    args.keys = args.values = keys.view;
    args.positions = positions.view;
    args.indptr = indptr.view;
    args.page_ids = page_ids.view;
    args.page_indptr = page_indptr.view;
    args.layer = layer.view();
    return args;
  }
  AppendArgs append() const {
    AppendArgs args;
    args.keys = args.values = entries.view;
    args.layer = layer.view();
    return args;
  }
  PlanArgs plan() const {
    PlanArgs args;
    args.lengths = TensorView(layer.lengths.view.data, {1, 2, 2}, DType::kInt32);
    args.block_table = TensorView(layer.block_table.view.data, {1, 2, 2, 4}, DType::kInt32);
    args.fresh_pages = TensorView(layer.fresh_pages.view.data, {1, 2, 2, 1}, DType::kInt32);
    args.new_tokens = 0;
    args.page_size = 8;
    args.num_workers = 2;
    args.schedule = schedules.view;
    return args;
  }
  AttendArgs attend() const {
    AttendArgs args;
    args.queries = queries.view;
    args.layer = layer.view();
    args.schedule = schedules.view.select(0);
    args.num_workers = 2;
    args.out = out.view;
    return args;
  }
  ShortlistArgs shortlist() const {
    ShortlistArgs args;
    args.queries = queries.view;
    args.bounds = bounds.view;
    args.lengths = layer.lengths.view;
    args.block_table = layer.block_table.view;
    args.page_size = 8;
    args.listed = listed.view;
    args.listed_lengths = budgets.view;
    return args;
  }
};

// What a verb says about arguments that are right but for one change.
template <typename Args, typename Change>
std::string after(Args (Right::*make)() const, void (*verb)(const Args&), const Change& change) {
  const Right right;
  Args args = (right.*make)();
  change(args);
  return complaint([&] { verb(args); });
}

std::string score_after(void (*change)(ScoreArgs&)) {
  return after(&Right::score, &score, change);
}

TEST(Arguments, RightOnesAreWelcome) {
  const Right right;
  EXPECT_EQ(complaint([&] { run(&score, right.score()); }), "");
  EXPECT_EQ(complaint([&] { run(&value_norm, right.value_norm()); }), "");
  EXPECT_EQ(complaint([&] { run(&allocate, right.allocate()); }), "");
  EXPECT_EQ(complaint([&] { run(&select, right.select()); }), "");
  EXPECT_EQ(complaint([&] { plan(right.plan()); }), "");
  EXPECT_EQ(complaint([&] { run(&attend, right.attend()); }), "");
  EXPECT_EQ(complaint([&] { run(&shortlist, right.shortlist()); }), "");
}

TEST(Arguments, EveryTensorHasMemoryBehindIt) {
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.keys.data = nullptr; }),
            "score: keys [2, 2, 12, 8] must have memory, got a null pointer");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.keys.shape[2] = -3; }),
            "score: keys: sizes must lie in 0 .. 2147483647, got [2, 2, -3, 8]");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.keys.shape[2] = int64_t{1} << 31; }),
            "score: keys: sizes must lie in 0 .. 2147483647, got [2, 2, 2147483648, 8]");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.keys.rank = 5; }),
            "score: keys must have at most 4 dimensions, got 5");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.keys.data = reinterpret_cast<void*>(6); }),
            "score: keys must be aligned to its elements of 4 bytes, got 0x6");
}

TEST(Arguments, ScratchMemoryIsLargeEnough) {
  EXPECT_EQ(score_after([](ScoreArgs&) {}).substr(0, 27), "score: workspace is missing");
  EXPECT_EQ(score_after([](ScoreArgs& args) {
              alignas(16) static int32_t few[4];
              args.workspace = TensorView(few, {4}, DType::kInt32);
            }).substr(0, 27),
            "score: workspace must have ");
  EXPECT_EQ(score_after([](ScoreArgs& args) {
              args.workspace = TensorView(nullptr, {1 << 20}, DType::kInt32);
            }),
            "score: workspace must be a contiguous int32 tensor of one dimension");
}

// Scratch memory and schedules are read in pieces of 16 bytes.
TEST(Arguments, WhatIsReadInPiecesIsAligned) {
  const auto shift = [](TensorView& view, int bytes) { view.data = view.ptr<char>() + bytes; };
  alignas(16) static int32_t scratch[1 << 16];
  for (int bytes : {1, 4, 8}) {
    EXPECT_NE(after(&Right::score, &score,
                    [&](ScoreArgs& args) {
                      args.workspace = TensorView(scratch, {(1 << 16) - 4}, DType::kInt32);
                      shift(args.workspace, bytes);
                    })
                  .find("score: workspace must be aligned to 16 bytes, got "),
              std::string::npos);
    EXPECT_NE(after(&Right::plan, &plan, [&](PlanArgs& args) { shift(args.schedule, bytes); })
                  .find("plan: schedule must be aligned to "),
              std::string::npos);
    EXPECT_NE(after(&Right::attend, &attend, [&](AttendArgs& args) { shift(args.schedule, bytes); })
                  .find("attend: schedule must be aligned to "),
              std::string::npos);
  }
}

TEST(Arguments, ScoreNamesWhatIsWrong) {
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.queries.shape[1] = 3; }),
            "score: q heads must be 1 to 16 times the kv heads, got Hq = 3 and Hkv = 2");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.queries.shape[3] = args.keys.shape[3] = 4; }),
            "score: head dim D must be a multiple of 8, at most 256, got 4");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.pool_width = 4; }),
            "score: pool_width must be odd, 1 to 63, got 4");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.window = -2; }),
            "score: window must be -1 (that of the queries) or more, got -2");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.stride = 0; }).substr(0, 61),
            "score: stride must be at least 1, and W * stride at most 2^26");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.distance = -1; }),
            "score: distance must lie in 0 .. 2^26, got -1");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.softcap = -1; }),
            "score: softcap must be 0 (none) or more, got -1");
  EXPECT_EQ(score_after([](ScoreArgs& args) { args.scale = NAN; }),
            "score: scale must be finite, got nan");
  EXPECT_EQ(score_after([](ScoreArgs& args) {
              static int32_t lengths[] = {12, 13};
              args.seq_lens = TensorView(lengths, {2}, DType::kInt32);
            }),
            "score: seq_lens must lie in 0 .. 12, got 13 for sequence 1");
}

TEST(Arguments, ValueNormNamesWhatIsWrong) {
  EXPECT_EQ(
      after(&Right::value_norm, &value_norm, [](ValueNormArgs& args) { args.w_o.shape[1] = 24; }),
      "value_norm: w_o must be [E, Hq * D] with Hq 1 to 16 times the kv heads, got [5, 24] "
      "for Hkv = 2 and D = 8");
}

TEST(Arguments, AllocateNamesWhatIsWrong) {
  EXPECT_EQ(after(&Right::allocate, &allocate, [](AllocateArgs& args) { args.window = 3; }),
            "allocate: budget must be at least the window, got budget = 0 and window = 3");
  EXPECT_EQ(after(&Right::allocate, &allocate, [](AllocateArgs& args) { args.floor = 1.5; }),
            "allocate: floor must lie in 0 .. 1, got 1.5");
  EXPECT_EQ(after(&Right::allocate, &allocate, [](AllocateArgs& args) { args.floor = NAN; }),
            "allocate: floor must lie in 0 .. 1, got nan");
}

TEST(Arguments, SelectNamesWhatIsWrong) {
  EXPECT_EQ(after(&Right::select, &select, [](SelectArgs& args) { args.first = -0.5; }),
            "select: first must lie in 0 .. 1, got -0.5");
  EXPECT_EQ(after(&Right::select, &select, [](SelectArgs& args) { args.indptr.shape[0] = 4; }),
            "select: indptr must have 5 elements, got 4");
  EXPECT_EQ(after(&Right::select, &select, [](SelectArgs& args) { args.eps = INFINITY; }),
            "select: eps must be 0 or more, got inf");
}

TEST(Arguments, CompactNamesWhatIsWrong) {
  EXPECT_EQ(
      after(&Right::compact, &compact, [](CompactArgs& args) { args.layer.pages.stride[1] = 65; }),
      "compact: pages must be contiguous");
  EXPECT_EQ(after(&Right::compact, &compact,
                  [](CompactArgs& args) { args.layer.fresh_pages.shape[2] = 0; }),
            "compact: fresh_pages must have at least one column, got [2, 2, 0]");
  EXPECT_EQ(
      after(&Right::compact, &compact, [](CompactArgs& args) { args.page_indptr.shape[0] = 2; }),
      "compact: page_indptr must have 3 elements, got 2");
}

TEST(Arguments, AppendNamesWhatIsWrong) {
  EXPECT_EQ(after(&Right::append, &append, [](AppendArgs& args) { args.values.shape[1] = 1; }),
            "append: values must be [B = 2, Hkv = 2, S = 3, D = 8], got [2, 1, 3, 8]");
  EXPECT_EQ(after(&Right::append, &append,
                  [](AppendArgs& args) { args.layer.lengths.ptr<int32_t>()[0] = -1; }),
            "append: lengths must lie in 0 .. M * P = 32, got -1");
}

TEST(Arguments, PlanNamesWhatIsWrong) {
  EXPECT_EQ(after(&Right::plan, &plan, [](PlanArgs& args) { args.page_size = 12; }),
            "plan: page_size must be a power of two from 8 to 256, got 12");
  EXPECT_EQ(after(&Right::plan, &plan, [](PlanArgs& args) { args.new_tokens = 9; }),
            "plan: at most F * P = 8 tokens can be appended in one piece, got new_tokens = 9");
  EXPECT_EQ(after(&Right::plan, &plan, [](PlanArgs& args) { args.num_workers = 3; }),
            "plan: schedule must be [L, 224], got [1, 160]");
  EXPECT_EQ(after(&Right::plan, &plan, [](PlanArgs& args) { args.lengths.ptr<int32_t>()[3] = 33; }),
            "plan: lengths must lie in 0 .. M * P = 32, got 33");
}

TEST(Arguments, AttendNamesWhatIsWrong) {
  EXPECT_EQ(after(&Right::attend, &attend, [](AttendArgs& args) { args.keys = args.queries; }),
            "attend: keys and values must be given together");
  EXPECT_EQ(
      after(&Right::attend, &attend, [](AttendArgs& args) { args.out.dtype = DType::kInt32; }),
      "attend: out must be float32, float16 or bfloat16, got int32");
  EXPECT_EQ(after(&Right::attend, &attend, [](AttendArgs& args) { args.num_workers = 0; }),
            "attend: num_workers must be from 1 to 32767, got 0");
  static float slots[2 * 2 * 32];
  EXPECT_EQ(after(&Right::attend, &attend,
                  [](AttendArgs& args) {
                    args.accumulated = TensorView(slots, {2, 2, 31}, DType::kFloat32);
                  }),
            "attend: accumulated must be [B, Hkv, T] with T at least M * P = 32, got [2, 2, 31]");
  EXPECT_EQ(after(&Right::attend, &attend,
                  [](AttendArgs& args) {
                    args.accumulated = TensorView(slots, {2, 2, 32}, DType::kFloat32);
                  }),
            "attend: lse must be given with accumulated");
  EXPECT_EQ(after(&Right::attend, &attend, [](AttendArgs& args) { args.others.resize(8); }),
            "attend: others must be at most 7, got 8");
  EXPECT_EQ(after(&Right::attend, &attend,
                  [](AttendArgs& args) {
                    args.others = {{args.layer, args.schedule, TensorView(), -1}};
                  }),
            "attend: others[0]: column must not be negative, got -1");
  EXPECT_EQ(
      after(&Right::attend, &attend,
            [](AttendArgs& args) { args.others = {{args.layer, args.schedule, TensorView(), 8}}; }),
      "attend: out must be [B, Hq, S, 16], the columns of all tiers, at most 512, got "
      "[2, 4, 3, 8]");
}

TEST(Arguments, ShortlistNamesWhatIsWrong) {
  const auto shortlist_after = [](void (*change)(ShortlistArgs&)) {
    return after(&Right::shortlist, &shortlist, change);
  };
  EXPECT_EQ(shortlist_after([](ShortlistArgs& args) { args.bounds.shape[1] = 8; }),
            "shortlist: bounds must be contiguous [N, 2 D] with D = 8, got [30, 8]");
  EXPECT_EQ(shortlist_after([](ShortlistArgs& args) { args.share = NAN; }),
            "shortlist: share must be above 0 and at most 1, got nan");
  EXPECT_EQ(shortlist_after([](ShortlistArgs& args) { args.newest = 0; }),
            "shortlist: newest must be at least 1, got 0");
  EXPECT_EQ(shortlist_after([](ShortlistArgs& args) { args.listed.shape[2] = 1; }),
            "shortlist: listed must have room for the newest 2 pages of a row, got [2, 2, 1]");
  EXPECT_EQ(shortlist_after([](ShortlistArgs& args) { args.lengths.ptr<int32_t>()[2] = 33; }),
            "shortlist: lengths must lie in 0 .. 32, got 33 for row (1, 0)");
}

// A schedule for tokens that nobody appended.
TEST(Arguments, AttendReadsNoPageThatIsNotThere) {
  const Right right;
  PlanArgs plan_args = right.plan();
  plan_args.new_tokens = 1;
  plan(plan_args);
  EXPECT_EQ(complaint([&] { run(&attend, right.attend()); }),
            "attend: the schedule must be that of the layer's lengths, new tokens included, but it "
            "says 1 for row 0, which has 0");
}

TEST(Arguments, AnotherDeviceIsAnErrorWithoutIt) {
  if (cuda_available()) GTEST_SKIP() << "CUDA is here";
  const Right right;
  ScoreArgs args = right.score();
  for (TensorView* view : {&args.queries, &args.keys, &args.scores}) {
    view->device = {DeviceType::kCuda, 0};
  }
  EXPECT_THROW(score(args), Error);
  EXPECT_THROW(default_num_workers({DeviceType::kCuda, 0}), Error);
  args.scores.device = {};
  EXPECT_EQ(complaint([&] { score(args); }),
            "score: scores must be on cuda:0 like queries, got cpu");
}

}  // namespace
}  // namespace adakv
