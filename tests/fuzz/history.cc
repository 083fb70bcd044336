// Random histories of a cache: prompts are compacted, tokens appended and attended to, sequences
// removed and their pages used again, what is held shrinks in place, and now and then more is asked
// for than there is.
//
// Beside the cache goes a model of it, a list of (position, number) for every row; each entry's
// key and value are made of its number. After each step all invariants are checked:
//   * every page has one owner; free and owned pages add up to the pool; what a sequence owns is
//     what pages_for says
//   * lengths, seen and the rows' entries, read through the block table, are the model's
//   * a row's pages belong to its sequence, and the block table holds -1 behind them
//   * what fails with an error changes nothing
//   * forks of the cache, which share pages with it, hold their own entries and no other's
// Pages are plain, of float32, or int8, int4 or int2, of bfloat16: then what is held may be half a step
// away.
// Values are as wide as keys or, but for int4 and int2, not.
#include <adakv/adakv.h>
#include <adakv/c.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "c_calls.h"
#include "entries.h"
#include "input.h"

namespace adakv::fuzz {
namespace {

class History {
 public:
  explicit History(Input& input) : input_(input), config_(config_from(input)) {
    branches_.push_back({std::make_unique<KVCache>(config_, device_memory({})),
                         std::vector<SequenceModel>(config_.num_sequences)});
  }

  void run_all() {
    for (int step = 0; step < 60 && !input_.is_over(); ++step) {
      now_ = input_.range(0, static_cast<int>(branches_.size()) - 1);
      config_ = cache().config();
      switch (input_.range(0, 10)) {
        case 10:
          shrink();
          break;
        case 8:
          fork();
          break;
        case 9:
          drop();
          break;
        case 0:
        case 1:
          begin();
          break;
        case 2:
          remove();
          break;
        case 3:
          fail();
          break;
        default:
          decode();
      }
      for (now_ = 0; now_ < branches_.size(); ++now_) check();
    }
    branches_.resize(1);
    now_ = 0;
    config_ = cache().config();
    check();
    for (int32_t b = 0; b < config_.num_sequences; ++b) cache().remove(b);
    ADAKV_FUZZ_ASSERT(cache().pool().num_used() == 0);
  }

 private:
  /// A cache of the pool, and what it ought to hold.
  struct Branch {
    std::unique_ptr<KVCache> cache;
    std::vector<SequenceModel> model;  // [B]
  };

  KVCache& cache() { return *branches_[now_].cache; }
  const KVCache& cache() const { return *branches_[now_].cache; }
  std::vector<SequenceModel>& model() { return branches_[now_].model; }
  const std::vector<SequenceModel>& model() const { return branches_[now_].model; }

  /// Another cache, or another sequence, that goes on from some sequences of this one.
  void fork() {
    const bool is_within = input_.one_in(3);
    if (branches_.size() == 4 && !is_within) return;
    const int count = is_within ? 1 : input_.range(1, 3);
    const int slot = is_within ? input_.range(0, config_.num_sequences - 1) : 0;
    const bool whole = input_.one_in(4);
    std::vector<int32_t> sources, back;
    std::vector<SequenceModel> texts;
    for (int i = 0; i < count; ++i) {
      sources.push_back(input_.range(0, config_.num_sequences - 1));
      SequenceModel text = model()[sources[i]];
      int64_t shortest = text.is_begun ? text.seen : 0;
      for (const auto& row : text.rows) shortest = std::min<int64_t>(shortest, row.size());
      const bool goes_back = !facts_of(config_.format).has_tails && input_.one_in(3);
      const auto taken = goes_back ? input_.range(0, static_cast<int>(shortest)) : 0;
      back.push_back(taken);
      text.fork(taken, whole, page_size(), num_heads());
      texts.push_back(text);
    }
    const int32_t free_before = cache().pool().num_free();
    Fork made;
    try {
      made = is_within ? cache().fork_into(slot, sources, back, whole)
                       : cache().fork(sources, back, whole);
    } catch (const InvalidArgument&) {
      ADAKV_FUZZ_ASSERT(is_within && model()[slot].is_begun);
      ADAKV_FUZZ_ASSERT(cache().pool().num_free() == free_before);
      return;
    } catch (const Error&) {
      ADAKV_FUZZ_ASSERT(cache().pool().num_free() == free_before);
      ADAKV_FUZZ_ASSERT(cache().pages_to_fork(sources, whole) > free_before);
      return;
    }
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      const LayerView from = cache().layer(layer);
      ForkArgs args;
      args.source_table = from.block_table;
      args.source_lengths = from.lengths;
      args.source_seen = from.seen;
      args.source_tails = from.tails;
      args.sources = ints(sources);
      args.stretch = ints(made.stretch);
      if (!from.tails) args.back = ints(back);
      args.page_ids = ints(made.pages[layer].ids);
      args.page_indptr = ints(made.pages[layer].indptr);
      args.whole = whole;
      args.layer = is_within ? rows_of(from, slot) : made.cache->layer(layer);
      adakv::fork(args);
    }
    if (is_within) {
      model()[sources[0]].is_forked = texts[0].is_forked;  // which of them checks see first varies
      model()[slot] = texts[0];
      return;
    }
    branches_.push_back({std::move(made.cache), std::move(texts)});
  }

