#include "kv.h"

#include <algorithm>

namespace embed {
namespace {

using adakv::DType;
using adakv::TensorView;

constexpr int32_t kPageSize = 16;

// [tokens, heads * D] as adakv takes it, [1, heads, tokens, D]: strides do it, nothing is copied.
TensorView per_head(float* data, int64_t tokens, int64_t heads, int64_t head_dim) {
  TensorView view(data, {1, heads, tokens, head_dim}, DType::kFloat32);
  view.stride[1] = head_dim;
  view.stride[2] = heads * head_dim;
  return view;
}

TensorView ints(std::vector<int32_t>& values, std::initializer_list<int64_t> shape) {
  return TensorView(values.data(), shape, DType::kInt32);
}

}  // namespace

Kv::Kv(const Sizes& sizes, const Policy& policy, int64_t tokens, int64_t max_new_tokens)
    : sizes_(sizes),
      policy_(policy),
      tokens_(tokens),
      cache_(config(max_new_tokens), adakv::device_memory({})),
      num_workers_(adakv::default_num_workers({})),
      scores_(sizes.kv_heads * tokens),
      budgets_(sizes.kv_heads),
      positions_(num_kept()),
      indptr_(sizes.kv_heads + 1) {
  if (policy.is_critical) norms_.resize(scores_.size());
  schedules_.resize(sizes.layers * adakv::schedule_size(sizes.kv_heads, num_workers_));
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
  return config;
}

// Runs a verb that wants scratch memory.
template <typename Args>
void Kv::run(void (*verb)(const Args&), Args& args) {
  workspace_.resize(std::max(workspace_.size(), adakv::workspace_bytes(args) / 4 + 1));
  args.workspace = ints(workspace_, {static_cast<int64_t>(workspace_.size())});
  verb(args);
}

// score -> allocate -> select, or everything where the budget has room for it.
void Kv::choose(float* queries, float* keys, float* values, const float* w_o, int64_t width) {
  const int64_t heads = sizes_.heads, kv_heads = sizes_.kv_heads, head_dim = sizes_.head_dim;
  const TensorView scores(scores_.data(), {1, kv_heads, tokens_}, DType::kFloat32);
  const TensorView norms(norms_.data(), {1, kv_heads, tokens_}, DType::kFloat32);
  const bool fits = tokens_ <= policy_.budget;

  if (fits) {
    std::fill(budgets_.begin(), budgets_.end(), static_cast<int32_t>(tokens_));
  } else {
    adakv::ScoreArgs score;
    float* window = queries + (tokens_ - policy_.window) * heads * head_dim;
    score.queries = per_head(window, policy_.window, heads, head_dim);
    score.keys = per_head(keys, tokens_, kv_heads, head_dim);
    score.scores = scores;
    run(&adakv::score, score);

    adakv::AllocateArgs allocate;
    allocate.scores = scores;
    allocate.budget = policy_.budget;
    allocate.window = policy_.window;
    allocate.budgets = ints(budgets_, {1, kv_heads});
    run(&adakv::allocate, allocate);
  }

  adakv::SelectArgs select;
  if (policy_.is_critical && !fits) {
    adakv::ValueNormArgs value_norm;
    value_norm.values = per_head(values, tokens_, kv_heads, head_dim);
    value_norm.w_o =
        TensorView(const_cast<float*>(w_o), {width, heads * head_dim}, DType::kFloat32);
    value_norm.norms = norms;
    run(&adakv::value_norm, value_norm);
    select.norms = norms;
  }
  select.scores = scores;
  select.budgets = ints(budgets_, {1, kv_heads});
  select.window = fits ? 0 : policy_.window;
  select.positions = ints(positions_, {num_kept()});
  select.indptr = ints(indptr_, {kv_heads + 1});
  run(&adakv::select, select);
}

void Kv::take_prompt(
    int32_t layer, float* queries, float* keys, float* values, const float* w_o, int64_t width) {
  choose(queries, keys, values, w_o, width);
  adakv::PageList pages = cache_.begin(layer, 0, {num_kept()}, {tokens_});
  adakv::CompactArgs compact;
  compact.keys = per_head(keys, tokens_, sizes_.kv_heads, sizes_.head_dim);
  compact.values = per_head(values, tokens_, sizes_.kv_heads, sizes_.head_dim);
  compact.positions = ints(positions_, {num_kept()});
  compact.indptr = ints(indptr_, {sizes_.kv_heads + 1});
  compact.page_ids = ints(pages.ids, {static_cast<int64_t>(pages.ids.size())});
  compact.page_indptr = ints(pages.indptr, {2});
  compact.layer = cache_.layer(layer);
  run(&adakv::compact, compact);
}

void Kv::begin_step() {
  cache_.grow({1}, 1);
  adakv::PlanArgs plan;
  plan.lengths = cache_.all_layers().lengths;
  plan.block_table = cache_.all_layers().block_table;
  plan.fresh_pages = cache_.all_layers().fresh_pages;
  plan.page_size = kPageSize;
  plan.num_workers = num_workers_;
  plan.schedule =
      ints(schedules_, {sizes_.layers, static_cast<int64_t>(schedules_.size()) / sizes_.layers});
  adakv::plan(plan);
}

void Kv::attend(int32_t layer, float* queries, float* keys, float* values, float* out) {
  const int64_t size = static_cast<int64_t>(schedules_.size()) / sizes_.layers;
  adakv::AttendArgs attend;
  attend.queries = per_head(queries, 1, sizes_.heads, sizes_.head_dim);
  attend.keys = per_head(keys, 1, sizes_.kv_heads, sizes_.head_dim);
  attend.values = per_head(values, 1, sizes_.kv_heads, sizes_.head_dim);
  attend.out = per_head(out, 1, sizes_.heads, sizes_.head_dim);
  attend.layer = cache_.layer(layer);
  attend.schedule = TensorView(schedules_.data() + layer * size, {size}, DType::kInt32);
  attend.num_workers = num_workers_;
  run(&adakv::attend, attend);
}

std::vector<std::vector<int32_t>> Kv::positions(int32_t layer) const {
  const adakv::LayerView view = cache_.layer(layer);
  std::vector<std::vector<int32_t>> result(sizes_.kv_heads);
  for (int32_t h = 0; h < sizes_.kv_heads; ++h) {
    const int32_t* row = view.block_table.ptr<int32_t>() + h * view.block_table.stride[1];
    for (int32_t i = 0; i < view.lengths.ptr<int32_t>()[h]; ++i) {
      const int64_t slot = int64_t{row[i / kPageSize]} * kPageSize + i % kPageSize;
      result[h].push_back(view.page_positions.ptr<int32_t>()[slot]);
    }
  }
  return result;
}

}  // namespace embed
