#include "kv.h"

#include <algorithm>
#include <stdexcept>

namespace embed {

using adakv::DType;
using adakv::TensorView;

constexpr int32_t kPageSize = 16;

Kv::Kv(const Place& place,
       const Sizes& sizes,
       const Policy& policy,
       int64_t tokens,
       int64_t max_new_tokens)
    : place_(place),
      sizes_(sizes),
      policy_(policy),
      tokens_(tokens),
      cache_(config(max_new_tokens), place.memory(), place.stream()),
      num_workers_(adakv::default_num_workers(place.device())) {}

Kv::Kv(const Place& place, const Sizes& sizes, const adakv::CacheFile& book, int64_t max_new_tokens)
    : place_(place),
      sizes_(sizes),
      tokens_(book.seen()[0]),
      cache_(config(book, max_new_tokens), place.memory(), place.stream()),
      num_workers_(adakv::default_num_workers(place.device())) {
  book.load(cache_, 0, place.stream());
}

int64_t Kv::num_kept() const {
  return sizes_.kv_heads * std::min<int64_t>(policy_.budget, tokens_);
}

adakv::CacheConfig Kv::config(int64_t max_new_tokens) const {
  adakv::CacheConfig config;
  config.num_layers = sizes_.layers;
  config.num_sequences = 1;
  config.num_kv_heads = sizes_.kv_heads;
  config.head_dim = sizes_.head_dim;
  config.page_size = kPageSize;
  config.num_pages =
      static_cast<int32_t>(sizes_.layers * adakv::KVCache::pages_for(num_kept(), max_new_tokens,
                                                                     sizes_.kv_heads, kPageSize));
  config.max_row_pages = static_cast<int32_t>((tokens_ + max_new_tokens) / kPageSize + 2);
  config.dtype = DType::kFloat32;
  config.device = place_.device();
  return config;
}

adakv::CacheConfig Kv::config(const adakv::CacheFile& book, int64_t max_new_tokens) const {
  adakv::CacheConfig config = book.config(max_new_tokens, kPageSize);
  const bool fits = config.num_layers == sizes_.layers && config.num_kv_heads == sizes_.kv_heads &&
                    config.head_dim == sizes_.head_dim && config.value_dim == sizes_.head_dim;
  if (!fits) throw std::runtime_error("the book was made for a model of another shape");
  const bool is_one = config.num_sequences == 1 && config.dtype == DType::kFloat32;
  if (!is_one) throw std::runtime_error("the book must be one text, in float32");
  config.device = place_.device();
  return config;
}

// [tokens, heads * D] as adakv takes it, [1, heads, tokens, D]: strides do it, nothing is copied.
TensorView Kv::per_head(float* data, int64_t tokens, int64_t heads) const {
  TensorView view = floats(data, {1, heads, tokens, sizes_.head_dim});
  view.stride[1] = sizes_.head_dim;
  view.stride[2] = heads * sizes_.head_dim;
  return view;
}

TensorView Kv::floats(float* data, std::initializer_list<int64_t> shape) const {
  return TensorView(data, shape, DType::kFloat32, place_.device());
}

TensorView Kv::ints(int32_t* data, std::initializer_list<int64_t> shape) const {
  return TensorView(data, shape, DType::kInt32, place_.device());
}

// Runs a verb that wants scratch memory.
template <typename Args>
void Kv::run(void (*verb)(const Args&), Args& args) {
  const int64_t size = static_cast<int64_t>(adakv::workspace_bytes(args) / 4 + 1);
  args.workspace = ints(workspace_.room(size), {size});
  args.stream = place_.stream();
  verb(args);
}

// [L, schedule_size]
TensorView Kv::schedules() {
  const int64_t size = adakv::schedule_size(sizes_.kv_heads, num_workers_);
  return ints(schedules_.room(sizes_.layers * size), {sizes_.layers, size});
}

// score -> allocate -> select, or everything where the budget has room for it: positions and indptr
// of `compact`, which has the layer's keys and values.
void Kv::choose(const float* queries,
                const float* w_o,
                int64_t width,
                adakv::CompactArgs& compact) {
  const int64_t kv_heads = sizes_.kv_heads, q_width = sizes_.heads * sizes_.head_dim;
  const bool fits = tokens_ <= policy_.budget;
  const std::vector<int32_t> all(kv_heads, static_cast<int32_t>(tokens_));
  adakv::SelectArgs select;
  select.scores = floats(scores_.room(kv_heads * tokens_), {1, kv_heads, tokens_});
  select.budgets =
      ints(fits ? budgets_.input(all.data(), kv_heads) : budgets_.room(kv_heads), {1, kv_heads});
  if (!fits) {
    const float* window = queries + (tokens_ - policy_.window) * q_width;
    adakv::ScoreArgs score;
    score.queries =
        per_head(queries_.input(window, policy_.window * q_width), policy_.window, sizes_.heads);
    score.keys = compact.keys;
    score.scores = select.scores;
    run(&adakv::score, score);

    adakv::AllocateArgs allocate;
    allocate.scores = select.scores;
    allocate.budget = policy_.budget;
    allocate.window = policy_.window;
    allocate.budgets = select.budgets;
    run(&adakv::allocate, allocate);
  }
  if (policy_.is_critical && !fits) {
    adakv::ValueNormArgs value_norm;
    value_norm.values = compact.values;
    value_norm.w_o = floats(w_o_.input(w_o, width * q_width), {width, q_width});
    value_norm.norms = floats(norms_.room(kv_heads * tokens_), {1, kv_heads, tokens_});
    run(&adakv::value_norm, value_norm);
    select.norms = value_norm.norms;
  }
  select.window = fits ? 0 : policy_.window;
  select.positions = ints(positions_.room(num_kept()), {num_kept()});
  select.indptr = ints(indptr_.room(kv_heads + 1), {kv_heads + 1});
  run(&adakv::select, select);
  compact.positions = select.positions;
  compact.indptr = select.indptr;
}

void Kv::take_prompt(int32_t layer,
                     const float* queries,
                     const float* keys,
                     const float* values,
                     const float* w_o,
                     int64_t width) {
  const int64_t size = tokens_ * sizes_.kv_heads * sizes_.head_dim;
  adakv::CompactArgs compact;
  compact.keys = per_head(keys_.input(keys, size), tokens_, sizes_.kv_heads);
  compact.values = per_head(values_.input(values, size), tokens_, sizes_.kv_heads);
  choose(queries, w_o, width, compact);

  const adakv::PageList pages = cache_.begin(layer, 0, {num_kept()}, {tokens_});
  const int64_t num_pages = static_cast<int64_t>(pages.ids.size());
  compact.page_ids = ints(page_ids_.input(pages.ids.data(), num_pages), {num_pages});
  compact.page_indptr = ints(page_indptr_.input(pages.indptr.data(), 2), {2});
  compact.layer = cache_.layer(layer);
  run(&adakv::compact, compact);
}

void Kv::begin_step() {
  cache_.grow({1}, 1, place_.stream());
  adakv::PlanArgs plan;
  plan.lengths = cache_.all_layers().lengths;
  plan.block_table = cache_.all_layers().block_table;
  plan.fresh_pages = cache_.all_layers().fresh_pages;
  plan.page_size = kPageSize;
  plan.num_workers = num_workers_;
  plan.schedule = schedules();
  plan.stream = place_.stream();
  adakv::plan(plan);
}

void Kv::attend(
    int32_t layer, const float* queries, const float* keys, const float* values, float* out) {
  const int64_t q_width = sizes_.heads * sizes_.head_dim;
  const int64_t kv_width = sizes_.kv_heads * sizes_.head_dim;
  adakv::AttendArgs attend;
  attend.queries = per_head(queries_.input(queries, q_width), 1, sizes_.heads);
  attend.keys = per_head(keys_.input(keys, kv_width), 1, sizes_.kv_heads);
  attend.values = per_head(values_.input(values, kv_width), 1, sizes_.kv_heads);
  attend.out = per_head(out_.output(out, q_width), 1, sizes_.heads);
  attend.layer = cache_.layer(layer);
  attend.schedule = schedules().select(layer);
  attend.num_workers = num_workers_;
  run(&adakv::attend, attend);
  out_.finish(out, q_width);
}

std::vector<std::vector<int32_t>> Kv::positions(int32_t layer) const {
  const adakv::LayerView view = cache_.layer(layer);
  const std::vector<int32_t> lengths = place_.read(view.lengths);       // [Hkv]
  const std::vector<int32_t> table = place_.read(view.block_table);     // [Hkv, M]
  const std::vector<int32_t> slots = place_.read(view.page_positions);  // [N, P]
  std::vector<std::vector<int32_t>> result(sizes_.kv_heads);
  for (int32_t h = 0; h < sizes_.kv_heads; ++h) {
    const int32_t* row = &table[h * view.block_table.stride[1]];
    for (int32_t i = 0; i < lengths[h]; ++i) {
      result[h].push_back(slots[int64_t{row[i / kPageSize]} * kPageSize + i % kPageSize]);
    }
  }
  return result;
}

}  // namespace embed