  /// A cache and its pages go, whichever was there first.
  void drop() {
    if (branches_.size() > 1) branches_.erase(branches_.begin() + static_cast<int64_t>(now_));
    now_ = 0;
  }

  int64_t page_size() const { return config_.page_size; }
  int num_heads() const { return config_.num_kv_heads; }
  int key_dim() const { return config_.head_dim; }
  int value_dim() const { return config_.value_dim; }

  /// Keeps some entries of a prompt for one sequence, in all layers.
  void begin() {
    const int b = input_.range(0, config_.num_sequences - 1), length = input_.range(0, 150);
    SequenceModel fresh;
    fresh.is_begun = true;
    fresh.seen = length;
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      std::vector<int32_t> indptr = {0}, positions;
      int64_t longest = 0;
      for (int h = 0; h < num_heads(); ++h) {
        const int stride = input_.range(1, 9), first = input_.range(0, 20);
        fresh.rows.emplace_back();
        for (int t = first; t < length; t += stride) {
          positions.push_back(t);
          fresh.rows.back().push_back({t, next_number_++});
        }
        indptr.push_back(static_cast<int32_t>(positions.size()));
        longest = std::max<int64_t>(longest, fresh.rows.back().size());
      }
      // The host may know only a bound.
      const int64_t kept = indptr.back() + input_.range(0, 10);
      fresh.num_pages.push_back(
          KVCache::pages_for(kept, 0, config_.num_kv_heads, config_.page_size));
      PageList pages;
      const int32_t free_before = cache().pool().num_free();
      try {
        pages = cache().begin(layer, b, {kept}, {longest + input_.range(0, 5)});
      } catch (const Error&) {
        ADAKV_FUZZ_ASSERT(cache().pool().num_free() == free_before);
        cache().remove(b);  // what earlier layers took
        model()[b] = {};
        return;
      } catch (const InvalidArgument&) {
        ADAKV_FUZZ_ASSERT(model()[b].is_begun && layer == 0);
        ADAKV_FUZZ_ASSERT(cache().pool().num_free() == free_before);
        return;
      }
      fill(layer, b, fresh, length, indptr, positions, pages);
    }
    model()[b] = fresh;
  }

  void fill(int32_t layer,
            int b,
            const SequenceModel& fresh,
            int length,
            std::vector<int32_t>& indptr,
            std::vector<int32_t>& positions,
            PageList& pages) {
    Numbers keys(num_heads() * length * key_dim(), config_.dtype);
    Numbers values(num_heads() * length * value_dim(), config_.dtype);
    for (int h = 0; h < num_heads(); ++h) {
      for (const Entry& entry : fresh.rows[layer * num_heads() + h]) {
        put(config_, keys, values, h * length + entry.position, entry.number);
      }
    }
    CompactArgs args;
    args.keys = keys.view({1, num_heads(), length, key_dim()});
    args.values = values.view({1, num_heads(), length, value_dim()});
    args.positions = ints(positions);
    args.indptr = ints(indptr);
    args.page_ids = ints(pages.ids);
    args.page_indptr = ints(pages.indptr);
    args.layer = rows_of(cache().layer(layer), b);
    compact(args);
  }

