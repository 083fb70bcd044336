// Arguments of every verb, right ones and wrong ones: wrong ranks, sizes, strides, dtypes, devices,
// null pointers, numbers out of every range. A verb either does its work or throws Error or
// InvalidArgument, and then nothing has changed. Every tensor has exactly the memory that its view
// spans, so that a sanitizer sees each step beyond.
//
// Lengths, block tables and what was seen may be wild, too: on the CPU they are checked where they
// are read (docs/memory.md).
#include <adakv/adakv.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "input.h"

namespace adakv::fuzz {
namespace {

using Shape = std::vector<int64_t>;

class Call {
 public:
  explicit Call(Input& input)
      : input_(input),
        dtype_(static_cast<DType>(input.range(0, 2))),
        odds_(input.range(0, 3) * 12),
        B(input.range(0, 3)),
        Hkv(input.range(0, 3)),
        Hq(Hkv * (input.one_in(8) ? input.range(0, 18) : input.range(1, 4))),
        T(input.one_in(20) ? input.range(0, 900) : input.range(0, 40)),
        W(input.range(0, 6)),
        S(input.one_in(4) ? input.range(0, 40) : 1),
        D(input.one_in(10) ? input.range(0, 300) : 8 * input.range(1, 5)),
        has_value_pages_(input.one_in(3)),
        Dv(!has_value_pages_  ? D
           : input.one_in(10) ? input.range(0, 300)
                              : 8 * input.range(1, 5)),
        P(8 << input.range(0, 2)),
        N(input.range(1, 40)),
        M(input.range(0, 6)),
        F(input.range(1, 4)) {}

  void run_one() {
    switch (input_.range(0, 9)) {
      case 0:
        return score_call();
      case 1:
        return value_norm_call();
      case 2:
        return allocate_call();
      case 3:
        return select_call();
      case 4:
        return compact_call();
      case 5:
        return append_call();
      case 6:
        return fork_call();
      case 7:
        return plan_call();
      case 8:
        return shortlist_call();
      default:
        return attend_call();
    }
  }

 private:
  struct Buffer {
    std::unique_ptr<char[]> data, before;
    size_t bytes;
  };

  /// True now and then, if this input goes wrong at all.
  bool goes_wrong() { return odds_ > 0 && input_.one_in(odds_); }