  /// A sequence keeps some of what it holds, in place.
  void shrink() {
    const int b = input_.range(0, config_.num_sequences - 1);
    if (!model()[b].is_begun || facts_of(config_.format).has_tails) return;
    SequenceModel text = model()[b];
    Chosen chosen = choose_again(input_, text, config_);
    const int32_t free_before = cache().pool().num_free();
    std::vector<PageList> pages;
    try {
      pages = cache().begin_again(b, chosen.kept, {chosen.longest});
    } catch (const InvalidArgument&) {
      ADAKV_FUZZ_ASSERT(cache().is_shared(b) && cache().pool().num_free() == free_before);
      return;
    } catch (const Error&) {
      ADAKV_FUZZ_ASSERT(cache().pool().num_free() == free_before);
      return;
    }
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      CompactArgs args;
      args.positions = ints(chosen.slots[layer]);
      args.indptr = ints(chosen.indptr[layer]);
      args.page_ids = ints(pages[layer].ids);
      args.page_indptr = ints(pages[layer].indptr);
      args.layer = rows_of(cache().layer(layer), b);
      run(&compact, args);
    }
    model()[b] = text;
  }

  /// Appends some columns of tokens to all sequences that there are, and attends to them.
  void decode() {
    const int columns = input_.one_in(3) ? input_.range(1, 70) : 1;
    std::vector<int32_t> num_new(config_.num_sequences);
    for (size_t b = 0; b < model().size(); ++b) {
      if (model()[b].is_begun) num_new[b] = input_.one_in(4) ? input_.range(0, columns) : columns;
    }
    for (int left = columns; left > 0;) {
      const int32_t free_before = cache().pool().num_free();
      const int64_t needed = cache().pages_to_grow(num_new);
      int now;
      try {
        now = cache().grow(num_new, left);
      } catch (const Error&) {
        // All the columns fit, or none.
        ADAKV_FUZZ_ASSERT(left == columns && cache().pool().num_free() == free_before);
        return;
      }
      ADAKV_FUZZ_ASSERT(needed <= free_before && now >= 1 && now <= left);
      std::vector<int32_t> counts(num_new.size());
      for (size_t b = 0; b < num_new.size(); ++b) {
        counts[b] = std::max(0, now - (left - num_new[b]));
        num_new[b] -= counts[b];
      }
      append_columns(now, counts);
      left -= now;
    }
  }

  void append_columns(int columns, std::vector<int32_t>& counts) {
    const int64_t batch = config_.num_sequences, heads = num_heads();
    const int workers = input_.range(1, 5);
    std::vector<int32_t> schedule(config_.num_layers * schedule_size(batch * heads, workers));
    PlanArgs plan_args;
    plan_args.lengths = cache().all_layers().lengths;
    plan_args.block_table = cache().all_layers().block_table;
    plan_args.fresh_pages = cache().all_layers().fresh_pages;
    plan_args.num_new = ints(counts);
    plan_args.new_tokens = columns;
    plan_args.page_size = config_.page_size;
    plan_args.num_workers = workers;
    plan_args.schedule =
        TensorView(schedule.data(), {config_.num_layers, schedule_size(batch * heads, workers)},
                   DType::kInt32);
    plan(plan_args);
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      Numbers keys(batch * heads * columns * key_dim(), config_.dtype), queries = keys;
      Numbers values(batch * heads * columns * value_dim(), config_.dtype), out = values;
      for (int64_t row = 0; row < batch * heads; ++row) {
        SequenceModel& sequence = model()[row / heads];
        for (int i = 0; i < counts[row / heads]; ++i) {
          put(config_, keys, values, (row + 1) * columns - counts[row / heads] + i, next_number_);
          sequence.rows[layer * heads + row % heads].push_back({sequence.seen + i, next_number_++});
        }
      }
      AttendArgs args;
      const auto entries = [&](Numbers& data, int dim) {
        return data.view({batch, heads, columns, dim});
      };
      args.queries = entries(queries, key_dim());  // zeros: every entry weighs the same
      args.layer = cache().layer(layer);
      args.schedule = plan_args.schedule.select(layer);
      args.keys = entries(keys, key_dim());
      args.values = entries(values, value_dim());
      args.num_new = ints(counts);
      args.num_workers = workers;
      args.out = entries(out, value_dim());
      run(&attend, args);
      check_means(layer, columns, counts, out);
    }
    for (size_t b = 0; b < model().size(); ++b) {
      model()[b].append(counts[b], page_size(), num_heads());
    }
  }

  /// With queries of 0 a token gets the mean of the values that it sees.
  void check_means(int32_t layer,
                   int columns,
                   const std::vector<int32_t>& counts,
                   const Numbers& out) const {
    const double step = 1. / 15;  // of a value, whose elements span 7 / 8; and 3 roundings
    const auto allowed = [&](double mean) {
      return config_.dtype == DType::kFloat32 ? 1e-3 : step / 2 + 3 * mean / 256;
    };
    for (int64_t row = 0; row < static_cast<int64_t>(model().size()) * num_heads(); ++row) {
      const int64_t b = row / num_heads();
      double sum = 0;
      for (int s = 0; s < columns; ++s) {
        const int64_t at = (row * columns + s) * value_dim(), last = value_dim() - 1;
        const float mean = out.get(at), mean_of_last = out.get(at + last);
        if (s < columns - counts[b]) {
          ADAKV_FUZZ_ASSERT(mean == 0 && mean_of_last == 0);
          continue;
        }
        const auto& entries = model()[b].rows[layer * num_heads() + row % num_heads()];
        const size_t visible = entries.size() - columns + s + 1;
        if (s == columns - counts[b]) {
          for (size_t i = 0; i + 1 < visible; ++i) sum += element(entries[i].number, 0) + 1;
        }
        sum += element(entries[visible - 1].number, 0) + 1;
        const double expected = sum / visible, of_last = expected + last / 8.;
        ADAKV_FUZZ_ASSERT(std::abs(mean - expected) < allowed(expected));
        ADAKV_FUZZ_ASSERT(std::abs(mean_of_last - of_last) < allowed(of_last));
      }
    }
  }

  void remove() {
    const int b = input_.range(0, config_.num_sequences - 1);
    cache().remove(b);
    model()[b] = {};
  }

  template <typename Call>
  void expect_failure(const Call& call) {
    const int32_t free_before = cache().pool().num_free();
    bool has_failed = false;
    try {
      call();
    } catch (const Error&) {
      has_failed = true;
    } catch (const InvalidArgument&) {
      has_failed = true;
    }
    ADAKV_FUZZ_ASSERT(has_failed && cache().pool().num_free() == free_before);
  }

  /// Asks for what can't be had.
  void fail() {
    const auto wild = static_cast<int32_t>(input_.word());
    const int64_t huge = static_cast<int64_t>(input_.word()) << input_.range(0, 31);
    const int32_t count = config_.num_sequences;
    switch (input_.range(0, 9)) {
      case 0:
        expect_failure([&] { cache().begin(wild < 0 ? wild : config_.num_layers, 0, {1}, {1}); });
        break;
      case 1:
        expect_failure([&] { cache().begin(0, wild < 0 ? wild : count, {1}, {1}); });
        break;
      case 2:
        expect_failure([&] { cache().begin(0, 0, {huge | int64_t{1} << 40}, {1}); });
        break;
      case 3:
        expect_failure([&] { cache().begin(0, 0, {1}, {huge | int64_t{1} << 40}); });
        break;
      case 4:
        expect_failure([&] { cache().grow(std::vector<int32_t>(count + 1), 1); });
        break;
      case 5:
        expect_failure([&] { cache().grow(std::vector<int32_t>(count, 1 << 30), wild | 1 << 30); });
        break;
      case 6:
        expect_failure([&] { cache().remove(wild < 0 ? wild : count); });
        break;
      case 7:
        count_anything(input_);
        break;
      case 8:
        begin_in_c(input_);
        break;
      default:
        expect_failure([&] { cache().grow(std::vector<int32_t>(count, -1), 1); });
    }
  }

  void check() const {
    std::set<int32_t> used;
    int64_t num_owned = 0;
    for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
      const LayerView view = cache().layer(layer);
      for (int32_t b = 0; b < cache().config().num_sequences; ++b) {
        const SequenceModel& sequence = model()[b];
        const int64_t expected = sequence.is_begun ? sequence.num_pages[layer] : 0;
        ADAKV_FUZZ_ASSERT(cache().num_pages(layer, b) == expected);
        ADAKV_FUZZ_ASSERT(view.seen.ptr<int32_t>()[b] == sequence.seen);
        num_owned += expected;
        for (int h = 0; h < num_heads(); ++h) check_row(view, layer, b, h, used);
      }
    }
    int64_t num_begun = 0;
    bool is_alone = branches_.size() == 1;
    for (const Branch& branch : branches_) {
      for (const SequenceModel& sequence : branch.model) {
        num_begun += sequence.is_begun;
        is_alone = is_alone && !sequence.is_forked;
      }
    }
    const int64_t num_used = cache().pool().num_used();
    ADAKV_FUZZ_ASSERT(!is_alone || num_used == num_owned);
    ADAKV_FUZZ_ASSERT(cache().bytes_used() ==
                      num_used * cache().page_bytes() + num_begun * cache().tail_bytes());
    ADAKV_FUZZ_ASSERT(cache().pool().num_free() == config_.num_pages - num_used);
    ADAKV_FUZZ_ASSERT(static_cast<int64_t>(used.size()) <= num_used);
  }

  void check_row(
      const LayerView& view, int32_t layer, int32_t b, int h, std::set<int32_t>& used) const {
    static const std::vector<Entry> kNone;
    const std::vector<Entry>& entries =
        model()[b].is_begun ? model()[b].rows[layer * num_heads() + h] : kNone;
    const int64_t row = b * num_heads() + h, length = entries.size();
    ADAKV_FUZZ_ASSERT(view.lengths.ptr<int32_t>()[row] == length);
    const int32_t* table = view.block_table.ptr<int32_t>() + row * view.block_table.stride[1];
    const int64_t num_pages = (length + page_size() - 1) / page_size();
    ADAKV_FUZZ_ASSERT(num_pages <= view.block_table.shape[2]);
    for (int64_t i = 0; i < view.block_table.shape[2]; ++i) {
      if (i >= num_pages) {
        ADAKV_FUZZ_ASSERT(table[i] == -1);
      } else {
        ADAKV_FUZZ_ASSERT(table[i] >= 0 && table[i] < config_.num_pages);
        // A page that a row may still write to is its own.
        const bool is_new = used.insert(table[i]).second;
        ADAKV_FUZZ_ASSERT(is_new || (model()[b].is_forked && (i + 1) * page_size() <= length));
      }
    }
    for (int64_t slot = 0; slot < length; ++slot) {
      const int64_t page = table[slot / page_size()], in_page = slot % page_size();
      const TensorView& positions = view.page_positions;
      ADAKV_FUZZ_ASSERT(positions.ptr<int32_t>()[page * positions.stride[0] + in_page] ==
                        entries[slot].position);
      for (int half = 0; half < 2; ++half) {
        for (int d = 0; d < (half == 0 ? key_dim() : value_dim()); ++d) {
          const float x = element(entries[slot].number, d) + static_cast<float>(half);
          const Held got = held(view, row, length, page, slot, half, d);
          ADAKV_FUZZ_ASSERT(std::abs(got.x - rounded(x, config_.dtype)) <= got.error);
        }
      }
    }
  }

  Input& input_;
  CacheConfig config_;
  std::vector<Branch> branches_;  // that share one pool
  size_t now_ = 0;                // the one at hand
  int next_number_ = 1;
};

}  // namespace
}  // namespace adakv::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  adakv::fuzz::Input input(data, size);
  adakv::fuzz::History(input).run_all();
  return 0;
}