  /// A view of zeros with memory of its own; maybe with gaps between its rows, maybe wrong. Its first
  /// dimension's parts lie `apart` elements apart, if they are no more than that.
  TensorView make(const Shape& shape, DType dtype, int64_t apart = 0) {
    TensorView view;
    view.dtype = dtype;
    view.rank = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), view.shape);
    const bool is_wrong = goes_wrong();
    const int wrong = is_wrong ? input_.range(0, 9) : -1;
    int64_t* some_size = &view.shape[view.rank > 0 ? input_.byte() % view.rank : 0];
    if (wrong == 0) return {};
    if (wrong == 1) view.dtype = static_cast<DType>(input_.range(0, 3));
    if (wrong == 2) view.device = {static_cast<DeviceType>(input_.range(0, 1)), input_.range(0, 1)};
    if (wrong == 3) *some_size += input_.range(-2, 2);
    if (wrong == 4) *some_size = 0;
    if (wrong == 5) view.rank = input_.range(0, 4);
    int64_t step = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.stride[i] = step;
      step *= std::max<int64_t>(view.shape[i], 1) + (i > 0 && input_.one_in(16) ? 3 : 0);
    }
    view.stride[0] = std::max(view.stride[0], apart);
    if (wrong == 6 && view.rank > 0) view.stride[view.rank - 1] = input_.range(0, 2);
    allocate_memory(view);
    if (wrong == 7 && view.size() > 0) view.data = nullptr;  // empty ones may have any pointer
    if (wrong == 8) *some_size = static_cast<int64_t>(input_.word()) << 31 | int64_t{1} << 63;
    if (wrong == 9) view.rank = input_.range(5, 9);
    return view;
  }

  void allocate_memory(TensorView& view) {
    int64_t elements = 1;
    for (int i = 0; i < view.rank; ++i) elements += (view.shape[i] - 1) * view.stride[i];
    for (int i = 0; i < view.rank; ++i) elements = view.shape[i] <= 0 ? 0 : elements;
    const size_t bytes = elements * dtype_size(view.dtype);
    buffers_.push_back({std::make_unique<char[]>(bytes), nullptr, bytes});
    view.data = buffers_.back().data.get();
    span_ = elements;  // of the newest tensor
  }

  /// Random numbers, some of them special.
  TensorView floats(const Shape& shape, DType dtype, int64_t apart = 0) {
    const TensorView view = make(shape, dtype, apart);
    if (!view.data) return view;
    std::mt19937 random(input_.byte());
    for (int64_t i = 0; i < span_; ++i) {
      static constexpr float kSome[] = {0.f, 1.f, -1.f, .5f, 2.f, -.25f, 100.f, 1e30f};
      const auto choice = random() % 11;
      uint32_t bits;
      std::memcpy(&bits, &kSome[choice % 8], sizeof bits);
      if (choice == 8) bits = 0x7f800000;  // inf
      if (choice == 9) bits = 0x7fc00000;  // NaN
      if (choice == 10) bits = static_cast<uint32_t>(random());
      if (dtype_size(view.dtype) == 4) {
        std::memcpy(view.ptr<char>() + 4 * i, &bits, 4);
      } else {
        std::memcpy(view.ptr<char>() + 2 * i, reinterpret_cast<char*>(&bits) + 2, 2);
      }
    }
    return view;
  }
  TensorView floats(const Shape& shape) { return floats(shape, dtype_); }

  /// Numbers in first .. last; now and then any number.
  TensorView ints(const Shape& shape, int first, int last) {
    const TensorView view = make(shape, DType::kInt32);
    if (!view.data || dtype_size(view.dtype) != 4) return view;
    const bool are_some_wild = goes_wrong();
    std::mt19937 random(input_.byte());
    const auto most = static_cast<uint32_t>(std::max(last - first, 0)) + 1;
    for (int64_t i = 0; i < span_; ++i) {
      const bool is_wild = are_some_wild && random() % 4 == 0;
      view.ptr<int32_t>()[i] =
          static_cast<int32_t>(is_wild ? random() : first + static_cast<uint32_t>(random()) % most);
    }
    return view;
  }

  /// The numbers given; one of them may be any.
  TensorView ints(const std::vector<int32_t>& numbers) {
    const TensorView view = make({static_cast<int64_t>(numbers.size())}, DType::kInt32);
    if (!view.data || view.dtype != DType::kInt32 || span_ == 0) return view;
    const auto count = std::min<int64_t>(span_, numbers.size());
    std::copy_n(numbers.begin(), count, view.ptr<int32_t>());
    if (goes_wrong())
      view.ptr<int32_t>()[input_.byte() % span_] = static_cast<int32_t>(input_.word());
    return view;
  }

  TensorView counts(int most) { return input_.one_in(2) ? ints({B}, 0, most) : TensorView(); }

  float option(float usual) {
    static constexpr float kOdd[] = {0.f, -1.f, 1e30f, INFINITY, NAN};
    return goes_wrong() ? kOdd[input_.range(0, 4)] : usual;
  }

  int number(int usual) { return goes_wrong() ? static_cast<int>(input_.word()) : usual; }

  LayerView layer() {
    // Sizes, however wrong, as far as there can be memory behind them.
    const auto size = [](const TensorView& x, int rank, int dim) {
      if (x.rank != rank || !x.data) return 0;
      return static_cast<int>(std::clamp<int64_t>(x.shape[dim], 0, 64));
    };
    LayerView view;
    if (has_value_pages_) {
      const int64_t apart = int64_t{P} * std::max(D, Dv);
      view.pages = floats({N, 1, P, D}, dtype_, apart);
      view.value_pages = floats({N, 1, P, Dv}, dtype_, apart);
    } else {
      view.pages = floats({N, 2, P, D});
    }
    const int last = size(view.pages, 4, 0) - 1;
    view.page_positions = ints({N, P}, 0, 1000);
    view.block_table = ints({B, Hkv, M}, 0, last);
    const int room = last >= 0 ? size(view.block_table, 3, 2) * size(view.pages, 4, 2) : 0;
    view.lengths = ints({B, Hkv}, 0, room);
    view.seen = ints({B}, 0, 1000);
    view.fresh_pages = ints({B, Hkv, F}, input_.one_in(4) ? -1 : 0, last);
    return view;
  }

  /// Calls a verb; if it throws, nothing may have changed.
  template <typename Verb>
  void call(const Verb& verb) {
    for (Buffer& buffer : buffers_) {
      buffer.before = std::make_unique<char[]>(buffer.bytes);
      std::memcpy(buffer.before.get(), buffer.data.get(), buffer.bytes);
    }
    try {
      verb();
      return;
    } catch (const InvalidArgument&) {
    } catch (const Error&) {
    }
    for (const Buffer& buffer : buffers_) {
      ADAKV_FUZZ_ASSERT(std::memcmp(buffer.before.get(), buffer.data.get(), buffer.bytes) == 0);
    }
  }

  /// The same with scratch memory, mostly of the right size and at a right address.
  template <typename Args>
  void call(void (*verb)(const Args&), Args& args) {
    std::unique_ptr<char[]> workspace;
    call([&] {
      const auto ints = static_cast<int64_t>((workspace_bytes(args) + 3) / 4);
      const int64_t given = std::max<int64_t>(ints - goes_wrong(), 0);
      const int shift = goes_wrong() ? input_.range(1, 15) : 0;
      workspace = std::make_unique<char[]>(4 * given + shift);
      args.workspace = TensorView(workspace.get() + shift, {given}, DType::kInt32);
      verb(args);
    });
  }

  void score_call() {
    ScoreArgs args;
    args.queries = floats({B, Hq, W, D});
    args.keys = floats({B, Hkv, T, D});
    args.seq_lens = counts(T);
    if (input_.one_in(3)) args.sink_logits = floats({Hq}, DType::kFloat32);
    if (input_.one_in(3)) args.lse = floats({B, Hq, W}, DType::kFloat32);
    args.scale = option(0.5f);
    args.softcap = option(input_.one_in(3) ? 5.f : 0.f);
    args.window_reduce = static_cast<Reduce>(input_.range(0, 2));
    args.group_reduce = static_cast<Reduce>(input_.range(0, 2));
    args.order = static_cast<Order>(input_.range(0, 1));
    args.pool = static_cast<Pool>(input_.range(0, 2));
    args.pool_width = number(2 * input_.range(0, 6) + 1);
    if (input_.one_in(2)) {
      args.window = number(input_.range(-1, 9));
      args.stride = number(input_.range(1, 4));
      args.distance = number(input_.range(0, 9));
    }
    args.scores = floats({B, Hkv, T}, DType::kFloat32);
    call(&score, args);
  }

  void value_norm_call() {
    ValueNormArgs args;
    args.values = floats({B, Hkv, T, D});
    args.w_o = floats({input_.range(0, 20), Hq * D});
    args.seq_lens = counts(T);
    args.norm = static_cast<Norm>(input_.range(0, 1));
    args.norms = floats({B, Hkv, T}, DType::kFloat32);
    call(&value_norm, args);
  }

  void allocate_call() {
    AllocateArgs args;
    args.scores = floats({B, Hkv, T}, DType::kFloat32);
    args.seq_lens = counts(T);
    args.window = number(input_.range(0, 8));
    args.budget = number(args.window + input_.range(0, 30));
    args.floor = option(static_cast<float>(input_.range(0, 10)) / 10);
    args.safeguard = static_cast<Safeguard>(input_.range(0, 3));
    args.budgets = ints({B, Hkv}, 0, 0);
    call(&allocate, args);
  }

  void select_call() {
    SelectArgs args;
    args.scores = floats({B, Hkv, T}, DType::kFloat32);
    args.budgets = ints({B, Hkv}, 0, T);
    if (input_.one_in(2)) args.norms = floats({B, Hkv, T}, DType::kFloat32);
    args.seq_lens = counts(T);
    args.window = number(input_.range(0, 8));
    args.first = option(static_cast<float>(input_.range(0, 10)) / 10);
    args.eps = option(1e-4f);
    args.positions = ints({input_.one_in(3) ? input_.range(0, 99) : B * Hkv * T}, 0, 0);
    args.indptr = ints({B * Hkv + 1}, 0, 0);
    call(&select, args);
  }

  void compact_call() {
    CompactArgs args;
    args.keys = floats({B, Hkv, T, D});
    args.values = floats({B, Hkv, T, Dv});
    std::mt19937 random(input_.byte());
    std::vector<int32_t> positions, indptr = {0}, ids, id_indptr = {0};
    for (int b = 0; b < B; ++b) {
      for (int h = 0; h < Hkv; ++h) {
        const int kept = T > 0 ? input_.range(0, std::min(T, M * P)) : 0;
        for (int i = 0; i < kept; ++i) positions.push_back(static_cast<int32_t>(random() % T));
        indptr.push_back(static_cast<int32_t>(positions.size()));
        for (int i = 0; i < kept; i += P) ids.push_back(static_cast<int32_t>(random() % N));
        ids.push_back(static_cast<int32_t>(random() % N));
      }
      id_indptr.push_back(static_cast<int32_t>(ids.size()));
    }
    args.positions = ints(positions);
    if (input_.one_in(2)) args.places = ints(positions);
    args.indptr = ints(indptr);
    args.page_ids = ints(ids);
    args.page_indptr = ints(id_indptr);
    args.seq_lens = counts(T);
    args.layer = layer();
    call(&compact, args);
  }

  void append_call() {
    AppendArgs args;
    args.keys = floats({B, Hkv, S, D});
    args.values = floats({B, Hkv, S, Dv});
    args.num_new = counts(S);
    args.layer = layer();
    call([&] { append(args); });
  }

  void fork_call() {
    const int A = input_.range(1, 3), most_back = M > 0 ? input_.range(0, P) : 0;
    ForkArgs args;
    args.source_table = ints({A, Hkv, M}, 0, N - 1);
    args.source_lengths = ints({A, Hkv}, most_back, M * P);
    args.source_seen = ints({A}, most_back, 1000);
    args.sources = ints({B}, 0, A - 1);
    args.stretch = ints({B}, 0, P);
    if (input_.one_in(2)) args.back = ints({B}, 0, most_back);
    args.whole = input_.one_in(3);
    std::mt19937 random(input_.byte());
    std::vector<int32_t> ids, indptr = {0};
    for (int b = 0; b < B; ++b) {
      const int enough = args.whole ? (M + 1) * Hkv : 2 * Hkv;
      const int count = input_.one_in(8) ? input_.range(0, enough) : enough;
      for (int i = 0; i < count; ++i) ids.push_back(static_cast<int32_t>(random() % N));
      indptr.push_back(static_cast<int32_t>(ids.size()));
    }
    args.page_ids = ints(ids);
    args.page_indptr = ints(indptr);
    args.layer = layer();
    call([&] { fork(args); });
  }

  void plan_call() {
    const int64_t layers = input_.range(0, 3);
    PlanArgs args;
    args.lengths = ints({layers, B, Hkv}, 0, M * P);
    args.block_table = ints({layers, B, Hkv, M}, 0, N - 1);
    args.fresh_pages = ints({layers, B, Hkv, F}, -1, N - 1);
    args.num_new = counts(S);
    args.new_tokens = number(S);
    args.page_size = number(P);
    args.num_workers = input_.range(1, 9);
    args.schedule = schedules({layers, schedule_size(B * Hkv, args.num_workers)});
    args.num_workers = number(args.num_workers);
    if (input_.range(0, 1)) args.share = option(static_cast<float>(input_.range(1, 10)) / 10);
    args.least = number(input_.range(0, 4));
    args.newest = number(input_.range(1, 3));
    call([&] { plan(args); });
  }

  /// Memory for schedules, now and then not aligned to 16 bytes.
  TensorView schedules(Shape shape) {
    shape.back() += 4;
    TensorView view = make(shape, DType::kInt32);
    if (view.rank != static_cast<int>(shape.size()) || !view.data) return view;
    view.shape[view.rank - 1] -= 4;
    if (goes_wrong()) view.data = view.ptr<char>() + input_.range(1, 15);
    return view;
  }

  /// A layer's tensor with a dimension of one layer in front.
  static TensorView one_layer(const TensorView& view) {
    TensorView all = view;
    if (view.rank < 0 || view.rank >= TensorView::kMaxRank) return {};
    all.rank = view.rank + 1;
    all.shape[0] = all.stride[0] = 1;
    std::copy_n(view.shape, view.rank, all.shape + 1);
    std::copy_n(view.stride, view.rank, all.stride + 1);
    return all;
  }

  void attend_call() {
    AttendArgs args;
    args.queries = floats({B, Hq, S, D});
    args.layer = layer();
    if (input_.one_in(2)) {
      args.keys = floats({B, Hkv, S, D});
      args.values = floats({B, Hkv, S, Dv});
    }
    args.num_new = counts(S);
    if (input_.one_in(3)) args.sink_logits = floats({Hq}, DType::kFloat32);
    args.scale = option(0.f);
    args.softcap = option(input_.one_in(3) ? 5.f : 0.f);
    args.num_workers = input_.range(1, 9);

    PlanArgs plan_args;
    plan_args.lengths = one_layer(args.layer.lengths);
    plan_args.block_table = one_layer(args.layer.block_table);
    plan_args.fresh_pages = one_layer(args.layer.fresh_pages);
    plan_args.new_tokens = args.keys ? S : 0;
    if (args.keys) plan_args.num_new = args.num_new;
    plan_args.page_size =
        args.layer.pages.rank == 4 ? static_cast<int>(args.layer.pages.shape[2]) : P;
    plan_args.num_workers = args.num_workers;
    const Shape shape = {schedule_size(B * Hkv, args.num_workers)};
    args.schedule = schedules(shape);
    plan_args.schedule = one_layer(args.schedule);
    call([&] { plan(plan_args); });

    int64_t width = Dv;
    while (!args.keys && args.others.size() < 8 && input_.one_in(3)) {
      Tier& tier = args.others.emplace_back(Tier{args.layer, args.schedule, {}, 0});
      if (input_.one_in(2)) tier.queries = floats({B, Hq, S, D});
      tier.column = input_.one_in(3) ? 8 * input_.range(-1, 4) : 0;
      width = std::max<int64_t>(width, tier.column + Dv);
    }
    args.out = floats({B, Hq, S, width});
    if (input_.one_in(2)) args.lse = floats({B, Hq, S}, DType::kFloat32);
    if (args.lse && input_.one_in(args.others.empty() ? 2 : 9)) {
      args.accumulated = floats({B, Hkv, M * P}, DType::kFloat32);
      args.accumulate = static_cast<Accumulate>(input_.range(0, 2));
      args.group_reduce = static_cast<Reduce>(input_.range(0, 2));
      args.decay = option(0.5f);
      args.threshold = option(0.f);
    }
    call(&attend, args);
  }

  void shortlist_call() {
    ShortlistArgs args;
    args.queries = floats({B, Hq, S, D});
    args.bounds = floats({N, 2 * D});
    args.lengths = ints({B, Hkv}, 0, M * P);
    args.block_table = ints({B, Hkv, M}, 0, N - 1);
    args.num_new = counts(S);
    args.scale = option(0.5f);
    args.softcap = option(input_.one_in(3) ? 5.f : 0.f);
    args.page_size = number(P);
    args.share = option(static_cast<float>(input_.range(1, 10)) / 10);
    args.mass = option(input_.one_in(2) ? 0.5f : 1.f);
    args.least = number(input_.range(0, 4));
    args.newest = number(input_.range(1, 3));
    args.listed = ints({B, Hkv, input_.one_in(3) ? input_.range(0, M) : M}, 0, 0);
    args.listed_lengths = ints({B, Hkv}, 0, 0);
    call(&shortlist, args);
  }

  Input& input_;
  const DType dtype_;
  const int odds_;  // 0: everything is right
  const int B, Hkv, Hq, T, W, S, D;
  const bool has_value_pages_;
  const int Dv, P, N, M, F;
  std::vector<Buffer> buffers_;
  int64_t span_ = 0;
};

}  // namespace
}  // namespace adakv::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  adakv::fuzz::Input input(data, size);
  while (!input.is_over()) adakv::fuzz::Call(input).run_one();
  return 0;
}
